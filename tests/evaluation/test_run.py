"""Tidy rows and the table made of them."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import tqdm.notebook
from conftest import make_classifier, make_images
from torch import Tensor

import opticam_lite as ol
from opticam_lite.evaluation import choose, intervals, progress
from opticam_lite.metrics.localization import box_accuracy

METHODS = ["grad-cam", "fake-cam", "opti-cam"]
TARGETS = [0, 1, 2, 3, 4, 0, 1]


def run(
    images: Tensor | ol.Dataset,
    methods: Any,
    metrics: Any = "AD",
    kind: str = "cnn",
    **settings: Any,
) -> pd.DataFrame:
    """Evaluate methods of a small network."""
    dataset = ol.Images(images) if isinstance(images, Tensor) else images
    settings = {"progress": None, **settings}
    return ol.evaluate(make_classifier(kind), dataset, methods, metrics, **settings)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    dataset = ol.Images(make_images(7), TARGETS)
    options = {"opti-cam": {"iterations": 3}}
    return run(dataset, METHODS, ["AD", "AG", "AI"], batch_size=3, options=options)


def test_rows_are_tidy(frame: pd.DataFrame) -> None:
    assert len(frame) == 7 * 3 * 3
    columns = "dataset image network layer method options metric value target explained p o seconds"
    columns += " detail error"
    assert " ".join(frame.columns) == columns
    assert not frame.duplicated(["image", "method", "metric"]).any()
    assert set(frame["metric"]) == {"AD", "AG", "AI"}
    assert set(frame["layer"]) == {"4"}
    options = frame.loc[frame["method"] == "opti-cam", "options"].map(json.loads)
    assert all(o == {"iterations": 3} for o in options)
    assert (frame["seconds"] >= 0).all()


def test_values_are_those_of_single_calls(frame: pd.DataFrame) -> None:
    classifier, images = make_classifier("cnn"), make_images(7)
    targets = torch.tensor(TARGETS)
    for method in METHODS:
        options = {"iterations": 3} if method == "opti-cam" else {}
        masks = ol.explain(method, classifier, images, targets, **options)
        p, o = ol.masked_probabilities(classifier, images, masks, targets)
        for metric, function in (
            ("AD", ol.metrics.average_drop),
            ("AG", ol.metrics.average_gain),
            ("AI", ol.metrics.average_increase),
        ):
            rows = frame.loc[(frame["method"] == method) & (frame["metric"] == metric)]
            assert rows["value"].mean() == pytest.approx(function(p, o), abs=1e-2)
            assert rows["target"].tolist() == targets.tolist()
            assert rows["p"].tolist() == pytest.approx(p.tolist(), abs=1e-5)


def test_the_summary(frame: pd.DataFrame) -> None:
    table = ol.summarize(frame)
    assert list(table.index) == METHODS
    assert list(table.columns) == ["AD", "AG", "AI", "T"]
    expected = frame.query("method == 'opti-cam' and metric == 'AG'")["value"].mean()
    assert table.loc["opti-cam", "AG"] == pytest.approx(expected)
    seconds = frame.query("method == 'grad-cam'")["seconds"].median()
    assert table.loc["grad-cam", "T"] == pytest.approx(8 * seconds)


def test_images_without_labels_are_explained_for_their_prediction(images: Tensor) -> None:
    frame = run(images, ["grad-cam"])
    assert frame["target"].tolist() == make_classifier("cnn").predict(images).tolist()


def test_limit_and_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    note = {"progress": lambda *step: seen.append(step)}
    frame = run(make_images(9), ["fake-cam"], limit=5, batch_size=2, **note)
    assert frame["image"].tolist() == [str(i) for i in choose(9, 5)]
    assert seen == [("fake-cam", 2, 5), ("fake-cam", 4, 5), ("fake-cam", 5, 5)]


def test_the_choice_of_images() -> None:
    assert choose(4) == choose(4, 9) == [0, 1, 2, 3]
    few, many = choose(256, 16), choose(256, 64)
    assert few == sorted(few)
    assert set(few) <= set(many)
    assert len({i % 8 for i in many}) == 8  # every class, though classes take turns
    assert choose(256, 16, seed=1) != few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["gradcam"]}, "unknown method 'gradcam'"),
        ({"metrics": ["ad"]}, "unknown metric 'ad'"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 1.5}, "limit is 1.5; a whole number ≥ 1 is needed"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "8"}, "batch_size is '8'; a whole number ≥ 1 is needed"),
        ({"options": ["x"]}, r"options is \['x'\]; a mapping"),
        ({"options": {"optic": {}}}, "unknown method 'optic'"),
        (
            {"options": {"opti-cam": {"iterations": 5}}},
            "options are given for opti-cam, which is not among the methods: grad-cam",
        ),
        ({"seed": 1.5}, "seed is 1.5; a whole number from 0 to 9223372036854775807 is needed"),
        ({"workers": 1.5}, "workers is 1.5; a whole number ≥ 0 is needed"),
        ({"engine": "ray", "processes": 0}, "processes is 0; a whole number ≥ 1 is needed"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: dict, message: str, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(images, **{"methods": ["grad-cam"], "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


class Boxed(ol.Images):
    """Images with a box each."""

    has_boxes = True

    def __init__(self, images: Tensor, boxes: list[list[int]]) -> None:
        super().__init__(images)
        self._boxes = boxes

    def sample(self, index: int) -> ol.Sample:
        box = torch.tensor([self._boxes[index]])
        return replace(super().sample(index), boxes=box)


@pytest.mark.parametrize("box", [[10, 10, 300, 20], [9, 1, 9, 5], [-3, 0, 20, 20]], ids=str)
def test_a_wrong_box_is_that_images_fault(box: list[int], images: Tensor) -> None:
    dataset = Boxed(images, [[1, 1, 9, 9], box, [2, 2, 8, 8]])
    # For metrics without boxes, too: all metrics and methods are of the same images.
    for metrics in (["AD"], ["AD", "EP"]):
        frame = run(dataset, ["grad-cam"], metrics)
        assert frame.drop_duplicates("image")["error"].notna().tolist() == [False, True, False]
        error = frame["error"].dropna().item()
        assert f"the box {tuple(box)} is empty or leaves its image" in error


def test_options_may_come_with_the_methods(images: Tensor) -> None:
    methods = {"opti-cam": {"iterations": 1}}
    frame = run(images, methods, ["AG"])
    expected = run(images, ["opti-cam"], ["AG"], options=methods)
    assert frame["options"].eq('{"iterations": 1}').all()
    assert frame["value"].tolist() == expected["value"].tolist()
    with pytest.raises(ValueError, match="options are given twice"):
        run(images, methods, options=methods)


def test_a_callback_is_no_option_of_the_rows(images: Tensor) -> None:
    seen: list[Any] = []
    methods = {"opti-cam": {"iterations": 1, "callback": seen.append}}
    frame = run(images, methods, ["AG"])
    assert len(seen) == 1
    assert frame["options"].eq('{"iterations": 1}').all()


def test_the_official_metric_needs_the_true_class(images: Tensor) -> None:
    class Some(Boxed):
        def target(self, index: int) -> int | None:
            return None if index == 1 else 0

    frame = run(Some(images, [[1, 1, 30, 30]] * 3), "grad-cam", ["OM", "LE"])
    assert frame.loc[frame["metric"] == "OM", "value"].isna().tolist() == [False, True, False]
    assert frame.loc[frame["metric"] == "LE", "value"].notna().all()


def test_a_method_that_does_not_fit_is_refused(images: Tensor) -> None:
    dense = make_classifier("dense")
    dense.name = "DenseNet"
    with pytest.raises(ValueError, match="cam can't explain DenseNet: no linear layer"):
        ol.evaluate(dense, ol.Images(images), ["cam"])
    with pytest.raises(TypeError, match="grad-cam has no option"):
        run(images, ["grad-cam"], options={"grad-cam": {"a": 1}})


def test_features_are_computed_once_for_all_methods(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, seen = make_classifier("cnn"), []
    split = type(classifier._cut).split
    monkeypatch.setattr(
        type(classifier._cut), "split", lambda *given: seen.append(1) or split(*given)
    )
    methods = ["grad-cam", "score-cam", "opti-cam"]
    options = {"opti-cam": {"iterations": 2}}
    shared = ol.evaluate(classifier, ol.Images(images), methods, options=options, progress=None)
    assert len(seen) == 1
    assert classifier._memory is None
    for method in methods:
        alone = run(images, {method: options.get(method, {})}, ["AD", "AG", "AI"])
        rows = shared[shared["method"] == method].reset_index(drop=True)
        columns = ["image", "metric", "value", "p", "o"]
        pd.testing.assert_frame_equal(rows[columns], alone[columns], check_exact=True)


def test_the_shared_features_count_for_each_method_that_uses_them(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, clock = make_classifier("cnn"), [0.0]
    remember = type(classifier).remember

    def slow(self: ol.Classifier, images: Tensor) -> ol.Classifier:
        clock[0] += 6
        return remember(self, images)

    monkeypatch.setattr(type(classifier), "remember", slow)
    monkeypatch.setattr("opticam_lite.evaluation.measuring._now", lambda _: clock[0])
    methods = ["grad-cam", "fake-cam", "cam"]
    frame = ol.evaluate(classifier, ol.Images(images), methods, ["AD"], progress=None)
    assert clock == [6]
    seconds = frame.groupby("method")["seconds"].unique().map(list).to_dict()
    assert seconds == {"grad-cam": [2], "fake-cam": [0], "cam": [2]}  # 6 s for 3 images


def test_what_is_remembered_is_of_equal_images_and_this_layer(images: Tensor) -> None:
    classifier = make_classifier("cnn")
    remembering = classifier.remember(images)
    assert torch.equal(remembering.features(images.clone()), classifier.features(images))
    assert remembering.recalls == 1
    other = images.flip(0)
    assert torch.equal(remembering.features(other), classifier.features(other))
    x = images.clone().requires_grad_()
    assert remembering.features(x).requires_grad
    first = classifier.layers[0]
    assert torch.equal(
        remembering.at(first).features(images), classifier.at(first).features(images)
    )
    assert (remembering.recalls, classifier.recalls) == (1, 0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_decoding_ahead_changes_nothing(workers: int) -> None:
    frame = run(make_images(9), ["fake-cam"], batch_size=2, workers=workers)
    expected = run(make_images(9), ["fake-cam"])
    assert frame["image"].tolist() == expected["image"].tolist()
    assert frame["o"].tolist() == pytest.approx(expected["o"].tolist(), abs=1e-5)


def test_the_next_images_are_decoded_while_the_network_computes() -> None:
    class Watched(ol.Images):
        def __init__(self) -> None:
            super().__init__(make_images(4))
            self.next_batch = threading.Event()

        def sample(self, index: int) -> ol.Sample:
            if index >= 2:
                self.next_batch.set()
            return super().sample(index)

    dataset, arrived = Watched(), []

    def hold(method: str, done: int, total: int) -> None:
        """Hold up the first batch until the second one is being read."""
        arrived.append(dataset.next_batch.wait(60))

    run(dataset, ["fake-cam"], batch_size=2, workers=1, progress=hold)
    assert arrived == [True, True]


def test_bars_show_rate_and_time_left(
    images: Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opticam_lite.evaluation.progress.SECONDS_BEFORE", 0)
    run(images, ["fake-cam", "grad-cam"], progress=True)
    shown = capsys.readouterr().err
    for method in ("fake-cam", "grad-cam"):
        assert re.search(rf"{method} 100% .* 3/3, [\d.]+ img/s, 00:00 left", shown)
    for silent in (None, False):
        run(images, ["fake-cam"], progress=silent)
    assert capsys.readouterr().err == ""


def test_bars_in_a_notebook_stand_in_line_and_go_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    class Bar(tqdm.notebook.tqdm):
        def __init__(self, **options: object) -> None:
            super().__init__(**options, display=False)
            made.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    with progress.Tracker(True, {"cam": 0, "extremal-perturbation": 0}, 3) as tracker:
        tracker.update("cam", 3, 6.0)
        texts = [bar.container.children[0] for bar in made]
        assert {text.layout.width for text in texts} == {"22ch"}
        tracker.update("extremal-perturbation", 3, 0.001)
    assert [bar.container.layout.visibility for bar in made] == ["hidden", "hidden"]


def test_a_log_gets_lines(
    images: Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bar is redrawn: a log would hold every state of it, and codes that move the cursor."""
    monkeypatch.setattr("opticam_lite.evaluation.progress.SECONDS_BEFORE", 0)
    run(images, ["fake-cam", "grad-cam"], progress=True, batch_size=1)
    shown = capsys.readouterr().err
    assert not set("\r\x1b") & set(shown)
    # Two lines each at most: one after 0 seconds, none for 30, one at the end.
    assert 2 <= len(shown.splitlines()) <= 4
    form = r"(fake|grad)-cam +\d+%.* \d/3(, .* left)?$"
    assert all(re.match(form, line) for line in shown.splitlines())


