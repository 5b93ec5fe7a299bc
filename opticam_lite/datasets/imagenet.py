"""ImageNet's validation images with their boxes, and Imagenette, ten of its classes."""

from __future__ import annotations

import csv
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import torch
from PIL import ExifTags, Image
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets import Imagenette
from torchvision.models import ResNet18_Weights

from ..network import Classifier
from ..registry import check_name
from .files import Files, check_at_hand, class_folders, existing, images_of
from .images import ImageError, crop_boxes, crop_image, is_image, preprocessing, turn_boxes
from .protocol import Sample, checksum

IMAGENETTE_SPLITS = ("val", "train")
IMAGENETTE_FOLDERS = {"320px": "imagenette2-320", "full": "imagenette2", "160px": "imagenette2-160"}
_TRUTH = ("ILSVRC2012_validation_ground_truth.txt", "LOC_val_solution.csv")
_SYNSET = re.compile(r"n\d{8}")
_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
_ANNOTATION = re.compile(r"ILSVRC2012_val_\d{8}\.xml")
_ELSEWHERE = re.compile(r"(^|_)(train|test)(_|$)|^\.")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@cache
def synsets() -> dict[str, int]:
    """Return the class index of each of the 1,000 synsets: their place in sorted order."""
    return {synset: c for c, synset in enumerate(sorted(ImageNetInfo().label_names()))}


@cache
def _devkit_order() -> list[str]:
    """Return the synsets by the id that the development kit of 2012 gives them, from 1 on."""
    return ["", *Path(__file__).with_name("ilsvrc2012.txt").read_text(encoding="ascii").split()]


def _labels(classifier: Classifier | None) -> list[str]:
    if classifier is not None and classifier.classes == 1000:
        return classifier.labels
    # torchvision's names, which networks have here: in timm's descriptions some occur twice.
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


