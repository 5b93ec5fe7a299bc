"""Images with what is known of them: the embedded scenes, and folders of photographs."""

from __future__ import annotations

import csv
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as transforms
from torchvision.transforms.functional import InterpolationMode

from .classifier import Classifier, Preprocessing
from .paths import data_dir
from .registry import unknown_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SMALLEST_SIDE = 16
TWINS = ("swapped", "empty")


class ImageError(ValueError):
    """A file that can't be read as an image; the message names it."""


def load_image(path: str | Path, classifier: Classifier | None = None) -> Tensor:
    """Read an image file as the network expects it.

    The EXIF rotation is applied; greyscale, palette, CMYK and 16-bit images become RGB, and
    transparent pixels white. The shorter side is resized and the centre cropped, as the network's
    preprocessing says (without a classifier: 256, then 224×224, bilinear).

    Returns:
        float32 `(3, H, W)`, RGB in [0, 1], not normalised.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageError: If it is no image, damaged, too large to be safe (a decompression bomb), or
            smaller than 16 pixels.
    """
    settings = classifier.preprocessing if classifier is not None else Preprocessing()
    image = _crop(_rgb(Path(path)), settings)
    return transforms.to_tensor(image)


def _rgb(path: Path) -> Image.Image:
    """Open a file and return it upright as 8-bit RGB."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no image file at {path}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                # exif_transpose rotates the pixels as the camera was held.
                image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is not an image that Pillow can read; remove it or convert it to JPEG or PNG"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{path} has too many pixels to be opened safely ({error}); scale it down first"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            f"{path} is damaged or incomplete ({error}); get a whole copy of the file"
        ) from error
    if min(image.size) < SMALLEST_SIDE:
        raise ImageError(
            f"{path} is {image.width}×{image.height} pixels; at least {SMALLEST_SIDE} on each side "
            "are needed"
        )
    return _to_rgb(image, path)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        largest = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        if image.mode == "F" and values.max() <= 1:
            largest = 1
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > largest:
            raise ImageError(
                f"{path} has pixel values from {values.min():.4g} to {values.max():.4g}; 8-bit or "
                "16-bit values, or fractions in [0, 1], are needed"
            )
        image = Image.fromarray((values * (255 / largest)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _crop(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """Resize the shorter side and crop the centre."""
    # Of a very long image only the middle is kept: resized whole it might not fit in memory.
    short = min(image.size)
    if max(image.size) > 8 * short:
        image = transforms.center_crop(
            image, [min(image.height, 8 * short), min(image.width, 8 * short)]
        )
    mode = InterpolationMode(settings.interpolation)
    image = transforms.resize(image, [settings.resize], mode, antialias=True)
    return transforms.center_crop(image, list(settings.size))


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it.

    Attributes:
        id: Unique in its dataset.
        image: float32 `(3, H, W)`, RGB in [0, 1].
        target: The true class, or None if nobody knows.
        boxes: int64 `(M, 4)`, corners x0, y0, x1, y1 in pixels, right and bottom exclusive.
        extra: More; scenes have `environment`, `home` (whether that is the class's home) and
            `masks`, bool `(M, H, W)`, the visible pixels of each object of the class.
    """

    id: str
    image: Tensor
    target: int | None
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int64))
    extra: dict[str, Any] = field(default_factory=dict)


