"""Names → classifiers: embedded, torchvision, timm; checkpoints; what happens without a network."""

from __future__ import annotations

import argparse
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import make_images
from safetensors.torch import save_file

import opticam_lite as ol
from opticam_lite import models
from opticam_lite.network import Preprocessing

EMBEDDED = ["scenes_resnet", "scenes_vgg", "scenes_vit", "scenes_shortcut", "scenes_random_labels"]


def test_the_list_of_models() -> None:
    names = ol.list_models()
    assert names[: len(EMBEDDED)] == EMBEDDED
    assert {"resnet50", "vgg16_bn", "vit_base_patch16_224", "deit_base_patch16_224"} <= set(names)
    assert len(names) == len(set(names)) > 1000


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_networks_need_no_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    classifier = ol.load_model(name)
    assert classifier.name == name
    assert classifier.size == (224, 224)
    assert len(classifier.labels) == classifier.classes == 8
    assert classifier.layer in classifier.layers
    scenes = ol.load_dataset("scenes")
    images, targets = scenes.batch(range(4))
    assert classifier.labels == scenes.labels
    masks = ol.explain("grad-cam", classifier, images, targets)
    assert masks.shape == (4, 1, 224, 224)


def _no_network(*_: object) -> None:
    raise OSError("no network in this test")


def test_default_layers_of_the_embedded_networks_follow_the_paper() -> None:
    assert ol.load_model("scenes_resnet").layer.startswith("layer4.")
    vgg = ol.load_model("scenes_vgg")
    modules = dict(vgg.network.named_modules())
    assert isinstance(modules[vgg.layer], torch.nn.ReLU)
    number = int(vgg.layer.rpartition(".")[2])
    assert isinstance(modules[f"features.{number + 1}"], torch.nn.MaxPool2d)
    vit = ol.load_model("scenes_vit")
    assert vit.layer == f"blocks.{len(vit.network.blocks) - 1}.norm1"


def test_errors_that_users_may_catch_are_public() -> None:
    names = {"CutError", "HubError", "ImageError", "StoreError"}
    assert names <= set(ol.__all__)
    assert all(issubclass(getattr(ol, name), Exception) for name in names)


def test_missing_embedded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "networks").mkdir()
    monkeypatch.setenv("OPTICAM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the weights of 'scenes_vit' are not at"):
        ol.load_model("scenes_vit")


def test_random_weights_and_settings_of_both_libraries() -> None:
    tv = ol.load_model("squeezenet1_1", weights="random")
    assert tv.layer == "features.12"
    assert tv.labels[:2] == ["tench", "goldfish"]
    assert tv.preprocessing == Preprocessing((224, 224), 256, "bilinear")
    of_timm = ol.load_model("timm/efficientnet_b0", weights="random")
    assert type(of_timm.network).__module__.startswith("timm.")
    assert of_timm.preprocessing.interpolation == "bicubic"
    assert of_timm.labels[0] == "tench"
    assert tv.logits(make_images(1, 224, 224)).shape == (1, 1000)
    raw = ol.load_model("squeezenet1_1", weights="random", normalize=False, layer="features.7")
    assert not raw.normalize
    assert raw.layer == "features.7"
    own = ol.load_model("squeezenet1_1", weights="random", labels=[f"c{i}" for i in range(1000)])
    assert own.labels[3] == "c3"


