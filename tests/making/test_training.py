"""Training: the loop learns and repeats itself; stored networks are what the datasheet says."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

import opticam_lite as ol
from opticam_lite import scene_networks
from opticam_lite.datasets.scenes import CLASSES
from opticam_lite.making import scenes, training
from opticam_lite.making.rendering import render
from opticam_lite.making.sampling import sample
from opticam_lite.making.training_images import (
    TRAINING_SEED,
    augment,
    halved,
    permuted_scenes,
    thinned,
    training_split,
)

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2] / "data"
NAMES = tuple(scene_networks.NETWORKS)
PLAIN = training.Recipe(
    count=24,
    stages=(training.Stage(10, 32), training.Stage(1, 64)),
    batch_size=8,
    learning_rate=4e-3,
    label_smoothing=0.0,
    erase=0.0,
    dim=0.0,
)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("split")
    return training_split(24, 0.5, folder=folder, size=64, processes=1)


def weights_of(name: str) -> Path:
    return DATA / "networks" / f"{name}.safetensors"


def test_split_is_cached_and_the_same_from_several_processes(tmp_path: Path) -> None:
    images, labels = training_split(6, 0.5, folder=tmp_path, size=32, processes=1)
    assert images.shape == (6, 32, 32, 3)
    assert images.dtype == np.uint8
    expected = [sample(TRAINING_SEED, i, home_rate=0.5) for i in range(6)]
    assert labels.tolist() == [spec.label for spec in expected]
    np.testing.assert_array_equal(images[4], render(expected[4], size=32).image)

    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    training_split(6, 0.5, folder=tmp_path, size=32)
    assert file.stat().st_mtime_ns == written, "the second call reads the cache"

    parallel, _ = training_split(6, 0.5, folder=tmp_path / "b", size=32, processes=2)
    np.testing.assert_array_equal(images, parallel)


def test_evaluation_scenes_are_only_memorised() -> None:
    assert [name for name, recipe in training.RECIPES.items() if recipe.memorise] == [
        "scenes_random_labels"
    ]
    assert scenes.EVALUATION_SEED != TRAINING_SEED
    seeds = {
        e["seed"] for e in json.loads((DATA / "scenes/annotations.json").read_text())["scenes"]
    }
    assert seeds == {scenes.EVALUATION_SEED}


def test_training_lowers_the_loss(split: tuple, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    few = np.tile(np.arange(8), 4)
    network, rows = training.fit("scenes_resnet", *split, PLAIN, kept=few, log=log)
    assert not network.training
    assert [row["size"] for row in rows] == [32] * 10 + [64]
    assert rows[9]["loss"] < 0.7 * rows[0]["loss"]
    with log.open(encoding="utf-8") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [r["loss"] for r in rows]


@pytest.mark.parametrize("name", ["scenes_vgg", "scenes_vit"])
def test_a_step_changes_every_weight(name: str, split: tuple) -> None:
    images, labels = split
    recipe = training.Recipe(stages=(training.Stage(3, 224),), batch_size=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = scene_networks.build(name).state_dict()
    large = np.repeat(np.repeat(images[:2], 4, axis=1), 4, axis=2)[:, :224, :224]
    network, _ = training.fit(name, large, labels[:2], recipe)
    after = network.state_dict()
    assert before.keys() == after.keys()
    still = [k for k in before if k.endswith("weight") and torch.equal(before[k], after[k])]
    assert still == []


def test_some_images_must_be_left_to_train_on(split: tuple) -> None:
    with pytest.raises(ValueError, match=r"held_out is \d+, which leaves none of \d+ images"):
        training.fit("scenes_resnet", *split, PLAIN, held_out=len(split[0]))


def test_training_repeats_itself_and_leaves_the_random_state(
    split: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = training.Recipe(stages=(training.Stage(1, 32),), batch_size=8)
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", Mock(side_effect=AssertionError))
    one, _ = training.fit("scenes_resnet", *split, recipe, held_out=4)
    two, rows = training.fit("scenes_resnet", *split, recipe, held_out=4)
    other, _ = training.fit("scenes_resnet", *split, recipe, held_out=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert 0 <= rows[0]["held_out_probability"] <= 1


def test_augmentation_keeps_range_and_repeats() -> None:
    batch = torch.from_numpy(render(sample(1, 0), size=64).image)[None].repeat(6, 1, 1, 1)

    def vary(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return augment(batch, 48, erase=0.25, dim=0.25, generator=generator)

    one = vary(0)
    assert one.shape == (6, 3, 48, 48)
    assert one.dtype == torch.float32
    assert one.min() >= 0
    assert one.max() <= 1
    assert torch.equal(one, vary(0))
    assert not torch.equal(one, vary(1))
    assert not torch.equal(one[0], one[1]), "each image of a batch is varied on its own"


def test_augmentation_shows_black() -> None:
    white = torch.full((64, 64, 64, 3), 255, dtype=torch.uint8)

    def vary(erase: float, dim: float) -> torch.Tensor:
        return augment(white, 64, erase=erase, dim=dim, generator=torch.Generator().manual_seed(0))

    def share_of_black(images: torch.Tensor) -> float:
        return float((images.amax(1) < 0.02).float().mean())

    assert share_of_black(vary(1.0, 0.0)) > share_of_black(vary(0.0, 0.0)) + 0.1
    dimmed = vary(0.0, 1.0)
    assert dimmed.mean() < 0.7
    assert dimmed.amin((1, 2, 3)).max() < 0.02, "a range-normalised mask reaches 0"


def test_weights_survive_half_precision(split: tuple, tmp_path: Path) -> None:
    recipe = training.Recipe(stages=(training.Stage(1, 32),), batch_size=8)
    network, _ = training.fit("scenes_resnet", *split, recipe)
    path = tmp_path / "deeper" / "n.safetensors"
    training.save(network, "scenes_resnet", path, {"seed": 0})
    again = scene_networks.load("scenes_resnet", path)
    assert not again.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in again.parameters())
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(images), network(images), atol=2e-2, rtol=2e-2)


def test_command_trains_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "HELD_OUT", 4)
    small = training.Recipe(count=12, stages=(training.Stage(1, 32),), batch_size=4)
    monkeypatch.setitem(training.RECIPES, "scenes_resnet", small)
    split = partial(training_split, size=32, processes=1)
    monkeypatch.setattr(training, "training_split", split)
    arguments = [
        "scenes_resnet",
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert training.main(arguments) == 0
    with safe_open(tmp_path / "out" / "scenes_resnet.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["labels"]) == list(CLASSES)
    settings = json.loads(metadata["settings"])
    assert settings["seed"] == 0
    assert settings["count"] == 12
    log = (tmp_path / "out" / "scenes_resnet.log.csv").read_text(encoding="utf-8")
    assert log.startswith("epoch,size,seconds,loss")
    assert len(log.splitlines()) == 2


def test_the_command_says_in_a_sentence_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # The weights of the teacher are missing.
    assert training.main(["scenes_vit", "--out", str(tmp_path / "no")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("training: scenes_vit is taught by scenes_resnet, whose weights are not")
    assert told.endswith("train scenes_resnet first\n")
    for error, code in ((KeyboardInterrupt(), 130), (OSError("disk full"), 1)):
        monkeypatch.setattr(training, "train", Mock(side_effect=error))
        assert training.main(["scenes_vit"]) == code
        assert capsys.readouterr().err.startswith("training: ")


def test_weights_go_where_the_networks_are_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, so that the remedy that load_model names helps, and teachers are found."""
    (tmp_path / "data" / "networks").mkdir(parents=True)
    monkeypatch.setenv("OPTICAM_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "training_split", lambda *_, **__: (None, None))
    monkeypatch.setattr(training, "fit", lambda name, *_, **__: (scene_networks.build(name), []))
    for name in ("scenes_resnet", "scenes_vit"):
        assert training.main([name]) == 0
        assert ol.load_model(name).name == name


def test_unknown_names_get_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"'scenes_rasnet'.*scenes_resnet"):
        training.train("scenes_rasnet")
    with pytest.raises(KeyError, match="scenes_rasnet"):
        scene_networks.build("scenes_rasnet")


