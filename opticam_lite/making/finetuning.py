"""Fine-tune a network for the classes of a dataset, as the paper does for medical images (E.2).

First the last linear layer is trained alone, the rest frozen; then the whole network, by SGD with
momentum at a low rate. The state is written after each epoch, and each epoch draws its order from
the seed and its number, so a run that was killed ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets import Dataset, ImageError, load_dataset
from ..models import load_model
from ..network import Classifier
from ..registry import check_seed, seeded, whole_number

Tell = Callable[[str], object]


def _number(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Schedule:
    """How a network is fine-tuned. Defaults: Appendix E.2, chest X-rays.

    The paper's learning rates of the last layer on Kvasir are 1e-4 for ResNet50 and 5e-3 for VGG16.
    It gives neither the epochs of the last layer nor the batch size.

    Raises:
        ValueError: If a number is out of its range; the message names it.
    """

    head_epochs: int = _number(10, "epochs of the last layer alone")
    head_rate: float = _number(1e-3, "learning rate there")
    epochs: int = _number(50, "epochs of the whole network")
    rate: float = _number(1e-5, "learning rate there")
    momentum: float = _number(0.9, "of SGD, in both parts")
    batch_size: int = _number(32, "images in a step")
    seed: int = _number(0, "of the last layer's weights, the order of images, and dropout")

    def __post_init__(self) -> None:
        for name, least in {"head_epochs": 0, "epochs": 0, "batch_size": 2}.items():
            whole_number(name, getattr(self, name), least)
        check_seed(self.seed)
        for name in ("head_rate", "rate", "momentum"):
            value = getattr(self, name)
            if not 0 <= value < (1 if name == "momentum" else math.inf):
                needed = "from 0 to below 1" if name == "momentum" else "≥ 0"
                raise ValueError(f"{name} is {value}; a number {needed} is needed")


def finetune(
    model: str,
    data: str,
    out: str | Path,
    schedule: Schedule = Schedule(),
    *,
    checkpoint: str | Path | None = None,
    weights: str = "hub",
    device: str = "auto",
    tell: Tell | None = None,
) -> Path:
    """Fine-tune a network and write its weights, its classes and a log.

    Args:
        model, checkpoint, weights, device: As of `load_model`.
        data: `chest-xray:PATH`, `kvasir:PATH`, or `folders:PATH` with `train` and `test` (or `val`)
            in it, each with a folder a class.
        out: `NAME.safetensors`. Beside it: `NAME.classes.txt`, which `load_model` reads;
            `NAME.log.csv`, a row an epoch; and until the end `NAME.part`, from which the same call
            continues.
        schedule: Epochs, rates, seed.
        tell: Called with a line of progress after each epoch.

    Returns:
        `out`.

    Raises:
        ValueError: If the data have no training split or fewer than two classes, the network does
            not end in a linear layer, or `NAME.part` is of another run.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out is {str(out)!r}; a file that ends with .safetensors is needed")
    base = load_model(model, checkpoint=checkpoint, weights=weights, device=device)
    training, held_out = _splits(data, None)
    labels = training.labels or []
    if len(labels) < 2:
        raise ValueError(f"{data} has {len(labels)} classes; at least two are needed")
    network = copy.deepcopy(base.network)
    head = _replaced_head(network, len(labels), schedule.seed)
    about = {"mean": base.mean, "std": base.std, "size": base.size, "device": base.device}
    classifier = Classifier(
        network, labels=labels, preprocessing=base.preprocessing, name=base.name, **about
    )
    # The same images once more, prepared for this network.
    training, held_out = _splits(data, classifier)
    run = _digest(model, data, classifier, schedule, training)
    part, log = out.with_suffix(".part"), out.with_suffix(".log.csv")
    state = _read_part(part, run)
    rows: list[dict[str, Any]] = state["rows"] if state else []
    network.to(base.device)
    if state:
        network.load_state_dict(state["network"])
    optimizer = None
    for epoch in range(len(rows) + 1, schedule.head_epochs + schedule.epochs + 1):
        alone = epoch <= schedule.head_epochs
        if optimizer is None or epoch == schedule.head_epochs + 1:
            network.requires_grad_(not alone)
            head.requires_grad_(True)
            optimizer = torch.optim.SGD(
                [p for p in network.parameters() if p.requires_grad],
                schedule.head_rate if alone else schedule.rate,
                schedule.momentum,
            )
            if state and state["alone"] == alone:
                optimizer.load_state_dict(state["optimizer"])
        loss = _epoch(network, head, classifier, training, optimizer, schedule, epoch, alone)
        row = {"epoch": epoch, "layers": "last" if alone else "all", "loss": round(loss, 5)}
        row |= {"held_out_top1": round(_accuracy(network, classifier, held_out), 2)}
        rows.append(row)
        kept = {"run": run, "rows": rows, "alone": alone, "network": network.state_dict()}
        kept["optimizer"] = optimizer.state_dict()
        _write(part, partial(torch.save, kept))
        _write(log, pd.DataFrame(rows).to_csv)
        if tell is not None:
            tell(", ".join(f"{name} {value}" for name, value in row.items()))
    names = "".join(f"{label}\n" for label in labels)
    _write(out.with_suffix(".classes.txt"), lambda path: path.write_text(names, encoding="utf-8"))
    settings = json.dumps({"model": model, "data": data, **asdict(schedule)})
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    _write(out, lambda path: save_file(tensors, str(path), {"settings": settings}))
    part.unlink(missing_ok=True)
    return out


