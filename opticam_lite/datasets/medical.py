"""The paper's medical images (Appendix E.2): chest X-rays and Kvasir's endoscopies."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..network import Classifier
from ..registry import check_name, unknown_name
from .files import Files, class_folders, class_indices, class_key, existing, images_of
from .images import preprocessing
from .protocol import has_names

CHEST_SPLITS = ("test", "train", "val")
CHEST_CLASSES = ("NORMAL", "PNEUMONIA")
KVASIR_SPLITS = ("test", "train", "val")
KVASIR_CLASSES = (
    "dyed-lifted-polyps",
    "dyed-resection-margins",
    "esophagitis",
    "normal-cecum",
    "normal-pylorus",
    "normal-z-line",
    "polyps",
    "ulcerative-colitis",
)


def chest_xray(
    path: str | Path, split: str = "test", classifier: Classifier | None = None
) -> Files:
    """Chest X-rays of healthy children and of children with pneumonia (Kermany et al. 2018).

    5,216 images for training, 16 for validation, 624 for testing, as published. Greyscale becomes
    RGB.

    Args:
        path: The folder that holds `train`, `val` and `test`, each with `NORMAL` and `PNEUMONIA`
            (or the folder with `chest_xray`, as the archive unpacks).
        split: `"test"`, `"train"` or `"val"`.
        classifier: Gives the preprocessing and, if it has these two classes by name, their order.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If a class folder is unknown, or there is no such split.
    """
    check_name("split", split, CHEST_SPLITS)
    root = _inside(path, "chest_xray", holds=split) / split
    files, labels = _classes(root, CHEST_CLASSES, classifier)
    return Files(f"chest-xray-{split}", root, files, labels, preprocessing(classifier))


def kvasir(
    path: str | Path, split: str = "test", classifier: Classifier | None = None, *, seed: int = 0
) -> Files:
    """Kvasir's endoscopic images (Pogorelov et al. 2017): eight classes of 1,000 images.

    The paper splits them into 6,000 for training, 1,000 for validation and 1,000 for testing and
    doesn't say how. Here every class is shuffled and the classes are interleaved; the first three
    quarters are for training, then an eighth each for validation and testing: of each class 750,
    125 and 125 images, and the same proportions of a smaller set.

    Args:
        path: The folder of the eight class folders (or the folder with `kvasir-dataset` or
            `kvasir-dataset-v2`, as the archives unpack).
        split: `"test"`, `"train"` or `"val"`.
        classifier: Gives the preprocessing and, if it has these eight classes by name, their order.
        seed: Of the shuffle, which sorts by a hash of seed and file, so that the split does not
            depend on the machine or on versions of libraries.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If a class folder is unknown, or there is no such split.
    """
    check_name("split", split, KVASIR_SPLITS)
    root = _inside(path, "kvasir-dataset-v2", "kvasir-dataset", holds=KVASIR_CLASSES[0])
    files, labels = _classes(root, KVASIR_CLASSES, classifier)
    shuffled = sorted(files, key=lambda f: hashlib.sha256(f"{seed} {f[0]}".encode()).digest())
    size, dealt = Counter(c for _, c in files), Counter[int]()
    turn: dict[str, float] = {}  # how much of its class comes before an image
    for file, c in shuffled:
        turn[file] = dealt[c] / size[c]
        dealt[c] += 1
    order = sorted(shuffled, key=lambda f: turn[f[0]])
    first, second = round(len(order) * 6 / 8), round(len(order) * 7 / 8)
    part = {"train": order[:first], "val": order[first:second], "test": order[second:]}[split]
    return Files(f"kvasir-{split}", root, sorted(part), labels, preprocessing(classifier))


def _inside(path: str | Path, *names: str, holds: str) -> Path:
    """Return the folder that holds a folder: the path itself, or one of these names in it."""
    root = existing(path)
    for place in (root, *(root / name for name in names)):
        if (place / holds).is_dir():
            return place
    raise FileNotFoundError(f"{root} has no folder {holds!r}, nor has {' or '.join(names)} in it")


def _classes(
    root: Path, classes: Sequence[str], classifier: Classifier | None
) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the files of exactly these class folders, and the names of the classes."""
    folders = class_folders(root)
    for folder in folders:
        if folder not in classes:
            raise ValueError(
                f"{root / folder} is one class folder too many: "
                f"{unknown_name('class', folder, classes)} Move it away"
            )
    for folder in classes:
        if folder not in folders:
            raise FileNotFoundError(f"{root} has no class folder {folder!r}; get a whole copy")
    known = classifier if classifier is not None and _knows(classifier, classes) else None
    indices, labels = class_indices(classes, known, root)
    return [(file, indices[c]) for c in classes for file in images_of(root, c)], labels


def _knows(classifier: Classifier, classes: Sequence[str]) -> bool:
    """Whether these are classes of a classifier: by their names, or by their number without."""
    if not has_names(classifier):
        return classifier.classes == len(classes)
    return set(map(class_key, classes)) <= set(map(class_key, classifier.labels))
