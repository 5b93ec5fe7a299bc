"""What a report is about: its parameters checked, the network and the images they name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..datasets import Dataset, ImageError, Unlabelled, knows_classes, load_dataset
from ..evaluation import choose
from ..evaluation.run import lacks
from ..methods import METHODS, applicable
from ..metrics import METRICS
from ..models import load_model
from ..network import Classifier
from ..registry import Registry, names_in


class ReportError(ValueError):
    """A report that can't be made as asked for; the message says why in one sentence."""


@dataclass(frozen=True)
class Subject:
    """What a report is about, checked.

    Attributes:
        classifier: The network, cut at the layer.
        dataset: The images; without a target where the predicted class is explained.
        indices: The images to measure.
        examples: Those of them that are shown: of different classes, as far as there are any.
        methods: Names of the methods that apply to the network.
        left_out: Name → reason of those that don't.
        options: Options of the methods, as `evaluate` takes them.
        targets: Which class is explained, in words.
        labelled: Whether that is the true class.
        metrics: Names of the metrics that the dataset allows.
        broken: Id → reason of the drawn images that can't be read, as far as they were looked for.
    """

    classifier: Classifier
    dataset: Dataset
    indices: list[int]
    examples: list[int]
    methods: list[str]
    left_out: dict[str, str]
    options: dict[str, dict[str, Any]]
    targets: str
    labelled: bool
    metrics: tuple[str, ...] = ("AD", "AG", "AI")
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def transformer(self) -> bool:
        """Whether the network attends: its counterpart in the paper is Table 2, not Table 1."""
        return any(
            type(m).__name__.endswith("Attention") for m in self.classifier.network.modules()
        )


def prepare(
    *,
    model: str = "scenes_resnet",
    checkpoint: str = "",
    weights: str = "hub",
    layer: str = "",
    images: str = "scenes",
    labels: str = "",
    methods: str = "cam, grad-cam, score-cam, opti-cam, fake-cam",
    limit: int = 8,
    seed: int = 0,
    examples: int = 4,
    iterations: int = 100,
    normalize: bool = True,
    device: str = "auto",
) -> Subject:
    """Check the parameters of a report and load what they name.

    Args:
        model, checkpoint, weights, layer, normalize, device: See `load_model`; `""` is None.
        images: `"scenes"`, one of its twins, or a folder of image files.
        labels: Table of a folder's true classes. Without one the predicted classes are explained,
            also if the scenes are shown to a network that was not trained on them.
        methods: Names separated by commas. Those that do not apply to the network are left out.
        limit: Measure at most this many images.
        seed: Of their draw.
        examples: Show this many of them.
        iterations: Of Opti-CAM.

    Raises:
        ReportError, ValueError, FileNotFoundError, ConnectionError: The first thing that is wrong.
    """
    subject = _subject(
        model=model,
        checkpoint=checkpoint,
        weights=weights,
        layer=layer,
        data=images,
        labels=labels,
        methods=methods,
        limit=limit,
        seed=seed,
        examples=examples,
        iterations=iterations,
        normalize=normalize,
        device=device,
    )
    targets, broken = _readable(subject.dataset, subject.indices)
    if not targets:
        raise ReportError(
            f"none of the {len(broken)} images of {images} can be read; the first says: "
            f"{next(iter(broken.values()))}"
        )
    shown = _different(targets, examples)
    return replace(subject, indices=list(targets), examples=shown, broken=broken)


def prepare_benchmark(
    *,
    model: str = "scenes_resnet",
    checkpoint: str = "",
    weights: str = "hub",
    layer: str = "",
    data: str = "scenes",
    labels: str = "",
    methods: str = "grad-cam, grad-cam++, layer-cam, opti-cam, fake-cam",
    metrics: str = "AD, AG, AI, AOPC, ADCC, OM, LE, F1, BA, SP, EP, SM",
    limit: int = 8,
    seed: int = 0,
    examples: int = 1,
    iterations: int = 50,
    normalize: bool = True,
    device: str = "auto",
) -> Subject:
    """Check the parameters of the benchmark report and load what they name.

    Broken images are not looked for: `evaluate` counts them and goes on.

    Args:
        model, checkpoint, weights, layer, normalize, device: See `load_model`; `""` is None.
        data, labels: See `load_dataset`.
        methods: Names separated by commas, or `all`. Those that do not apply are left out.
        metrics: Names separated by commas, or `all`, of which I, D and MS take longest. Those that
            the dataset does not allow are left out.
        limit: Measure at most this many images.
        seed: Of their draw, and of metrics that draw.
        examples: Show this many of the best and of the worst maps of each method.
        iterations: Of Opti-CAM.

    Raises:
        ReportError, ValueError, FileNotFoundError, ConnectionError: The first thing that is wrong.
    """
    names = _listed("METRICS", metrics, METRICS)
    subject = _subject(
        model=model,
        checkpoint=checkpoint,
        weights=weights,
        layer=layer,
        data=data,
        labels=labels,
        methods=methods,
        limit=limit,
        seed=seed,
        examples=examples,
        iterations=iterations,
        normalize=normalize,
        device=device,
    )
    reasons = {name: lacks(subject.dataset, name) for name in names}
    left_out = {
        name: reason.replace("it has", f"{subject.dataset.name} has", 1)
        for name, reason in reasons.items()
        if reason is not None
    }
    if len(left_out) == len(names):
        name, reason = next(iter(left_out.items()))
        raise ReportError(f"no metric of METRICS can be measured on {data}; {name}: {reason}")
    return replace(
        subject,
        metrics=tuple(name for name in names if name not in left_out),
        left_out=subject.left_out | left_out,
    )


