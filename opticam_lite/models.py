"""Names → classifiers: embedded networks, torchvision's and timm's."""

from __future__ import annotations

import itertools
import re
import socket
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torchvision
from huggingface_hub import constants as hub
from safetensors.torch import load_file
from torch import Tensor, nn

from . import scene_networks
from .datasets.scenes import CLASSES
from .network import ACTIVATIONS, IMAGENET_MEAN, IMAGENET_STD, Classifier, Preprocessing, usual
from .paths import data_dir, given_path
from .registry import check_name, seeded, unknown_name

WEIGHTS = ("hub", "random")


class HubError(ConnectionError):
    """Trained weights could not be downloaded from their hub."""


def list_models() -> list[str]:
    """Return the names that `load_model` takes: of embedded, torchvision and timm networks."""
    own = [*scene_networks.NETWORKS, *_torchvision_names()]
    return own + [name for name in timm.list_models() if name not in set(own)]


def check_model_name(name: str) -> str:
    """Return where a name comes from: `"embedded"`, `"torchvision"` or `"timm"`.

    Raises:
        ValueError: For an unknown name; the message lists close matches.
    """
    source, _, bare = name.rpartition("/") if isinstance(name, str) else ("", "", name)
    if source in ("", "embedded") and bare in scene_networks.NETWORKS:
        return "embedded"
    if source in ("", "torchvision") and bare in _torchvision_names():
        return "torchvision"
    # timm's names may end with a tag that names the weights: "resnet50.a1_in1k".
    if source in ("", "timm") and isinstance(bare, str) and timm.is_model(bare):
        return "timm"
    raise ValueError(unknown_name("network", name, list_models()))


@torch.inference_mode(False)  # inference tensors could not be differentiated later
def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    layer: str | None = None,
    device: str | torch.device = "auto",
    weights: str = "hub",
    normalize: bool = True,
    labels: Sequence[str] | None = None,
    activation: str = "softmax",
) -> Classifier:
    """Load a network by name and make a classifier of it.

    Args:
        name: One of `list_models()`: an embedded network (`"scenes_resnet"`), or a torchvision or
            timm name. A name that both have is torchvision's, as in the paper; `"timm/resnet50"`
            asks for the other.
        checkpoint: A local file of weights, `.safetensors` or a state dict saved by `torch.save`
            (read with `weights_only=True`: code in it is never run), also inside a checkpoint of
            timm or Lightning. The number of classes is taken from it. A text file beside it,
            `cats.classes.txt` of `cats.pt`, may name them, one a line.
        layer: Where to cut. Default: Appendix A of the paper, see `Classifier`.
        device: `"auto"`, `"cpu"`, `"cuda"`, …
        weights: Without a checkpoint: `"hub"` downloads trained weights (torchvision's
            IMAGENET1K_V1, as in the paper, or timm's default), `"random"` leaves the network
            untrained, the same each time. Embedded networks bring their own.
        normalize: False leaves the normalisation out (paper, Appendix H).
        labels: Names of the classes. Default: those beside the checkpoint, else ImageNet's where
            there are 1,000.
        activation: `"sigmoid"` for a network with several labels an image, see `Classifier`.

    Threads that load take turns: libraries draw the first weights from the process's generators.

    Raises:
        ValueError: For an unknown name, layer or option, a checkpoint that does not fit, or a
            network without a classifier (DINOv2, SigLIP, CLIP's image towers, …).
        FileNotFoundError: If the checkpoint does not exist.
        HubError: If the weights can't be downloaded from the hub; the message says what was tried
            and what to do.
    """
    check_name("weights", weights, WEIGHTS)
    check_name("activation", activation, ACTIVATIONS)
    source, name = check_model_name(name), name.rpartition("/")[2]
    build = _BUILDERS[source]
    if source == "timm" and checkpoint is None:
        _check_head(name)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    with usual(), seeded(0):
        network, settings = build(name, state is None and weights == "hub")
        if checkpoint is not None and state is not None:
            state = _renamed(name, state, network.state_dict(), checkpoint)
            classes = _other_classes(state, network.state_dict())
            if classes is not None:
                network, _ = build(name, False, num_classes=classes)
                settings["labels"] = None  # the names of the original classes do not apply
            _fill(name, network, state, checkpoint)
            del state  # as large as the network
    if labels is not None:
        settings["labels"] = labels
    settings["layer"] = layer or settings.get("layer")
    classifier = Classifier(
        network, device=device, normalize=normalize, name=name, activation=activation, copy=False,
        **settings,
    )  # fmt: skip
    if labels is None and checkpoint is not None:
        _name_classes(classifier, given_path(checkpoint))
    return classifier


