"""The sanity check by random weights, against its definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_classifier, make_images
from torch import nn

import opticam_lite as ol
from opticam_lite.studies import sanity


def slow_rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of ranks, a tie taking the mean of its ranks."""

    def ranks(x: np.ndarray) -> np.ndarray:
        x = x.ravel()
        return np.array([sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def slow_hog(x: np.ndarray, cell: int = 16, directions: int = 8) -> np.ndarray:
    """Histograms of oriented gradients, a pixel at a time; each is a block of its own."""
    h, w = x.shape
    histograms = np.zeros((h // cell, w // cell, directions))
    for i in range(h):
        for j in range(w):
            dy = x[i + 1, j] - x[i - 1, j] if 0 < i < h - 1 else 0.0
            dx = x[i, j + 1] - x[i, j - 1] if 0 < j < w - 1 else 0.0
            angle = math.degrees(math.atan2(dy, dx)) % 180
            bin_ = int(angle // (180 / directions)) % directions
            histograms[i // cell, j // cell, bin_] += math.hypot(dx, dy) / cell**2
    for row in histograms:
        for v in row:
            v /= math.sqrt((v**2).sum() + 1e-10)
            v[:] = np.minimum(v, 0.2)
            v /= math.sqrt((v**2).sum() + 1e-10)
    return histograms.ravel()


def slow_ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """The mean over windows of 7×7 pixels, with sample variances, constants of the range 1."""
    values = []
    for i in range(a.shape[0] - window + 1):
        for j in range(a.shape[1] - window + 1):
            x, y = (v[i : i + window, j : j + window].ravel() for v in (a, b))
            cxy = np.cov(x, y)
            top = (2 * x.mean() * y.mean() + 1e-4) * (2 * cxy[0, 1] + 9e-4)
            bottom = (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (cxy[0, 0] + cxy[1, 1] + 9e-4)
            values.append(top / bottom)
    return float(np.mean(values))


def test_similarities_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 1, 32, 32, generator=generator).round(decimals=1) for _ in "ab")
    second = second + first
    found = sanity.similarities(first, second)
    assert tuple(found) == sanity.MEASURES
    for i in range(2):
        a, b = (m[i, 0].double().numpy() for m in (first, second))
        assert found["rank"][i] == pytest.approx(slow_rank_correlation(a, b), abs=1e-9)
        expected = slow_rank_correlation(abs(a), abs(b))
        assert found["rank of absolute values"][i] == pytest.approx(expected, abs=1e-9)
        expected = float(np.corrcoef(slow_hog(a), slow_hog(b))[0, 1])
        assert found["HOG"][i] == pytest.approx(expected, abs=1e-6)
        scaled = [(v - v.min()) / (v.max() - v.min()) for v in (a, b)]
        assert found["SSIM"][i] == pytest.approx(slow_ssim(*scaled), abs=1e-6)


def test_limits_of_the_similarities() -> None:
    ramp = torch.arange(1024.0).view(1, 1, 32, 32)
    same = sanity.similarities(ramp, 2 * ramp + 1)
    assert [v[0] for v in same.values()] == pytest.approx([1, 1, 1, 1])
    assert sanity.similarities(ramp, -ramp)["rank"] == pytest.approx([-1])
    assert sanity.similarities(ramp, -ramp)["rank of absolute values"] == pytest.approx([1])
    constant = sanity.similarities(ramp, torch.ones_like(ramp))
    assert all(math.isnan(constant[name][0]) for name in ("rank", "HOG"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("scenes_resnet", ["fc", "layer4", "layer3", "layer2", "layer1"]),
        ("scenes_vgg", ["features.20", "features.16", "features.9", "features.4", "features.0"]),
        ("scenes_vit", ["norm", "blocks.2", "blocks.0", "patch_embed", ""]),
    ],
)
def test_which_layers_become_random(kind: str, expected: list[str]) -> None:
    classifier = ol.load_model(kind)
    before = {k: v.clone() for k, v in classifier.network.state_dict().items()}
    changed: set[str] = set()
    names = []
    for name, other in sanity.randomized(classifier):
        names.append(name)
        state = other.network.state_dict()
        differ = {k for k in state if not torch.equal(state[k], before[k])}
        assert changed < differ, "each network has all random weights of the one before"
        assert any(k.startswith(name) for k in differ - changed)
        changed = differ
        assert (other.mean, other.std, other.layer) == (
            *(classifier.mean, classifier.std),
            classifier.layer,
        )
    assert names == expected
    assert all(torch.equal(v, before[k]) for k, v in classifier.network.state_dict().items())


def test_random_weights_follow_the_seed_and_leave_the_random_state() -> None:
    classifier = make_classifier("cnn")
    state = torch.get_rng_state()
    first, again, other = (
        [p for _, c in sanity.randomized(classifier, 2, seed) for p in c.network.parameters()]
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_parameters_that_no_module_draws_are_permuted() -> None:
    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.arange(64.0))

    block = WithToken()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sanity._randomize(block)
    assert not torch.equal(block.token, torch.arange(64.0))
    assert sorted(block.token.tolist()) == list(range(64))


def test_the_study_is_that_of_single_calls() -> None:
    classifier, data = make_classifier("cnn"), ol.Images(make_images(3), [0, 1, 2])
    frame = sanity.sanity_study(
        classifier, data, ["grad-cam", "fake-cam"], cuts=2, seeds=(0, 1), batch_size=2
    )
    assert len(frame) == 3 * 3 * 2 * 2 * len(sanity.MEASURES)
    x, c = data.batch(range(3))
    original = ol.explain("grad-cam", classifier, x, c)
    for seed in (0, 1):
        for cut, (name, other) in enumerate(sanity.randomized(classifier, 2, seed), start=1):
            expected = sanity.similarities(original, ol.explain("grad-cam", other, x, c))
            rows = frame[(frame["method"] == "grad-cam") & (frame["cut"] == cut)]
            rows = rows[rows["seed"] == seed]
            assert set(rows["from"]) == {name}
            for measure, values in expected.items():
                own = rows[rows["measure"] == measure]["value"].tolist()
                assert own == pytest.approx(values, abs=1e-5, nan_ok=True)
    # The controls do not see the network.
    controls = frame[
        frame["method"].isin(["fake-cam", sanity.EDGES]) & (frame["measure"] == "SSIM")
    ]
    assert controls["value"].tolist() == pytest.approx([1.0] * len(controls))


def test_a_network_of_random_labels_is_one_more_to_compare_with() -> None:
    classifier = make_classifier("cnn")
    _, other = next(sanity.randomized(classifier, 1))
    data = ol.Images(make_images(3), [0, 1, 2])
    frame = sanity.sanity_study(
        classifier, data, ["grad-cam"], cuts=1, seeds=(5,), random_labels=other
    )
    rows = frame[(frame["cut"] == sanity.RANDOM_LABELS) & (frame["method"] == "grad-cam")]
    x, c = data.batch(range(3))
    maps = [ol.explain("grad-cam", network, x, c) for network in (classifier, other)]
    for measure, values in sanity.similarities(*maps).items():
        own = rows[rows["measure"] == measure]["value"].tolist()
        assert own == pytest.approx(values, abs=1e-5, nan_ok=True)
    assert set(rows["from"]) == {other.name}


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, data = make_classifier("cnn"), ol.Images(make_images(4), [0, 1, 2, 0])
    calls: list[str] = []

    def study(out: Path | None, methods: tuple[str, ...] = ("grad-cam",), **more: Any) -> Any:
        given = {"cuts": 2, "seeds": (0,), "batch_size": 2, **more}
        return sanity.sanity_study(classifier, data, methods, out=out, **given)

    def counted(method: str, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(method)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return ol.explain(method, *arguments, **options)

    whole = study(None)
    monkeypatch.setattr(sanity, "explain", counted)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path)
    calls.append("interrupted")
    # Two batches of two cuts: the first cut was complete, and of the second the first batch.
    pd.testing.assert_frame_equal(study(tmp_path), whole)
    assert calls[7:] == ["grad-cam"] * 2
    pd.testing.assert_frame_equal(study(tmp_path), whole)
    assert len(calls) == 9
    added = study(tmp_path, ("grad-cam", "fake-cam"))
    assert calls[9:] == ["fake-cam"] * 6
    assert set(added["method"]) == {"grad-cam", "fake-cam", sanity.EDGES}
    with pytest.raises(ol.evaluation.StoreError, match="cuts is 2 there and 1 here"):
        study(tmp_path, cuts=1)


def as_frame(values: dict[str, list[float]], cut: int = 2) -> pd.DataFrame:
    """Method → rank correlation of each image, the same for each of two seeds, and an SSIM."""
    rows = [
        {"image": str(i), "method": method, "cut": cut, "from": "layer1", "seed": seed}
        | {"measure": measure, "value": value + (0.1 if seed else -0.1)}
        for method, own in values.items()
        for i, value in enumerate(own)
        for seed in (0, 1)
        for measure in ("rank", "SSIM")
    ]
    return pd.DataFrame(rows)


def test_a_method_passes_if_its_maps_are_surely_less_than_half_alike() -> None:
    unlike = [0.0, 0.1, -0.1, 0.05, 0.0, -0.05, 0.1, 0.06]
    alike = [0.9 + value for value in unlike]
    unsure = [0.0, 1.0] * 4
    values = {"opti-cam": unlike, "grad-cam": alike, "layer-cam": unsure, sanity.EDGES: alike}
    found = sanity.findings(pd.concat([as_frame(values), as_frame(values, 1)]))
    assert [finding.verdict for finding in found] == [True, False, None, False]
    assert found[0].claim.startswith("Opti-CAM passes")
    assert found[3].claim.startswith("The edge detector, a control, passes")
    assert found[0].figures.startswith("0.02 (")
    assert "n = 8" in found[0].figures
    found = sanity.findings(as_frame(values)[lambda rows: rows["image"] == "1"])
    assert {finding.verdict for finding in found} == {None}, "one image shows nothing"
    both = pd.concat([as_frame(values), as_frame(values, sanity.RANDOM_LABELS)])
    verdicts = [finding.verdict for finding in sanity.findings(both)[4:]]
    assert verdicts == [True, True, False, None, False], "Opti-CAM's SSIM is one more"


def test_the_table_averages_seeds_and_then_images() -> None:
    frame = as_frame({"opti-cam": [0.0, 0.2, 0.4, float("nan")]})
    (row,) = sanity.sanity_table(frame).to_dict("records")
    assert (row["method"], row["cut"], row["from"], row["n"]) == ("opti-cam", 2, "layer1", 3)
    assert row["rank"] == pytest.approx(0.2)
    assert row["rank ±"] == pytest.approx(0.2 / math.sqrt(3))
    assert row["rank low"] < 0.2 < row["rank high"]


def test_edges_are_where_the_image_changes() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1
    found = sanity.edges(image)[0, 0]
    assert found.shape == (8, 8)
    assert (found[2:6, 3:5] == 1).all()
    assert (found[:, [0, 1, 6, 7]] == 0).all()
