"""Reports that are executed: what a good run writes, what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_benchmark import QUICK as BENCHMARK
from test_reports import QUICK, Page
from test_text import NASTY, Shown

import opticam_lite as ol
from opticam_lite import reports
from opticam_lite.reports import runner, tables
from opticam_lite.text import plain

pytestmark = [
    pytest.mark.slow,
    # Papermill and Jupyter's libraries are still on their way to the newest Python.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def write_notebook(path: Path, *cells: str, parameters: str = 'out: str = ""') -> Path:
    notebook = new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "P"}}
    )
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [first, *map(new_code_cell, cells)]
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of the real notebook, in a folder that also holds a file of the user's."""
    out = tmp_path_factory.mktemp("a report") / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code = runner.main([*QUICK, "METHODS=cam,grad-cam,opti-cam,fake-cam", f"OUT={out}"])
    return code, out


def test_a_good_run_writes_page_notebook_and_metrics(made):
    code, out = made
    assert code == 0
    assert {p.name for p in out.iterdir()} == {
        *("saliency_report.html", "saliency_report.ipynb", "metrics.json", "mine.txt"),
        *("table.csv", "table.tex", ".lock"),
    }
    notebook = nbformat.read(out / "saliency_report.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert runner.failures(notebook) == []


def test_the_page_is_self_contained_and_told_to_those_who_can_not_see_it(made):
    text = (made[1] / "saliency_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert "table.figures td.best" in text.partition("</head>")[0]
    images = page.all("img")
    assert len(images) == 3
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(len(image["alt"]) > 40 for image in images)
    ids = [
        ol.load_dataset("scenes").id(i)
        for i in reports.Saliency(limit=4, examples=2).prepare().examples
    ]
    assert all(name in images[0]["alt"] for name in ids)
    assert all(anchor["href"].startswith("#") for anchor in page.all("a"))
    assert not any("role" in division for division in page.all("div"))


def test_the_page_shows_the_metrics_that_the_file_holds(made):
    text = (made[1] / "saliency_report.html").read_text(encoding="utf-8")
    metrics = json.loads((made[1] / "metrics.json").read_text(encoding="utf-8"))
    page = Page(text)
    assert [row["method"] for row in metrics["methods"]] == [
        *("cam", "grad-cam", "opti-cam", "fake-cam")
    ]
    for row in metrics["methods"]:
        shown = [cell.split() for cell in page.row(tables.title(row["method"]))[:3]]
        measured = [float(figure) for figure, _ in shown]
        assert all(interval.count("–") == 1 for _, interval in shown)
        assert measured == pytest.approx([row["AD"], row["AG"], row["AI"]], abs=0.051)
        assert row["n"] == 4
        assert row["seconds"] >= 0
    assert metrics["settings"]["limit"] == 4
    assert metrics["versions"]["torch"]
    assert len(metrics["ordering"]) == 3
    verdict = "ordering holds here" if metrics["ordering_holds"] else "ordering does not hold here"
    assert verdict in text


def test_a_failing_cell_leaves_the_page_with_the_error_marked(tmp_path):
    out = tmp_path / "out"
    good = write_notebook(
        tmp_path / "good.ipynb", "from pathlib import Path; (Path(out) / 'metrics.json').touch()"
    )
    assert runner.run({}, out, notebook=good) == []
    assert (out / "metrics.json").exists()
    bad = write_notebook(
        tmp_path / "bad.ipynb", "1 + 1", "# papermill_description=Two_zeros\n0 / 0", "3 + 3"
    )
    found = runner.run({}, out, notebook=bad)
    assert [(f.where, f.error) for f in found] == [
        ("cell In [4] (Two zeros)", "ZeroDivisionError: division by zero")
    ]
    text = (out / "saliency_report.html").read_text(encoding="utf-8")
    assert [d["role"] for d in Page(text).all("div") if "role" in d] == ["alert"]
    assert text.count("ZeroDivisionError") > 2
    assert 'id="failure"' in text
    # The figures of the earlier, good run are not those of this page.
    assert not (out / "metrics.json").exists()
    outputs = nbformat.read(out / "saliency_report.ipynb", as_version=4).cells[-1].outputs
    assert outputs == []


def test_markup_in_markdown_keeps_its_text(tmp_path):
    text = nbformat.v4.new_markdown_cell("| layer | <code>layer4.1</code>: 7 <small>maps</small> |")
    runner.write_html(nbformat.v4.new_notebook(cells=[text]), tmp_path / "page.html")
    shown = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<code>layer4.1</code>: 7 <small>maps</small>" in shown


def test_a_widget_leaves_no_text_on_the_page(tmp_path):
    source = "import ipywidgets as w\ndisplay(w.IntProgress(value=7))\nprint('twenty-' + 'one')"
    assert runner.run({}, tmp_path, notebook=write_notebook(tmp_path / "n.ipynb", source)) == []
    kept = nbformat.read(tmp_path / "saliency_report.ipynb", as_version=4).cells[-1].outputs
    assert "IntProgress(value=7)" in str(kept)
    text = (tmp_path / "saliency_report.html").read_text(encoding="utf-8")
    assert "IntProgress(value=7" not in text
    assert "twenty-one" in text


def test_main_returns_1_for_a_failing_cell(tmp_path, capsys, monkeypatch):
    bad = write_notebook(tmp_path / "bad.ipynb", "raise ValueError('<so> it is')")
    monkeypatch.setattr(runner, "notebook_path", lambda *_: bad)
    monkeypatch.setattr(reports.Saliency, "prepare", lambda _: None)
    assert runner.main([f"OUT={tmp_path / 'out'}"]) == 1
    shown = capsys.readouterr()
    assert "failed with ValueError: <so> it is" in shown.err
    assert "saliency_report.html" in shown.out
    assert "&lt;so&gt; it is" in (tmp_path / "out" / "saliency_report.html").read_text()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import time; time.sleep(60)", "CellTimeoutError"),
        ("import os; os._exit(3)", "DeadKernelError"),
        # Papermill sees nothing of an error inside an output widget.
        ("import ipywidgets as w\no = w.Output()\nwith o:\n    1 / 0\no", "ZeroDivisionError"),
    ],
)
def test_failures_that_are_in_no_cells_output_are_found(source, error, tmp_path):
    notebook = write_notebook(tmp_path / "n.ipynb", source)
    found = runner.run({}, tmp_path / "out", timeout=5, notebook=notebook)
    assert [f.error.partition(":")[0] for f in found] == [error]
    assert error in (tmp_path / "out" / "saliency_report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", ["import time; time.sleep(60)", "import os; os._exit(3)"])
