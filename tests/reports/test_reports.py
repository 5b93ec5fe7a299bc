"""The report: what is checked before it runs, what it shows, what a failure leaves behind."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from filelock import FileLock
from nbconvert.filters import markdown2html
from PIL import Image
from test_text import NASTY, SAFE, Shown

import opticam_lite as ol
from opticam_lite import reports
from opticam_lite.evaluation import choose
from opticam_lite.reports import records, runner, saliency, tables
from opticam_lite.text import plain

# Papermill and Jupyter's libraries are still on their way to the newest Python.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = ["WEIGHTS=random", "LIMIT=4", "EXAMPLES=2", "ITERATIONS=2"]


class Page(HTMLParser):
    """Collects the tags of a page, and the rows of its tables as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += " "

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, title):
        return next(row[1:] for row in self.rows if row[0] == title)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(pixels.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def table():
    """Figures in which the paper's ordering holds."""
    return pd.DataFrame(
        {
            "AD": [12.0, 8.0, 0.5, 0.1],
            "AG": [10.0, 20.0, 60.0, 0.2],
            "AI": [30.0, 50.0, 90.0, 48.0],
            "T": [0.1, 4.0, 6.0, 0.0],
        },
        index=["grad-cam", "score-cam", "opti-cam", "fake-cam"],
    )


# ---------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("report", reports.REPORTS)
def test_the_parameters_cell_of_a_notebook_is_its_dataclass(report):
    cell = papermill.inspect_notebook(str(runner.notebook_path(report)))
    written = [
        (p["name"], p["inferred_type_name"], ast.literal_eval(p["default"]), p["help"])
        for p in cell.values()
        if p["name"] not in ("out", "rows")
    ]
    assert written == [
        (p.name, type(p.default).__name__, p.default, p.metadata["explanation"])
        for p in reports.REPORTS[report].known()
    ]
    for name, kind, default, explanation in written:
        assert reports.REPORTS[report].__annotations__.get(name, kind) == kind
        assert explanation or default == "", name


@pytest.mark.parametrize("report", reports.REPORTS)
def test_a_report_has_the_defaults_of_its_dataclass(report):
    parameters, out, timeout = runner.parse([], report)
    assert parameters == reports.REPORTS[report]()
    assert (out, timeout) == (Path(f"build/{report}_report"), 7200)
    assert type(parameters).of(globals() | parameters.settings()) == parameters


def test_the_activation_is_that_of_the_network():
    parameters, _, _ = runner.parse(["ACTIVATION=sigmoid", "LIMIT=2", "METHODS=fake-cam"])
    assert parameters.prepare().classifier.activation == "sigmoid"
    parameters, _, _ = runner.parse(["ACTIVATION=sigmoids"])
    with pytest.raises(ValueError, match="unknown activation 'sigmoids'; did you mean 'sigmoid'"):
        parameters.prepare()


def test_parameters_are_converted_and_empty_ones_left_at_their_default():
    parameters, out, timeout = runner.parse(
        ["LIMIT=7", "normalize=No", "IMAGES=my = photos", "LAYER=", "OUT=some where", "TIMEOUT=9.5"]
    )
    assert parameters == reports.Saliency(limit=7, normalize=False, images="my = photos")
    assert (out, timeout) == (Path("some where"), 9.5)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("MODLE=resnet50", ["'MODLE'", "did you mean 'MODEL'"]),
        ("LIMIT=many", ["LIMIT", "'many'", "whole number"]),
        ("LIMIT=2.5", ["LIMIT", "'2.5'", "whole number"]),
        ("NORMALIZE=perhaps", ["NORMALIZE", "'perhaps'", "yes or no"]),
        ("TIMEOUT=0", ["TIMEOUT", "above 0"]),
        ("resnet50", ["'resnet50'", "NAME=value"]),
    ],
)
def test_wrong_parameters_are_told(argument, words):
    with pytest.raises(reports.ReportError) as error:
        runner.parse([argument])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["LIMIT=0"], ["LIMIT is 0", "at least 1"]),
        (["EXAMPLES=-1"], ["EXAMPLES is -1"]),
        (["SEED=-1"], ["SEED is -1", "at least 0"]),
        (["METHODS=grad-cam, opticam"], ["'opticam'", "'opti-cam'"]),
        (["METHODS=,"], ["METHODS", "opti-cam"]),
        (["MODEL=resnt50"], ["'resnt50'", "'resnet50'"]),
        (["LAYER=layer9"], ["layer9", "layer4"]),
        (["CHECKPOINT=nowhere.pt"], ["CHECKPOINT", "'nowhere.pt'", "no such file"]),
        (["LABELS=nowhere.csv"], ["LABELS", "'nowhere.csv'", "no such file"]),
        (["IMAGES=nowhere"], ["'nowhere'"]),
        (["MODEL=scenes_vgg", "METHODS=cam"], ["no method", "scenes_vgg"]),
        (["WEIGHTS=best"], ["'best'", "random"]),
        (["DEVICE=gpu9"], ["'gpu9'"]),
    ],
)
def test_a_wrong_parameter_ends_before_anything_runs(arguments, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert runner.main(["WEIGHTS=random", *arguments, f"OUT={out}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("report: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)
    assert not out.exists()


def test_damaged_images_are_left_out_with_the_reason(photos):
    for name in ("a.png", "c.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:200])
    subject = reports.Saliency(weights="random", images=str(photos)).prepare()
    assert (subject.indices, subject.examples) == ([1], [1])
    assert list(subject.broken) == ["a.png", "c.png"]
    assert "damaged" in subject.broken["c.png"]


def test_a_folder_of_damaged_images_is_told_before_anything_runs(photos, tmp_path, capsys):
    for photo in photos.iterdir():
        photo.write_bytes(photo.read_bytes()[:200])
    out = tmp_path / "out"
    assert runner.main([*QUICK, f"IMAGES={photos}", f"OUT={out}"]) == 2
    message = capsys.readouterr().err
    assert "none of the 3 images" in message
    assert "a.png" in message
    assert not out.exists()


def test_a_file_in_place_of_the_folder_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert runner.main([f"OUT={tmp_path / 'file' / 'below'}"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_names_every_parameter(capsys):
    assert runner.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for report, parameters in reports.REPORTS.items():
        part = shown.partition(f"REPORT={report}:")[2].partition("REPORT=")[0]
        for known in parameters.known():
            assert f"  {known.name.upper():<12}{known.metadata['explanation']}" in part
        assert f"OUT         folder to write to [build/{report}_report]" in part
        assert "TIMEOUT     seconds that one cell of the notebook may take [7200]" in part


# ------------------------------------------------------------------------- what is reported on


def test_methods_that_do_not_apply_are_left_out_with_the_reason():
    subject = reports.Saliency(
        model="scenes_vit", weights="random", methods="cam grad-cam"
    ).prepare()
    assert subject.methods == {"grad-cam": {}}
    assert list(subject.left_out) == ["cam"]
    assert subject.left_out["cam"]
    assert subject.transformer
    assert not reports.Saliency(weights="random", limit=1).prepare().transformer


def test_examples_are_of_different_classes():
    subject = reports.Saliency(weights="random", limit=40, examples=4).prepare()
    assert len({subject.dataset[i].target for i in subject.examples}) == 4
    assert set(subject.examples) <= set(subject.indices)
    assert len(subject.indices) == 40


def test_more_examples_than_classes_are_filled_up(photos):
    subject = reports.Saliency(weights="random", images=str(photos), examples=9).prepare()
    assert subject.examples == [0, 1, 2]
    few = reports.Saliency(weights="random", images=str(photos), examples=2).prepare()
    assert len(few.examples) == 2


def test_photos_without_labels_are_explained_for_the_predicted_class(photos):
    subject = reports.Saliency(weights="random", images=str(photos)).prepare()
    targets, predicted = saliency.predictions(subject, batch_size=2)
    assert not subject.labelled
    assert "predicted" in subject.targets
    assert targets.tolist() == predicted.tolist()


def test_photos_with_labels_are_explained_for_the_true_class(photos, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("file,class_index\na.png,2\nc.png,5\n")
    subject = reports.Saliency(weights="random", images=str(photos), labels=str(labels)).prepare()
    assert subject.labelled
    assert saliency.predictions(subject)[0].tolist() == [2, 5]


def test_scenes_have_no_true_class_for_a_network_of_other_classes():
    subject = reports.Saliency(model="squeezenet1_1", weights="random", limit=2).prepare()
    assert not subject.labelled
    assert subject.dataset[0].target is None
    assert len(subject.dataset) == len(ol.load_dataset("scenes"))


# ------------------------------------------------------------------------------- what it shows


def test_the_papers_tables_are_whole():
    cnns, transformers = tables.paper_table(1), tables.paper_table(2)
    assert cnns.groupby("network").size().to_dict() == {"ResNet50": 12, "VGG16": 12}
    assert transformers.groupby("network").size().to_dict() == {"DeiT-B": 14, "ViT-B": 14}
    for paper in (cnns, transformers):
        # The claims that reports check are the paper's own: they hold of its figures, but for
        # Fake-CAM's AG and AD, which they bound; so a slip in transcription would show.
        for _, rows in paper.groupby("network"):
            assert all(holds for holds, _ in tables.ordering(rows.set_index("method")).values())


@pytest.mark.parametrize(
    ("method", "metric", "value", "broken"),
    [
        ("opti-cam", "AD", 8.0, "lowest average drop"),
        ("score-cam", "AG", 30.1, "twice the average gain"),
        ("fake-cam", "AD", 1.0, "Fake-CAM"),
        ("fake-cam", "AG", 2.0, "Fake-CAM"),
    ],
)
def test_ordering_fails_where_a_figure_breaks_it(table, method, metric, value, broken):
    assert all(holds for holds, _ in tables.ordering(table).values())
    assert "ordering holds here" in tables.checklist(tables.ordering(table))
    other = table.copy()
    other.loc[method, metric] = value
    failing = [claim for claim, (holds, _) in tables.ordering(other).items() if not holds]
    assert len(failing) == 1
    assert broken in failing[0]
    assert "does not hold here: 1 of 3" in tables.checklist(tables.ordering(other))


def test_ordering_says_nothing_of_methods_that_were_not_measured(table):
    assert list(tables.ordering(table.loc[["grad-cam"]])) == []
    assert "can't be judged" in tables.checklist({})
    assert len(tables.ordering(table.loc[["grad-cam", "fake-cam"]])) == 1


def test_ordering_is_that_of_the_papers_methods(table):
    faster = table.assign(AD=0.0, AG=99.0).loc[["opti-cam"]].rename({"opti-cam": "opti-cam-fast"})
    assert tables.ordering(pd.concat([table, faster])) == tables.ordering(table)


def test_the_verdict_on_few_images_and_iterations_has_caveats(table, photos):
    subject = reports.Saliency(weights="random", images=str(photos), iterations=20).prepare()
    said = tables.checklist(tables.ordering(table), tables.caveats(subject))
    assert "Opti-CAM took 20 iterations here, 100 in the paper. 3 images are few" in said
    whole = reports.Saliency(weights="random", limit=100).prepare()
    assert tables.caveats(whole) == []
    assert tables.checklist(tables.ordering(table)).endswith("</ul>")


def test_settings_are_those_that_were_used():
    def rows(subject):
        lines = records.settings_table(subject).splitlines()[2:]
        return dict(line.strip("| ").split(" | ") for line in lines)

    subject = reports.Saliency(model="scenes_vgg", weights="random", device="cpu").prepare()
    shown = rows(subject)
    assert (shown["layer"], shown["device"], shown["weights"]) == ("features.21", "cpu", "random")
    assert shown["checkpoint"] == "–"
    own = reports.Saliency(checkpoint="my.pt")
    assert "weights" not in rows(replace(subject, parameters=own))
    assert "layer" not in rows(replace(subject, parameters=reports.Boxes()))


def test_tables_are_written_to_copy(table, tmp_path):
    table = table.rename_axis("method").assign(**{"AD ±": 0.5, "AD low": 11.25, "AD high": 13.5})
    table["AD best"] = table.index == "opti-cam"
    records.write_table(tmp_path, table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv", index_col="method"), table)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert r"Grad-CAM & 12.00 [11.2, 13.5] & 10.00 &" in text
    assert r"Opti-CAM & 0.50 [11.2, 13.5]* & 60.00 &" in text
    for line in (
        r"\toprule",
        r"\bottomrule",
        r"\begin{table}",
        r"% \usepackage{booktabs,graphicx}",
    ):
        assert line in text
    boxes = pd.DataFrame({"network": ["scenes_vgg"], "mask": ["S∖B"], "AD": [1.25]})
    records.write_table(tmp_path, boxes)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").startswith("network,mask,AD\n")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert r"scenes\_vgg & S$\setminus$B & 1.25 \\" in text
    records.write_table("", boxes)


def test_any_name_is_text_in_every_table(table, tmp_path):
    table = table.rename_axis("method").rename(index={"score-cam": NASTY})
    records.write_table(tmp_path, table)
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "onerror" in line)
    assert line.count("&") == len(table.columns)
    assert r"price\_\$10\_vs\_\$20 \textless{}img src=x onerror=alert(1)\textgreater{}" in line
    assert r"\textbar{}*\_`\#\textbackslash n\# h" in line
    assert NASTY in pd.read_csv(tmp_path / "table.csv")["method"].to_list()
    shown = tables.comparison(table, tables.paper_table(1), here=NASTY)
    verdict = tables.checklist({"claim": (True, NASTY)})
    for text in (shown, verdict):
        assert "<img" not in text
        assert "$" not in text.replace(tables.FIGURES, "")
    assert Page(shown).row(plain(NASTY))[:2] == ["8.0", "20.0"]


def test_settings_and_notes_are_text():
    subject = reports.Saliency(weights="random", device="cpu").prepare()
    named = reports.Saliency(images=NASTY)
    subject = replace(subject, parameters=named, broken={NASTY: NASTY}, left_out={"lime": NASTY})
    subject.dataset.unread = [NASTY]
    notes = "\n".join(f"- {note}" for note in tables.notes(subject))
    for source in (records.settings_table(subject), notes):
        assert "<img" not in source
        assert "$" not in source
        shown = Shown(markdown2html(source))
        assert shown.tags <= SAFE
        assert plain(NASTY) in shown.text
    assert len(notes.splitlines()) == 4  # one item each
    assert reports.boxes.in_words(
        {"best": "_a_ | b", "rho": 1, "n": 9, "low": 0.1, "high": 1, "true": True}
        | {"within_noise": ["<b>"], "beats_control": True}
    ).startswith("**&#95;a&#95; &#124; b** follows")


def test_a_note_says_why_equal_methods_differ():
    subject = reports.Saliency(weights="random", device="cpu").prepare()
    told = [note for note in tables.notes(subject) if "relu" in note]
    assert len(told) == 1
    assert "CAM weighs the maps as Grad-CAM would" in told[0]
    for methods in ({"cam": {}, "opti-cam": {}}, {"grad-cam": {}, "hires-cam": {}}):
        assert tables.notes(replace(subject, methods=methods)) == []


@pytest.mark.parametrize("report", reports.REPORTS)
def test_every_report_checks_seed_and_paths(report, capsys):
    data = "DATA" if report == "benchmark" else "IMAGES"
    for argument, words in {
        "SEED=-1": "SEED is -1; it must be at least 0",
        f"SEED={2**63}": f"SEED is {2**63}; it must be at least 0 and at most {2**63 - 1}",
        "TIMEOUT=nan": "TIMEOUT is nan; it must be above 0",
        "TIMEOUT=inf": "TIMEOUT is inf; it must be above 0 and at most 1e+08",
        f"{data}=~nobody-here/x": "'~nobody-here/x', which is no path here",
        f"{data}={'x' * 300}": "is too long, 300 letters",
        f"OUT={'x' * 300}": "OUT is too long, 300 letters",
        **({"CHECKPOINT=~nobody-here/x": "CHECKPOINT is '~n"} if report != "boxes" else {}),
    }.items():
        models = ["MODELS=scenes_resnet"] if report == "boxes" else []
        assert runner.main([f"REPORT={report}", argument, *models]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    "report",
    [
        lambda: reports.Saliency(images="", weights="random"),
        lambda: reports.Benchmark(data="", weights="random"),
        lambda: reports.Boxes(images="", models="scenes_resnet"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(report, monkeypatch, photos):
    monkeypatch.chdir(photos)
    with pytest.raises(ValueError, match="is empty; name a file or a folder"):
        report().prepare()


def test_the_report_on_boxes_leaves_out_what_can_not_be_read(monkeypatch):
    whole = ol.datasets.Scenes.sample

    drawn = choose(256, 3)

    def sample(self, index):
        if index == drawn[0]:
            raise ol.ImageError("a.jpg is damaged")
        return whole(self, index)

    monkeypatch.setattr(ol.datasets.Scenes, "sample", sample)
    (subject,) = reports.Boxes(models="scenes_resnet", limit=3).prepare()
    assert (subject.indices, list(subject.broken.values())) == (drawn[1:], ["a.jpg is damaged"])


def test_the_comparison_shows_measured_and_printed_figures(table):
    shown = tables.comparison(table, tables.paper_table(1), here="<mine>")
    page = Page(shown)
    assert page.row("Opti-CAM")[:4] == ["0.5", "60.0", "90.0", "6.00"]
    paper = ["8.6", "26.6", "56.7", "15.22", "13.5", "15.6", "41.7", "3.11"]
    assert page.row("Score-CAM")[4:] == paper
    assert page.row("LIME")[:5] == ["–", "–", "–", "–", "66.7"]
    assert "<mine>" not in shown
    # Bold: the best of each measured column, but never Fake-CAM.
    best = [cell for cell in shown.split("<td")[1:] if cell.startswith(' class="best"')]
    assert [cell.split("<b>")[1].partition("<")[0] for cell in best[:3]] == ["0.5", "60.0", "90.0"]


def test_tables_bring_their_style_to_a_notebook_opened_by_hand(table):
    shown = tables.comparison(table, tables.paper_table(1), here="mine")
    style, _, shown = shown.partition("</style>")
    rules = {rule.partition("{")[0].strip() for rule in style.split("}")}
    assert {"table.figures td.best", "table.figures tr.other > *"} <= rules
    # Without any style the network still stands apart from what is said of it.
    assert "mine<br><small>measured</small>" in shown
    assert tables.styled("<table>").endswith("</style><table>")


def test_the_chart_tells_its_figures_to_those_who_can_not_see_it(table):
    picture = saliency.chart(table, tables.paper_table(1))
    assert "Opti-CAM 0.5 and 60.0" in picture.alt
    assert picture.png.startswith(b"\x89PNG")


def test_metrics_never_hold_what_json_does_not_know(table, tmp_path):
    subject = reports.Saliency(weights="random", limit=1).prepare()
    quality = {"top1": None, "mean_probability": float("nan")}
    of = ("±", "low", "high")
    sure = {f"{metric} {part}": float("nan") for metric in ("AD", "AG", "AI") for part in of}
    saliency.write_metrics(tmp_path, subject, table.assign(**sure), quality)
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["mean_probability"] is None
    assert written["ordering_holds"] is True
    figures = {"value": 12.0, "error": None, "low": None, "high": None}
    assert written["methods"][0]["metrics"]["AD"] == figures


@pytest.mark.parametrize("report", reports.REPORTS)
def test_notebooks_speak_of_parameters_as_they_are_written_there(report):
    notebook = nbformat.read(runner.notebook_path(report), as_version=4)
    for cell in notebook.cells:
        assert not re.search(r"\b[A-Z]{4,}=", cell.source), "only make writes them in capitals"


# -------------------------------------------------------------------------------- making it


def test_an_interrupted_run_leaves_the_earlier_report(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    (out / "saliency_report.html").write_text("earlier")
    monkeypatch.setattr(runner.papermill, "execute_notebook", interrupted)
    assert runner.main([*QUICK, f"OUT={out}"]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {".lock", "saliency_report.html"}
    assert (out / "saliency_report.html").read_text() == "earlier"


def executed(source, target, *_, **__):
    Path(target).write_bytes(Path(source).read_bytes())


def test_a_page_that_can_not_be_made_leaves_the_executed_notebook(tmp_path, capsys, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("no template\nindex.html.j2")

    (tmp_path / "saliency_report.html").write_text("earlier")
    monkeypatch.setattr(runner.papermill, "execute_notebook", executed)
    monkeypatch.setattr(runner, "HTMLExporter", missing)
    assert runner.main(["REPORT=saliency", f"OUT={tmp_path}"]) == 1
    shown, told = capsys.readouterr()
    reason = "the conversion to a page failed with FileNotFoundError: no template index.html.j2"
    assert told.splitlines()[-1] == f"report: {reason}"
    assert shown == f"{tmp_path / 'saliency_report.ipynb'}\n"
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "saliency_report.ipynb"}


def test_two_reports_are_not_written_to_one_folder_at_once(tmp_path, capsys, monkeypatch):
    (tmp_path / "saliency_report.html").write_text("earlier")
    monkeypatch.setattr(runner.papermill, "execute_notebook", executed)
    with FileLock(tmp_path / ".lock"):
        assert runner.main(["REPORT=saliency", f"OUT={tmp_path}"]) == 1
    told = capsys.readouterr().err
    assert "another report is being written there; wait for it, or choose another OUT" in told
    assert (tmp_path / "saliency_report.html").read_text() == "earlier"
    assert runner.main(["REPORT=saliency", f"OUT={tmp_path}"]) == 0
    assert (tmp_path / "saliency_report.html").read_text(encoding="utf-8") != "earlier"


def test_an_interruption_before_anything_runs_is_told(tmp_path, capsys, monkeypatch):
    def interrupted(_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(reports.Saliency, "prepare", interrupted)
    assert runner.main([*QUICK, f"OUT={tmp_path / 'out'}"]) == 130
    told = capsys.readouterr().err
    assert told == "report: interrupted; nothing was written but the rows measured so far\n"
    assert not (tmp_path / "out").exists()


def test_a_missing_notebook_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "_PACKAGE", tmp_path / "package")
    with pytest.raises(FileNotFoundError, match="saliency_report"):
        runner.notebook_path()


def test_a_full_disk_leaves_the_earlier_report(tmp_path, capsys, monkeypatch):
    """The page is whole or not there: that the notebook could still be written changes nothing."""

    def full(source, target):
        if str(target).endswith(".html.part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(runner.papermill, "execute_notebook", executed)
    monkeypatch.setattr(runner.shutil, "copyfile", full)
    earlier = {f"saliency_report.{end}": f"earlier {end}" for end in ("html", "ipynb")}
    for name, text in earlier.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert runner.main(["REPORT=saliency", f"OUT={tmp_path}"]) == 1
    told = capsys.readouterr().err
    assert f"could not be written to {tmp_path} (No space left on device); what was there" in told
    earlier[".lock"] = ""
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == earlier