def test_an_empty_path_is_not_the_current_folder(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        with pytest.raises(ValueError, match="out is empty; name a file or a folder"):
            run(images, ["fake-cam"], out=empty)
    with pytest.raises(ValueError, match="the path is empty"):
        ol.summarize("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rate", "words"),
    [(1390.4, "1390 img/s"), (9.96, "10 img/s"), (0.545, "0.5 img/s"), (0.02, "50 s/img")],
)
def test_rates_are_numbers_that_people_read(rate: float, words: str) -> None:
    assert progress.rate_in_words(rate) == words


def test_the_summary_with_errors(frame: pd.DataFrame) -> None:
    table = ol.summarize(frame, errors=True)
    of = ("", " ±", " low", " high", " best")
    expected = [f"{metric}{part}" for metric in ("AD", "AG", "AI") for part in of]
    assert list(table.columns) == [*expected, "T", "images"]
    values = frame.query("method == 'grad-cam' and metric == 'AD'")["value"]
    mean = sum(values) / 7
    error = (sum((v - mean) ** 2 for v in values) / 6) ** 0.5 / 7**0.5
    assert table.loc["grad-cam", "AD ±"] == pytest.approx(error)
    assert table["images"].tolist() == [7, 7, 7]
    one = frame[frame["image"] == "0"]
    assert ol.summarize(one, errors=True)["AD ±"].isna().all()
    with pytest.raises(ValueError, match="no rows to summarise"):
        ol.summarize(frame[:0])


