"""Extremal perturbation against slow references of each of its parts and of the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_classifier, make_images
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.methods.extremal_perturbation import (
    MaskGenerator,
    area_loss,
    perturb,
    pyramid,
)
from opticam_lite.network import Quick

# ----------------------------------------------------------------- the letters of the paper, slowly


def reference_mask(m_bar: Tensor, size: tuple[int, int], step: int, sigma: float) -> Tensor:
    """m(u) = smax_v k(‖u − v‖/σ) m̄(v) for one mask, m̄ `(h, w)`; zeros lie around it."""
    reach = 1 + math.ceil(sigma / step)
    m = torch.zeros(size, dtype=m_bar.dtype)
    for y in range(size[0]):
        for x in range(size[1]):
            f = []
            for i in range(y // step - reach, y // step + reach + 1):
                for j in range(x // step - reach, x // step + reach + 1):
                    if (i - y // step) ** 2 + (j - x // step) ** 2 > reach**2:
                        continue
                    inside = 0 <= i < m_bar.shape[0] and 0 <= j < m_bar.shape[1]
                    centre = (i + 0.5) * step - 0.5, (j + 0.5) * step - 0.5
                    z = math.dist((y, x), centre) / sigma
                    k = math.exp(-2 * max(0, z - 0.5) ** 2)
                    f.append(k * m_bar[i, j] if inside else m_bar.new_zeros(()))
            f = torch.stack(f)
            m[y, x] = (f * torch.exp(20 * f)).sum() / torch.exp(20 * f).sum()
    return m


def reference_perturbation(x: Tensor, m: Tensor, levels: int, blur: float) -> Tensor:
    """m ⊗ x for one image and one mask `(H, W)`, by scipy's blur."""
    y = []
    for level in range(levels):
        sigma = blur * (1 - level / (levels - 1))
        one = gaussian_filter(np.ones(x.shape[1:]), sigma, mode="constant", truncate=12)
        filtered = [
            gaussian_filter(c, sigma, mode="constant", truncate=12) / one for c in x.numpy()
        ]
        y.append(x if sigma == 0 else torch.from_numpy(np.stack(filtered)))
    z = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            level = min(int(m[i, j] * (levels - 1)), levels - 2)
            w = m[i, j] * (levels - 1) - level
            z[:, i, j] = (1 - w) * y[level][:, i, j] + w * y[level + 1][:, i, j]
    return z


def reference_area_loss(m: Tensor, a: float) -> Tensor:
    """The mean of (vecsort(m) − r_a)²; equal values share their part of the template."""
    m = m.flatten()[m.detach().flatten().argsort()]
    r_a = (torch.arange(len(m)) >= len(m) - round(a * len(m))).double()
    losses = []
    for m_i in m:
        shared = r_a[(m.detach() - m_i.detach()).abs() < 1e-5].mean()
        losses.append(shared * (m_i - 1) ** 2 + (1 - shared) * m_i**2)
    return torch.stack(losses).mean()