def test_where_a_name_comes_from() -> None:
    assert models.check_model_name("scenes_vit") == "embedded"
    assert models.check_model_name("resnet50") == "torchvision"
    assert models.check_model_name("timm/resnet50") == "timm"
    assert models.check_model_name("vit_base_patch16_224") == "timm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes_rasnet", "unknown network 'scenes_rasnet'; did you mean 'scenes_resnet'"),
        ("resnet51", "did you mean 'resnet"),
        ("timm/scenes_vit", "unknown network"),
        ("", "unknown network ''"),
        (3, "unknown network 3"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ol.load_model(name)
    with pytest.raises(ValueError, match="unknown weights 'none'"):
        ol.load_model("resnet18", weights="none")


# ------------------------------------------------------------------------------------- checkpoints


def network(classes: int = 1000) -> torch.nn.Module:
    torch.manual_seed(5)
    return torchvision.models.squeezenet1_1(weights=None, num_classes=classes).eval()


@pytest.mark.parametrize(
    ("file", "stored"),
    [
        ("weights.safetensors", lambda state: state),
        ("half.safetensors", lambda state: {k: v.half() for k, v in state.items()}),
        ("weights.pth", lambda state: state),
        ("wrapped.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("parallel.pth", lambda state: {f"module.{k}": v for k, v in state.items()}),
    ],
)
def test_checkpoints(file: str, stored: Callable[[dict], dict], tmp_path: Path) -> None:
    save = save_file if file.endswith(".safetensors") else torch.save
    save(stored(network().state_dict()), tmp_path / file)
    classifier = ol.load_model("squeezenet1_1", checkpoint=tmp_path / file)
    images = make_images(1, 224, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (ol.IMAGENET_MEAN, ol.IMAGENET_STD))
    expected = network()((images - mean) / std)
    tolerance = 1e-2 if file.startswith("half") else 1e-4
    torch.testing.assert_close(classifier.logits(images), expected, rtol=tolerance, atol=tolerance)


def test_a_checkpoint_of_another_number_of_classes(tmp_path: Path) -> None:
    torch.save(network(7).state_dict(), tmp_path / "seven.pth")
    classifier = ol.load_model("squeezenet1_1", checkpoint=tmp_path / "seven.pth")
    assert classifier.classes == 7
    assert classifier.labels[6] == "class 6"
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    classifier = ol.load_model(
        "vit_tiny_patch16_224", checkpoint=tmp_path / "vit.safetensors", labels=list("abc")
    )
    assert classifier.labels == list("abc")


def test_classes_are_named_beside_the_checkpoint(tmp_path: Path) -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(network.state_dict(), tmp_path / "own.v2.pt")
    beside, names = tmp_path / "own.v2.classes.txt", ["cat", "garden dog", "Kühlschrank"]
    beside.write_text("\n".join(names) + "\n\n", encoding="utf-8-sig")
    settings: dict[str, Any] = {"checkpoint": tmp_path / "own.v2.pt", "device": "cpu"}
    assert ol.load_model("squeezenet1_1", **settings).labels == names
    assert ol.load_model("squeezenet1_1", labels=list("abc"), **settings).labels == list("abc")
    beside.write_bytes("Kühlschrank".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.v2\.classes\.txt is not UTF-8"):
        ol.load_model("squeezenet1_1", **settings)
    beside.write_text("cat\ndog\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.v2\.classes\.txt names 2 .* network has 3; "):
        ol.load_model("squeezenet1_1", **settings)
    for text, line in (("cat\n\nfox\ndog\n", 2), ("\ncat\nfox\ndog", 1)):
        beside.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"own\.v2\.classes\.txt has a blank line {line}; "):
            ol.load_model("squeezenet1_1", **settings)
    with pytest.raises(TypeError, match="labels is 'cat'; a list of names is needed"):
        ol.load_model("squeezenet1_1", labels="cat", **settings)


def test_random_weights_repeat_and_leave_the_random_state_alone() -> None:
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        networks.append(ol.load_model("squeezenet1_1", weights="random", device="cpu").network)
        assert torch.equal(torch.random.get_rng_state(), state)
    first, second = (network.parameters() for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_network_that_was_just_built_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(*args: Any, **options: Any) -> Any:
        built.append(timm.create_model("test_resnet"))
        return built[0], {"size": 160}

    monkeypatch.setitem(models._BUILDERS, "timm", build)
    with torch.inference_mode():
        classifier = ol.load_model("test_resnet", weights="random", device="cpu")
    assert classifier.network is built[0]
    assert not any(p.requires_grad or p.is_inference() for p in built[0].parameters())
    assert ol.explain("grad-cam", classifier, make_images(1, 160, 160), [3]).shape[0] == 1


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "squeeze.pth")
    with pytest.raises(ValueError, match=r"squeeze\.pth does not fit 'resnet18': it misses conv1"):
        ol.load_model("resnet18", checkpoint=tmp_path / "squeeze.pth")
    with pytest.raises(
        ValueError, match=r"'squeezenet1_0': it misses features\.5.* instead of \(96, 3, 7, 7\)"
    ):
        ol.load_model("squeezenet1_0", checkpoint=tmp_path / "squeeze.pth")


class Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.write_text, (Path("pwned.txt"), "code ran"))


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth can't be read as weights.*can run code"):
        ol.load_model("resnet18", checkpoint=tmp_path / "evil.pth")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="can't be read as weights"):
        ol.load_model("resnet18", checkpoint=tmp_path / "raw.pkl")
    assert not (tmp_path / "pwned.txt").exists()


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file at"):
        ol.load_model("resnet18", checkpoint=tmp_path / "nowhere.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("this is no file of weights")
        with pytest.raises(ValueError, match=re.escape(f"{name} can't be read as weights")):
            ol.load_model("resnet18", checkpoint=tmp_path / name)
    for held in ([1, 2, 3], {1: torch.zeros(2)}):
        torch.save(held, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="holds no state dict"):
            ol.load_model("resnet18", checkpoint=tmp_path / "other.pth")
    state = network().state_dict()
    key = next(iter(state))
    state[key].view(-1)[3] = torch.nan
    save_file(state, tmp_path / "broken.SAFETENSORS")
    with pytest.raises(ValueError, match=f"holds NaN or infinity in {re.escape(key)}"):
        ol.load_model("squeezenet1_1", checkpoint=tmp_path / "broken.SAFETENSORS")


# -------------------------------------------------------------------------------- without a network


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_an_unreachable_hub_is_explained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real loading code runs until it asks for a connection."""
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(ol.HubError) as caught:
        ol.load_model(name)
    message = str(caught.value)
    assert message.startswith(f"trained weights of '{name}' could not be had from ")
    assert ("download.pytorch.org" if name == "resnet18" else "timm/") in message
    assert "checkpoint=" in message
    assert "scenes_resnet" in message
    assert not models.hub.HF_HUB_OFFLINE  # as it was found


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("https://huggingface.co", 443), ("http://mirror", 80), ("http://localhost:8090/hf", 8090)],
)
def test_a_mirror_is_asked_at_its_own_port(
    endpoint: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(models.hub, "ENDPOINT", endpoint)
    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with models._quick_when_offline():
        assert not models.hub.HF_HUB_OFFLINE
    assert [p for _, p in asked] == [port]


def test_what_needs_no_hub_asks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("asked whether the hub answers")

    monkeypatch.setattr(models, "_quick_when_offline", fail)
    assert ol.load_model("vit_tiny_patch16_224", weights="random").classes == 1000


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_in_a_checkpoint_are_left_out(name: str, tmp_path: Path) -> None:
    """The published files have them, and go with inputs that the network transforms."""
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name, weights=None, init_weights=False, num_classes=5)
    whole.transform_input = True
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1  # so that logits depend on the image
    size = 299 if name == "inception_v3" else 224
    x = torchvision.transforms.functional.normalize(
        make_images(3, size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    with torch.no_grad():
        whole.train()(x)
        expected = whole.eval()(x)
        whole.transform_input = False
        assert (expected - whole(x)).abs().max() > 0.01
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    classifier = ol.load_model(name, checkpoint=tmp_path / "whole.pth")
    found = classifier.logits(make_images(3, size, size))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_first_names_of_densenet(tmp_path: Path) -> None:
    network = torchvision.models.densenet121(num_classes=5)
    first = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", k): v
        for k, v in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in first
    torch.save(first, tmp_path / "first.pth")
    classifier = ol.load_model("densenet121", checkpoint=tmp_path / "first.pth")
    for key, value in classifier.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"n_averaged": torch.tensor(3), **{f"module.{k}": state[k] for k in state}},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        lambda state: {f"net.encoder.{k}": v for k, v in state.items()},
        lambda state: {"state_dict_ema": state},
        lambda state: {"model_ema": state},
    ],
)
def test_what_others_put_around_weights(wrap, tmp_path: Path) -> None:
    state = ol.load_model("scenes_vgg").network.state_dict()
    state = {k: v * 2 for k, v in state.items()}
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    read = ol.load_model("scenes_vgg", checkpoint=tmp_path / "wrapped.pth").network.state_dict()
    assert list(read) == list(state)
    assert all(torch.equal(read[k], v) for k, v in state.items())


# ------------------------------------------------------------------- checkpoints of trainers


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights of a small network, other than those that it is built with."""
    weights = ol.load_model("scenes_vgg", device="cpu").network.state_dict()
    return {k: v * 2 for k, v in weights.items()}


def load(stored: Any, folder: Path) -> ol.Classifier:
    torch.save(stored, folder / "stored.ckpt")
    return ol.load_model("scenes_vgg", checkpoint=folder / "stored.ckpt", device="cpu")


def check(classifier: ol.Classifier, state: dict[str, torch.Tensor]) -> None:
    found = classifier.network.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[k], v) for k, v in state.items())