def test_a_table_compares_methods_on_the_images_that_all_have(frame: pd.DataFrame) -> None:
    """An interrupted run: one method has all seven images, another three."""
    cut = frame[(frame["method"] != "opti-cam") | frame["image"].isin(["0", "1", "2"])]
    with pytest.warns(UserWarning, match=r"\(3\); .* left out: grad-cam 4, fake-cam 4 "):
        table = ol.summarize(cut, errors=True)
    assert table["images"].tolist() == [3, 3, 3]
    expected = ol.summarize(frame[frame["image"].isin(["0", "1", "2"])])
    pd.testing.assert_series_equal(table["AD"], expected["AD"])
    each = ol.summarize(cut, errors=True, common=False)
    assert each["images"].tolist() == [7, 7, 3]
    assert not each["AD best"].any()  # three images do not decide
    assert each["AD"].iloc[0] == ol.summarize(frame)["AD"].iloc[0]
    # A metric that one method lacks does not count, and of some methods all images are common.
    some = cut[(cut["metric"] != "AG") | (cut["method"] == "opti-cam")]
    two = ol.summarize(some, methods=["fake-cam", "grad-cam"])
    assert list(two.index) == ["fake-cam", "grad-cam"]
    assert list(two.columns) == ["AD", "AI", "T"]
    none = cut[(cut["method"] != "grad-cam") | ~cut["image"].isin(["0", "1", "2"])]
    with pytest.raises(ValueError, match=r"no image with AD in common; .* common=False"):
        ol.summarize(none)
    with pytest.raises(ValueError, match="unknown method of these rows 'cam'"):
        ol.summarize(frame, methods=["cam"])