class ImageNet(Files):
    """ImageNet's validation images (ILSVRC 2012), in any of the usual layouts.

    The parts are found by their names, anywhere below the folder (except in folders called train or
    test):

    - the images, either `ILSVRC2012_val_00000001.JPEG` … in one folder, or a folder for each synset
      (`n01440764/…`), all 1,000 or some of them;
    - the classes, for images in one folder: `ILSVRC2012_validation_ground_truth.txt` of the
      development kit, one id a line, or Kaggle's `LOC_val_solution.csv`. The kit's ids are not in
      the order of the classes; its `meta.mat` is not needed, the package has the order;
    - the boxes, if there are any: `ILSVRC2012_val_00000001.xml` … in one folder, beside the images,
      or in a folder for each synset.

    Files of other names are ignored. A folder beside the synsets' that holds images and is none of
    the 1,000 is an error: its images would have no class.

    Boxes are scaled from the size that the XML states, which is not always the file's, to the
    upright image, and then resized and cropped as the image is; what lies outside the crop is left
    out. Where EXIF turns or mirrors the image and the stated size has the proportions of the
    stored pixels, the boxes are turned, too: annotators saw the pixels as they are stored, since
    browsers of that time ignored EXIF. Coordinates count from 0 and include the last pixel, as in
    the kit's own evaluation. An image without XML has no boxes: localisation is undefined for it,
    everything else is measured.

    Args:
        path: The folder.
        classifier: Gives the preprocessing, and the names of the classes if it has 1,000.

    Raises:
        FileNotFoundError: If images or classes are missing.
        ValueError: If a folder is no class, or images and classes don't belong together.
    """

    def __init__(self, path: str | Path, classifier: Classifier | None = None) -> None:
        root = existing(path)
        places: list[tuple[Path, list[str]]] = []  # folders with images: of synsets, or of files
        truths: list[Path] = []
        self._annotations: list[Path] = []
        seen: set[str] = set()  # a link may lead back to where it lies
        for here, folders, files in os.walk(root, followlinks=True):
            folders[:] = [] if os.path.realpath(here) in seen else folders
            seen.add(os.path.realpath(here))
            place, within = Path(here), [f for f in folders if _SYNSET.fullmatch(f)]
            folders[:] = sorted(f for f in folders if f not in within and not _ELSEWHERE.search(f))
            if any(_has(place / f, is_image) for f in within):
                places.append((place, within))
            elif any(_IMAGE.fullmatch(f) for f in files):
                places.append((place, []))
            truths += [place / f for f in files if f in _TRUTH]
            if any(_ANNOTATION.fullmatch(f) for f in files) or any(
                _has(place / f, lambda p: p.suffix == ".xml") for f in within
            ):
                self._annotations.append(place)
        if not places:
            raise FileNotFoundError(
                f"there are no validation images below {root}: neither "
                "ILSVRC2012_val_00000001.JPEG … nor folders of synsets, such as n01440764"
            )
        if len(places) > 1:
            raise ValueError(
                f"there are images in {' and in '.join(str(p) for p, _ in places)}; name one folder"
            )
        images, within = places[0]
        found = _in_synsets(images) if within else _in_one_folder(images, truths, root)
        self.has_boxes = bool(self._annotations)
        super().__init__("imagenet", images, found, _labels(classifier), preprocessing(classifier))

    def sample(self, index: int) -> Sample:
        """Read the image and the boxes of an index."""
        file, target = self.files[index]
        image = self.read(index)
        boxes = crop_boxes(self._boxes(index, *image.size), *image.size, self.settings)
        return Sample(file, crop_image(image, self.settings), target, boxes)

    def fingerprint(self, index: int) -> str:
        """Return that of the file, and a checksum of its annotation."""
        annotation, _ = self._annotation(index)
        known = checksum(annotation.read_bytes()) if annotation else "no boxes"
        return f"{super().fingerprint(index)} {known}"

    def _annotation(self, index: int) -> tuple[Path | None, str]:
        """Return the file with an image's boxes, if there is one, and the image's synset."""
        file, target = self.files[index]
        xml, synset = Path(file).stem + ".xml", list(synsets())[target or 0]
        places = (place / sub / xml for place in self._annotations for sub in ("", synset))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            for place in self._annotations:  # no XML means no boxes only if the folder is readable
                check_at_hand(place, place)
        return found, synset

    def _boxes(self, index: int, width: int, height: int) -> Tensor:
        """Return the annotated boxes `(M, 4)`, in pixels of the upright image."""
        annotation, synset = self._annotation(index)
        if annotation is None:
            return torch.zeros(0, 4)
        with Image.open(self.root / self.id(index)) as stored:
            W, H, orientation = *stored.size, stored.getexif().get(ExifTags.Base.Orientation)
        try:
            about = ElementTree.parse(annotation).getroot()
            stated = [int(about.findtext(f"size/{side}") or 0) for side in ("width", "height")]
            w, h = stated[0] or W, stated[1] or H
            corners = [
                [float(found.findtext(f"bndbox/{name}") or "") for name in _CORNERS]
                for found in about.iterfind("object")
            ]
        except (ElementTree.ParseError, OSError, ValueError) as error:
            raise ImageError(
                f"{annotation} is no annotation that can be read ({error}); get a whole copy, or "
                "remove it to have this image without boxes"
            ) from error
        others = {found.findtext("name") or "" for found in about.iterfind("object")} - {synset}
        if others & set(synsets()):
            raise ImageError(
                f"{annotation} shows {' and '.join(sorted(others))}, but {self.id(index)} is of "
                f"the class {synset}; images, classes and boxes must be of the same set"
            )
        boxes = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += 1  # right and bottom exclusive
        limits = torch.tensor([w, h] * 2)
        boxes = boxes.clamp(torch.zeros(4), limits) / limits
        if abs(w * H - h * W) <= max(w + h, W + H) / 2:  # one shape, but for rounding to pixels
            boxes = turn_boxes(boxes, orientation)
        return boxes * torch.tensor([width, height] * 2)


def _has(folder: Path, test: Callable[[Path], bool]) -> bool:
    return any(map(test, folder.iterdir()))


def _in_synsets(root: Path) -> list[tuple[str, int]]:
    """Return the files in the folders of synsets, with their classes."""
    files = []
    for folder in class_folders(root):
        images = images_of(root, folder)
        if images and folder not in synsets():
            raise ValueError(
                f"{root / folder} is none of ImageNet's 1,000 synsets, so its images have no "
                "class; move it away"
            )
        files += [(image, synsets()[folder]) for image in images]
    return files


