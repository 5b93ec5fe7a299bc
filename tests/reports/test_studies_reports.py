"""The reports on the paper's studies: tables, charts, findings, and where two methods disagree."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch

from opticam_lite import reports
from opticam_lite.reports import studies
from opticam_lite.reports.tables import findings_list
from opticam_lite.studies.findings import Finding
from opticam_lite.studies.paper import STUDIES

QUICK = {"limit": 3, "iterations": 1}
METHODS = {"methods": "grad-cam, opti-cam, fake-cam"}


@pytest.fixture(scope="module")
def subject():
    return reports.Ablation(**QUICK, **METHODS).prepare()


@pytest.fixture(scope="module")
def measured(subject):
    return {name: studies.measured(name, subject) for name in ("table6", "figure-a4", "starts")}


def test_a_study_is_shown_beside_the_papers_figures(subject, measured):
    shown = studies.section(measured["table6"], subject)
    assert "VGG16" in shown
    assert "paper: another network" in shown
    assert "66.3" in shown  # AG of Mask with range
    assert "Table 6" in shown
    assert len(re.findall('<img alt="[^"]{40,}"', shown)) == 2
    assert "Of 5 findings of the paper" in shown
    value = measured["table6"].table.loc["mask, range", "AG"]
    assert f"{value:.1f}" in shown


def test_curves_replace_the_table_of_many_variants(subject, measured):
    shown = studies.section(measured["figure-a4"], subject)
    assert "<table" not in shown
    assert shown.count("<img") == 3
    assert "exponent α" in shown


def test_a_study_without_figures_in_the_paper(subject, measured):
    shown = studies.section(measured["starts"], subject)
    assert "paper" not in re.sub("(?s)<style>.*?</style>", "", shown).partition("</table>")[0]
    assert "findings" not in shown


def test_a_study_that_was_not_asked_for_is_left_out(tmp_path):
    subject = reports.Ablation(**QUICK, **METHODS, studies="table-a12").prepare()
    assert studies.measured("table6", subject) is None
    assert "Not measured" in studies.section(None, subject)
    only = studies.measured("table-a12", subject)
    studies.write_metrics(tmp_path, "ablation", subject, [None, only])
    assert {v["study"] for v in json.loads((tmp_path / "metrics.json").read_text())["methods"]} == {
        "table-a12"
    }


def test_all_is_written(subject, measured, tmp_path):
    record = studies.write_metrics(tmp_path, "ablation", subject, list(measured.values()))
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(record))
    assert record["findings"][0]["claim"].startswith("Mask is better than Diff")
    assert {f["verdict"] for f in record["findings"]} <= {True, False, None}
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.columns[:3]) == ["method", "study", "AD"]
    assert len(table) == sum(len(m.table) for m in measured.values())
    assert "AG ±" in table
    text = (tmp_path / "table.tex").read_text()
    for name in measured:
        assert f"\\caption{{{STUDIES[name].title}}}" in text
    assert r"Grad-CAM, $\alpha$ = 0.01" in text


def test_a_run_that_was_killed_goes_on(subject, tmp_path, monkeypatch):
    whole = studies.measured("table6", subject, str(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in folder.iterdir()] == ["table6"]
    parts = sorted((folder / "table6").glob("part-*.parquet"))
    assert parts
    asked = []
    evaluate = studies.evaluate

    def told(*args, **options):
        options["progress"] = lambda label, *_: asked.append(label)
        return evaluate(*args, **options)

    monkeypatch.setattr(studies, "evaluate", told)
    again = studies.measured("table6", subject, str(tmp_path))
    assert not asked
    pd.testing.assert_frame_equal(whole.table, again.table)


@pytest.mark.parametrize(
    ("report", "given", "words"),
    [
        ("Ablation", {"studies": "table7"}, "unknown study 'table7'; did you mean 'table6'"),
        ("Ablation", {"studies": "table-a9"}, "unknown study 'table-a9'"),
        ("Ablation", {"studies": ","}, "STUDIES names none"),
        ("Classes", {"pair": "cam"}, "PAIR is 'cam'; two methods are needed"),
        ("Classes", {"pair": "cam, camm"}, "unknown method 'camm'"),
        ("Classes", {"pair": "cam, rollout"}, "PAIR names rollout, which can't explain"),
        ("Classes", {"success_insertion": 101.0}, "SUCCESS_INSERTION is 101.0"),
    ],
)
def test_wrong_parameters(report, given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        getattr(reports, report)(**given).prepare()


# --------------------------------------------------------------------- where two disagree

BOTH = ("opti-cam", "grad-cam")


def areas(**of):
    """Areas of both methods: I and D of Opti-CAM (o) and of Grad-CAM (g)."""
    names = {"oI": (BOTH[0], "I"), "oD": (BOTH[0], "D"), "gI": (BOTH[1], "I"), "gD": (BOTH[1], "D")}
    return {key: torch.tensor(of[name]) for name, key in names.items()}


def test_images_on_which_one_method_succeeds_and_the_other_fails():
    # Image 0: Opti-CAM succeeds, Grad-CAM fails. 1: the reverse. 2: a larger gap, no failure.
    area = areas(oI=[95.0, 60, 99], oD=[5.0, 20, 0], gI=[60.0, 95, 71], gD=[20.0, 5, 60])
    chosen, told = studies._opposed(area, BOTH, reports.Classes(examples=1))
    assert chosen == [[0], [1]]
    assert "On 1 of 3 images Opti-CAM succeeds and Grad-CAM fails." in told
    assert "On 1 of 3 images Grad-CAM succeeds and Opti-CAM fails." in told
    chosen, told = studies._opposed(area, BOTH, reports.Classes(examples=1, success_insertion=99.5))
    assert chosen == [[2], [1]]  # the most extreme ones, and it is said
    assert told.count("On no image") == 2


def test_the_images_are_drawn_with_maps_and_curves():
    subject = reports.Classes(**QUICK, methods="grad-cam", examples=1).prepare()
    shown = studies.disagreement(subject)
    assert shown.text
    assert 1 <= len(shown.charts) <= 2
    assert "Opti-CAM" in shown.maps.html()
    assert "Opti-CAM, I goes from" in shown.charts[0].html()  # the alt text


def test_findings_have_three_answers():
    found = [Finding("a", True, "1"), Finding("b", False, "2"), Finding("c", None, "<3")]
    shown = findings_list(found, ["Few."])
    assert "Of 3 findings of the paper 1 hold here and 1 do not; for 1 the images" in shown
    for words in ("<b>holds</b> a", "<b>does not hold</b> b", "<b>too few images to say</b> c"):
        assert words in shown
    assert "&lt;3" in shown
    assert "no findings" in findings_list([])