def test_the_best_is_marked_where_it_is_surely_better(frame: pd.DataFrame) -> None:
    made = []
    for method, drops in {"cam": 50, "grad-cam": 10, "fake-cam": 0, "opti-cam": 12}.items():
        rows = frame[(frame["method"] == "cam") | (frame["method"] == "grad-cam")]
        rows = rows[rows["metric"] == "AD"].assign(method=method)
        made.append(rows.assign(value=drops + np.arange(7) * (-1) ** np.arange(7)))
    told = ol.summarize(pd.concat(made), errors=True)
    assert told["AD best"].to_dict() == {
        **{"cam": False, "grad-cam": True, "fake-cam": False, "opti-cam": False}
    }
    made[3] = made[3].assign(value=made[1]["value"])
    assert not ol.summarize(pd.concat(made), errors=True)["AD best"].any()


def test_the_summary_of_folders(images: Tensor, tmp_path: Path) -> None:
    first, second = make_classifier("cnn"), make_classifier("cnn")
    with torch.no_grad():
        next(second.network.parameters())[0] += 1
    folders = [tmp_path / "first", tmp_path / "second"]
    for classifier, out in zip((first, second), folders, strict=True):
        ol.evaluate(classifier, ol.Images(images), ["grad-cam"], ["AD"], out=out)
    table = ol.summarize(folders, errors=True)
    assert table.index.names == ["folder", "method"]
    for folder, row in zip(folders, table.itertuples(), strict=True):
        alone = ol.summarize(folder, errors=True)
        assert row.Index == (str(folder), "grad-cam")
        assert list(row)[1:] == alone.iloc[0].tolist()
    twice = ol.summarize([folders[0], folders[0]], errors=True)
    pd.testing.assert_frame_equal(twice, ol.summarize(folders[0], errors=True))


