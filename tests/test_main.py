"""The command line: `python -m opticam_lite evaluate` and `summarize`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import opticam_lite as ol
from opticam_lite.__main__ import main
from opticam_lite.evaluation import choose, read

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


def test_the_command_line_without_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summarize", str(tmp_path)]) == 2
    assert "holds no results of evaluate" in capsys.readouterr().err
