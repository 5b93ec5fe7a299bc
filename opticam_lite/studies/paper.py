"""The paper's studies as lists of variants, and what the paper finds in them.

| name | paper | what varies |
|---|---|---|
| `table6` | Table 6 | objective (mask, diff) and normalisation of Opti-CAM |
| `table-a12` | Table A12 | objective, those that look outside of the mask included |
| `table-a13` | Table A13 | layer |
| `table-a14` | Table A14 | all methods, with and without normalisation of the input |
| `figure-a4` | Fig. A4 | exponent of the mask, all methods |
| `figure-a5` | Fig. A5 | learning rate and number of iterations |
| `table-a9` | Table A9 | the class whose map is made |
| `selectors` | section 3.2, no figures | selector function g_c |
| `starts` | section 5.5, no figures | initial u |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..masking import NORMALIZATIONS
from ..methods import METHODS, applicable
from ..methods.opti_cam import OBJECTIVES
from ..methods.search import SELECTORS
from ..network import Classifier
from .findings import Finding, Values, Verdict, above, all_hold, between

Variants = dict[str, dict[str, Any]]
NAMES = ("AD", "AG", "AI")
EXPONENTS = (0.01, 0.05, 0.1, 0.5, 1, 1.5, 2, 3, 5, 10)
RATES = (0.01, 0.1, 0.5, 1)
MOST_LAYERS = 8
FEWEST_BLOCKS = 4
NEAR_ZERO = 5.0  # percent: an AD below is "near zero"; the paper's is 1.4 at α = 1
LITTLE = 3.0  # percent: averages that differ by less "differ little"
BARE = "{}, not normalised"


@dataclass(frozen=True)
class Study:
    """A study of the paper.

    Attributes:
        title: A line.
        variants: (classifier, names of methods, iterations of Opti-CAM) → label → variant.
        findings: Takes the rows of `evaluate`; returns what the paper says, checked.
        source: Table of the paper, as `paper_table` takes it; None where it prints no figures.
        iterations: Of Opti-CAM, in the paper.
    """

    title: str
    variants: Callable[[Classifier, Sequence[str], int], Variants]
    findings: Callable[[pd.DataFrame], list[Finding]]
    source: str | None = None
    iterations: int = 100


def study(
    name: str, classifier: Classifier, methods: Sequence[str] = (), iterations: int | None = None
) -> Variants:
    """Return label → variant of a study of the paper, as `evaluate` takes them.

    Args:
        name: A key of `STUDIES`.
        classifier: The network.
        methods: Names, for studies of several methods. Default: all one-pass methods that apply,
            Score-CAM, Opti-CAM and Fake-CAM.
        iterations: Of Opti-CAM. Default: the paper's.
    """
    methods = methods or comparable(classifier)
    return STUDIES[name].variants(classifier, methods, iterations or STUDIES[name].iterations)


def comparable(classifier: Classifier) -> list[str]:
    """Return the methods of Table 1 that apply to a network and take seconds an image at most."""
    slow = ("extremal-perturbation", "lime", "gradient-shap", "opti-cam-fast")
    able = [name for name, reason in applicable(classifier).items() if reason is None]
    return [name for name in able if name not in slow]


# ------------------------------------------------------------------- components of Opti-CAM


def _objectives(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    options = {"method": "opti-cam", "iterations": iterations}
    return {
        f"{objective}, {n}": {**options, "objective": objective, "normalization": n}
        for n in NORMALIZATIONS
        for objective in ("mask", "diff")
    }


def _of_objectives(rows: pd.DataFrame) -> list[Finding]:
    v, found = Values(rows), []
    for n in NORMALIZATIONS:
        mask, diff = f"mask, {n}", f"diff, {n}"
        found.append(
            Finding(
                f"Mask is better than Diff in AD, AG and AI, normalised by {n}",
                all_hold(v.better(metric, mask, diff) for metric in NAMES),
                ". ".join(v.show(metric, mask, diff) for metric in NAMES),
            )
        )
    masks = [f"mask, {n}" for n in NORMALIZATIONS]
    of_range, of_max, of_sigmoid = masks
    lower = [v.better(m, other, of_sigmoid) for m in NAMES for other in (of_range, of_max)]
    shown = ". ".join(v.show(metric, *masks) for metric in NAMES)
    found.append(Finding("Sigmoid is the lowest in AD, AG and AI", all_hold(lower), shown))
    close = all_hold(v.close(m, of_range, of_max, LITTLE) for m in ("AD", "AG"))
    found.append(
        Finding(f"Range and max differ by less than {LITTLE:g} in AD and AG", close, shown)
    )
    return found


def _outside(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    options = {"method": "opti-cam", "iterations": iterations}
    return {objective: {**options, "objective": objective} for objective in OBJECTIVES}


def _of_outside(rows: pd.DataFrame) -> list[Finding]:
    v = Values(rows)
    others = [o for o in OBJECTIVES if o != "io-mask"]
    drops, gains = (v.show(metric, *OBJECTIVES) for metric in ("AD", "AG"))
    half = above(0.5 * v.of("AG", "mask"), v.of("AG", "io-mask"))
    worst = [v.better("AD", o, "io-diff") for o in OBJECTIVES if o != "io-diff"]
    return [
        Finding("IOMask has the lowest AD", all_hold(v.better("AD", "io-mask", o) for o in others),
                drops),
        Finding("The AG of IOMask is less than half of Mask's", half, gains),
        Finding("IODiff has the highest AD", all_hold(worst), drops),
    ]  # fmt: skip


def block_ends(classifier: Classifier, most: int = MOST_LAYERS) -> list[str]:
    """Return the ends of a network's blocks that can be explained, in forward order.

    The blocks are the part of the network that holds the classifier's layer, and its neighbours
    with weights: the stages of a ResNet, the convolutions of a VGG, the blocks of a transformer. Of
    nested ones the outermost of at least `FEWEST_BLOCKS`. A block ends with the last layer of its
    resolution and channels, such as the relu that follows a convolution; the classifier's own layer
    stands for its block. Of more than `most` blocks some are taken, evenly spaced, and the last.
    """
    layers, own = classifier.layers, classifier.layer
    modules = dict(classifier.network.named_modules())
    blocks = [own]
    for depth in range(own.count(".") + 2):
        parent = ".".join(own.split(".")[:depth])
        beside = [n for n in layers if n.rpartition(".")[0] == parent and _has_weights(modules[n])]
        if len(beside) >= FEWEST_BLOCKS:
            blocks = beside
            break
    ends = []
    for block, following in pairwise([*blocks, None]):
        assert block is not None
        rest = layers[layers.index(block) :]
        stop = next((i for i, n in enumerate(rest) if f"{n}.".startswith(f"{following}.")), None)
        shape = classifier.layer_shape(block)
        same = [n for n in rest[:stop] if classifier.layer_shape(n) == shape]
        inside = own in same or own.startswith(f"{block}.")
        ends.append(own if inside else [n for n in same if n not in own.split(".")][-1])
    chosen = np.linspace(len(ends) - 1, 0, min(most, len(ends))).round().astype(int)
    return [ends[i] for i in sorted(chosen)]


def _has_weights(module: nn.Module) -> bool:
    """Whether a module has a weight matrix or kernel, not only scales and biases."""
    return any(p.ndim > 1 for p in module.parameters())


def _layers(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    options = {"method": "opti-cam", "iterations": iterations}
    return {layer: {**options, "layer": layer} for layer in block_ends(classifier)}


def _of_layers(rows: pd.DataFrame) -> list[Finding]:
    v = Values(rows)
    *earlier, last = v.labels
    gains = {layer: v.of("AG", layer) for layer in v.labels}
    # "Match": better than the last, less a difference that counts as little.
    match = {layer: above(gains[layer] + LITTLE, gains[last]) for layer in earlier}
    sure, open_ = (sum(m is verdict for m in match.values()) for verdict in (True, None))
    several: Verdict = True if sure >= 2 else None if sure + open_ >= 2 else False
    shown = v.show("AG", *v.labels)
    return [
        Finding(f"At least two earlier layers match or beat the last in AG (within {LITTLE:g})",
                several, shown),
        Finding("The earliest layer has a lower AG than the last",
                v.better("AG", last, v.labels[0]), v.show("AG", v.labels[0], last)),
    ]  # fmt: skip


def _convergence(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    counts = sorted({max(1, round(iterations * f)) for f in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)})
    return {
        f"rate {rate:g}, {n} iterations": {
            "method": "opti-cam", "learning_rate": rate, "iterations": n,
        }
        for rate in RATES for n in counts
    }  # fmt: skip


def _of_convergence(rows: pd.DataFrame) -> list[Finding]:
    v = Values(rows)
    counts = [int(label.split()[-2]) for label in v.labels if label.startswith("rate 0.1,")]
    n = max(counts)
    best, half = f"rate 0.1, {n} iterations", f"rate 0.1, {round(n / 2)} iterations"
    others = [f"rate {rate:g}, {n} iterations" for rate in RATES if rate != 0.1]
    longest = v.show("AG", best, *others)
    found = [
        Finding(f"A rate of 0.1 has the highest AG after {n} iterations",
                all_hold(v.better("AG", best, other) for other in others), longest),
    ]  # fmt: skip
    if half in v:
        lost = v.of("AG", best) - v.of("AG", half)
        claim = "Half the iterations cost about 6 points of AG (3 to 9)"
        found.append(Finding(claim, between(lost, 3, 9), v.show("AG", half, best)))
    return found


def _selectors(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    able = [s for s in SELECTORS if s != "margin" or classifier.classes > 1]
    options = {"method": "opti-cam", "iterations": iterations}
    return {selector: {**options, "selector": selector} for selector in able}


def _starts(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    """Equal weights, as in the paper, and three random starts."""
    options = {"method": "opti-cam", "iterations": iterations}
    generator, maps = torch.Generator().manual_seed(0), classifier.layer_shape()[0]
    random = {
        f"random {i}": {**options, "initial_u": torch.randn(maps, generator=generator)}
        for i in (1, 2, 3)
    }
    return {"equal": options, **random}


def _no_findings(rows: pd.DataFrame) -> list[Finding]:
    """The paper prints no figures."""
    return []


# ------------------------------------------------------------------------------ all methods


def _options(method: str, iterations: int) -> dict[str, Any]:
    return {"method": method} | ({"iterations": iterations} if method == "opti-cam" else {})


def _bare(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    both = {method: _options(method, iterations) for method in methods}
    return both | {BARE.format(m): {**own, "normalize": False} for m, own in both.items()}


def _of_bare(rows: pd.DataFrame) -> list[Finding]:
    v, found = Values(rows), list[Finding]()
    if "opti-cam" not in v:
        return found
    lost = {
        m: v.of("AD", BARE.format(m)) - v.of("AD", m)
        for m in v.labels
        if BARE.format(m) in v and m != "fake-cam"
    }
    for method in lost:
        if method != "opti-cam":
            theirs, own = (f"{lost[m].mean():.1f}" for m in (method, "opti-cam"))
            shown = f"AD rises by {theirs}, Opti-CAM's by {own}"
            claim = f"Without normalisation {title(method)} loses more than Opti-CAM"
            found.append(Finding(claim, above(lost[method], lost["opti-cam"]), shown))
    return found


def _exponents(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    return {
        f"{method}, α = {a:g}": {**_options(method, iterations), "exponent": a}
        for method in methods
        for a in EXPONENTS
    }


def _of_exponents(rows: pd.DataFrame) -> list[Finding]:
    v, found = Values(rows), []
    methods = list(dict.fromkeys(label.split(",")[0] for label in v.labels))

    def at(method: str, a: float) -> str:
        return f"{method}, α = {a:g}"

    def peaks(method: str, metric: str) -> Verdict:
        return all_hold(v.better(metric, at(method, 1), at(method, a)) for a in EXPONENTS if a != 1)

    def shown(method: str, metric: str, exponents: Sequence[float] = EXPONENTS) -> str:
        told = (f"{v.mean(metric, at(method, a)):.1f} at {a:g}" for a in exponents)
        return f"{metric}: {', '.join(told)}"

    if "opti-cam" in methods:
        small = [a for a in EXPONENTS if a < 2]
        near = all_hold(v.within("AD", at("opti-cam", a), 0, NEAR_ZERO) for a in small)
        claim = f"The AD of Opti-CAM stays near 0 (below {NEAR_ZERO:g}) for α < 2"
        found.append(Finding(claim, near, shown("opti-cam", "AD", small)))
        for metric in ("AG", "AI"):
            claim = f"The {metric} of Opti-CAM peaks at α = 1"
            found.append(Finding(claim, peaks("opti-cam", metric), shown("opti-cam", metric)))
    for method in methods:
        if method not in ("opti-cam", "fake-cam"):
            peak = peaks(method, "AI")
            verdict = None if peak is None else not peak
            claim = f"The AI of {title(method)} does not peak at α = 1"
            found.append(Finding(claim, verdict, shown(method, "AI")))
    return found


CLASSES = {"true": "true", "first": "most probable", "second": "second", "last": "least probable"}
MISCLASSIFIED = "misclassified"


def _classes(classifier: Classifier, methods: Sequence[str], iterations: int) -> Variants:
    return {
        f"{method}, {which}": {**_options(method, iterations), "class": which}
        for which in CLASSES
        for method in methods
    }


def with_misclassified(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of Table A9 and those of misclassified images once more, as its last group.

    The latter are the maps of the most probable class where that is not the true one.
    """
    wrong = rows["method"].str.endswith(", first") & (rows["explained"] != rows["target"])
    again = rows[wrong.fillna(False)]
    return pd.concat([rows, again.assign(method=again["method"].str.replace(
        ", first", f", {MISCLASSIFIED}", regex=False))], ignore_index=True)  # fmt: skip


