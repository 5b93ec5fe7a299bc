"""The subject of a report: the network and the images that its parameters name, checked."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from ..datasets import Dataset, ImageError, Unlabelled, knows_classes, load_dataset
from ..datasets.protocol import check_readable
from ..evaluation import choose
from ..methods import METHODS, applicable
from ..models import load_model
from ..network import Classifier
from ..paths import given_path
from ..registry import Registry, names_in
from .parameters import OneNetwork, Parameters, ReportError

TRUE_CLASS = "true class"


@dataclass(frozen=True)
class Subject:
    """A network and images to measure it on, checked.

    Attributes:
        parameters: Of the report.
        classifier: The network, cut at the layer.
        dataset: The images; without a target where the predicted class is explained.
        indices: The images to measure.
        methods: Name → options of the methods that apply to the network, as `evaluate` takes them.
        left_out: Name → reason of the methods, and metrics, that don't apply.
        targets: Which class is explained, in words.
        metrics: Names of the metrics that the dataset allows.
        examples: Those of the indices that are shown.
        broken: Id → reason of the drawn images that can't be read, if images were checked.
    """

    parameters: Parameters
    classifier: Classifier
    dataset: Dataset
    indices: list[int]
    methods: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    targets: str = TRUE_CLASS
    metrics: tuple[str, ...] = ("AD", "AG", "AI")
    examples: list[int] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether the true class is explained, not the predicted one."""
        return self.targets == TRUE_CLASS

    @property
    def transformer(self) -> bool:
        """Whether the network has attention, so that the paper's Table 2 applies, not Table 1."""
        return any(
            type(m).__name__.endswith("Attention") for m in self.classifier.network.modules()
        )


def load(asked: OneNetwork, data: str, labels: str) -> Subject:
    """Load the network and the images of a report; the cheap checks come first.

    Args:
        asked: The parameters.
        data, labels: See `load_dataset`. The predicted classes are explained if there are no true
            ones, or if the dataset's classes are not those of the network.

    Raises:
        ReportError, ValueError, FileNotFoundError, ConnectionError: For the first wrong value.
    """
    listed("METHODS", asked.methods, METHODS)
    for what, file in {"CHECKPOINT": asked.checkpoint, "LABELS": labels}.items():
        if file and not given_path(file, what).is_file():
            raise FileNotFoundError(f"{what} is {file!r}, and there is no such file")
    if not given_path(data, "the name of the images").exists():
        load_dataset(data)  # loads the scenes, or raises an error that says what is missing
    classifier = load_model(
        asked.model,
        checkpoint=asked.checkpoint or None,
        layer=asked.layer or None,
        weights=asked.weights,
        normalize=asked.normalize,
        activation=asked.activation,
        device=asked.device,
    )
    with warnings.catch_warnings(action="ignore"):  # `notes` tells of files that can't be read
        dataset = load_dataset(data, labels=labels or None, classifier=classifier)
    targets = TRUE_CLASS
    if not knows_classes(classifier, dataset):
        targets = f"predicted class, since {classifier.name} does not know the classes of {data}"
        dataset = Unlabelled(dataset)
    elif dataset.target(0) is None:
        targets = "predicted class, since no table of true classes (labels) was given"
    return about(asked, classifier, dataset, targets)


def about(
    asked: Parameters, classifier: Classifier, dataset: Dataset, targets: str = TRUE_CLASS
) -> Subject:
    """Return the subject of a network and a dataset, with applicable methods and drawn images."""
    names = listed("METHODS", asked.methods, METHODS)
    reasons = applicable(classifier)
    left_out = {name: reason for name in names if (reason := reasons[name]) is not None}
    options: dict[str, dict[str, Any]] = {"opti-cam": {"iterations": asked.iterations}}
    methods = {name: options.get(name, {}) for name in names if name not in left_out}
    if not methods:
        name, reason = next(iter(left_out.items()))
        raise ReportError(f"no method of METHODS can explain {classifier.name}; {name}: {reason}")
    return Subject(
        asked,
        classifier,
        dataset,
        choose(len(dataset), asked.limit, asked.seed),
        methods,
        left_out,
        targets,
    )


def readable(subject: Subject) -> Subject:
    """Return a subject without the drawn images that can't be read; its `broken` names them.

    Raises:
        ReportError: If none can be read.
    """
    check_readable(subject.dataset, subject.indices)
    kept, broken = [], {}
    for i in subject.indices:
        try:
            subject.dataset[i]
            kept.append(i)
        except ImageError as error:
            broken[subject.dataset.id(i)] = str(error)
    if not kept:
        raise ReportError(
            f"none of the {len(broken)} images of {subject.dataset.name} can be read; the first "
            f"says: {next(iter(broken.values()))}"
        )
    return replace(subject, indices=kept, broken=broken)


def listed(what: str, text: str, registry: Registry[Any]) -> list[str]:
    """Return the names of a list, each once; `all` stands for every name of the registry.

    Raises:
        ReportError, ValueError: If there is no name, or an unknown one.
    """
    names = names_in(text)
    if names == ["all"]:
        return list(registry)
    for name in names:
        registry[name]  # an unknown name raises the error that lists the close ones
    if not names:
        raise ReportError(f"{what} names none; choose among {', '.join(registry)}")
    return names