def _check_head(name: str) -> None:
    """Raise ValueError if timm's network of this name gives features, not the logits of classes.

    Those of CLIP end in an embedding of a multiple of 128 values; no set of classes of timm's
    networks is of such a size.
    """
    config = timm.get_pretrained_cfg(name)
    if config and config.num_classes % 128 == 0:
        raise ValueError(
            f"{name} has no classifier: it gives features, not the logits of classes. Train a head "
            f"on it and pass ol.Classifier(timm.create_model({name!r}, num_classes=…)) with its "
            "weights, or ol.Classifier(torch.nn.Sequential(network, head))"
        )


def _name_classes(classifier: Classifier, checkpoint: Path) -> None:
    """Take the names of the classes from the text file beside a checkpoint, if there is one."""
    path = checkpoint.with_suffix(".classes.txt")
    if not path.is_file():
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8; save the classes' names as such a text") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    wrong = f"names {len(names)} classes, but the network has {classifier.classes}"
    if "" in names:
        wrong = f"has a blank line {names.index('') + 1}"
    if "" in names or len(names) != classifier.classes:
        raise ValueError(f"{path} {wrong}; write one name a line, in the order of the logits")
    classifier.labels = names


class _Unread:
    """Stands for an object beside the weights, which is not made: nothing of its class runs."""

    def __new__(cls, *_: Any) -> _Unread:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# timm keeps its script's arguments and NumPy's numbers beside the weights.
_NUMBERS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_UNREAD: list[Any] = [(_Unread, name) for name in ("argparse.Namespace", *_NUMBERS)]
_reading = threading.Lock()  # what `torch.load` may read is known to the whole process


@usual()
def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file or one that `torch.save` wrote.

    Pickled code is never run: a file that contains more than tensors, plain values and what timm
    keeps beside them raises an error.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of weights.
    """
    path = given_path(path, "the checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file at {path}; check the path")
    try:
        if path.suffix.lower() == ".safetensors":
            state: Any = load_file(path)
        else:
            with _reading, torch.serialization.safe_globals(_UNREAD):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for other kinds of files the readers raise errors of any type
        raise ValueError(
            f"{path} can't be read as weights: it is damaged or something else; a "
            ".safetensors file or a state dict saved by torch.save(network.state_dict(), path) is "
            "needed: files that pickle whole networks are refused, for they can run code"
        ) from error
    for key in ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(
            f"{path} holds no state dict (names → tensors); save one with "
            "torch.save(network.state_dict(), path)"
        )
    state.pop("n_averaged", None)  # AveragedModel's counter
    # Half precision is for storage only.
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _embedded(name: str, pretrained: bool, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    path = data_dir() / "networks" / f"{name}.safetensors"
    if pretrained and not path.is_file():
        raise FileNotFoundError(
            f"the weights of {name!r} are not at {path}; restore the repository's data/ folder "
            f"or train them again with python -m opticam_lite.making.training {name}"
        )
    network = (
        scene_networks.load(name, path) if pretrained else scene_networks.build(name, **options)
    )
    return network, {
        "layer": scene_networks.NETWORKS[name].layer,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "labels": list(CLASSES),
        "size": 224,
        "preprocessing": Preprocessing((224, 224), 224, "bilinear"),
    }


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(name: str, pretrained: bool, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    all_weights = torchvision.models.get_model_weights(name)
    # The paper used the first weights of the model zoo, where there are several.
    chosen = getattr(all_weights, "IMAGENET1K_V1", None) or all_weights.DEFAULT
    if name in ("googlenet", "inception_v3") and not pretrained:
        options.setdefault("init_weights", False)  # their default initialisation takes a minute
        options.setdefault("aux_logits", False)  # auxiliary heads serve training only
        options.setdefault("transform_input", True)  # as for their published weights
    weights = chosen if pretrained else None
    with _from_hub(name, chosen.url, pretrained):
        network = torchvision.models.get_model(name, weights=weights, **options)
    crop = chosen.transforms()
    size = crop.crop_size[0]
    return network, {
        "mean": crop.mean,
        "std": crop.std,
        "labels": chosen.meta["categories"],
        "size": size,
        "preprocessing": Preprocessing((size, size), crop.resize_size[0], crop.interpolation.value),
    }


def _timm(name: str, pretrained: bool, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    where = timm.get_pretrained_cfg(name)
    place = str((where.hf_hub_id or where.url) if where else "") or "timm's hub"
    offline = _quick_when_offline() if pretrained else nullcontext()
    with _from_hub(name, place, pretrained), offline:
        network = timm.create_model(name, pretrained=pretrained, **options)
    config = timm.data.resolve_data_config(model=network)
    height, width = config["input_size"][1:]
    labels = None
    if network.num_classes == 1000:
        labels = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return network, {
        "mean": config["mean"],
        "std": config["std"],
        "labels": labels,
        "size": (height, width),
        "preprocessing": Preprocessing(
            (height, width),
            int(min(height, width) / config["crop_pct"]),
            "bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        ),
    }


# Each function takes a name, whether to load trained weights, and options of the network; it
# returns the network with the settings of its classifier.
_BUILDERS: dict[str, Callable[..., tuple[nn.Module, dict[str, Any]]]] = {
    "embedded": _embedded,
    "torchvision": _torchvision,
    "timm": _timm,
}


@contextmanager
def _quick_when_offline() -> Iterator[None]:
    """Use the hub's local cache at once, not after a timeout of two minutes, when offline."""
    url = urllib.parse.urlsplit(hub.ENDPOINT)  # HF_ENDPOINT may name a mirror
    port = url.port or {"http": 80}.get(url.scheme, 443)
    before = hub.HF_HUB_OFFLINE
    # Behind a proxy a direct connection does not show whether the hub can be reached.
    if not urllib.request.getproxies():
        try:
            socket.create_connection((url.hostname or "", port), timeout=5).close()
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextmanager
def _from_hub(name: str, place: str, pretrained: bool) -> Iterator[None]:
    """Raise HubError for whatever fails while trained weights are loaded."""
    try:
        yield
    except Exception as error:
        if not pretrained:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HubError(
            f"trained weights of {name!r} could not be had from {place} ({type(error).__name__}: "
            f"{reason[:200]}); check the network connection, pass checkpoint='weights.safetensors',"
            " or use an embedded network, which needs no download: "
            f"{', '.join(scene_networks.NETWORKS)}"
        ) from error


