"""Variants of methods: what differs is measured, what is the same is computed once."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_classifier, make_images

import opticam_lite as ol
from opticam_lite.evaluation.variants import KEYS, Variant
from opticam_lite.methods import METHODS
from opticam_lite.methods.registry import Method

TARGETS = [0, 1, 2, 3, 4]


def run(methods: Any, metrics: Any = ("AD", "AG"), **settings: Any) -> pd.DataFrame:
    dataset = ol.Images(make_images(5), TARGETS)
    settings = {"batch_size": 3, "progress": None, **settings}
    return ol.evaluate(make_classifier("cnn"), dataset, methods, metrics, **settings)


def test_the_keys_of_a_variant_are_no_options_of_methods() -> None:
    assert not [(name, o) for name in METHODS for o in METHODS[name].options if o in KEYS]


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("which", ["true", "first", "second", "last"])
@pytest.mark.parametrize("exponent", [0.5, 1, 3])
def test_a_variant_is_what_its_slow_definition_says(kind: str, which: str, exponent: float) -> None:
    classifier, images = make_classifier(kind), make_images(5)
    layer = classifier.layers[0]
    frame = ol.evaluate(
        classifier,
        ol.Images(images, TARGETS),
        {
            "it": {
                "method": "layer-cam",
                "layer": layer,
                "normalize": False,
                "class": which,
                "exponent": exponent,
            }
        },
        ["AD", "AG"],
        batch_size=3,
        progress=None,
    )
    # Image by image, by a network built without normalisation, with the class looked up by hand.
    bare = ol.Classifier(classifier.network, layer, size=32, device="cpu", normalize=False)
    for i, target in enumerate(TARGETS):
        x = images[i : i + 1]
        order = sorted(range(bare.classes), key=lambda c: -float(bare.logits(x)[0, c]))
        c = {"true": target, "first": order[0], "second": order[1], "last": order[-1]}[which]
        mask = ol.explain("layer-cam", bare, x, c, warn=False)
        powers = torch.tensor([float(m) ** exponent for m in mask.flatten()]).view_as(mask)
        p = float(bare.probabilities(x)[0, target])  # measured is always the true class
        o = float(bare.probabilities(x * powers)[0, target])
        rows = frame[frame["image"] == str(i)].set_index("metric")
        assert rows.loc["AD", "p"] == pytest.approx(p, abs=1e-5)
        assert rows.loc["AD", "o"] == pytest.approx(o, abs=1e-5)
        assert rows.loc["AD", "value"] == pytest.approx(100 * max(p - o, 0) / p, abs=1e-2)
        assert rows.loc["AG", "value"] == pytest.approx(100 * max(o - p, 0) / (1 - p), abs=1e-2)
        assert rows.loc["AD", "layer"] == layer
        assert (rows["explained"] == c).all()
        assert (rows["target"] == target).all()
        settings = json.loads(rows.loc["AD", "options"])
        assert settings["method"] == "layer-cam"
        assert settings["layer"] == layer
        assert settings["normalize"] is False


def test_fewer_iterations_are_taken_from_the_longest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "opti-cam")
    counts = [0, 1, 2, 5, 9, 10]
    rate = {"method": "opti-cam", "learning_rate": 0.5, "tolerance": 1e-3}
    together = run({f"{n}": {**rate, "iterations": n} for n in counts})
    assert calls["opti-cam"] == 2 * 2  # two batches, and 0 iterations are no search
    for n in counts:
        alone = run({f"{n}": {**rate, "iterations": n}})
        both = together[together["method"] == str(n)].reset_index(drop=True)
        pd.testing.assert_frame_equal(both.drop(columns="seconds"), alone.drop(columns="seconds"))
    seconds = together.groupby("method")["seconds"].mean()
    assert seconds["1"] < seconds["5"] < seconds["10"]


def test_a_run_that_converges_early_serves_all_longer_ones() -> None:
    rate = {"method": "opti-cam", "tolerance": 1e9}  # every image stops after its second step
    frame = run({"3": {**rate, "iterations": 3}, "50": {**rate, "iterations": 50}}, "AD")
    first, second = (frame.loc[frame["method"] == n, "o"].tolist() for n in ("3", "50"))
    assert first == second
    alone = run({"3": {**rate, "iterations": 3}}, "AD")
    assert first == alone["o"].tolist()


def test_exponents_share_their_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "score-cam")
    run({f"{a}": {"method": "score-cam", "exponent": a} for a in (0.1, 1, 2)})
    assert calls["score-cam"] == 2  # batches


def test_features_are_shared_where_the_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    split = ol.Classifier._split

    def counted(self: ol.Classifier, images: torch.Tensor) -> Any:
        calls[self.layer] += 1
        return split(self, images)

    monkeypatch.setattr(ol.Classifier, "_split", counted)
    classifier = make_classifier("cnn")
    early, late = classifier.layers[0], classifier.layer
    variants = {f"{m} {at}": {"method": m, "layer": at} for m in ("grad-cam", "layer-cam")
                for at in (early, late)}  # fmt: skip
    ol.evaluate(classifier, ol.Images(make_images(2), [0, 1]), variants, "AD", progress=None)
    assert calls[early] == 1
    assert calls[late] <= 2  # the evaluation's own pass, and the variants'


def test_metrics_of_other_classes_take_the_mask_as_it_is() -> None:
    metrics = ["MS", "ADCC", "I"]
    frame = run({c: {"method": "grad-cam", "class": c} for c in ("first", "last")}, metrics)
    table = ol.summarize(frame)
    assert (table.loc["first"] != table.loc["last"]).all()
    classifier, images = make_classifier("cnn"), make_images(5)
    last = classifier.logits(images).argmin(1)
    masks = ol.explain("grad-cam", classifier, images, last, warn=False)
    areas = ol.metrics.insertion(classifier, images, masks, classifier.predict(images))
    assert table.loc["last", "I"] == pytest.approx(100 * float(areas.areas.mean()), abs=1e-3)


def test_metrics_that_explain_again_raise_to_the_exponent_too() -> None:
    frame = run({"sharp": {"method": "grad-cam", "exponent": 2}}, ["ADCC-target"])
    classifier, images, targets = make_classifier("cnn"), make_images(5), torch.tensor(TARGETS)

    def sharp(x: torch.Tensor) -> torch.Tensor:
        return ol.explain("grad-cam", classifier, x, targets, warn=False) ** 2

    masks = sharp(images)
    p, o = ol.masked_probabilities(classifier, images, masks, targets)
    expected = 100 * ol.metrics.adcc(p, o, masks, sharp(images * masks))
    assert frame["value"].tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_summary_has_a_row_a_variant() -> None:
    layers = make_classifier("cnn").layers[:2]
    frame = run({at: {"method": "grad-cam", "layer": at} for at in layers} | {"fake-cam": {}})
    table = ol.summarize(frame, errors=True)
    assert list(table.index) == [*layers, "fake-cam"]
    assert not table.loc["fake-cam", "AD best"]
    assert set(frame["layer"]) == {*layers, make_classifier("cnn").layer}


def test_a_run_is_resumed_by_its_variants(tmp_path: Path) -> None:
    half = {"half": {"method": "opti-cam", "iterations": 2, "exponent": 0.5}}
    whole = half | {"whole": {"method": "opti-cam", "iterations": 2}}
    measured: list[str] = []
    note = {"out": tmp_path, "progress": lambda label, *_: measured.append(label)}
    run(half, **note)
    frame = run(whole, **note)
    assert measured == ["half", "half", "whole", "whole"]  # two batches
    again = run(whole, **note)
    assert measured == ["half", "half", "whole", "whole"]
    for other in (again, run(whole)):
        pd.testing.assert_frame_equal(other.drop(columns="seconds"), frame.drop(columns="seconds"))
    other = {"half": {"method": "opti-cam", "iterations": 2, "exponent": 0.25}}
    with pytest.raises(ol.StoreError, match=r"the options of half are .*0\.5.* there and .*0\.25"):
        run(other, out=tmp_path)


def test_an_image_on_which_a_variant_fails_is_told_under_its_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = make_images(3)
    images[1] = 0.9
    name = "bright-cam"

    def bright(classifier: ol.Classifier, images: torch.Tensor, targets: torch.Tensor) -> Any:
        if (images.flatten(1).min(1).values > 0.8).any():
            raise RuntimeError("too bright")
        return images[:, :1]

    monkeypatch.setitem(METHODS._entries, name, Method(name, bright, "Mine", "here"))
    variants = {"a": {"method": name}, "b": {"method": name, "exponent": 2}}
    data = ol.Images(images, [0, 1, 2])
    frame = ol.evaluate(make_classifier("cnn"), data, variants, "AD", progress=None)
    failed = frame[frame["error"].notna()]
    assert failed["method"].tolist() == ["a", "b"]
    assert failed["image"].tolist() == ["1", "1"]
    assert failed["error"].str.contains("raised RuntimeError: too bright").all()
    assert frame["error"].isna().sum() == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layer": "3"}, "the variant 'mine' names no method; add one, such as 'method'"),
        ({"method": "gradcam"}, "unknown method 'gradcam'; did you mean 'grad-cam'"),
        ({"method": "grad-cam", "layer": "77"}, "'77'"),
        ({"method": "grad-cam", "exponent": 0}, "exponent of mine is 0; a positive number"),
        ({"method": "grad-cam", "exponent": "2"}, "exponent of mine is '2'; a positive number"),
        ({"method": "grad-cam", "exponent": True}, "exponent of mine is True"),
        ({"method": "grad-cam", "class": "third"}, "unknown class 'third'"),
        ({"method": "grad-cam", "normalize": "no"}, "normalize of mine is 'no'; True or False"),
        ({"method": "grad-cam", "exponnet": 2}, "no option 'exponnet'; did you mean 'exponent'?"),
        ("grad-cam", "'mine': 'grad-cam' is no variant; a name and a mapping are needed"),
        ({"method": "raw-attention"}, "mine can't explain"),
    ],
)
def test_wrong_variants_are_refused_before_anything_runs(spec: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        run({"mine": spec}, progress=lambda *_: pytest.fail("something ran"))


def test_a_class_that_the_network_does_not_have() -> None:
    classifier = ol.Classifier(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 1),
        ),
        "0",
        size=32,
        activation="sigmoid",
        device="cpu",
    )
    with pytest.raises(ValueError, match="explains the second class, and Sequential has one"):
        ol.evaluate(classifier, ol.Images(make_images(1), [0]),
                    {"it": {"method": "grad-cam", "class": "second"}})  # fmt: skip


def test_settings_are_those_that_differ() -> None:
    assert Variant.of("grad-cam", {"method": "grad-cam", "exponent": 1}).settings == {}
    assert Variant.of("a", {"method": "opti-cam", "iterations": 3, "class": "last"}).settings == {
        "method": "opti-cam",
        "class": "last",
        "iterations": 3,
    }


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> Counter[str]:
    """Count how often a method is called."""
    calls: Counter[str] = Counter()
    entry = METHODS[name]

    @functools.wraps(entry.function)
    def counted(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return entry.function(*args, **options)

    monkeypatch.setitem(METHODS._entries, name, replace(entry, function=counted))
    return calls
