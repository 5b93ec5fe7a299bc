"""The sanity report: what is checked before it runs, what it shows."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from test_reports import Page

from opticam_lite import reports
from opticam_lite.network import Classifier
from opticam_lite.reports import runner, sanity, tables
from opticam_lite.studies.findings import Finding
from opticam_lite.studies.sanity import MEASURES, RANDOM_LABELS, sanity_table

# Papermill and Jupyter's libraries are still on their way to the newest Python.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = {"limit": 2, "methods": "grad-cam, fake-cam", "cuts": 2, "draws": 1, "examples": 1}


@pytest.fixture(scope="module")
def subject():
    return reports.Sanity(**QUICK).prepare()


@pytest.fixture(scope="module")
def frame(subject):
    return sanity.measured(subject)


@pytest.fixture(scope="module")
def table(frame):
    return sanity_table(frame)


def test_the_network_of_random_labels_is_cut_as_the_network():
    asked = reports.Sanity(**QUICK, layer="layer3", normalize=False)
    subject = asked.prepare()
    other = subject.random_labels
    assert isinstance(other, Classifier)
    assert (other.name, other.layer, other.normalize) == ("scenes_random_labels", "layer3", False)
    assert reports.Sanity(**QUICK, random_labels="").prepare().random_labels is None


def test_a_network_of_other_layers_is_left_out_with_the_reason():
    subject = reports.Sanity(**QUICK, model="scenes_vgg").prepare()
    assert subject.random_labels is None
    assert subject.left_out["scenes_random_labels"] == "it has not the layers of scenes_vgg"
    assert "scenes&#95;random" not in (notes := " ".join(tables.notes(subject)))
    assert "scenes_random_labels is left out: it has not the layers" in notes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["CUTS=0"], ["CUTS is 0", "at least 1"]),
        (["RANDOM_LABELS=scenes_resnet:nowhere.pt"], ["RANDOM_LABELS", "'nowhere.pt'", "no such"]),
        (["RANDOM_LABELS=scenes_randm"], ["'scenes_randm'", "'scenes_random_labels'"]),
        (["METHODS=opticam"], ["'opticam'", "'opti-cam'"]),
        (["SEED=-1"], ["SEED is -1"]),
    ],
)
def test_a_wrong_parameter_ends_before_anything_runs(arguments, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert runner.main(["REPORT=sanity", *arguments, f"OUT={out}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("report: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)
    assert not out.exists()


def test_rows_resume_and_another_study_has_other_rows(subject, frame, tmp_path, monkeypatch):
    first = sanity.measured(subject, str(tmp_path))
    pd.testing.assert_frame_equal(first, frame)

    def explain(*_, **__):
        raise AssertionError("it is measured again")

    monkeypatch.setattr("opticam_lite.studies.sanity.explain", explain)
    pd.testing.assert_frame_equal(sanity.measured(subject, str(tmp_path)), frame)
    alone = reports.Sanity(**QUICK, random_labels="").prepare()
    with pytest.raises(AssertionError, match="measured again"):
        sanity.measured(alone, str(tmp_path))


def test_other_seeds_draw_other_weights():
    drawn = [sanity.seeds(reports.Sanity(draws=3, seed=seed)) for seed in (0, 1)]
    assert drawn == [[0, 1, 2], [3, 4, 5]]


def test_the_curves_start_with_the_trained_network_and_tell_every_value(table):
    pictures = sanity.charts(table)
    # Masks have no negative values, so one chart shows both rank correlations.
    assert [p.figure.axes[0].get_title().partition(",")[0] for p in pictures] == [
        *("Rank", "HOG", "SSIM")
    ]
    for picture, measure in zip(pictures, ("rank", "HOG", "SSIM"), strict=True):
        (ax,) = picture.figure.axes
        assert [t.get_text() for t in ax.get_xticklabels()] == ["trained", "layer2", "conv1"]
        rows = table[(table["method"] == "fake-cam") & (table["cut"] > 0)]
        assert f"Fake-CAM trained 1.00, layer2 {rows[measure].iloc[0]:.2f}" in picture.alt
        assert all(line.get_ydata()[0] == 1 for line in ax.lines)
    signed = table.assign(**{MEASURES[1]: 0.5})
    assert len(sanity.charts(signed)) == 4


def test_maps_are_of_every_method_and_network(subject):
    picture = sanity.maps(subject)
    assert "by trained, layer2, conv1, random labels" in picture.alt
    for method in ("Grad-CAM", "Fake-CAM", "edges"):
        assert f"{method}: " in picture.alt
    assert picture.alt.count("Row ") == 3


def test_random_labels_stand_beside_the_papers_figure(table):
    rows = table[table["cut"] == RANDOM_LABELS]
    page = Page(sanity.labels_table(table))
    value, low, high = rows[["SSIM", "SSIM low", "SSIM high"]].iloc[0]
    assert page.row("Grad-CAM")[3:] == [f"{value:.2f} {low:.2f} to {high:.2f}", "–"]
    paper = table.replace({"method": {"grad-cam": "opti-cam"}})
    assert Page(sanity.labels_table(paper)).row("Opti-CAM")[-1] == "0.013"
    assert f"Grad-CAM {value:.2f} ({low:.2f} to {high:.2f})" in sanity.labels_chart(table).alt


def test_what_is_written_is_what_was_measured(subject, table, tmp_path):
    found = [Finding("it passes", None, "0.1")]
    sanity.write_metrics(tmp_path, subject, table, found)
    record = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert record["report"] == "sanity_report"
    assert record["random_labels"] == "scenes_random_labels"
    assert record["findings"] == [{"claim": "it passes", "verdict": None, "figures": "0.1"}]
    row = record["methods"][0]
    assert (row["method"], row["cut"], row["from"]) == ("grad-cam", 1, "layer2")
    assert row["measures"]["SSIM"]["value"] == table["SSIM"].iloc[0]
    written = pd.read_csv(tmp_path / "table.csv")
    assert written["SSIM"].tolist() == pytest.approx(table["SSIM"].tolist())
    assert r"\begin{tabular}" in (tmp_path / "table.tex").read_text(encoding="utf-8")