def test_the_error_of_a_metric_that_is_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of BA, against the spread of BA over many samples of as many images."""
    monkeypatch.setattr(intervals, "DRAWS", 150)  # the mean over samples is what is compared
    generator = np.random.default_rng(0)

    def sample() -> pd.DataFrame:
        """Overlaps that are good at another threshold for each image."""
        best = generator.uniform(0, 100, (32, 1))
        overlaps = torch.tensor(np.exp(-(((np.arange(100) - best) / 30) ** 2)))
        rows = pd.DataFrame({"value": 100 * box_accuracy(overlaps).numpy(), "metric": "BA"})
        rows["detail"] = overlaps.tolist()
        rows["image"] = rows.index.astype(str)
        about = {
            "dataset": "d",
            "network": "n",
            "layer": "l",
            "method": "m",
            "options": "{}",
            "error": None,
        }
        return rows.assign(seconds=1.0, **about)

    samples = [sample() for _ in range(50)]
    tables = pd.concat(ol.summarize(rows, errors=True) for rows in samples)
    spread, told = tables["BA"].std(), tables["BA ±"].mean()
    assert told == pytest.approx(spread, rel=0.25)
    alone = np.mean([rows["value"].std() / 32**0.5 for rows in samples])  # at their own thresholds
    assert abs(told - spread) < abs(alone - spread) / 2


def test_the_summary_of_several_runs(images: Tensor) -> None:
    runs = [
        run(images, {"opti-cam": {"iterations": n}}, kind=kind).assign(network=kind)
        for kind, n in (("cnn", 1), ("cnn", 2), ("dense", 1))
    ]
    joined = ol.summarize(pd.concat(runs, ignore_index=True))
    assert joined.index.names == ["network", "layer", "method", "options"]
    assert len(joined) == 3
    for rows, value in zip(runs, joined["AD"], strict=True):
        assert ol.summarize(rows)["AD"].item() == pytest.approx(value)
    with pytest.raises(ValueError, match="opti-cam has AD twice for the image 0: these are rows"):
        ol.summarize(pd.concat([runs[0], runs[0]]))
    two = ol.summarize(pd.concat([runs[0], runs[2]]))
    assert list(two.index) == [("cnn", "4", "opti-cam"), ("dense", "3", "opti-cam")]
