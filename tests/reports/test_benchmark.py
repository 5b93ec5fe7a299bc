"""The benchmark report: the paper's tables, what is checked before it runs, what it shows."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd
import pytest
from test_reports import Page
from torchvision.utils import save_image

import opticam_lite as ol
from opticam_lite import reports
from opticam_lite.evaluation import summary
from opticam_lite.methods import METHODS
from opticam_lite.metrics import METRICS
from opticam_lite.reports import benchmark, runner, tables

# Papermill and Jupyter's libraries are still on their way to the newest Python.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = {"weights": "random", "limit": 3, "methods": "grad-cam, fake-cam", "metrics": "AD, AG, LE"}


@pytest.fixture(scope="module")
def subject():
    return reports.Benchmark(**QUICK).prepare()


@pytest.fixture(scope="module")
def frame(subject):
    return ol.evaluate(
        subject.classifier, subject.dataset, subject.methods, subject.metrics, limit=3
    )


def figures(section):
    """The table of a section, without what stands below it."""
    return Page(section.partition("</table>")[0])


# --------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize(
    ("number", "columns", "rows"),
    [
        (1, "AD AG AI T", {"ResNet50": 12, "VGG16": 12}),
        (2, "AD AG AI T", {"DeiT-B": 14, "ViT-B": 14}),
        (3, "I D", {"DeiT-B": 13, "ResNet50": 11, "VGG16": 11, "ViT-B": 13}),
        (4, "AOPC MS ADCC", {"ResNet50": 8, "VGG16": 8}),
        ("A7", "OM LE F1 BA SP EP SM", {"ResNet50": 9, "VGG16": 9}),
        ("A8", "OM LE F1 BA SP EP SM", {"DeiT-B": 11, "ViT-B": 11}),
    ],
)
def test_the_papers_tables_have_one_form(number, columns, rows):
    table = tables.paper_table(number)
    assert list(table.columns) == ["network", "method", *columns.split()]
    assert table.attrs["source"] == f"Table {number}"
    assert table.groupby("network").size().to_dict() == rows
    assert not table.duplicated(["network", "method"]).any()
    assert set(table["method"]) <= set(METHODS)
    for column in columns.split():
        assert column == "T" or column in METRICS
        known = table[column].dropna()
        assert len(known) >= len(table) - 1  # the scan lost single cells at most
        assert known.between(0, {"T": 200, "MS": 2, "SM": 5}.get(column, 100)).all()


@pytest.mark.parametrize(("number", "columns", "rows"), [("A10", "AD AG AI", 9), ("A11", "I D", 6)])
def test_the_papers_tables_of_medical_images(number, columns, rows):
    table = tables.paper_table(number)
    assert list(table.columns) == ["dataset", "network", "method", *columns.split()]
    assert set(table.groupby(["dataset", "network"]).size()) == {rows}
    assert set(table["dataset"]) == set(benchmark.MEDICAL)
    assert set(table["method"]) <= set(METHODS)
    assert table[columns.split()].map(lambda value: 0 <= value <= 100).all(axis=None)
    best = table[table["method"] == "opti-cam"]  # "AD and AI are near perfect, AG extremely high"
    if number == "A10":
        assert (best["AD"] <= 0.2).all()
        assert (best["AG"] > 85).all()
    else:  # "performs best D on VGG16 of Kvasir"
        vgg = table[(table["dataset"] == "kvasir") & (table["network"] == "VGG16")]
        assert vgg.set_index("method")["D"].idxmin() == "opti-cam"


def test_medical_images_are_compared_with_the_papers(tmp_path):
    scenes = ol.load_dataset("scenes")
    for kind in ("NORMAL", "PNEUMONIA"):
        for split in ("train", "val", "test"):
            (tmp_path / split / kind).mkdir(parents=True)
        save_image(scenes[0].image, tmp_path / "test" / kind / "a.png")
    asked = reports.Benchmark(**QUICK, model="resnet18", data=f"chest-xray:{tmp_path}")
    subject = asked.prepare()
    frame = ol.evaluate(subject.classifier, subject.dataset, subject.methods, ["AD", "AG", "I"])
    table = ol.summarize(frame, errors=True)
    shown = benchmark.section("What the mask keeps", subject, table)
    assert "paper, Chest X-ray: another network" in shown
    assert "Table A10" in shown
    assert "91.2" in shown  # AG of Opti-CAM
    assert "66.2" not in shown  # ImageNet's
    assert "Table A11" in benchmark.section("Insertion and deletion", subject, table)
    localised = table.assign(
        **dict.fromkeys(["F1", "F1 low", "F1 high"], 1.0), **{"F1 best": False}
    )
    none = benchmark.section("Localisation", subject, localised)
    assert "appendix on Chest X-ray has no network of this kind" in none


def test_what_the_paper_says_of_its_tables_holds_of_their_transcription():
    def best(number, network, metric):
        table = tables.paper_table(number)
        table = table[(table["network"] == network) & (table["method"] != "fake-cam")]
        values = table.set_index("method")[metric]
        best = values.min() if metric in ("D", "MS", "OM", "LE", "SM") else values.max()
        return set(values.index[values == best])

    # Section 5.3.2, 5.3.3, Appendix B.2.
    assert best(3, "ResNet50", "I") == {"extremal-perturbation"}
    assert best(3, "DeiT-B", "I") == best(3, "ViT-B", "D") == best(3, "DeiT-B", "D") == {"tibav"}
    for network in ("ResNet50", "VGG16"):
        assert best(4, network, "MS") == best("A7", network, "LE") == {"opti-cam"}
        assert "opti-cam" in best("A7", network, "OM")
    for network in ("ViT-B", "DeiT-B"):
        for metric in ("OM", "LE", "F1", "SM"):
            assert best("A8", network, metric) == {"opti-cam"}


# ---------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], ["saliency", "benchmark"]),
        (["MODEL=resnet50"], ["saliency"]),
        (["REPORT="], ["saliency", "benchmark"]),
        (["MODEL=resnet50", "report=Benchmark"], ["benchmark"]),
        (["REPORT=boxes"], ["boxes"]),
        (["REPORT=all", "MODEL=resnet50"], list(reports.REPORTS)),
    ],
)
def test_reports_are_chosen_by_name(arguments, chosen):
    found, others = runner.choose_reports(arguments)
    assert found == chosen
    assert others == [a for a in arguments if a.startswith("MODEL")]


def test_each_report_takes_the_parameters_that_it_knows(tmp_path):
    given = ["LIMIT=3", "MODEL=scenes_vgg", "MODELS=scenes_vit", f"OUT={tmp_path}"]
    plans = runner.parse_several(given, ["saliency", "boxes"])
    (saliency, there, _), (boxes, beside, _) = plans.values()
    assert saliency.limit == boxes.limit == 3
    assert saliency.model == "scenes_vgg"
    assert boxes.models == "scenes_vit"
    assert (there, beside) == (tmp_path / "saliency_report", tmp_path / "boxes_report")
    for wrong in ("MODLE=x", "LIMIT", "METRICS=AD"):  # the benchmark's METRICS is of neither
        with pytest.raises(reports.ReportError, match=wrong.partition("=")[0]):
            runner.parse_several([wrong], ["saliency", "boxes"])


def test_the_page_that_lists_reports(tmp_path, monkeypatch, capsys):
    made = []

    def run(parameters, out, timeout, report):
        made.append(report)
        out.mkdir(parents=True)
        for name in (f"{report}_report.html", f"{report}_report.ipynb", "table.csv"):
            (out / name).write_text("x")
        return [runner.Failure("cell In [3]", "ValueError: <b>no</b>")] if report == "boxes" else []

    monkeypatch.setattr(runner, "run", run)
    assert runner.main(["REPORT=all", "LIMIT=2", f"OUT={tmp_path / 'all'}"]) == 1
    assert made == list(reports.REPORTS)
    page = (tmp_path / "all" / "index.html").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "all" / "index.html")
    for report in reports.REPORTS:
        assert f'<a href="{report}_report/{report}_report.html">' in page
        assert f'<a href="{report}_report/table.csv">' in page
    assert page.count("not complete") == 1
    assert "cell In [3] failed" in page
    assert page.count("LIMIT=2") == len(reports.REPORTS)
    assert "metrics.json" not in page  # there is none


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["REPORT=benchmrk"], ["'benchmrk'", "'benchmark'"]),
        (["METRICS=AD, AOCP"], ["'AOCP'", "'AOPC'"]),
        (["METRICS=,"], ["METRICS names none", "ADCC"]),
        (["METHODS=gradcam"], ["'gradcam'", "'grad-cam'"]),
        (["DATA=imagnet:photos"], ["'imagnet'", "'imagenet'"]),
        (["DATA=scenes-empty", "METRICS=LE", "MODEL=squeezenet1_1"], ["LE", "no boxes"]),
        (["LIMIT=0"], ["LIMIT is 0"]),
        (["IMAGES=scenes"], ["'IMAGES'", "DATA"]),
    ],
)
def test_a_wrong_parameter_ends_before_anything_runs(arguments, words, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["REPORT=benchmark", "WEIGHTS=random", f"OUT={out}"]
    given = given[1:] if arguments[0].startswith("REPORT") else given
    assert runner.main([*given, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("report: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)
    assert not out.exists()


def test_all_reports_are_checked_before_the_first_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(parameters, out, timeout, report):
        ran.append(report)
        return [runner.Failure("cell 3", "ValueError: no")] if report == "saliency" else []

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(reports.Saliency, "prepare", lambda _: None)
    monkeypatch.setattr(reports.Benchmark, "prepare", lambda _: None)
    assert runner.main([]) == 1
    assert ran == ["saliency", "benchmark"]
    shown = capsys.readouterr()
    assert shown.out.split() == [
        "build/saliency_report/saliency_report.html",
        "build/benchmark_report/benchmark_report.html",
        "build/index.html",
    ]
    assert "cell 3 failed with ValueError: no" in shown.err

    def wrong(_):
        raise ValueError("the second is wrong")

    ran.clear()
    monkeypatch.setattr(reports.Benchmark, "prepare", wrong)
    assert runner.main([]) == 2
    assert ran == []


# ------------------------------------------------------------------------- what is reported on


def test_all_stands_for_every_method_and_metric_that_applies():
    subject = reports.Benchmark(
        model="squeezenet1_1", weights="random", methods="all", metrics="all"
    ).prepare()
    assert {"grad-cam", "opti-cam"} <= set(subject.methods)
    assert {"AD", "I", "ADCC"} <= set(subject.metrics)
    # The scenes' boxes are of classes that this network does not know.
    assert subject.left_out["LE"] == "scenes has no boxes"
    assert "raw-attention" in subject.left_out
    assert {*subject.methods, *subject.metrics, *subject.left_out} == {*METHODS, *METRICS}


def test_rows_resume_where_nothing_else_changed(subject, tmp_path, monkeypatch):
    def rows(subject):
        return benchmark.rows_folder(str(tmp_path), subject)

    first = rows(subject)
    assert first == rows(subject)
    assert first.parent == tmp_path
    assert benchmark.rows_folder("", subject) is None
    assert rows(replace(subject, methods={"cam": {}}, metrics=("AI",))) == first
    asked = replace(subject.parameters, iterations=6)
    other = replace(subject, classifier=subject.classifier.at("layer3"))
    assert len({first, rows(replace(subject, parameters=asked)), rows(other)}) == 3
    for where, measures in {
        "network.classifier.lay_out": True,
        "datasets.files.read_rgb": True,
        "methods.grad_cam.features_and_gradients": False,
        "metrics.faithfulness.drop": False,
        "plots.bars": False,
        "making.scenes.write_evaluation": False,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"opticam_lite.{where}", lambda *_: None)
            assert (rows(subject) != first) == measures


def test_a_changed_method_is_measured_again_and_no_other(subject, tmp_path, monkeypatch):
    def measure():
        measured = set()
        ol.evaluate(
            subject.classifier,
            subject.dataset,
            subject.methods,
            ["AD"],
            limit=3,
            out=benchmark.rows_folder(str(tmp_path), subject),
            progress=lambda method, *_: measured.add(method),
        )
        return measured

    assert measure() == set(subject.methods)
    assert measure() == set()
    changed = replace(METHODS["grad-cam"], function=METHODS["layer-cam"].function)
    monkeypatch.setitem(METHODS._entries, "grad-cam", changed)
    with pytest.warns(UserWarning, match="the code of grad-cam has changed"):
        assert measure() == {"grad-cam"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "network", "same"),
    [
        ("resnet50", "ResNet50", True),
        ("vgg16_bn", "VGG16", True),
        ("vgg11", "VGG16", False),
        ("squeezenet1_0", "ResNet50", False),
    ],
)
def test_the_papers_network_of_the_same_kind(subject, monkeypatch, name, network, same):
    monkeypatch.setattr(subject.classifier, "name", name)
    assert benchmark.counterpart(subject) == (network, same)


def test_transformers_have_their_own_tables():
    subject = reports.Benchmark(**{**QUICK, "model": "scenes_vit"}).prepare()
    assert benchmark.counterpart(subject) == ("ViT-B", False)
    measured = {"AD": [1.0], "AD low": [0.5], "AD high": [3], "AD best": [False]}
    measured |= {"MS": [1.5], "MS low": [1.25], "MS high": [1.75], "MS best": [True]}
    table = pd.DataFrame(measured | {"T": [1.0]}, index=["rollout"])
    shown = benchmark.section("What the mask keeps", subject, table)
    assert "the paper's Table 2" in shown
    assert figures(shown).row(tables.title("rollout")) == ["1.0 0.5–3.0", "1.00", "42.1", "0.02"]
    # The paper's Table 4 has no transformer.
    shown = benchmark.section("AOPC, sensitivity, ADCC", subject, table)
    assert figures(shown).row(tables.title("rollout")) == ["1.50 1.25–1.75"]
    assert "Table 4 has no network of this kind" in shown


# ------------------------------------------------------------------------------- what it shows


def test_a_section_shows_measured_and_printed_figures(subject, frame):
    table = ol.summarize(frame, errors=True)
    shown = benchmark.section("Localisation", subject, table)
    page = figures(shown)
    value, low, high = table.loc["grad-cam", ["LE", "LE low", "LE high"]]
    assert page.row("Grad-CAM") == [f"{value:.1f} {low:.1f}–{high:.1f}", "65.8"]
    assert page.row("Opti-CAM") == ["–", "64.8"]
    assert "paper: another network" in shown
    # In words that hold for `make` and for a notebook opened by hand.
    assert "Not measured: OM, F1, BA, SP, EP, SM (the parameter metrics does not name" in shown
    (image,) = Page(shown).all("img")
    assert f"Grad-CAM {value:.3g} ({low:.3g} to {high:.3g})" in image["alt"]
    assert Page(benchmark.section("Insertion and deletion", subject, table)).rows == []


def test_each_of_the_papers_tables_is_one_that_fits_a_page(subject, frame, tmp_path):
    table = pd.DataFrame(1.0, index=frame["method"].unique(), columns=[*METRICS, "T"])
    beside = [table.add_suffix(of) for of in summary.ERRORS]
    table = pd.concat([table, *beside], axis="columns").rename_axis("method").assign(images=3)
    parameters = replace(subject.parameters, metrics="all")
    asked = replace(subject, parameters=parameters, metrics=tuple(METRICS))
    benchmark.write_metrics(tmp_path, asked, table, frame)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    columns = re.findall(r"\\begin\{tabular\}\{(l(r|l)+)\}", text)
    tables_of_all = len(benchmark.SECTIONS) + 1  # one of metrics that the paper has not
    assert len(columns) == text.count(r"\caption{") == tables_of_all
    assert max(len(column) for column, _ in columns) <= 12
    heads = [line for line in text.splitlines() if line.startswith(" & ")]
    shown = [cell.strip(" \\") for line in heads for cell in line.split("&")[1:]]
    assert sorted(shown) == sorted([*METRICS, "T"])


def test_a_cell_that_the_scan_lost_is_a_dash(subject):
    paper = tables.paper_table(4)
    paper = paper[paper["network"] == "ResNet50"].copy()
    paper.loc[paper["method"] == "score-cam", "MS"] = float("nan")
    table = pd.DataFrame({"MS": [1.5]}, index=["grad-cam"])
    page = Page(tables.comparison(table, paper, here="mine"))
    assert page.row("Score-CAM") == ["–", "–"]
    assert page.row("Grad-CAM") == ["1.50", "1.05"]


def test_best_and_worst_are_those_whose_probability_changes_most(subject, frame):
    frame = frame.assign(p=0.5, o=0.5 + frame["o"] - frame["p"])  # two decimals each
    shown = {best: benchmark.extremes(frame, subject, best=best).alt for best in (True, False)}
    for method, of_method in frame.groupby("method"):
        change = of_method["o"] - of_method["p"]
        for best, row in ((True, change.idxmax()), (False, change.idxmin())):
            p, o = of_method.loc[row, ["p", "o"]]
            told = next(line for line in shown[best].split("Row ") if tables.title(method) in line)
            assert of_method.loc[row, "image"] in told
            assert f"{p:.2f} → {o:.2f}" in told


def test_small_probabilities_keep_their_digits(subject, frame):
    small = frame.assign(p=0.00123, o=0.00456)
    assert "0.0012 → 0.0046" in benchmark.extremes(small, subject).alt
    assert "0.90 → 0.00" in benchmark.extremes(frame.assign(p=0.9, o=0.0), subject).alt


def test_a_broken_image_is_left_out_of_best_and_worst(subject, frame):
    broken = frame.copy()
    broken.loc[broken["image"] == broken["image"][0], ["p", "o"]] = float("nan")
    picture = benchmark.extremes(broken, subject, examples=9)
    assert picture.alt.count("Row ") == 4  # the two other images of each of two methods
