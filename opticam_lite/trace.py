"""A callback that records an optimisation, to be plotted afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import plots
from .methods import Step
from .network import Classifier

MAPS = 100
"""Approximate largest number of maps kept of a run; the objective is kept of every step."""


class Trace:
    """Records each step of a method that optimises; `plot` draws them.

        trace = ol.Trace(classifier, images, targets)
        masks = ol.explain("opti-cam", classifier, images, targets, callback=trace)
        trace.plot(0)

    A trace holds one run.

    Args:
        classifier: The network, which gives the probabilities of the recorded masks.
        images: `(N, 3, H, W)`, as given to `ol.explain`.
        targets: `(N,)` or one for all. Default: the predicted classes.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: Tensor,
        targets: Tensor | Sequence[int] | int | None = None,
    ) -> None:
        self.classifier = classifier
        self.images = classifier.check_images(images)
        if targets is None:
            targets = classifier.predict(images)
        self.targets = classifier.check_targets(targets, len(images))
        # For each image recorded so far: the steps of its batch, and its row in them.
        self._traced: list[tuple[list[Step], int]] = []

    def __call__(self, step: Step) -> None:
        """Record a step.

        Raises:
            ValueError: If the method has no objective, or the trace is full.
        """
        if step.objective is None or step.saliency is None:
            raise ValueError(
                "the method optimises nothing, so there is nothing to trace; opti-cam does"
            )
        if step.index == 1:
            if len(self._traced) + len(step.objective) > len(self.images):
                raise ValueError(
                    f"a trace holds one run, and this one has its {len(self.images)} images "
                    "already; make another with ol.Trace(classifier, images, targets)"
                )
            batch: list[Step] = []
            self._traced += [(batch, row) for row in range(len(step.objective))]
        steps, _ = self._traced[-1]
        steps.append(step)
        stride = -(-step.total // MAPS)
        if len(steps) > 1 and (steps[-2].index - 1) % stride:  # a map is kept until the next step
            steps[-2] = replace(steps[-2], saliency=None)

    def objective(self, image: int = 0) -> Tensor:
        """Return the objective of an image in each iteration, `(T,)`."""
        steps, row = self._steps(image)
        return torch.stack([step.objective[row] for step in steps if step.objective is not None])

    def masks(self, image: int = 0) -> dict[int, Tensor]:
        """Return iteration → mask `(1, H, W)`; of long runs only some iterations are kept."""
        steps, row = self._steps(image)
        kept = {s.index: s.masks() for s in steps if s.saliency is not None}
        return {t: masks[row] for t, masks in kept.items() if masks is not None}

    def probabilities(self, image: int = 0) -> dict[int, float]:
        """Return iteration → probability of the class in the masked image."""
        masks = self.masks(image)
        x = self.images[image].to(self.classifier.device)
        p = self.classifier.probabilities(torch.stack([x * mask for mask in masks.values()]))
        return dict(zip(masks, p[:, self.targets[image]].tolist(), strict=True))

    def plot(self, image: int = 0, at: Sequence[int] | None = None) -> plots.Picture:
        """Draw objective, probability and masks of one image.

        Args:
            image: Its index.
            at: Iterations whose masks are drawn, each replaced by the nearest one kept. Default:
                six, denser at the beginning, where masks change most.
        """
        masks, p = self.masks(image), self.probabilities(image)
        last = max(masks)
        wanted = at or [last ** (i / 5) for i in range(6)]
        shown = sorted({min(masks, key=lambda kept: abs(kept - t)) for t in wanted})
        target = self.targets[image]
        whole = self.classifier.probabilities(self.images[image][None])[0, target]
        return plots.trace(
            self.images[image],
            self.objective(image),
            p,
            {t: masks[t] for t in shown},
            whole=float(whole),
            title=f"Image {image} explained for {self.classifier.labels[int(target)]}",
        )

    def _steps(self, image: int) -> tuple[list[Step], int]:
        """Return the steps of the batch that an image was in, and its row there."""
        if not 0 <= image < len(self.images):
            raise IndexError(f"image {image} is none of the {len(self.images)} of this trace")
        if image >= len(self._traced):
            raise ValueError("nothing is traced yet: pass the trace as callback= to ol.explain")
        return self._traced[image]