def _of_classes(rows: pd.DataFrame) -> list[Finding]:
    wrong = with_misclassified(rows)
    wrong = wrong[wrong["method"].str.endswith(MISCLASSIFIED)]
    found = []
    groups = {key: f"{name} class" for key, name in CLASSES.items()}
    groups[MISCLASSIFIED] = "predicted class of misclassified images"
    for which, name in groups.items():
        v = Values(wrong if which == MISCLASSIFIED else rows)
        mine = f"opti-cam, {which}"
        if which == "true" or mine not in v:
            continue
        others = [x for x in v.labels if x.endswith(f", {which}") and x.split(",")[0]
                  not in ("opti-cam", "fake-cam")]  # fmt: skip
        found.append(
            Finding(
                f"Maps of the {name}: the AG of Opti-CAM is below the others'",
                all_hold(v.better("AG", other, mine) for other in others),
                v.show("AG", mine, *others),
            )
        )
    v = Values(rows)
    if "opti-cam, true" in v:
        for which in ("second", "last"):
            lost = {
                label.split(",")[0]: v.of("AG", label) - v.of("AG", label.replace("true", which))
                for label in v.labels
                if label.endswith(", true")
            }
            of_opti = lost.pop("opti-cam")
            lost.pop("fake-cam", None)
            told = ", ".join(f"{m} {x.mean():.1f}" for m, x in lost.items())
            found.append(
                Finding(
                    f"From the true to the {CLASSES[which]} class Opti-CAM loses the most AG",
                    all_hold(above(of_opti, other) for other in lost.values()),
                    f"lost: opti-cam {of_opti.mean():.1f}, {told}",
                )
            )
    return found


def title(label: str) -> str:
    """Return how a method, or a variant that begins with its name, is written in text.

    >>> title("grad-cam++, first")
    'Grad-CAM++, first'
    """
    method, comma, rest = str(label).partition(",")
    return f"{METHODS[method].title if method in METHODS else method}{comma}{rest}"


STUDIES: Mapping[str, Study] = {
    "table6": Study("Objective and normalisation", _objectives, _of_objectives, "6"),
    "table-a12": Study("Inside and outside of the mask", _outside, _of_outside, "A12", 50),
    "table-a13": Study("Layers", _layers, _of_layers, "A13"),
    "table-a14": Study("Without normalisation of the input", _bare, _of_bare, "A14"),
    "figure-a4": Study("Selectivity: the mask to the power α", _exponents, _of_exponents),
    "figure-a5": Study("Iterations and learning rate", _convergence, _of_convergence),
    "selectors": Study("Selector functions", _selectors, _no_findings),
    "starts": Study("Starts of the search", _starts, _no_findings),
    "table-a9": Study("Maps of other classes", _classes, _of_classes, "A9"),
}
