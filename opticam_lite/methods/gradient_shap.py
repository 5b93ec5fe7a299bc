"""GradientSHAP: expected gradients between baselines and the image (Lundberg & Lee 2017)."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from ..registry import seeded, whole_number
from .registry import METHODS, Callback, Step


@METHODS.register(
    "gradient-shap", title="GradientSHAP", source="Lundberg & Lee 2017", uses_layer=False
)
def gradient_shap(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    samples: int = 50,
    stdev: float = 1e-4,
    seed: int = 0,
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Average the gradient between a baseline and the image, times their difference.

        x̃ = x + ε,   ε ~ N(0, stdev²),   b ∈ {0, x} and α ∈ [0, 1] uniform
        φ = E[(x̃ − b) ⊙ ∂y_c/∂x (α x̃ + (1 − α) b)],   map = Σ over channels of |φ|

    Through captum, which draws ε, b and α; the gradients are computed here, a chunk at a time, by
    the network's quick copy in float32 (`Classifier.quick`). The random numbers are the same for
    every image, so a mask does not depend on other images. A GPU draws another ε than a CPU, whose
    effect is negligible, and the same b and α.

    Args:
        classifier: Any; its layer is not used.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        samples: Number of (ε, b, α) per image.
        stdev: Of the noise, in units of pixel values.
        seed: Of the random numbers.
        chunk: Batch size of the samples; it does not change the mask. Default:
            `classifier.images_at_once()`.
        callback: Called after each chunk.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If samples or chunk is not positive, stdev is negative or the seed is not one
            of NumPy's.
    """
    from captum.attr import GradientShap  # slow to import, and rarely needed

    samples = whole_number("samples", samples, 1)
    chunk = classifier.images_at_once(images.shape[2:]) if chunk is None else chunk
    chunk = whole_number("chunk", chunk, 1)
    if not 0 <= stdev < np.inf:
        raise ValueError(f"stdev is {stdev}; a number ≥ 0 is needed")
    seed = whole_number("seed", seed, 0, 2**32 - 1)
    quick = classifier.quick("float32")
    total = len(images) * -(-samples // chunk)
    done = 0

    def gradients(
        forward: object, inputs: tuple[Tensor], c: int, more: object = None
    ) -> tuple[Tensor]:
        """∂y_c/∂x of all samples in chunks; captum's own computes all of them at once."""
        nonlocal done
        drawing.close()  # captum has drawn everything
        g = []
        for x in inputs[0].split(chunk):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                g += torch.autograd.grad(quick.logits(x)[:, c].sum(), x)
            done += 1
            if callback is not None:
                callback(Step(done, total))
        return (torch.cat(g),)

    shap = GradientShap(quick.logits)
    shap.gradient_func = gradients
    maps = []
    # On devices whose generator state can't be restored, captum draws on the CPU.
    here = images if images.is_cuda else images.cpu()
    for x, c in zip(here.split(1), targets.tolist(), strict=True):
        with ExitStack() as drawing:
            drawing.enter_context(seeded(seed, x.device))
            baselines = torch.cat([torch.zeros_like(x), x])
            phi = shap.attribute(x, baselines, samples, float(stdev), c)  # (1, 3, H, W)
        maps.append(phi.abs().sum(1, keepdim=True))
    return to_masks(torch.cat(maps).to(images), images.shape[2:])
