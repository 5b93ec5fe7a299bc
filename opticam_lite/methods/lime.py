"""LIME: a linear model of superpixels around the image (Ribeiro et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..masking import normalize
from ..network import Classifier
from ..registry import whole_number
from .registry import METHODS, Callback, Step


@METHODS.register("lime", title="LIME", source="Ribeiro et al. 2016", uses_layer=False)
def lime(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    samples: int = 1000,
    seed: int = 0,
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Weigh each superpixel by its coefficient in a linear model of the class's probability.

        z ∈ {0, 1}^S at random,   x_z = x, but its mean colour in superpixels s with z_s = 0
        w, b = argmin Σ_z π(z) (p_c(x_z) − w·z − b)² + ‖w‖²,   π(z) = exp(−d² / 2κ²)
        map = relu(w_s) in superpixel s,   d = 1 − cos(z, 1),   κ = 0.25

    Superpixels, random z and regression are those of the authors' package, `lime`, with its
    defaults; the probabilities are those of the network's quick copy in float32
    (`Classifier.quick`). The random numbers are the same for every image, so a mask does not depend
    on other images.

    Args:
        classifier: Any; its layer is not used.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        samples: Number of z, the first of them all ones (the package: 1000).
        seed: Of z and of the ties of quickshift.
        chunk: Batch size of the images x_z. Default: `classifier.images_at_once()`.
        callback: Called after each chunk.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1], constant in each superpixel, 1 for the largest weight; zeros
        where no superpixel raises the probability.

    Raises:
        ValueError: If samples or chunk is not positive, or the seed not from 0 to 2³¹ − 1.
    """
    samples = whole_number("samples", samples, 1)
    chunk = classifier.images_at_once(images.shape[2:]) if chunk is None else chunk
    chunk = whole_number("chunk", chunk, 1)
    seed = whole_number("seed", seed, 0, 2**31 - 1)  # quickshift takes no larger one
    passes = -(-samples // chunk)
    maps = []
    for n, (x, c) in enumerate(zip(images, targets.tolist(), strict=True)):

        def tell(index: int, done: int = n * passes) -> None:
            if callback is not None:
                callback(Step(done + index, len(images) * passes))

        explainer = _explainer(classifier, images.device, seed, chunk, tell)
        explanation = explainer.explain_instance(
            x.permute(1, 2, 0).double().cpu().numpy(),
            classifier_fn=None,
            labels=(c,),
            top_labels=None,  # else these replace the labels
            num_samples=samples,
            segmentation_fn=_quickshift(seed),
            random_seed=seed,  # else the package draws one from NumPy's global generator
        )
        w = np.array([weight for _, weight in sorted(explanation.local_exp[c])])  # (S,)
        # The probability of an image of one colour varies by rounding only.
        w[w <= 1e-6 * (abs(explanation.intercept[c]) + np.abs(w).sum())] = 0
        maps.append(torch.from_numpy(w[explanation.segments]))
    return normalize(torch.stack(maps)[:, None].to(images), "max")


def _quickshift(seed: int) -> partial[Any]:
    from skimage.segmentation import quickshift

    return partial(quickshift, kernel_size=4, max_dist=200, ratio=0.2, rng=seed)


def _explainer(
    classifier: Classifier, device: torch.device, seed: int, chunk: int, tell: Callable[[int], None]
) -> Any:
    """Return the package's explainer with the masking done on the network's device."""
    from lime.lime_image import LimeImageExplainer  # slow to import, and rarely needed

    quick = classifier.quick("float32")

    class Explainer(LimeImageExplainer):
        def data_labels(
            self,
            image: np.ndarray,
            fudged_image: np.ndarray,
            segments: np.ndarray,
            classifier_fn: object,
            num_samples: int,
            batch_size: int,
        ) -> tuple[np.ndarray, np.ndarray]:
            """Draw z and compute the probabilities of all x_z; no progress bar."""
            z = self.random_state.randint(0, 2, (num_samples, segments.max() + 1))
            z[0] = 1
            pixels = torch.tensor(np.stack([image, fudged_image]), dtype=torch.float32)
            x, mean = pixels.to(device).permute(0, 3, 1, 2)
            s = torch.from_numpy(segments).to(device)  # (H, W)
            p: list[Tensor] = []
            for z_b in torch.from_numpy(z).bool().to(device).split(chunk):
                shown = z_b[:, s][:, None]  # (chunk, 1, H, W)
                y = quick.logits(torch.where(shown, x, mean))
                p.append(classifier.to_probabilities(y))
                tell(len(p))
            return z, torch.cat(p).cpu().double().numpy()

    return Explainer(kernel_width=0.25, feature_selection="none", random_state=seed)
