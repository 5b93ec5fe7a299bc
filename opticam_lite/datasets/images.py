"""Image files of every kind → the network's input: RGB in [0, 1], resized and cropped."""

from __future__ import annotations

import errno
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, to_tensor
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxes

from ..network import Classifier, Preprocessing, usual
from ..paths import given_path

_AVIF = bool(features.check("avif"))  # built into Pillow from 11.3 on
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *[".avif"] * _AVIF,
)
# Images that are not read. Of raw photographs Pillow would read the small preview.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".xcf", ".eps"),
    *(".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".dds", ".tga", ".exr", ".hdr", ".dcm", ".nii"),
)
SMALLEST_SIDE = 16
# Errors of the system, not of the file: too many open files, no memory, a lost network drive.
PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
)


class ImageError(ValueError):
    """A file of a sample, image or annotation, that can't be read; the message names it."""


class MissingImage(ImageError, FileNotFoundError):  # noqa: N818 - as FileNotFoundError
    """There is no such file, or a link leads nowhere."""


class SourceError(OSError):
    """The folder of a dataset can't be read, so that no image counts as broken."""


def passes(error: BaseException) -> bool:
    """Whether an error may be temporary, so that the image must not count as broken."""
    return any(
        isinstance(e, MemoryError | SourceError | torch.OutOfMemoryError)
        or (isinstance(e, OSError) and e.errno in PASSING)
        or (isinstance(e, RuntimeError) and re.search("out of|allocate memory", str(e)) is not None)
        for e in (error, error.__cause__)
    )


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image, read or not; hidden ones, `._1.jpg`, are not."""
    known = path.suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES
    return known and not path.name.startswith(".")


def unreadable_kind(file: str) -> bool:
    """Whether a file's name is that of an image of a kind that is not read here."""
    suffix = Path(file).suffix.lower()
    return suffix in OTHER_SUFFIXES and suffix not in IMAGE_SUFFIXES


@usual()
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
            smaller than 16 pixels, or the file is none, such as a folder.
        ValueError: If the path is empty or too long.
    """
    return crop_image(read_rgb(given_path(path)), preprocessing(classifier))


def preprocessing(classifier: Classifier | None) -> Preprocessing:
    """Return the classifier's preprocessing, which datasets keep because it can be pickled."""
    return classifier.preprocessing if classifier is not None else Preprocessing()


def crop_image(image: Image.Image, settings: Preprocessing) -> Tensor:
    """Resize and crop an RGB image: float32 `(3, H, W)` in [0, 1]."""
    return to_tensor(_crop(image, settings))


def crop_boxes(boxes: Tensor, width: int, height: int, settings: Preprocessing) -> Tensor:
    """Transform boxes by the resize and the crop of their image.

    Args:
        boxes: Corners x0, y0, x1, y1 `(M, 4)` on an image of width × height pixels, right and
            bottom exclusive, fractions allowed.

    Returns:
        int64 `(≤ M, 4)`, rounded and clipped to the crop, without those that are then empty: they
        lie outside it, or are narrower than a pixel.
    """
    on_image = BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    cropped = _crop(on_image, settings).as_subclass(Tensor).round().long()
    return cropped[(cropped[:, 2:] > cropped[:, :2]).all(1)]


def turn_boxes(boxes: Tensor, orientation: int | None) -> Tensor:
    """Turn boxes `(M, 4)`, in fractions of the image, as EXIF's orientation turns the pixels."""
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    if orientation in (2, 3, 7, 8):
        x = 1 - x.flip(1)
    if orientation in (3, 4, 6, 7):
        y = 1 - y.flip(1)
    if orientation in (5, 6, 7, 8):
        x, y = y, x
    return torch.stack([x, y], 2).flatten(1)


def _crop(image: Any, settings: Preprocessing) -> Any:
    """Resize the shorter side and crop the centre, of a picture or of the boxes on it."""
    # Of a very long image only the middle is kept: resized whole it might not fit in memory.
    height, width = transforms.get_size(image)
    short = min(height, width)
    if max(height, width) > 8 * short:
        image = transforms.center_crop(image, [min(height, 8 * short), min(width, 8 * short)])
    mode = InterpolationMode(settings.interpolation)
    image = transforms.resize(image, [settings.resize], mode, antialias=True)
    return transforms.center_crop(image, list(settings.size))


def read_rgb(path: Path) -> Image.Image:
    """Open a file and return it upright as 8-bit RGB.

    Raises:
        MissingImage: If there is no such file.
        ImageError: If it can't be read, whatever the reason.
        MemoryError, OSError: For errors of the system that may pass.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would never end, a folder can't be opened
            raise ImageError(f"{path} is a folder or a device, not an image file; move it away")
        with Image.open(path) as opened:
            # Pillow only warns of these; turning its warning into an error is not thread-safe.
            pixels, most = opened.width * opened.height, Image.MAX_IMAGE_PIXELS
            if most is not None and pixels > most:
                raise Image.DecompressionBombError(f"{pixels} pixels, more than {most}")
            # Uncompressed, a pixel takes a bit at least; Pillow would fill in what is missing.
            raw = any(tile[0] == "raw" for tile in opened.tile)
            if raw and opened.format in ("TIFF", "BMP", "PPM") and pixels > 8 * about.st_size:
                raise ValueError(f"{about.st_size} bytes can't hold {pixels} pixels")
            opened.load()
            # exif_transpose rotates the pixels by the orientation of the camera.
            image = _to_rgb(ImageOps.exif_transpose(opened), path, opened.format)
    except FileNotFoundError as error:
        link = ", which is a link that leads nowhere" if path.is_symlink() else ""
        raise MissingImage(f"there is no image file at {path}{link}; check the path") from error
    except Exception as error:  # damaged files make Pillow raise nearly anything
        if isinstance(error, ImageError) or passes(error):
            raise
        raise ImageError(f"{path} {_reason(error)}") from error
    if min(image.size) < SMALLEST_SIDE:
        raise ImageError(
            f"{path} is {image.width}×{image.height} pixels; at least {SMALLEST_SIDE} on each side "
            "are needed"
        )
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that Pillow can read; remove it or convert it to JPEG or PNG"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"has too many pixels to be opened safely ({error}); scale it down first"
    if isinstance(error, OSError) and error.errno is not None:
        return f"can't be opened: {error.strerror}"
    return f"is damaged or incomplete ({error}); get a whole copy of the file"


def _to_rgb(image: Image.Image, path: Path, kind: str | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        # In these two formats "I" is always 16 bits, even for dark images; Pillow scales PPM so.
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM"))
        largest = 65535 if sixteen or values.max() > 255 else 255
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