def test_the_cell_that_was_running_is_the_one_that_is_marked(source, tmp_path):
    notebook = write_notebook(tmp_path / "n.ipynb", "1 + 1", f"# the one\n{source}", "3 + 3")
    assert len(runner.run({}, tmp_path / "out", timeout=5, notebook=notebook)) == 1
    cells = nbformat.read(tmp_path / "out" / "saliency_report.ipynb", as_version=4).cells
    failed = [
        c.source for c in cells if any(o.output_type == "error" for o in c.get("outputs", []))
    ]
    assert [source.partition("\n")[0] for source in failed] == ["# the one"]


def test_a_good_run_writes_page_notebook_metrics_and_rows(tmp_path):
    out = tmp_path / "out"
    given = [f"{name.upper()}={value}" for name, value in BENCHMARK.items()]
    assert runner.main(["REPORT=benchmark", *given, f"OUT={out}"]) == 0
    assert {p.name for p in out.iterdir()} == {
        *("benchmark_report.html", "benchmark_report.ipynb", "metrics.json", "rows"),
        *("table.csv", "table.tex", ".lock"),
    }
    (rows,) = (out / "rows").iterdir()
    table = ol.summarize(rows, errors=True)
    text = (out / "benchmark_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == page.all("link") == []
    images = page.all("img")
    assert len(images) == 5  # three metrics, best and worst
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(len(image["alt"]) > 40 for image in images)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["report"] == "benchmark_report"
    assert metrics["settings"]["limit"] == 3
    assert metrics["paper"] == {"network": "ResNet50", "same": False}
    assert [row["method"] for row in metrics["methods"]] == ["grad-cam", "fake-cam"]
    for row in metrics["methods"]:
        assert row["n"] == 3
        for metric, measured in row["metrics"].items():
            assert measured["value"] == table.loc[row["method"], metric]
            assert measured["error"] == table.loc[row["method"], f"{metric} ±"]
    assert f"{table.loc['grad-cam', 'AD']:.1f}" in page.row("Grad-CAM")[0]


def test_a_failing_cell_leaves_the_page_and_the_rows(tmp_path):
    bad = write_notebook(
        tmp_path / "bad.ipynb",
        "from pathlib import Path; Path(rows).mkdir(parents=True); (Path(rows) / 'part').touch()",
        "0 / 0",
        parameters='out: str = ""\nrows: str = ""',
    )
    out = tmp_path / "out"
    (failure,) = runner.run({}, out, notebook=bad, report="benchmark")
    assert failure.error == "ZeroDivisionError: division by zero"
    assert (out / "rows" / "part").exists()
    page = Page((out / "benchmark_report.html").read_text(encoding="utf-8"))
    assert [d["role"] for d in page.all("div") if "role" in d] == ["alert"]
    nbformat.validate(nbformat.read(out / "benchmark_report.ipynb", as_version=4))


# ------------------------------------------------------------------------------------- any name

NAME = NASTY.replace("/", "∕")  # which no file name holds


@pytest.fixture
def nasty(tmp_path):
    """A folder of photographs, weights, and names of classes, all named as nobody should."""
    place = tmp_path / NAME
    place.mkdir()
    scenes = ol.paths.data_dir() / "scenes" / "images"
    for i in range(3):
        (place / f"{i}{NAME}.jpg").write_bytes((scenes / f"{i:04}.jpg").read_bytes())
    (place / f"3{NAME}.jpg").write_bytes(b"no image")
    weights = tmp_path / f"{NAME}.safetensors"
    weights.write_bytes((ol.paths.data_dir() / "networks/scenes_resnet.safetensors").read_bytes())
    # One a line; so they may hold anything else.
    labels = "".join(f"{c}{plain(NAME)}\n" for c in range(8))
    weights.with_suffix(".classes.txt").write_text(labels, encoding="utf-8")
    return place, weights


def text_only(page, *names):
    """Check that a page has no element that a name made, and shows the names."""
    shown = Page(page)
    assert all("onerror" not in attributes for _, attributes in shown.tags)
    assert all(image["src"].startswith("data:") for image in shown.all("img"))
    found = Shown(page).text
    for name in names:
        assert plain(name) in found


@pytest.mark.parametrize("report", ["saliency", "benchmark"])
def test_any_name_is_text_in_an_executed_report(report, nasty, tmp_path):
    place, weights = nasty
    data = "IMAGES" if report == "saliency" else "DATA"
    arguments = [f"REPORT={report}", f"{data}={place}", f"CHECKPOINT={weights}", "METHODS=cam"]
    arguments += ["METRICS=AD,AG"] if report == "benchmark" else []
    assert runner.main([*arguments, f"OUT={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / f"{report}_report.html").read_text(encoding="utf-8")
    text_only(page, NAME, f"3{NAME}.jpg", weights)
    assert "is broken and left out" in page
    notebook = nbformat.read(tmp_path / "out" / f"{report}_report.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            source = output.get("data", {}).get("text/markdown", "")
            assert "$" not in source
            assert "<img" not in source


def test_any_name_is_text_in_the_report_on_boxes(nasty, tmp_path):
    _, weights = nasty
    weights.with_suffix(".classes.txt").unlink()  # its images are the scenes
    arguments = [f"MODELS=scenes_resnet:{weights}", "METHODS=cam,fake-cam", "LIMIT=4", "DRAWS=10"]
    assert runner.main(["REPORT=boxes", *arguments, f"OUT={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / "boxes_report.html").read_text(encoding="utf-8")
    text_only(page, NAME)