def lightning(state: dict[str, torch.Tensor], **beside: torch.Tensor) -> dict[str, Any]:
    """What Lightning's `Trainer.save_checkpoint` stores of a module with the network in it."""
    return {
        **{"epoch": 3, "global_step": 40, "pytorch-lightning_version": "2.5.5"},
        "state_dict": {**{f"model.{k}": v for k, v in state.items()}, **beside},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "kth_value": 1}},
        **{"optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": []},
        **{"hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1, "weights": [1.0, 2.0]}},
    }


def test_a_network_inside_a_lightning_module(state, tmp_path: Path) -> None:
    beside = {"loss.weight": torch.ones(2), "criterion.pos_weight": torch.tensor(torch.inf)}
    with pytest.warns(UserWarning, match="only what is under 'model.' is loaded, not") as told:
        classifier = load(lightning(state, **beside), tmp_path)
    assert str(told[0].message).endswith("stored.ckpt holds more than 'scenes_vgg': only what is "
        "under 'model.' is loaded, not loss.weight, criterion.pos_weight")  # fmt: skip
    assert told[0].filename == __file__
    check(classifier, state)
    # A copy under another name is no matter; other weights are.
    same = {f"trunk.{k}": v for k, v in state.items()}
    with pytest.warns(UserWarning, match=r"is loaded, not trunk\.\S+, .* and \d+ more"):
        check(load(lightning(state, **same), tmp_path), state)
    other = {f"teacher.{k}": v + 1 for k, v in state.items()}
    with pytest.raises(ValueError, match=r"other weights .* 'model.' than under 'teacher.'"):
        load(lightning(state, **other), tmp_path)


