"""The command line: `python -m opticam_lite evaluate` and `summarize`."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from pyarrow import parquet

import opticam_lite as ol
from opticam_lite.__main__ import main
from opticam_lite.evaluation import choose, read
from opticam_lite.studies.paper import study

COMMAND = ["evaluate", "--model", "scenes_resnet", "--data", "scenes", "--quiet"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--methods", "grad-cam, fake-cam", "opti-cam", "--metrics", "AD,AI", "--limit", "2"]
    given += ["--option", "opti-cam.iterations=1", "--option", "opti-cam.objective=diff"]
    out = str(tmp_path / "run")
    assert main([*COMMAND, *given, "--out", out]) == 0
    shown = capsys.readouterr().out
    methods = ["grad-cam", "fake-cam", "opti-cam"]
    assert [line.split()[0] for line in shown.splitlines()[2:]] == methods
    classifier, scenes = ol.load_model("scenes_resnet"), ol.load_dataset("scenes")
    options = {"opti-cam": {"iterations": 1, "objective": "diff"}}
    expected = ol.evaluate(classifier, scenes, methods, ["AD", "AI"], limit=2, options=options)
    found = read(out)
    assert found["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-3)
    assert found["options"].tolist() == expected["options"].tolist()
    table = tmp_path / "table.csv"
    assert main(["summarize", out, "--csv", str(table)]) == 0
    assert capsys.readouterr().out == shown
    assert pd.read_csv(table)["AD"].tolist() == ol.summarize(found)["AD"].tolist()


def test_a_study_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = tmp_path / "my study.toml", str(tmp_path / "run")
    study.write_text(
        '["early, sharp"]\nmethod = "opti-cam"\nlayer = "layer3"\nexponent = 2\niterations = 3\n'
        "[fake-cam]\n",
        encoding="utf-8",
    )
    given = ["--study", str(study), "--limit", "2", "--option", "opti-cam.iterations=1"]
    assert main([*COMMAND, *given, "--out", out]) == 0
    assert "early, sharp" in capsys.readouterr().out
    frame = read(out)
    assert list(frame["method"].unique()) == ["early, sharp", "fake-cam"]
    assert set(frame["layer"]) == {"layer3", ol.load_model("scenes_resnet").layer}
    spec = {"method": "opti-cam", "layer": "layer3", "exponent": 2, "iterations": 1}
    expected = ol.evaluate(
        ol.load_model("scenes_resnet"), ol.load_dataset("scenes"),
        {"early, sharp": spec, "fake-cam": {}}, limit=2,
    )  # fmt: skip
    assert frame["value"].tolist() == expected["value"].tolist()


def test_a_study_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    given = ["--limit", "1", "--out", out, "--option", "opti-cam.iterations=2"]
    assert main([*COMMAND, "--study", "table-a14", "--methods", "cam,opti-cam", *given]) == 0
    shown = capsys.readouterr().out
    assert "opti-cam, not normalised" in shown
    assert "too few images to say: Without normalisation CAM loses more than Opti-CAM" in shown
    frame = read(out)
    classifier = ol.load_model("scenes_resnet")
    expected = study("table-a14", classifier, ["cam", "opti-cam"], iterations=2)
    assert list(frame["method"].unique()) == list(expected)
    assert all(json.loads(o).get("iterations", 2) == 2 for o in frame["options"])


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (None, [], "unknown study 'STUDY'. Valid names: table6, "),
        ("[a", [], "--study is 'STUDY', which is no TOML: "),
        ("a = 1", [], "'a': 1 is no variant; a name and a mapping are needed"),
        ("[a]\nmethod = 'cam'\nexponent = -1", [], "exponent of a is -1; a positive number"),
        ("[cam]", ["--methods", "cam"], "--methods and --study are both given"),
        ("[cam]", ["--option", "opti-cam.iterations=1"], "options are given for opti-cam, which"),
    ],
)
def test_a_study_that_is_wrong(
    text: str | None,
    given: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = tmp_path / "study.toml"
    if text is not None:
        study.write_text(text, encoding="utf-8")
    out = tmp_path / "run"
    assert main([*COMMAND, "--study", str(study), *given, "--out", str(out)]) == 2
    assert message.replace("STUDY", str(study)) in capsys.readouterr().err
    assert not out.exists()


def test_the_last_table_is_of_the_methods_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    command = [*COMMAND, "--limit", "2", "--out", out]
    assert main([*command, "--methods", "grad-cam", "fake-cam"]) == 0
    capsys.readouterr()
    assert main([*command, "--methods", "fake-cam"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["fake-cam"]
    assert main(["summarize", out, "--methods", "cam"]) == 2
    assert "unknown method of these rows 'cam'" in capsys.readouterr().err
    part = next(Path(out).glob("*.parquet"))
    rows = parquet.read_table(part)
    columns = (rows.column(name).to_pylist() for name in ("position", "method"))
    kept = [p == 0 or m == "fake-cam" for p, m in zip(*columns, strict=True)]
    parquet.write_table(rows.filter(kept), part)
    assert main(["summarize", out]) == 0
    shown = capsys.readouterr()
    assert "compares the images that all methods have (1); images left out: fake-cam 1" in shown.err
    assert main(["summarize", out, "--all-images"]) == 0
    assert "left out" not in capsys.readouterr().err


def test_all_means_all_that_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def note(classifier, dataset, methods, metrics, **settings):
        asked.update(methods=methods, metrics=metrics)
        raise ValueError("enough")

    monkeypatch.setattr("opticam_lite.__main__.evaluate", note)
    command = ["evaluate", "--model", "scenes_vgg", "--data", "scenes", "--out", str(tmp_path)]
    assert main([*command, "--methods", "all", "--metrics", "all"]) == 2
    reasons = ol.methods.applicable(ol.load_model("scenes_vgg"))
    assert asked["methods"] == [name for name, reason in reasons.items() if reason is None]
    assert asked["metrics"] == ol.list_metrics()
    told = capsys.readouterr().err
    for name, reason in reasons.items():
        assert (f"{name} is left out" in told) == (reason is not None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "gradcam"], "unknown method 'gradcam'; did you mean 'grad-cam'"),
        (["--metrics", "ad"], "unknown metric 'ad'"),
        (["--model", "resnet51"], "unknown network 'resnet51'"),
        (["--data", "nowhere"], "'nowhere' is neither"),
        (["--checkpoint", "nowhere"], "--checkpoint is 'nowhere', and there is no such file"),
        (["--engine", "spark"], "unknown engine 'spark'"),
        (["--limit", "0"], "limit is 0"),
        (["--layer", "nowhere"], "unknown layer 'nowhere'"),
        (["--option", "iterations=3"], "is not METHOD.NAME=VALUE"),
        (["--option", "opti-cam.iteration=3"], "opti-cam has no option 'iteration'"),
        (["--activation", "sigmoids"], "unknown activation 'sigmoids'; did you mean 'sigmoid'?"),
        (["--num-gpus", "1"], "num_gpus is 1.0; it is for engine='ray'"),
        (["--seed", "-1"], "seed is -1; a whole number from 0 to 9223372036854775807 is needed"),
        (["--seed", str(2**63)], "seed is 9223372036854775808"),
        (["--data", ""], "--data is empty"),
        (["--data", "~nobody-here/x"], "'~nobody-here/x', which is no path here"),
        (["--data", "x" * 300], "--data is too long, 300 letters"),
        (["--labels", ""], "the path is empty"),
        (["--out", ""], "the path is empty"),
        (["--out", "~nobody-here/x"], "'~nobody-here/x', which is no path here"),
        (["--data", "nowhere\n\x1b[2J"], r"nowhere\n\x1b[2J"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*COMMAND, "--methods", "fake-cam", "--out", str(out), *given]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not out.exists()


def test_the_command_line_explains_predictions_of_a_network_with_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ol.load_model("scenes_resnet", labels=[f"thing {i}" for i in range(8)])
    monkeypatch.setattr("opticam_lite.__main__.load_model", lambda *a, **k: other)
    assert main([*COMMAND, "--methods", "fake-cam", "--limit", "3", "--out", str(tmp_path)]) == 0
    assert "the predicted classes are explained" in capsys.readouterr().err
    images, _ = ol.load_dataset("scenes").batch(choose(256, 3))
    assert read(tmp_path)["target"].tolist()[::3] == other.predict(images).tolist()


def test_the_command_line_names_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (99, 99)).save(folder / "good.png")
    (folder / "bad\n.png").write_bytes(b"no image")
    (folder / "new.heic").write_bytes(b"no image either")
    command = ["evaluate", "--model", "scenes_resnet", "--quiet", "--data", str(folder)]
    assert main([*command, "--methods", "fake-cam", "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0] == (
        "opticam_lite: photos: images of kinds that can't be read here are left out (1): new.heic; "
        "convert them to JPEG or PNG"
    )
    assert told[1].startswith("opticam_lite: bad .png is left out: ImageError: ")


def test_the_command_line_without_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summarize", str(tmp_path)]) == 2
    assert "holds no results of evaluate" in capsys.readouterr().err


def test_the_command_line_measures_a_network_of_several_labels(tmp_path: Path) -> None:
    command = [*COMMAND, "--methods", "fake-cam", "--limit", "2", "--out", str(tmp_path)]
    assert main([*command, "--activation", "sigmoid"]) == 0
    frame = read(tmp_path)
    classifier, scenes = ol.load_model("scenes_resnet"), ol.load_dataset("scenes")
    by_id = {scenes.id(i): i for i in range(len(scenes))}
    for row in frame[frame["metric"] == "AD"].itertuples():
        y = classifier.logits(scenes[by_id[row.image]].image[None])[0, row.target]
        assert row.p == pytest.approx(y.sigmoid().item(), abs=1e-6)
