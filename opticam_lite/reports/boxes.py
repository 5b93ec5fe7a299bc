"""The report on boxes: Table 5, and which method's maps follow what a network relies on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..datasets import Scenes, load_dataset
from ..methods import METHODS
from ..models import load_model
from ..network import Classifier
from ..paths import given_path
from ..registry import LARGEST_SEED, names_in
from ..studies.boxes import check_classes
from ..studies.truth import CONTROL
from ..text import page
from .parameters import NAMES, Parameters, ReportError, parameter
from .subject import Subject, about, listed, readable
from .tables import title


@dataclass(frozen=True, kw_only=True)
class Boxes(Parameters):
    """Parameters of the report on boxes."""

    models: str = parameter(
        "scenes_resnet, scenes_vgg, scenes_vit, scenes_shortcut",
        "separated by commas; with weights of your own as NAME:FILE",
    )
    images: str = parameter("scenes", "scenes, or data with boxes such as imagenet:PATH")
    draws: int = parameter(1000, "of the bootstrap", least=1)
    methods: str = parameter("grad-cam, layer-cam, opti-cam-fast, fake-cam", NAMES)
    iterations: int = parameter(20, "of Opti-CAM; the paper has 100", least=1)
    seed: int = parameter(0, "of the draw, and of the bootstrap", least=0, most=LARGEST_SEED)

    def prepare(self) -> list[Subject]:
        """Check the parameters and load what they name: a subject for each network.

        A network with weights from a file has the name of the file, without its suffix.
        """
        listed("METHODS", self.methods, METHODS)
        named = self.models.split(",") if ":" in self.models else names_in(self.models)
        classifiers = [load_given(m.strip(), self.device, "MODELS") for m in named if m.strip()]
        names = [classifier.name for classifier in classifiers]
        if not names:
            raise ReportError("MODELS names none; separate names by commas")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ReportError(
                f"MODELS has two networks called {twice[0]!r}; leave one out, or rename its file"
            )
        subjects = []
        for classifier in classifiers:
            dataset = load_dataset(self.images, classifier=classifier)
            if not dataset.has_boxes:
                raise ReportError(
                    f"IMAGES is {self.images!r}, which has no boxes; this report needs them"
                )
            check_classes(classifier, dataset)
            subjects.append(readable(about(self, classifier, dataset)))
        return subjects


def load_given(named: str, device: str, parameter: str) -> Classifier:
    """Load a network that a parameter names as NAME or, with weights of one's own, NAME:FILE."""
    name, given, file = (part.strip() for part in named.partition(":"))
    if not given:
        return load_model(name, device=device)
    path = given_path(file, parameter)
    if not path.is_file():
        raise FileNotFoundError(f"{parameter} has the file {file!r}, and there is no such file")
    classifier = load_model(name, checkpoint=path, device=device)
    classifier.name = path.stem
    return classifier


def have_twins(subjects: list[Subject]) -> bool:
    """Return whether all images have counterfactual twins, so that reliance can be measured."""
    datasets = (subject.dataset for subject in subjects)
    return all(isinstance(dataset, Scenes) and dataset.name == "scenes" for dataset in datasets)


def in_words(verdict: Mapping[str, Any]) -> str:
    """Return the result of `verdict` in `studies/truth.py` as sentences in Markdown."""
    if verdict["best"] is None:
        return "no correlation is defined."
    best, rho = f"**{page(title(verdict['best']))}**", f"ρ = {verdict['rho']:.2f}"
    figures = f"n = {verdict['n']}"
    few = math.isnan(verdict["low"])
    if not few:
        figures = f"{verdict['low']:.2f} to {verdict['high']:.2f}, {figures}"
    unsure = "; these are too few images to say how surely." if few else ""
    if verdict["rho"] <= 0:
        end = unsure or "."
        return f"no method follows the truth; the highest is {best}, {rho} ({figures}){end}"
    text = f"{best} follows the truth best, {rho} ({figures})"
    if few:
        return text + unsure
    text += "." if verdict["true"] else ", which may well be 0: none is shown to tell the truth."
    near = ", ".join(page(title(method)) for method in verdict["within_noise"])
    text += f" Within the noise of it: {near}." if near else " Every other is surely behind."
    if verdict["beats_control"] is False or verdict["best"] == CONTROL:
        text += " The map is not shown to add anything to the control."
    return text