class Dataset(ABC):
    """Numbered samples. A subclass defines `name`, `labels`, `__len__` and `sample(index)`."""

    name: str
    labels: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Return the sample of an index from 0 to len − 1."""

    def __getitem__(self, index: int) -> Sample:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"{self.name} has {n} images; there is no image {index}")
        return self.sample(index % n)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor | None]:
        """Return images `(N, 3, H, W)` and targets `(N,)`, or None where one has no label."""
        samples = [self[int(i)] for i in indices]
        if not samples:
            raise ValueError("a batch needs at least one index, such as range(8)")
        images = torch.stack([s.image for s in samples])
        targets = [s.target for s in samples if s.target is not None]
        return images, torch.tensor(targets) if len(targets) == len(samples) else None


class Scenes(Dataset):
    """The embedded evaluation split: rendered scenes whose truth is known.

    Args:
        twin: None for the scenes themselves; `"swapped"` for the same objects in another
            environment, `"empty"` for the same environment without the objects.

    Attributes:
        labels: Names of the classes.
        environments: Names of the environments.
        home: Each class's home environment.
    """

    def __init__(self, twin: str | None = None) -> None:
        if twin is not None and twin not in TWINS:
            raise ValueError(unknown_name("twin", twin, TWINS))
        self._folder = data_dir() / "scenes"
        self._twin = twin
        about = json.loads((self._folder / "annotations.json").read_text(encoding="utf-8"))
        self._scenes: list[dict[str, Any]] = about["scenes"]
        self.name = "scenes" if twin is None else f"scenes-{twin}"
        self.labels = list(about["classes"])
        self.environments: list[str] = list(about["environments"])
        self.home: dict[str, str] = dict(about["home"])

    def __len__(self) -> int:
        return len(self._scenes)

    def sample(self, index: int) -> Sample:
        """Return the scene of an index, or its twin."""
        scene = self._scenes[index]
        shown = scene if self._twin is None else scene["twins"][self._twin]
        with Image.open(self._folder / shown["image"]) as image:
            pixels = transforms.to_tensor(image.convert("RGB"))
        boxes = torch.tensor(scene["boxes"], dtype=torch.int64).reshape(-1, 4)
        with Image.open(self._folder / scene["mask"]) as image:
            instances = torch.from_numpy(np.array(image))
        masks = torch.stack([instances == i for i in range(1, len(boxes) + 1)])
        if self._twin == "empty":
            boxes, masks = boxes[:0], masks[:0]
        environment = shown["environment"]
        home = environment == self.home[scene["class"]]
        extra = {"environment": environment, "home": home, "masks": masks}
        return Sample(scene["id"], pixels, scene["label"], boxes, extra)

    def twin(self, kind: str) -> Scenes:
        """Return the counterfactual twins, in the same order: `"swapped"` or `"empty"`."""
        return Scenes(kind)


class Photos(Dataset):
    """Image files of a folder, or one file, with or without labels.

    Args:
        path: A folder (its files with an image suffix, by name; not its subfolders) or a file.
        labels: A CSV file with a header: `file`, and `class_index` (or `target`) or `label`, a
            class name. Images are then those of the table, in its order.
        classifier: Gives the preprocessing and the names of the classes.

    Raises:
        FileNotFoundError: If the folder, the table or a file of the table is missing.
        ValueError: If there are no images or the table is wrong; the message names the line.
    """

    def __init__(
        self,
        path: str | Path,
        labels: str | Path | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        self.folder = Path(path)
        if not self.folder.exists():
            raise FileNotFoundError(f"there is no folder or image at {path}; check the path")
        self.name = self.folder.name
        self._classifier = classifier
        self.labels = classifier.labels if classifier is not None else None
        self._rows: list[tuple[Path, int | None]]
        if labels is not None:
            self._rows = [*self._read_table(Path(labels))]
        elif self.folder.is_file():
            self._rows = [(self.folder, None)]
        else:
            files = sorted(p for p in self.folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            self._rows = [(file, None) for file in files]
        if not self._rows:
            raise ValueError(
                f"there are no images in {path}; files with these endings are read: "
                f"{' '.join(IMAGE_SUFFIXES)}"
            )

    def _read_table(self, table: Path) -> Iterable[tuple[Path, int]]:
        if not table.is_file():
            raise FileNotFoundError(f"there is no table of labels at {table}; check the path")
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            column = next((c for c in ("class_index", "target", "label") if c in columns), None)
            if "file" not in columns or column is None:
                raise ValueError(
                    f"{table} has the columns {', '.join(columns) or '(none)'}; it needs file, "
                    "and class_index or label"
                )
            for row in reader:
                image = self.folder / row["file"]
                if not image.is_file():
                    raise FileNotFoundError(
                        f"{table}, line {reader.line_num}: there is no image at {image}"
                    )
                yield image, self._target(row[column], f"{table}, line {reader.line_num}")

    def _target(self, text: str | None, where: str) -> int:
        """Turn a class index or a class name into a target."""
        text = (text or "").strip()
        names = self.labels or []
        if text in names:
            return names.index(text)
        if not text.isdigit():
            known = f"; {unknown_name('class', text, names, show=20)}" if names else ""
            raise ValueError(f"{where}: {text!r} is neither a class index nor a class name{known}")
        if names and int(text) >= len(names):
            raise ValueError(
                f"{where}: class {text} does not exist; the network has classes 0 to "
                f"{len(names) - 1}"
            )
        return int(text)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        """Read the file of an index; its name is the id."""
        path, target = self._rows[index]
        return Sample(path.name, load_image(path, self._classifier), target)


class Images(Dataset):
    """A batch in memory as a dataset: images `(N, 3, H, W)` in [0, 1] and targets `(N,)`."""

    def __init__(
        self, images: Tensor, targets: Tensor | Sequence[int] | None = None, name: str = "images"
    ) -> None:
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; (N, 3, H, W) is needed")
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"{len(images)} images need as many targets, not {len(targets)}")
        self.name, self._images, self._targets = name, images, targets

    def __len__(self) -> int:
        return len(self._images)

    def sample(self, index: int) -> Sample:
        """Return the image of an index."""
        target = None if self._targets is None else int(self._targets[index])
        return Sample(str(index), self._images[index], target)


def load_dataset(
    name: str | Path,
    *,
    labels: str | Path | None = None,
    classifier: Classifier | None = None,
) -> Dataset:
    """Load a dataset: `"scenes"`, one of its twins, or a path to your own images.

    Args:
        name: `"scenes"`, `"scenes-swapped"`, `"scenes-empty"`, or the path of a folder or image.
        labels: For a folder: a CSV file with the columns `file` and `class_index` or `label`.
        classifier: For a folder: the network whose preprocessing is applied.

    Raises:
        FileNotFoundError: If it is neither a name nor an existing path.
        ValueError: If labels are given for scenes, which have their own, or the table is wrong.
    """
    embedded = {"scenes": None, "scenes-swapped": "swapped", "scenes-empty": "empty"}
    if str(name) in embedded:
        if labels is not None:
            raise ValueError(f"{name} has its own labels; leave labels={str(labels)!r} out")
        return Scenes(embedded[str(name)])
    if not Path(name).exists():
        raise FileNotFoundError(
            f"{str(name)!r} is neither an existing folder or image nor one of "
            f"{', '.join(embedded)}; check the path"
        )
    return Photos(name, labels, classifier)