def _listed(what: str, text: str, registry: Registry[Any]) -> list[str]:
    """Return the names of a list, each once; `all` stands for every name of the registry."""
    names = names_in(text)
    if names == ["all"]:
        return list(registry)
    for name in names:
        registry[name]  # an unknown name raises the error that lists the close ones
    if not names:
        raise ReportError(f"{what} names none; choose among {', '.join(registry)}")
    return names


def _subject(
    *,
    model: str,
    checkpoint: str,
    weights: str,
    layer: str,
    data: str,
    labels: str,
    methods: str,
    limit: int,
    seed: int,
    examples: int,
    iterations: int,
    normalize: bool,
    device: str,
) -> Subject:
    """Check what all reports have in common; the examples are not chosen yet."""
    for name, number in {"limit": limit, "examples": examples, "iterations": iterations}.items():
        if number < 1:
            raise ReportError(f"{name.upper()} is {number}; it must be at least 1")
    names = _listed("METHODS", methods, METHODS)
    # The cheap checks come first: a network may take a while.
    for what, given in {"CHECKPOINT": checkpoint, "LABELS": labels}.items():
        if given and not Path(given).expanduser().is_file():
            raise FileNotFoundError(f"{what} is {given!r}, and there is no such file")
    if not Path(data).expanduser().exists():
        load_dataset(data)  # the scenes, or the error that says what is missing
    classifier = load_model(
        model,
        checkpoint=_path(checkpoint),
        layer=layer or None,
        weights=weights,
        normalize=normalize,
        device=device,
    )
    dataset = load_dataset(Path(data).expanduser(), labels=_path(labels), classifier=classifier)
    reasons = applicable(classifier)
    left_out = {name: reason for name in names if (reason := reasons[name]) is not None}
    chosen = [name for name in names if name not in left_out]
    if not chosen:
        name, reason = next(iter(left_out.items()))
        raise ReportError(f"no method of METHODS can explain {classifier.name}; {name}: {reason}")
    if not knows_classes(classifier, dataset):
        dataset = Unlabelled(dataset)
        targets = f"predicted class, since {classifier.name} does not know the classes of {data}"
    elif _first_target(dataset) is None:
        targets = "predicted class, since no table of true classes (labels) was given"
    else:
        targets = "true class"
    return Subject(
        classifier,
        dataset,
        choose(len(dataset), limit, seed),
        [],
        chosen,
        left_out,
        {"opti-cam": {"iterations": iterations}} if "opti-cam" in chosen else {},
        targets,
        targets == "true class",
    )


def _first_target(dataset: Dataset) -> int | None:
    """Return the target of the first image that can be read."""
    for i in range(len(dataset)):
        with suppress(ImageError):
            return dataset[i].target
    return None


def _path(text: str) -> str | None:
    return str(Path(text).expanduser()) if text else None


def _readable(dataset: Dataset, indices: list[int]) -> tuple[dict[int, int | None], dict[str, str]]:
    """Read every image to be measured; return index → target, and id → reason of the broken."""
    targets, broken = {}, {}
    for i in indices:
        try:
            targets[i] = dataset[i].target
        except ImageError as error:
            broken[dataset.id(i)] = str(error)
    return targets, broken


def _different(targets: Mapping[int, int | None], examples: int) -> list[int]:
    """Choose examples: one image of each of as many classes as possible, then others."""
    firsts: dict[int | None, int] = {}
    for i, target in targets.items():
        firsts.setdefault(target, i)
    chosen = [list(firsts.values())[k] for k in choose(len(firsts), examples)]
    others = [i for i in targets if i not in chosen]
    chosen += [others[k] for k in choose(len(others), examples - len(chosen))] if others else []
    return sorted(chosen[:examples])


def predictions(subject: Subject, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return the targets and the predicted classes of the measured images, each `(N,)`."""
    targets, predicted = [], []
    for start in range(0, len(subject.indices), batch_size):
        images, known = subject.dataset.batch(subject.indices[start : start + batch_size])
        classes = subject.classifier.predict(images)
        predicted.append(classes)
        targets.append(classes if known is None else known)
    return torch.cat(targets), torch.cat(predicted)