def reference_extremal_perturbation(
    classifier: ol.Classifier, x: Tensor, c: int, *, area: float, iterations: int, step: int,
    sigma: float, levels: int, blur: float, learning_rate: float,
) -> Tensor:  # fmt: skip
    """The masks of one image by PyTorch's own SGD, in float64."""
    network = classifier.network.double()
    x = x.double()
    m_bar = torch.ones(
        -(-x.shape[1] // step), -(-x.shape[2] // step), dtype=torch.float64, requires_grad=True
    )
    sgd = torch.optim.SGD([m_bar], lr=learning_rate, momentum=0.9, dampening=0.9, maximize=True)
    for t in range(iterations):
        m = reference_mask(m_bar, x.shape[1:], step, sigma)
        z = reference_perturbation(x, m, levels, blur)
        z = z.flip(2) if t % 2 == 0 else z
        y = network((z[None] - 0.5) / 0.25)[0, c]
        sgd.zero_grad()
        (y - 300 * 1.0035**t * reference_area_loss(m, area)).backward()
        sgd.step()
        with torch.no_grad():
            m_bar.clamp_(0, 1)
    classifier.network.float()
    m = reference_mask(m_bar.detach(), x.shape[1:], step, sigma)
    return (m - m.min()) / (m.max() - m.min())


# ------------------------------------------------------------------------------------ the building


def random_cells(n: int, h: int, w: int) -> Tensor:
    return torch.rand(n, 1, h, w, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(("step", "sigma"), [(4, 6.0), (3, 2.5), (1, 1.5)])
def test_masks_are_painted_as_the_paper_says(step: int, sigma: float) -> None:
    size = (10, 13)
    generator = MaskGenerator(size, step, sigma)
    m_bar = random_cells(2, *generator.cells)
    generator.k = generator.k.double()
    masks = generator(m_bar)
    assert masks.shape == (2, 1, 10, 13)
    for cells, mask in zip(m_bar[:, 0], masks[:, 0], strict=True):
        torch.testing.assert_close(
            mask, reference_mask(cells, size, step, sigma), atol=1e-6, rtol=0
        )


def test_gradients_of_the_masks() -> None:
    generator = MaskGenerator((7, 8), 3, 4.0)
    generator.k = generator.k.double()
    m_bar = random_cells(2, *generator.cells).requires_grad_()
    assert torch.autograd.gradcheck(generator, m_bar)


def test_masks_stay_in_range() -> None:
    generator = MaskGenerator((30, 30), 5, 9.0)
    assert not generator(torch.zeros(1, 1, 6, 6)).any()
    ones = generator(torch.ones(1, 1, 6, 6))
    assert ones.min() > 0.5
    assert ones.max() <= 1


@pytest.mark.parametrize("a", [0.001, 0.1, 0.37, 0.99, 0.999])  # from no pixel of 99 to all
def test_the_area_loss_is_that_of_the_sorted_mask(a: float) -> None:
    m = random_cells(4, 9, 11)
    m[1] = (m[1] * 4).round() / 4  # many equal values, also on the threshold
    m[2] = 0.8
    m[3, :, :, :6] = 1
    m.requires_grad_()
    losses = area_loss(m, [a] * 4)
    expected = torch.stack([reference_area_loss(mask, a) for mask in m])
    torch.testing.assert_close(losses, expected)
    r_a = (torch.arange(99) >= 99 - round(a * 99)).double()
    torch.testing.assert_close(losses[0], ((m[0].flatten().sort().values - r_a) ** 2).mean())
    (g,) = torch.autograd.grad(losses.sum(), m, retain_graph=True)
    (slow,) = torch.autograd.grad(expected.sum(), m)
    torch.testing.assert_close(g, slow)
    assert (g[2] == g[2, 0, 0, 0]).all()  # nobody among equals is preferred


def test_the_area_loss_of_several_areas() -> None:
    m, areas = random_cells(3, 9, 11), [0.1, 0.5, 0.1]
    losses = area_loss(m, areas)
    each = [area_loss(mask[None], [a]) for mask, a in zip(m, areas, strict=True)]
    torch.testing.assert_close(losses, torch.cat(each))


def test_the_area_loss_vanishes_for_a_mask_of_that_area() -> None:
    m = torch.zeros(1, 1, 10, 10)
    m[:, :, :2, :5] = 1
    assert area_loss(m, [0.1]) == 0
    assert area_loss(m, [0.2]) == pytest.approx(0.1)


def test_blur_and_perturbation() -> None:
    images = make_images(2, 20, 28)
    y = pyramid(images, 4, 6.0)
    assert y.shape == (2, 4, 3, 20, 28)
    assert torch.equal(y[:, -1], images)
    masks = torch.rand(3, 1, 20, 28, generator=torch.Generator().manual_seed(0))
    masks[0], masks[1, :, :10] = 1, 0
    z = perturb(y, torch.tensor([1, 0, 1]), masks)
    for i, mask, z_i in zip([1, 0, 1], masks[:, 0], z, strict=True):
        expected = reference_perturbation(images[i], mask, 4, 6.0)
        torch.testing.assert_close(z_i, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(z[0], images[1])


def test_a_flat_image_stays_flat_when_it_is_blurred() -> None:
    y = pyramid(torch.full((1, 3, 16, 24), 0.3), 8, 20.0)
    torch.testing.assert_close(y, torch.full_like(y, 0.3))


# --------------------------------------------------------------------------------------- the whole

# So few cells have large gradients: the usual learning rate would empty the masks at once.
SMALL = {
    "iterations": 4, "step": 8, "sigma": 8.0, "levels": 3, "blur": 4.0, "learning_rate": 1e-3,
}  # fmt: skip
EXACT = {**SMALL, "precision": "float32"}


def test_extremal_perturbation_equals_its_slow_reference(targets: Tensor) -> None:
    classifier, images = make_classifier("dense"), make_images(3, 24, 32)
    masks = ol.explain("extremal-perturbation", classifier, images, targets, areas=0.2, **EXACT)
    assert masks.flatten(1).std(1).min() > 0.1  # else the test would show little
    for x, c, mask in zip(images, targets.tolist(), masks, strict=True):
        expected = reference_extremal_perturbation(classifier, x, c, area=0.2, **SMALL)
        torch.testing.assert_close(mask[0], expected.float(), rtol=0, atol=3e-3)


def test_it_finds_the_region_that_counts() -> None:
    """The logit is the contrast of a fine checkerboard in a square; blurring takes it away."""
    side, square = 48, (slice(8, 24), slice(20, 36))  # a ninth of the image
    checkers = 1.0 - 2 * ((torch.arange(side)[:, None] + torch.arange(side)) % 2)
    w = torch.zeros(2, 3, side, side)
    w[(1, slice(None), *square)] = checkers[square] * 0.1
    network = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Flatten(), nn.Linear(3 * side**2, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(3)[:, :, None, None])
        network[2].weight.copy_(w.flatten(1))
    classifier = ol.Classifier(network, "0", size=side)
    image = (0.5 + 0.4 * checkers).expand(1, 3, -1, -1)
    raw: list[Tensor] = []
    masks = ol.explain(
        "extremal-perturbation", classifier, image, 1, areas=1 / 9, iterations=300, step=4,
        sigma=6.0, blur=4.0, learning_rate=0.03, growth=1.01, jitter=False,
        callback=lambda step: raw.append(step.saliency),
    )  # fmt: skip
    assert raw[-1].mean() == pytest.approx(1 / 9, abs=0.02)
    truth = torch.zeros(side, side, dtype=torch.bool)
    truth[square] = True
    found = masks[0, 0] > 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.5


@pytest.mark.parametrize("weight", [300, 0])
def test_masks_stay_in_range_however_long_the_steps(weight: float, images: Tensor) -> None:
    """The area's term pushes cells below 0, the logit alone some of them above 1."""
    steps: list[ol.methods.Step] = []
    ol.explain(
        "extremal-perturbation", make_classifier("cnn"), images[:1], 0, weight=weight,
        callback=steps.append, **{**EXACT, "learning_rate": 1.0},
    )  # fmt: skip
    masks = torch.stack([step.saliency for step in steps])
    assert masks.min() >= 0
    assert masks.max() <= 1


def test_several_areas_are_averaged(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")

    def run(areas: object) -> ol.methods.Step:
        steps: list[ol.methods.Step] = []
        ol.explain(
            "extremal-perturbation", classifier, images, targets, areas=areas,
            callback=steps.append, **EXACT,
        )  # fmt: skip
        assert [(s.index, s.total) for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        return steps[-1]

    both, small, large = run((0.1, 0.5)), run(0.1), run([0.5])
    assert not torch.allclose(small.saliency, large.saliency, atol=1e-3)
    torch.testing.assert_close(both.saliency, (small.saliency + large.saliency) / 2)
    torch.testing.assert_close(both.objective, (small.objective + large.objective) / 2)
    assert both.masks().shape == (3, 1, 32, 32)


@pytest.mark.parametrize("selector", ["margin", "log-probability"])
def test_the_selector_is_what_the_callback_tells(
    selector: str, images: Tensor, targets: Tensor
) -> None:
    classifier = make_classifier("cnn")
    steps: list[ol.methods.Step] = []
    ol.explain(
        "extremal-perturbation", classifier, images, targets, selector=selector, jitter=False,
        callback=steps.append, **EXACT,
    )  # fmt: skip
    m = steps[2].saliency
    z = perturb(pyramid(images, SMALL["levels"], SMALL["blur"]), torch.arange(3), m)
    y = classifier.logits(z)
    others = y.scatter(1, targets[:, None], -math.inf).amax(1, keepdim=True)
    g = y - others if selector == "margin" else y.log_softmax(1)
    torch.testing.assert_close(steps[2].objective, g.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"areas": 0}, r"areas is \[0\]"),
        ({"areas": [0.1, 1.0]}, r"areas is \[0.1, 1.0\]"),
        ({"areas": []}, r"areas is \[\]"),
        ({"iterations": 2.5}, "iterations is 2.5"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"momentum": 1}, "momentum is 1"),
        ({"step": 0}, "step is 0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"levels": 1}, "levels is 1"),
        ({"blur": 0}, "blur is 0"),
        ({"weight": -1}, "weight is -1"),
        ({"growth": math.inf}, "growth is inf"),
        ({"selector": "logits"}, "unknown selector 'logits'; did you mean 'logit'"),
        ({"precision": "half"}, "unknown precision 'half'"),
    ],
)
def test_bad_options(options: dict, message: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        ol.explain("extremal-perturbation", make_classifier("cnn"), images, 0, **options)


def test_a_rough_network_finds_nearly_the_same_mask() -> None:
    """The gradient of a bfloat16 network is noisy, the mask hardly."""
    classifier = ol.load_model("scenes_resnet")
    images, targets = ol.load_dataset("scenes").batch([0, 5])
    options = {"iterations": 8, "step": 16, "sigma": 32.0}
    exact, rough = (
        ol.explain("extremal-perturbation", classifier, images, targets, precision=p, **options)
        for p in ("float32", "bfloat16")
    )
    assert not torch.equal(exact, rough)
    for a, b in zip(exact, rough, strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize(("jitter", "expected"), [(True, [1, 0, 1, 0]), (False, [0, 0, 0, 0])])
def test_every_other_iteration_sees_the_image_mirrored(
    jitter: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, seen = make_images(2), []
    logits = Quick.logits
    monkeypatch.setattr(Quick, "logits", lambda self, x: seen.append(x.detach()) or logits(self, x))
    ol.explain(
        "extremal-perturbation", make_classifier("cnn"), images, 1,
        iterations=4, step=8, sigma=8.0, levels=3, learning_rate=1e-6, jitter=jitter,
    )  # fmt: skip
    mirrored = [(x - images.flip(3)).abs().mean() < (x - images).abs().mean() for x in seen]
    assert mirrored[:4] == expected  # the fifth pass evaluates the last mask


def test_an_unknown_precision_is_refused_without_iterations_too(images: Tensor) -> None:
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        ol.explain(
            "extremal-perturbation",
            make_classifier("cnn"),
            images,
            1,
            iterations=0,
            precision="half",
        )
