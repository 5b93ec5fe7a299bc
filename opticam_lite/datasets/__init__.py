"""Datasets, images with annotations: the embedded scenes, your own files, published sets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..network import Classifier
from ..paths import given_path
from ..registry import unknown_name
from .files import Files, Folders, Photos
from .imagenet import IMAGENETTE_SPLITS, ImageNet, imagenette
from .images import ImageError, load_image
from .medical import CHEST_SPLITS, KVASIR_SPLITS, chest_xray, kvasir
from .protocol import Dataset, Images, Sample, Unlabelled, knows_classes, of_known_classes
from .scenes import Scenes

__all__ = [
    "Dataset",
    "Files",
    "Folders",
    "ImageError",
    "ImageNet",
    "Images",
    "Photos",
    "Sample",
    "Scenes",
    "Unlabelled",
    "chest_xray",
    "imagenette",
    "knows_classes",
    "kvasir",
    "load_dataset",
    "load_image",
    "of_known_classes",
]

_EMBEDDED = {"scenes": None, "scenes-swapped": "swapped", "scenes-empty": "empty"}
# Prefix of the path → its loader, and the splits that may follow the path, the default first.
_FORMS: dict[str, tuple[Callable[..., Dataset], tuple[str, ...]]] = {
    "folders": (Folders, ()),
    "imagenet": (ImageNet, ()),
    "imagenette": (imagenette, IMAGENETTE_SPLITS),
    "chest-xray": (chest_xray, CHEST_SPLITS),
    "kvasir": (kvasir, KVASIR_SPLITS),
}


def load_dataset(
    name: str | Path,
    *,
    labels: str | Path | None = None,
    classifier: Classifier | None = None,
) -> Dataset:
    """Load a dataset by name, by path, or by form and path.

    Warns of files that look like images of kinds that can't be read, such as HEIC; `unread` of the
    dataset names them. A file that turns out to be broken is an `ImageError` when it is read.

    | name | what it is |
    |---|---|
    | `scenes`, `scenes-swapped`, `scenes-empty` | the embedded scenes and their twins |
    | `PATH` | a folder of photographs, or one file |
    | `folders:PATH` | a folder for each class |
    | `imagenet:PATH` | ImageNet's validation images, with their boxes where there are any |
    | `imagenette:PATH`, `imagenette:PATH:train` | ten classes of ImageNet, downloaded if absent |
    | `chest-xray:PATH`, `…:train`, `…:val` | chest X-rays; the test split unless said |
    | `kvasir:PATH`, `…:train`, `…:val` | endoscopic images; the test split unless said |

    Args:
        name: One of these.
        labels: For a folder of photographs: a CSV file with the columns `file` and `class_index`
            or `label`.
        classifier: The network whose preprocessing and class names are applied.

    Raises:
        FileNotFoundError: If it is neither a name nor an existing path, or a part is missing.
        ValueError: If labels are given for a set that has its own, the table is wrong, a path is
            empty, or a name or a folder is unknown; the message lists close matches.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name is {name!r}; the name of a dataset or a path is needed")
    text = str(name)
    form, colon, path = text.partition(":")
    if labels is not None and (form in _FORMS or text in _EMBEDDED):
        raise ValueError(f"{name} has its own labels; leave labels={str(labels)!r} out")
    if text in _EMBEDDED:
        return Scenes(_EMBEDDED[text])
    if form in _FORMS and path:
        loader, splits = _FORMS[form]
        found = re.fullmatch(r"(.+):([^/\\]*)", path)
        if splits and found and not given_path(path).exists():
            return loader(given_path(found[1]), found[2], classifier)
        return loader(given_path(path), classifier=classifier)
    here = given_path(name, "the name of the dataset")
    if os.path.lexists(here):
        return Photos(here, labels, classifier)
    if form in _FORMS:
        raise ValueError(f"{name!r} needs the path of the images: {form}:PATH")
    known = [*_EMBEDDED, *(f"{form}:PATH" for form in _FORMS)]
    if colon and len(form) > 1:  # not the C: of Windows
        raise ValueError(unknown_name("dataset", form, _FORMS))
    raise FileNotFoundError(
        f"{text!r} is neither an existing folder or image nor one of {', '.join(known)}; "
        f"there is no {here.absolute()}"
    )