def _renamed(
    name: str, state: dict[str, Tensor], own: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, renamed to the names of the network's parameters.

    Args:
        name: Of the network.
        state: Names → tensors of the checkpoint, perhaps with a prefix from parallel training,
            torch.compile or an enclosing module, whose other tensors are left out with a warning.
        own: The network's state.
        path: Of the checkpoint.
    """
    some = [f".{k}" for k in itertools.islice(own, 20)]  # of thousands of names
    prefixes = {"", *(k[: 1 - len(o)] for k in state for o in some if k.endswith(o))}
    versions = {
        prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for prefix in sorted(prefixes)
    }
    shared = {prefix: len(own.keys() & version.keys()) for prefix, version in versions.items()}
    best = max(shared, key=shared.__getitem__)
    if 2 * shared[best] < len(own):  # another network: all its names are told
        whole = [prefix for prefix in versions if len(versions[prefix]) == len(state)]
        best = max(whole, key=shared.__getitem__)
    if left := [k for k in state if not k.startswith(best)]:
        for prefix, version in versions.items():
            same = all(k in version and version[k].equal(v) for k, v in versions[best].items())
            if shared[prefix] == shared[best] and not same:
                raise ValueError(
                    f"{path} holds other weights of {name!r} under {best!r} than under {prefix!r}; "
                    "save those that you mean by torch.save(network.state_dict(), path)"
                )
        warnings.warn(
            f"{path} holds more than {name!r}: only what is under {best!r} is loaded, not "
            f"{_first(left)}",
            stacklevel=4,
        )
    # Auxiliary heads serve training only; DenseNet's first published files have other names.
    return {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v
        for k, v in versions[best].items()
        if k in own or not k.startswith(("AuxLogits.", "aux1.", "aux2."))
    }


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _other_classes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int | None:
    """Return a checkpoint's number of classes if it differs from the network's.

    Tensors then differ in their first dimension only, and all by the same sizes.
    """
    resized = [(v, own[k]) for k, v in state.items() if k in own and v.shape != own[k].shape]
    classes = {v.shape[0] for v, mine in resized if v.shape[1:] == mine.shape[1:]}
    return classes.pop() if len(classes) == 1 else None


def _fill(name: str, network: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict into a network, or raise an error that says why it does not fit."""
    own = network.state_dict()
    # Batch counters matter to training only, and some files leave them out.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    wrong = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or unexpected or wrong:
        told = (("misses", missing), ("has also", unexpected), ("has", wrong))
        details = [f"{what} {_first(keys)}" for what, keys in told if keys]
        advice = "Pass the name of the network that it was saved from"
        if 2 * sum(k in own and v.shape == own[k].shape for k, v in state.items()) >= len(own):
            advice += (
                ". If that was changed, such as in its last layer or first convolution, build it "
                "as it was, load these weights into it and use ol.Classifier(my_network)"
            )
        raise ValueError(f"{path} does not fit {name!r}: it {'; it '.join(details)}. {advice}")
    for k, v in state.items():
        if own[k].is_floating_point() and not v.is_floating_point():
            raise ValueError(
                f"{path} holds {k} as {v.dtype}, not as floating-point numbers; save the weights "
                "that the network had before they were quantised"
            )
        if v.is_floating_point() and not v.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinity in {k}; the weights are of no use")
    network.load_state_dict(own | state)
