"""Extremal perturbation: the region of given area with the largest logit (Fong et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masking import normalize
from ..network import Classifier
from ..registry import check_name, whole_number
from .registry import METHODS, Callback, Step
from .search import SELECTORS, check_numbers, search, select


@METHODS.register(
    "extremal-perturbation",
    title="Extremal perturbation",
    source="Fong et al. 2019",
    uses_layer=False,
)
def extremal_perturbation(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    areas: float | Sequence[float] = 0.1,
    iterations: int = 800,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    step: int = 7,
    sigma: float = 21.0,
    levels: int = 8,
    blur: float = 20.0,
    weight: float = 300.0,
    growth: float = 1.0035,
    jitter: bool = True,
    selector: str = "logit",
    precision: str = "auto",
    callback: Callback | None = None,
) -> Tensor:
    """Find the smooth mask of a given area that maximises the logit when all else is blurred.

        m_a = argmax_m Φ(m ⊗ x) − λ R_a(m)
        (m ⊗ x)(u) = x blurred at u by a Gaussian of deviation σ_max (1 − m(u))
        m(u) = smax_v k(‖u − v‖/σ) m̄(v),   smax f = Σ f e^(f/T) / Σ e^(f/T),   T = 1/20
        R_a(m) = mean (vecsort(m) − r_a)²,   r_a = (0, …, 0, 1, …, 1) with a share a of ones

    by gradient ascent on m̄, which has one value for each cell of `step` pixels, starts as ones
    and is clamped to [0, 1]. The masks of all images and areas are optimised in one batch,
    independently. The defaults are those of the authors' TorchRay; unlike there, an area is a share
    of the image, not of the image and a margin of σ around it (0.1 there is up to 0.14 of a
    photograph), and the blur averages pixels of the image only instead of padding it with zeros.

    Args:
        classifier: Any; its layer is not used.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.
        areas: a, or several of them; the map of an image is the mean of its masks.
        iterations: Steps of gradient ascent.
        learning_rate, momentum: Of these steps.
        step: Side of a cell in pixels.
        sigma: σ, the radius of the disc of one cell in the mask, in pixels.
        levels: Number of blurred copies of the image, between which it is interpolated.
        blur: σ_max, in pixels.
        weight, growth: λ in iteration t = 0, 1, … is weight · growthᵗ.
        jitter: Mirror the image in every other iteration.
        selector: Φ, `"logit"` y_c (default), `"margin"` (TorchRay's contrastive reward),
            `"probability"` or `"log-probability"`.
        precision: Of the network's passes: `"auto"` (bfloat16 where the processor has it), else
            `"float32"` or `"bfloat16"`. Masks and blurred images are always float32.
        callback: Called after each iteration with Φ, the mean over the areas; an exception that it
            raises ends the run.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If an option is not one of the values above.
    """
    areas = _areas(areas)
    iterations = whole_number("iterations", iterations, 0)
    step, levels = whole_number("step", step, 1), whole_number("levels", levels, 2)
    positive = {"learning_rate": learning_rate, "sigma": sigma, "blur": blur, "growth": growth}
    check_numbers("a positive number", lambda v: 0 < v < math.inf, **positive)
    check_numbers("a number from 0 to below 1", lambda v: 0 <= v < 1, momentum=momentum)
    check_numbers("a number ≥ 0", lambda v: 0 <= v < math.inf, weight=weight)
    check_name("selector", selector, SELECTORS)
    n, size = len(images), images.shape[2:]
    generator = MaskGenerator(size, step, sigma, images.device)
    # Row i of m̄ is the mask of image i // A and area i % A.
    image = torch.arange(n, device=images.device).repeat_interleave(len(areas))
    m_bar = images.new_ones(len(image), 1, *generator.cells)

    def of_images(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (n, -1)).mean(1)

    quick = classifier.quick(precision)
    if iterations:
        y = pyramid(images, levels, blur)  # (N, L, 3, H, W)
        strength = images.new_tensor(weight)  # λ
        jitters = torch.tensor(jitter, device=images.device)
        mirrored = jitters.clone()  # in every other iteration

        def evaluate(m_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = generator(m_bar)
            z = perturb(y, image, m)
            z = torch.where(mirrored, z.flip(3), z)
            phi = select(classifier, quick.logits(z), targets[image], selector)
            return m, phi, phi - strength * area_loss(m, areas * n)

        sgd = torch.optim.SGD([m_bar], learning_rate, momentum, momentum, maximize=True)

        def update(g: Tensor) -> None:
            m_bar.grad = g
            sgd.step()
            m_bar.clamp_(0, 1)
            strength.mul_(growth)
            mirrored.logical_xor_(jitters)

        def tell(told: Step) -> None:
            phi, m = told.objective, told.saliency
            if callback is not None and phi is not None and m is not None:
                callback(replace(told, objective=of_images(phi), saliency=of_images(m)))

        search(
            m_bar, evaluate, update,
            start=generator(m_bar), steps=iterations, to_masks=normalize, callback=tell,
        )  # fmt: skip
    return normalize(of_images(generator(m_bar)))


def pyramid(images: Tensor, levels: int, blur: float) -> Tensor:
    """Blur images `(N, 3, H, W)` by σ = blur, …, 0 in equal steps: `(N, levels, 3, H, W)`.

    (1/Z) Σ_v g_σ(u − v) x(v), where Z is the sum of g_σ over the image: no padding, so at the
    border fewer pixels are averaged.
    """
    copies = []
    for sigma in torch.linspace(blur, 0, levels).tolist()[:-1]:
        rows, columns = (_gaussian(side, sigma).to(images) for side in images.shape[2:])
        copies.append(rows @ images @ columns.T)
    return torch.stack([*copies, images], dim=1)


def _gaussian(side: int, sigma: float) -> Tensor:
    """The matrix `(side, side)` of a one-dimensional Gaussian blur; its rows sum to 1."""
    u = torch.arange(side, dtype=torch.float64)
    return (-((u[:, None] - u) ** 2) / (2 * sigma**2)).softmax(1)


def perturb(y: Tensor, image: Tensor, m: Tensor) -> Tensor:
    """Interpolate y at the levels given by masks m, pixel by pixel: m ⊗ x.

    Args:
        y: Pyramids `(N, L, 3, H, W)`.
        image: `(M,)`, index of the pyramid for each mask.
        m: `(M, 1, H, W)` in [0, 1].
    """
    levels = y.shape[1]
    level = m * (levels - 1)
    below = level.detach().floor().clamp(max=levels - 2)
    index = (below.long() + levels * image.view(-1, 1, 1, 1)).expand(-1, 3, -1, -1)
    y_0, y_1 = (y.flatten(0, 1).gather(0, i) for i in (index, index + 1))  # (M, 3, H, W)
    return torch.addcmul(y_0, level - below, y_1 - y_0)


def area_loss(m: Tensor, a: Sequence[float]) -> Tensor:
    """R_a(m) of masks `(M, 1, H, W)` and M areas: the mean of (vecsort(m) − r_a)², `(M,)`.

    The template is 1 for the share a of the largest values, so a threshold replaces sorting: it is
    1 for pixels above the threshold, 0 for those below it, and a fraction for those equal to it,
    whose order would depend on rounding.
    """
    m = m.flatten(1)
    ones = [round(share * m.shape[1]) for share in a]
    # Masks of the same area together: a GPU takes as long for one as for all.
    together = [m] if len(set(ones)) == 1 else m.split(1)
    with torch.no_grad():
        r = torch.cat([_template(some, k) for some, k in zip(together, ones, strict=False)])
    return ((1 - 2 * m) * r + m**2).mean(1)


def _template(m: Tensor, ones: int) -> Tensor:
    """The template r at each pixel of masks `(M, pixels)`; its sum is `ones`."""
    bound = m.kthvalue(max(m.shape[1] - ones, 1), dim=1, keepdim=True).values
    above, equal = m > bound + 1e-5, (m - bound).abs() <= 1e-5
    return above + (ones - above.sum(1, keepdim=True)) / equal.sum(1, keepdim=True) * equal


class MaskGenerator:
    """Smooth maximum of discs: m̄ `(M, 1, h, w)` in [0, 1] → masks `(M, 1, H, W)` in [0, 1].

    m(u) = smax_v k(‖u − v‖/σ) m̄(v),   k(z) = exp(−2 max(0, z − ½)²)

    with v the centres of the cells in a circle around the cell of u, one cell wider than σ.
    """

    def __init__(
        self, size: Sequence[int], step: int, sigma: float, device: torch.device | str = "cpu"
    ) -> None:
        self.size, self.step = tuple(size), step
        self.cells = tuple(-(-side // step) for side in size)
        self.reach = 1 + math.ceil(sigma / step)  # in cells
        u = torch.arange(step) - (step - 1) / 2  # pixels of a cell, from its centre
        v = torch.arange(-self.reach, self.reach + 1)  # cells around it
        d = (u - step * v[:, None]) ** 2  # (window, step)
        z = (d[:, None, :, None] + d[None, :, None, :]).sqrt() / sigma
        k = torch.exp(-2 * (z - 0.5).clamp(min=0) ** 2)  # (window, window, step, step)
        near = v[:, None] ** 2 + v**2 <= self.reach**2
        self.near = near.flatten().nonzero()[:, 0].to(device)
        self.k = k[near].flatten(1).to(device)  # (V, step·step)

    def __call__(self, m_bar: Tensor) -> Tensor:
        """Return the masks; differentiable."""
        window = 2 * self.reach + 1
        around = F.unfold(m_bar, window, padding=self.reach)[:, self.near]  # (M, V, h·w)
        m = _SmoothMax.apply(around, self.k)  # (M, step·step, h·w)
        m = F.pixel_shuffle(m.unflatten(2, self.cells), self.step)
        return m[:, :, : self.size[0], : self.size[1]]


class _SmoothMax(torch.autograd.Function):
    """smax over v of k(v, u) m̄(v), one v after the other.

    All v at once would take several hundred times the memory of the masks.
    """

    @staticmethod
    def forward(ctx: Any, around: Tensor, k: Tensor) -> Tensor:
        f_v = around.permute(1, 0, 2)[..., None].contiguous()  # (V, M, cells, 1)
        k = 20 * k  # divide f by T once
        total = around.new_zeros(*f_v.shape[1:3], k.shape[1])  # (M, cells, pixels)
        weighted, f, e = torch.zeros_like(total), torch.empty_like(total), torch.empty_like(total)
        for m_v, k_v in zip(f_v, k, strict=True):
            torch.mul(m_v, k_v, out=f)
            torch.exp(f, out=e)
            total += e
            weighted.addcmul_(f, e)
        s = weighted / total
        ctx.save_for_backward(f_v, k, s, total)
        return s.mT / 20

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # ∂ smax / ∂f = e^(f/T) (1 + (f − smax)/T) / Σ e^(f/T)
        f_v, k, s, total = ctx.saved_tensors
        g = gradients[0].mT / total
        rest = g * (1 - s)
        out, f, e = torch.empty_like(f_v), torch.empty_like(g), torch.empty_like(g)
        for m_v, k_v, out_v in zip(f_v, k, out, strict=True):
            torch.mul(m_v, k_v, out=f)
            torch.exp(f, out=e)
            torch.addcmul(rest, f, g, out=f).mul_(e)
            torch.matmul(f, k_v / 20, out=out_v[..., 0])
        return out[..., 0].permute(1, 0, 2), None


def _areas(areas: float | Sequence[float]) -> list[float]:
    areas = [areas] if isinstance(areas, int | float) else list(areas)
    if not areas or not all(0 < area < 1 for area in areas):
        raise ValueError(f"areas is {areas}; one or more numbers between 0 and 1 are needed")
    return areas
