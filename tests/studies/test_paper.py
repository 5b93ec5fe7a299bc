"""The paper's studies: their variants, and when a finding holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_classifier, make_images

import opticam_lite as ol
from opticam_lite.evaluation.variants import variants
from opticam_lite.reports.tables import paper_table
from opticam_lite.studies import findings, paper
from opticam_lite.studies.paper import EXPONENTS, RATES, STUDIES, block_ends, study


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_measured(name: str, kind: str) -> None:
    classifier = make_classifier(kind)
    asked = study(name, classifier, ["grad-cam", "opti-cam", "fake-cam"], iterations=2)
    frame = ol.evaluate(classifier, ol.Images(make_images(2), [0, 1]), asked, progress=None)
    assert list(frame["method"].unique()) == list(asked)
    assert len(frame) == 2 * 3 * len(asked)
    for finding in STUDIES[name].findings(frame):
        assert (
            finding.verdict is not True
        )  # of two images nothing is sure, and 2 iterations are few
        assert finding.claim
        assert finding.figures


@pytest.mark.parametrize("name", STUDIES)
def test_the_papers_iterations_are_the_default(name: str) -> None:
    asked = variants(study(name, make_classifier("cnn")))
    counts = [v.iterations for v in asked.values() if v.method == "opti-cam"]
    assert max(c for c in counts if c is not None) == (50 if name == "table-a12" else 100)
    source = STUDIES[name].source
    if source not in (None, "A13"):  # its layers are VGG's
        printed = set(paper_table(str(source))["method"])
        own = set(study(name, make_classifier("cnn")))
        assert own & printed
        if name in ("table6", "table-a12"):
            assert own <= printed


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("resnet18", "relu layer1 layer2 layer3 layer4.1"),
        ("vgg11_bn", "features.2 features.6 features.10 features.13 features.17 features.20 "
         "features.24 features.27"),
        ("squeezenet1_1", "features.1 features.3 features.4 features.6 features.9 features.10 "
         "features.11 features.12"),
        ("vit_tiny_patch16_224", "blocks.0 blocks.2 blocks.3 blocks.5 blocks.6 blocks.8 blocks.9 "
         "blocks.11.norm1"),
        ("scenes_vit", "blocks.0 blocks.1 blocks.2 blocks.3.norm1"),
    ],
)  # fmt: skip
def test_the_ends_of_blocks(name: str, ends: str) -> None:
    classifier = ol.load_model(name) if "scenes" in name else ol.load_model(name, weights="random")
    assert block_ends(classifier) == ends.split()


# ------------------------------------------------------------------------------- findings

N = 200
NOISE = torch.randn(N, generator=torch.Generator().manual_seed(0)).double()


def rows(averages: Mapping[str, Mapping[str, float]], n: int = N) -> pd.DataFrame:
    """Rows whose variants have these averages, and the same images with the same noise.

    Args:
        averages: Label → metric → average.
        n: Images.
    """
    noise = NOISE[:n] - NOISE[:n].mean()
    found = []
    for k, (label, of) in enumerate(averages.items()):
        for metric, average in of.items():
            own = 0.1 * noise.roll(k)
            found += [
                {"image": str(i), "method": label, "metric": metric, "value": average + float(x),
                 "error": None, "target": 0, "explained": 0}
                for i, x in enumerate(own)
            ]  # fmt: skip
    return pd.DataFrame(found)


def figures(labels: Sequence[str], ad: Any, ag: Any, ai: Any = None) -> dict[str, dict[str, float]]:
    """Label → metric → average, of lists or single numbers."""
    columns = {"AD": ad, "AG": ag, "AI": ag if ai is None else ai}
    listed = {m: x if isinstance(x, list) else [x] * len(labels) for m, x in columns.items()}
    return {label: {m: x[i] for m, x in listed.items()} for i, label in enumerate(labels)}


TABLE6 = ["mask, range", "diff, range", "mask, max", "diff, max", "mask, sigmoid", "diff, sigmoid"]
OBJECTIVES = ["mask", "diff", "io-mask", "io-diff"]
LAYERS = ["first", "middle", "late", "last"]
BARE = [m.format(n) for n in ("cam", "opti-cam") for m in ("{}", "{}, not normalised")]
POWERS = [f"{m}, α = {a:g}" for m in ("opti-cam", "cam") for a in EXPONENTS]
STEPS = [f"rate {r:g}, {n} iterations" for r in RATES for n in (50, 100)]
OTHERS = [f"{m}, {c}" for c in paper.CLASSES for m in ("cam", "opti-cam")]

# Study → figures for which its findings hold, and for which they do not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "table6": (
        figures(TABLE6, [1.4, 7.1, 1.6, 6.8, 5, 6.5], [66.3, 18.5, 66.2, 17.8, 18.3, 10]),
        figures(TABLE6, [7, 1, 20, 6, 1, 0.5], [10, 66, 5, 66, 80, 90]),
    ),
    "table-a12": (
        figures(OBJECTIVES, [1.4, 7.1, 0.5, 25.9], [66.3, 18.5, 5.5, 7.6]),
        figures(OBJECTIVES, [25, 7.1, 9, 1.9], [16.3, 18.5, 15.5, 7.6]),
    ),
    "table-a13": (
        figures(LAYERS, 2, [23.5, 80, 78, 66]),
        figures(LAYERS, 2, [70, 20, 20, 66]),
    ),
    "table-a14": (
        figures(BARE, [12, 36, 1.5, 2], 10),
        figures(BARE, [12, 13, 1.5, 9], 10),
    ),
    "figure-a4": (
        figures(
            POWERS,
            [*[1] * 6, 6, 9, 20, 30, *[10] * 10],
            [1, 1, 2, 30, 70, 60, 40, 20, 9, *[5] * 11],
            [50, 50, 50, 60, 90, 80, 70, 60, 50, 40, 40, 40, 40, 60, 50, 40, 30, 20, 10, 5],
        ),
        figures(
            POWERS,
            [*[9] * 10, *[10] * 10],
            [1, 1, 2, 90, 70, 60, 40, 20, 9, *[5] * 11],
            [50, 50, 50, 95, 90, 80, 70, 60, 50, 40, 40, 40, 40, 45, 50, 40, 30, 20, 10, 5],
        ),
    ),
    "figure-a5": (
        figures(STEPS, 1, [5, 9, 60, 66, 50, 60, 20, 30]),
        figures(STEPS, 1, [5, 9, 40, 66, 50, 80, 20, 30]),
    ),
    "table-a9": (
        figures(OTHERS, 10, [20, 70, 19, 15, 12, 5, 12, 5]),
        figures(OTHERS, 10, [20, 21, 10, 60, 2, 15, 2, 15]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in STUDIES if n not in ("selectors", "starts")])
def test_findings_hold_do_not_hold_and_are_open(name: str) -> None:
    good, bad = CASES[name]
    find: Callable[[pd.DataFrame], list[findings.Finding]] = STUDIES[name].findings
    found = find(rows(good))
    assert found
    for finding in found:
        assert finding.verdict is True, finding
    for finding in find(rows(bad)):
        # Range and max, too, differ in the figures that contradict Table 6.
        assert finding.verdict is False, finding
    for finding in find(rows(good, n=3)):
        assert finding.verdict is not False
    assert any(finding.verdict is None for finding in find(rows(good, n=3)))


def test_misclassified_images_are_a_group_of_their_own() -> None:
    frame = rows(figures(OTHERS, 10, [20, 70, 19, 15, 12, 5, 12, 5]))
    wrong = frame["method"].str.endswith(", first") & frame["image"].isin(map(str, range(40)))
    frame.loc[wrong, "explained"] = 1
    both = paper.with_misclassified(frame)
    added = both.iloc[len(frame) :]
    assert set(added["method"]) == {"cam, misclassified", "opti-cam, misclassified"}
    assert set(added["image"]) == set(map(str, range(40)))
    claims = [f for f in STUDIES["table-a9"].findings(frame) if "misclassified" in f.claim]
    assert [f.verdict for f in claims] == [True]


def test_a_variant_that_failed_on_an_image_is_compared_on_the_others() -> None:
    frame = rows(figures(OBJECTIVES, 1, [4, 3, 2, 1]))
    lost = (frame["method"] == "diff") & (frame["image"] == "0")
    v = findings.Values(frame[~lost])
    assert len(v.of("AG", "mask")) == N - 1


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [([True, True], True), ([True, None], None), ([None, False], False), ([], True)],
)
def test_all_hold(verdicts: list[findings.Verdict], whole: findings.Verdict) -> None:
    assert findings.all_hold(verdicts) is whole


def test_verdicts_by_limits() -> None:
    zero = torch.zeros(100)
    assert findings.between(zero, -1, 1) is True
    assert findings.between(zero, 1, 2) is False
    assert findings.between(zero[:5], -1, 1) is None
    noise = NOISE - NOISE.mean()
    assert findings.between(noise, -3, 3) is True
    assert findings.between(5 + noise, -3, 3) is False
    assert findings.between(3 + noise, -3, 3) is None
    v = findings.Values(rows({"a": {"AD": 2.0}}))
    assert v.within("AD", "a", 0, 20) is True
    assert v.within("AD", "a", 0, 3) is None  # 200 images can't exclude rare losses
    assert v.within("AD", "a", 50, 60) is False