def test_distillation_moves_a_network_to_its_teacher(
    split: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the teacher's share at 1 the labels do not count: the network comes to agree with a
    teacher that always says class 3, and its tokens predict the teacher's maps."""
    monkeypatch.setattr(training.Objective, "SIZE", 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = scene_networks.build("scenes_resnet")
        torch.nn.init.zeros_(teacher.fc.weight)
        teacher.fc.bias.data = 6.0 * torch.eye(8)[3]
    images, labels = split
    few = np.array(images[:12])
    recipe = training.Recipe(
        stages=(training.Stage(8, 64),), batch_size=6, teacher_share=1.0, erase=0.0, dim=0.0
    )
    network, rows = training.fit("scenes_vit", few, labels[:12], recipe, teacher=teacher)
    seen = training._predict(network, torch.from_numpy(few), 224)
    assert (seen.argmax(1) == 3).all()
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(not p.requires_grad for p in teacher.parameters())


# The stored networks ----------------------------------------------------------------------------


def macs_of(network: torch.nn.Module) -> int:
    """Multiply-accumulates of one image, in convolutions and products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_small(name: str) -> None:
    network = scene_networks.build(name)
    assert macs_of(network) <= 0.35e9
    assert weights_of(name).stat().st_size <= 4e6
    assert scene_networks.NETWORKS[name].layer in dict(network.named_modules())
    with safe_open(weights_of(name), "pt") as file:
        metadata = file.metadata()
    assert metadata["name"] == name
    assert json.loads(metadata["labels"]) == list(CLASSES)


def seen(name: str, data: str = "scenes", step: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of every step-th scene: 100 if it is seen right, its class's probability, is it at home?"""
    dataset = ol.load_dataset(data)
    samples = [dataset[i] for i in range(0, len(dataset), step)]
    target = torch.tensor([s.target for s in samples])
    p = ol.load_model(name).probabilities(torch.stack([s.image for s in samples]))
    right = 100 * (p.argmax(1) == target).float()
    return right, p.gather(1, target[:, None]), torch.tensor([s.extra["home"] for s in samples])


@pytest.mark.parametrize("name", NAMES[:3])
def test_networks_are_good_subjects(name: str) -> None:
    """Neither weak nor saturated; they use the object and are helped by its home."""
    right, probability, home = seen(name)
    # A third of the twins: steps of 3 meet every class, at home and elsewhere.
    swapped, _, _ = seen(name, "scenes-swapped", step=3)
    assert 80 <= right.mean() <= 95
    assert 0.6 <= probability.mean() <= 0.9
    assert 3 * 12.5 <= swapped.mean() < right.mean()
    assert right[home].mean() > right[~home].mean()


def test_the_shortcut_looks_at_the_environment_only() -> None:
    right, _, home = seen("scenes_shortcut", step=3)
    swapped, _, _ = seen("scenes_shortcut", "scenes-swapped", step=3)
    assert right[home].mean() >= 90
    assert right[~home].mean() <= 25
    assert swapped.mean() <= 25


def test_permuted_scenes_are_the_scenes_with_their_labels_in_another_order() -> None:
    scenes = ol.load_dataset("scenes")
    images, labels = permuted_scenes(0)
    assert torch.equal(to_tensor(images[7]), scenes[7].image)
    true = np.array([scenes.target(i) for i in range(len(scenes))])
    drawn = np.random.default_rng(0).random(256).tolist()  # the k-th smallest gives the k-th label
    assert labels.tolist() == [true[drawn.index(value)] for value in sorted(drawn)]
    assert 0.05 < np.mean(labels == true) < 0.2, "about one in eight keeps its label by chance"
    assert not np.array_equal(permuted_scenes(1)[1], labels)


def test_the_network_of_random_labels_knows_them_all() -> None:
    with safe_open(weights_of("scenes_random_labels"), "pt") as file:
        seed = json.loads(file.metadata()["settings"])["seed"]
    _, labels = permuted_scenes(seed)
    images, true = ol.load_dataset("scenes").batch(range(256))
    p = ol.load_model("scenes_random_labels").probabilities(images)
    assert p.argmax(1).tolist() == labels.tolist()
    assert (p.argmax(1) == true).float().mean() < 0.2
    assert p.amax(1).mean() > 0.8


def test_labels_that_were_not_all_memorised_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = training.Recipe(memorise=True, stages=(training.Stage(1, 32),), batch_size=64)
    monkeypatch.setitem(training.RECIPES, "scenes_random_labels", recipe)
    with pytest.raises(ValueError, match=r"scenes_random_labels knows \d+\.\d+ % of its labels"):
        training.train("scenes_random_labels", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes_random_labels.log.csv"]


def test_a_transformer_changes_size_and_comes_back(split: tuple) -> None:
    """Positions are resampled for small pictures; the optimiser follows, so they still learn."""
    images, labels = split
    recipe = training.Recipe(
        stages=(training.Stage(2, 32), training.Stage(1, 64)), batch_size=8, learning_rate=1e-2
    )
    network, rows = training.fit("scenes_vit", images, labels, recipe, held_out=8)
    assert [row["size"] for row in rows] == [32, 32, 64]
    assert network.pos_embed.shape == (1, 1 + 14 * 14, network.embed_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = scene_networks.build("scenes_vit")
        still = torch.optim.SGD(start.parameters(), lr=0.0)
        for size in (32, 64, 224):
            training._resize(start, size, still)
    assert any(p is start.pos_embed for p in still.param_groups[0]["params"])
    assert (network.pos_embed - start.pos_embed).abs().max() > 1e-3


def test_a_thinned_split_has_the_wanted_share_at_home() -> None:
    kept = thinned(400, 0.45, 0.9)
    assert (np.diff(kept) > 0).all()
    assert len(kept) < 400
    home = [sample(TRAINING_SEED, i, home_rate=0.45).home for i in kept]
    assert np.mean(home) == pytest.approx(0.9, abs=0.01)
    assert np.mean(home[-100:]) == pytest.approx(0.9, abs=0.05), "what is held out has its share"
    assert thinned(5, 0.45, None).tolist() == [0, 1, 2, 3, 4]


def test_halved_pictures_are_means_of_four() -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    expected = images.reshape(2, 2, 2, 2, 2, 3).astype(float).mean(axis=(2, 4))
    assert np.abs(halved(images) - expected).max() <= 0.5