def _splits(data: str, classifier: Classifier | None) -> tuple[Dataset, Dataset]:
    """Return the images to train on, and those that measure the accuracy."""
    form, _, path = data.partition(":")
    if form == "folders":
        root = Path(path).expanduser()
        held_out = next((s for s in ("test", "val") if (root / s).is_dir()), None)
        if held_out is None or not (root / "train").is_dir():
            raise ValueError(
                f"{path} has no training split; make the folders train and test in it, each with "
                "a folder for each class"
            )
        names = (f"folders:{root / split}" for split in ("train", held_out))
    elif form in ("chest-xray", "kvasir"):
        names = (f"{data}:{split}" for split in ("train", "test"))
    else:
        raise ValueError(
            f"{data} has no training split; chest-xray:PATH, kvasir:PATH and folders:PATH, with "
            "train and test in it, have one"
        )
    training, measured = (load_dataset(name, classifier=classifier) for name in names)
    if training.labels != measured.labels:
        raise ValueError(f"the two splits of {data} have other classes; both need the same folders")
    return training, measured


def _replaced_head(network: nn.Module, classes: int, seed: int) -> nn.Linear:
    """Put a new linear layer in place of the last one, and return it."""
    named = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    last = [(n, m) for n, m in named if list(m.parameters(recurse=False))]
    name, old = last[-1] if last else ("", None)
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"{type(network).__name__} does not end in a linear layer but in "
            f"{name or 'no layer'} ({type(old).__name__}), so its classes can't be replaced; take "
            "a network such as resnet50 or vgg16"
        )
    with seeded(seed):
        new = nn.Linear(old.in_features, classes)
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, new)
    return new


def _epoch(
    network: nn.Module,
    head: nn.Module,
    classifier: Classifier,
    dataset: Dataset,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epoch: int,
    alone: bool,
) -> float:
    """Train for an epoch; return the mean loss."""
    network.train(not alone)
    head.train()
    with seeded(schedule.seed + 1_000_003 * epoch, classifier.device):
        order = torch.randperm(len(dataset)).tolist()
        total, count = 0.0, 0
        for images, targets in _batches(dataset, order, schedule.batch_size):
            if len(images) == 1 and not alone:
                continue  # batch norm has no variance of one image
            logits = network(classifier.normalised(images))
            loss = F.cross_entropy(logits, targets.to(logits.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count = total + float(loss.detach()) * len(images), count + len(images)
    return total / max(count, 1)


@torch.no_grad()
def _accuracy(network: nn.Module, classifier: Classifier, dataset: Dataset) -> float:
    network.eval()
    hits, count = 0, 0
    for images, targets in _batches(dataset, list(range(len(dataset))), 32):
        predicted = network(classifier.normalised(images)).argmax(1).cpu()
        hits, count = hits + int((predicted == targets).sum()), count + len(images)
    return 100 * hits / max(count, 1)


def _batches(dataset: Dataset, order: list[int], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and targets; an image that can't be read is left out."""
    for start in range(0, len(order), size):
        samples = []
        for i in order[start : start + size]:
            try:
                samples.append(dataset[i])
            except ImageError:
                continue
        if samples:
            targets = torch.tensor([s.target for s in samples])
            yield torch.stack([s.image for s in samples]), targets


def _digest(
    model: str, data: str, classifier: Classifier, schedule: Schedule, training: Dataset
) -> str:
    """Return a digest of all that the result depends on."""
    found = hashlib.sha256(repr((model, data, schedule, classifier.labels)).encode())
    for name, value in classifier.network.state_dict().items():
        found.update(name.encode() + value.cpu().numpy().tobytes())
    for i in range(len(training)):
        found.update(f"{training.id(i)} {training.fingerprint(i)}".encode())
    return found.hexdigest()


def _read_part(part: Path, run: str) -> dict[str, Any] | None:
    if not part.exists():
        return None
    state: dict[str, Any] = torch.load(part, weights_only=True)
    if state["run"] != run:
        raise ValueError(
            f"{part} is of a run with another network, other images or another schedule; remove "
            "it, or name another file to write"
        )
    return state


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that it is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    write(unfinished)
    unfinished.replace(path)
