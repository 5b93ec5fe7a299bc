"""Fine-tuning: what is trained, resuming, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import opticam_lite as ol
from opticam_lite.__main__ import main
from opticam_lite.making import finetuning
from opticam_lite.making.finetuning import Schedule, finetune

SCHEDULE = Schedule(head_epochs=2, head_rate=0.1, epochs=2, rate=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of two classes, in folders of a training and a test split."""
    root = tmp_path_factory.mktemp("medical")
    scenes = ol.load_dataset("scenes")
    classes = sorted({scenes.target(i) for i in range(len(scenes))})[:2]
    for name, c in zip(("ill", "well"), classes, strict=True):
        own = [i for i in range(len(scenes)) if scenes.target(i) == c][:6]
        for k, i in enumerate(own):
            folder = root / ("train" if k < 4 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (scenes[i].image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


def run(data: Path, out: Path, schedule: Schedule = SCHEDULE, **given: object) -> Path:
    return finetune("scenes_resnet", f"folders:{data}", out, schedule, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an uninterrupted run."""
    return run(data, tmp_path_factory.mktemp("out") / "w.safetensors")


@pytest.mark.slow
def test_the_last_layer_then_all_against_a_plain_loop(data: Path, out: Path) -> None:
    found = load_file(out)

    base = ol.load_model("scenes_resnet")
    network = ol.models.scene_networks.build("scenes_resnet")
    network.load_state_dict(base.network.state_dict())
    torch.manual_seed(0)
    network.fc = nn.Linear(network.fc.in_features, 2)
    training = ol.load_dataset(f"folders:{data / 'train'}")
    training.settings = base.preprocessing
    images, targets = training.batch(range(8))
    x = base.normalised(images)
    for epoch in range(1, 5):
        alone = epoch <= 2
        network.train(not alone)
        if epoch in (1, 3):
            parameters = list((network.fc if alone else network).parameters())
            velocity = [torch.zeros_like(p) for p in parameters]
        torch.manual_seed(1_000_003 * epoch)
        order = torch.randperm(8)
        for chosen in (order[:4], order[4:]):
            loss = F.cross_entropy(network(x[chosen]), targets[chosen])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(0.9).add_(g)
                    p.sub_((0.1 if alone else 1e-3) * v)
        if epoch == 2:
            frozen = {k: v.clone() for k, v in network.state_dict().items()}
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(frozen[k], v) for k, v in found.items() if "conv1" in k)

    log = pd.read_csv(out.with_suffix(".log.csv"))
    assert log["layers"].tolist() == ["last", "last", "all", "all"]
    classifier = ol.load_model("scenes_resnet", checkpoint=out)
    assert classifier.labels == ["ill", "well"]
    test = ol.load_dataset(f"folders:{data / 'test'}", classifier=classifier)
    images, targets = test.batch(range(4))
    right = (classifier.predict(images) == targets).double().mean()
    assert log["held_out_top1"].iloc[-1] == pytest.approx(100 * float(right))
    assert sorted(p.name for p in out.parent.iterdir()) == [
        *("w.classes.txt", "w.log.csv", "w.safetensors")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    data: Path, out: Path, tmp_path: Path, killed_after: int
) -> None:
    whole, told = load_file(out), []

    def killed(line: str) -> None:
        told.append(line)
        if len(told) == killed_after:
            raise KeyboardInterrupt

    own = tmp_path / "killed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(data, own, tell=killed)
    assert not own.exists()
    with pytest.raises(ValueError, match="is of a run with another network"):
        run(data, own, Schedule(head_epochs=2, epochs=3))
    again = load_file(run(data, own, tell=told.append))
    assert len(told) == 4
    assert all(torch.equal(again[k], v) for k, v in whole.items())


@pytest.mark.slow
def test_the_command_goes_on_after_an_interruption(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "w.safetensors"
    command = ["finetune", "--model", "scenes_resnet", "--data", f"folders:{data}"]
    command += ["--out", str(out), "--head-epochs", "1", "--epochs", "1", "--batch-size", "4"]
    with monkeypatch.context() as patched:

        def interrupted(*_: object) -> float:
            raise KeyboardInterrupt

        patched.setattr(finetuning, "_accuracy", interrupted)
        assert main(command) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(out)
    assert [line.split(", ")[1] for line in shown.err.splitlines()] == ["layers last", "layers all"]
    assert main([*command, "--momentum", "1"]) == 2
    assert "momentum is 1.0; a number from 0 to below 1 is needed" in capsys.readouterr().err


def test_a_broken_image_is_left_out(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "ill" / "0.png").write_bytes(b"no image")
    one = Schedule(head_epochs=1, epochs=0, batch_size=4)
    assert run(tmp_path / "data", tmp_path / "w.safetensors", one).exists()


def test_what_can_not_be_fine_tuned_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=r"no training split; make the folders train and test"):
        run(data / "train", out)
    with pytest.raises(ValueError, match="scenes has no training split"):
        finetune("scenes_resnet", "scenes", out)
    one = tmp_path / "one"
    for split in ("train", "test"):
        shutil.copytree(data / split / "ill", one / split / "ill")
    with pytest.raises(ValueError, match="has 1 classes; at least two"):
        run(one, out)
    shutil.copytree(data / "train" / "ill", one / "train" / "more")
    with pytest.raises(ValueError, match=r"the two splits .* have other classes"):
        run(one, out)
    with pytest.raises(ValueError, match=r"ends with \.safetensors"):
        run(data, tmp_path / "w.pt")
    for wrong in ({"head_epochs": -1}, {"batch_size": 1}, {"rate": float("nan")}, {"seed": 0.5}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .* is needed"):
            Schedule(**wrong)
    with pytest.raises(ValueError, match=r"does not end in a linear layer but in .*Conv2d"):
        finetuning._replaced_head(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), 2, 0)
    assert not out.exists()
