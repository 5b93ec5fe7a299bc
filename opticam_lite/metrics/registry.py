"""The registry of metrics, and `Case`, their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..masking import check_tensor
from ..network import Classifier
from ..registry import Entry, Registry


@dataclass
class Case:
    """A batch of images and masks with what metrics need of them, computed once and shared.

    Attributes:
        classifier: The network.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)`, the true classes; the predicted ones where they are unknown.
        predicted: `(N,)`, the predicted classes.
        masks: `(N, 1, H, W)` in [0, 1], explanations of `targets`, or of other classes.
        p: `(N,)`, the target's probability for the image.
        o: `(N,)`, the target's probability for the image × mask.
        boxes: For each image int64 `(M, 4)`: x0, y0, x1, y1, right and bottom exclusive.
        explain: (images, targets) → masks, by the method and the options that made `masks`.
        seed: Of metrics that use random numbers.
        known: bool `(N,)`, whether `targets` holds the true class; None if it does for all.
        others: Whether masks, and `explain`, are of other classes than `targets` on purpose; then
            metrics of the predicted class take the masks as they are.
    """

    classifier: Classifier
    images: Tensor
    targets: Tensor
    predicted: Tensor
    masks: Tensor
    p: Tensor
    o: Tensor
    boxes: list[Tensor]
    explain: Callable[[Tensor, Tensor], Tensor]
    seed: int = 0
    known: Tensor | None = None
    others: bool = False
    _shared: dict[Callable[[Case], Tensor], Tensor] = field(default_factory=dict, repr=False)

    def share(self, compute: Callable[[Case], Tensor]) -> Tensor:
        """Return `compute(self)`, computed once and cached for all metrics that need it."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        return self._shared[compute]

    @cached_property
    def masks_of_predicted(self) -> Tensor:
        """Masks `(N, 1, H, W)` of the predicted classes; only those that differ are computed."""
        wrong = self.predicted != self.targets
        if self.others or not wrong.any():
            return self.masks
        masks = self.masks.clone()
        masks[wrong] = self.explain(self.images[wrong], self.predicted[wrong])
        return masks


def mean(values: Tensor, details: Tensor | None = None) -> float:
    """Return the mean of the images for which the metric is defined, NaN if there are none."""
    return float(values.nanmean())


@dataclass(frozen=True, kw_only=True)
class Metric(Entry):
    """A registered metric, as tables report it.

    Attributes:
        of_case: Takes the metric's function and a case; returns a value for each image, float64
            `(N,)`; NaN where the metric is not defined for an image, such as localisation without
            boxes.
        better: `"higher"` or `"lower"`.
        unit: `"percent"`, or another unit of the values, such as `"ratio"`.
        needs: `"boxes"` if the metric is defined for images with boxes only, else None.
        detail: Returns a row for each image of a case, float64 `(N, T)`, where `average` needs
            more than the values.
        average: Takes the values and the details (or None) of all images; returns the metric.
    """

    of_case: Callable[[Callable[..., Any], Case], Tensor]
    better: str
    unit: str = "percent"
    needs: str | None = None
    detail: Callable[[Case], Tensor] | None = None
    average: Callable[[Tensor, Any], float] = mean

    def per_image(self, case: Case) -> Tensor:
        """Return the metric of each image of a case, float64 `(N,)`."""
        return self.of_case(self.function, case)

    @property
    def arrow(self) -> str:
        """↑ where higher is better, ↓ where lower is."""
        return {"higher": "↑", "lower": "↓"}[self.better]


METRICS = Registry("metric", Metric)


def check_masks(masks: Tensor, images: Tensor | None = None) -> None:
    """Check that masks are `(N, 1, H, W)` without NaN, one for each image if given.

    Raises:
        TypeError, ValueError: If they are not; the message says what is wrong.
    """
    check_tensor("masks", masks)
    if masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(f"masks have shape {tuple(masks.shape)}; (N, 1, H, W) is needed")
    if images is not None and masks.shape != images[:, :1].shape:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}; images of shape {tuple(images.shape)} need "
            f"masks of shape {tuple(images[:, :1].shape)}"
        )
    if masks.isnan().any():
        raise ValueError("masks hold NaN, which has no place in an order; check the method")