def _in_one_folder(images: Path, truths: list[Path], root: Path) -> list[tuple[str, int]]:
    """Return the files of one folder, with the classes that the ground truth gives them."""
    if not truths:
        raise FileNotFoundError(
            f"{images} has images but nothing below {root} tells their classes: copy "
            f"{_TRUTH[0]} (from the development kit, ILSVRC2012_devkit_t12.tar.gz) or {_TRUTH[1]} "
            "(from Kaggle) there"
        )
    truth = min(truths, key=lambda p: _TRUTH.index(p.name))
    numbers = {
        int(found[1]): p.name for p in images.iterdir() if (found := _IMAGE.fullmatch(p.name))
    }
    known = _read_solution(truth) if truth.suffix == ".csv" else _read_ids(truth)
    for number, name in numbers.items():
        if number not in known:
            raise ValueError(f"{truth} knows {len(known)} images, but not {name}; get a whole copy")
    return [(numbers[n], synsets()[known[n]]) for n in sorted(numbers)]


def _read_ids(truth: Path) -> dict[int, str]:
    """Return the synset of each image's number: line n has the kit's id for image n."""
    order, known = _devkit_order(), {}
    for line, text in enumerate(truth.read_text(encoding="utf-8").split(), 1):
        if not text.isdigit() or not 1 <= int(text) < len(order):
            raise ValueError(f"{truth}, line {line}: {text!r} is no id from 1 to 1000")
        known[line] = order[int(text)]
    return known


def _read_solution(truth: Path) -> dict[int, str]:
    """Return the synset of each image's number, the first word of Kaggle's prediction."""
    rows = csv.DictReader(truth.read_text(encoding="utf-8-sig").splitlines(), restval="")
    if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or []):
        raise ValueError(f"{truth} needs the columns ImageId and PredictionString")
    known = {
        int(row["ImageId"].removeprefix("ILSVRC2012_val_")): row["PredictionString"].split(" ")[0]
        for row in rows
    }
    for synset in known.values():
        if synset not in synsets():
            raise ValueError(f"{truth}: {synset!r} is none of ImageNet's 1,000 synsets")
    return known


def imagenette(path: str | Path, split: str = "val", classifier: Classifier | None = None) -> Files:
    """Imagenette: ten classes of ImageNet, downloaded by torchvision where it is absent.

    Targets are ImageNet's class indices, so that networks of 1,000 classes can be explained.

    Args:
        path: The folder with `imagenette2-320`, `imagenette2` or `imagenette2-160` (the first that
            is there is read), or one of these folders itself. If there is none, the first is
            downloaded (340 MB): its shorter side of 320 pixels is enough for crops of 224.
        split: `"val"` or `"train"`.
        classifier: Gives the preprocessing, and the names of the classes if it has 1,000.

    Raises:
        ConnectionError: If it is absent and can't be downloaded.
        ValueError: If a folder is no class of ImageNet, or there is no such split.
    """
    check_name("split", split, IMAGENETTE_SPLITS)
    path = Path(path)
    places = [path, *(path / name for name in IMAGENETTE_FOLDERS.values())]
    root = next((place / split for place in places if (place / split).is_dir()), None)
    if root is None:
        root = _download_imagenette(path, split) / split
    labels = _labels(classifier)
    return Files(f"imagenette-{split}", root, _in_synsets(root), labels, preprocessing(classifier))


def _download_imagenette(path: Path, split: str, size: str = "320px") -> Path:
    """Download and unpack beside the place, then move, so that the folder is complete or absent."""
    folder, url = IMAGENETTE_FOLDERS[size], Imagenette._ARCHIVES[size][0]
    whole = path.absolute()
    nearest = next(place for place in (whole, *whole.parents) if place.is_dir())
    with tempfile.TemporaryDirectory(dir=nearest) as scratch:
        try:
            Imagenette(scratch, split, size, download=True)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(
                f"Imagenette is not in {path}, and {url} could not be downloaded ({error}); "
                f"download it where there is a network and unpack it to {path / folder}"
            ) from error
        path.mkdir(parents=True, exist_ok=True)
        (Path(scratch) / folder).rename(path / folder)
    return path / folder