def test_what_is_beside_another_network_is_not_left_out(state, tmp_path: Path) -> None:
    torch.save(lightning(state, **{"loss.weight": torch.ones(2)}), tmp_path / "stored.ckpt")
    with pytest.raises(ValueError, match=r"it misses .*; it has also model\.") as e:
        ol.load_model("scenes_resnet", checkpoint=tmp_path / "stored.ckpt")
    assert str(e.value).endswith("Pass the name of the network that it was saved from")


def test_a_checkpoint_that_timm_saved(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=3)
    arguments = argparse.Namespace(model="test_vit", lr=np.float64(0.1), opt_betas=[0.9, 0.99])
    saver = timm.utils.CheckpointSaver(
        network,
        torch.optim.SGD(network.parameters(), 0.1),
        args=arguments,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=1, metric=np.float32(51.5))
    path = tmp_path / "last.pth.tar"
    found = torch.load(path, weights_only=False)
    assert found["metric"] == 51.5
    assert found["args"].lr == 0.1
    before = set(torch.serialization.get_safe_globals())
    check(ol.load_model("test_vit", checkpoint=path, device="cpu"), network.state_dict())
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "hide",
    [
        lambda evil: argparse.Namespace(lr=evil),
        lambda evil: {"state_dict": {}, "metric": [np.float64(1), evil]},
        lambda evil: {"np": np.ones(2)},
        lambda evil: {"path": Path("somewhere")},
    ],
)
def test_what_is_not_allowed_by_name_is_refused(hide, state, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stored in ({**state, "args": hide(Evil())}, {"state_dict": state, "args": hide(Evil())}):
        with pytest.raises(ValueError, match=r"can't be read as weights.*can run code"):
            load(stored, tmp_path)
    assert not (tmp_path / "pwned.txt").exists()


def test_a_changed_network_is_one_of_your_own(tmp_path: Path) -> None:
    own = (
        r"it was saved from\. If that was changed, such as in its last layer or first convolution, "
        r"build it as it was, load these weights into it and use ol\.Classifier\(my_network\)$"
    )
    network = torchvision.models.resnet18(num_classes=4)
    network.fc = torch.nn.Sequential(torch.nn.Dropout(), network.fc)
    torch.save(network.state_dict(), tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=rf"misses fc\.weight, .* has also fc\.1\.weight, .*{own}"):
        ol.load_model("resnet18", checkpoint=tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=r"it was saved from$"):
        ol.load_model("squeezenet1_1", checkpoint=tmp_path / "changed.pth")
    network = torchvision.models.resnet18(num_classes=4)
    network.conv1 = torch.nn.Conv2d(1, 64, 7, bias=False)
    torch.save(network.state_dict(), tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=rf"has conv1\.weight \(64, 1, 7, 7\) instead of .*{own}"):
        ol.load_model("resnet18", checkpoint=tmp_path / "grey.pth")


def test_whole_numbers_are_no_weights(state, tmp_path: Path) -> None:
    key = next(k for k in state if state[k].ndim == 4)
    whole = {**state, key: (state[key] * 100).to(torch.int8)}
    with pytest.raises(ValueError, match=rf"{re.escape(key)} as torch\.int8, not as floating"):
        load(whole, tmp_path)
