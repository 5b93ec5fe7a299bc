"""The interface of datasets: numbered samples, each with an id, an image and its annotations."""

from __future__ import annotations

import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..network import Classifier, Preprocessing, usual
from .images import ImageError, passes


@dataclass(frozen=True)
class Sample:
    """One image and its annotations.

    Attributes:
        id: Unique in its dataset.
        image: float32 `(3, H, W)`, RGB in [0, 1].
        target: The true class, or None if it is unknown.
        boxes: int64 `(M, 4)`, corners x0, y0, x1, y1 in pixels, right and bottom exclusive.
        extra: Others; scenes have `environment`, `home` (whether that is the class's home) and
            `masks`, bool `(M, H, W)`, the visible pixels of each object of the class.
    """

    id: str
    image: Tensor
    target: int | None
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int64))
    extra: dict[str, Any] = field(default_factory=dict)


class Dataset(ABC):
    """Numbered samples. A subclass defines `name`, `labels`, `__len__` and `sample(index)`.

    It defines `fingerprint(index)`, too, if `evaluate(…, out=folder)` is to refuse other images
    under the same ids.

    A dataset must be picklable, at low cost, so that worker processes can read its samples.

    Attributes:
        name: What tables call it.
        labels: Names of the classes, or None if there are no targets.
        settings: How files become images, or None if there are no files to be resized.
        unread: Names of files that look like images of kinds that can't be read.
        has_boxes: Whether samples have boxes of the target's objects. A single sample may have
            none: its localisation metrics are then undefined.
    """

    name: str
    labels: list[str] | None = None
    settings: Preprocessing | None = None
    unread: Sequence[str] = ()
    has_boxes: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Return the sample of an index from 0 to len − 1.

        Raises:
            ImageError: If a file of this sample is broken; other samples are not affected.
        """

    def id(self, index: int) -> str:
        """Return the id of a sample without reading it; `#index` where that is not possible."""
        return f"#{index}"

    def target(self, index: int) -> int | None:
        """Return the true class of a sample without reading it; None where that is not possible."""
        return None

    def fingerprint(self, index: int) -> str:
        """Return a string that changes with a sample's content, even if the id does not.

        A run is resumed only with the same contents. Without this method only ids and targets are
        compared, so other images under the same ids are not noticed. Anything that changes with the
        content is suitable, such as a file's size and time: `f"{stat.st_size} {stat.st_mtime}"` of
        `stat = path.stat()`.
        """
        return ""

    @usual()
    def __getitem__(self, index: int) -> Sample:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"{self.name} has {n} images; there is no image {index}")
        return self.sample(index % n)

    @usual()
    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor | None]:
        """Return images `(N, 3, H, W)` and targets `(N,)`, or None where one has no label.

        Raises:
            ImageError: If files are broken; it names all of them.
        """
        samples, broken = [], []
        for i in indices:
            try:
                samples.append(self[int(i)])
            except ImageError as error:
                broken.append(error)
        if broken:
            raise broken[0] if len(broken) == 1 else ImageError("; ".join(map(str, broken)))
        if not samples:
            raise ValueError("a batch needs at least one index, such as range(8)")
        images = torch.stack([s.image for s in samples])
        targets = [s.target for s in samples if s.target is not None]
        return images, torch.tensor(targets) if len(targets) == len(samples) else None


def checksum(data: bytes) -> str:
    """Return a checksum (CRC-32), which detects accidental changes."""
    return f"{zlib.crc32(data):08x}"


def knows_classes(classifier: Classifier, dataset: Dataset) -> bool:
    """Whether a dataset's targets, if it has any, are classes of a classifier, by their names.

    If the classifier's classes have no names, the number of classes is compared.
    """
    if dataset.labels is None or list(dataset.labels) == list(classifier.labels):
        return True
    return not has_names(classifier) and classifier.classes == len(dataset.labels)


def has_names(classifier: Classifier) -> bool:
    """Whether a classifier's classes have names other than the default ones."""
    return classifier.labels != [f"class {c}" for c in range(classifier.classes)]


class Images(Dataset):
    """A batch in memory as a dataset: images `(N, 3, H, W)` in [0, 1] and targets `(N,)`.

    Raises:
        TypeError, ValueError: If shapes are others, or targets are no whole numbers.
    """

    def __init__(
        self, images: Tensor, targets: Tensor | Sequence[int] | None = None, name: str = "images"
    ) -> None:
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; (N, 3, H, W) is needed")
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"{len(images)} images need as many targets, not {len(targets)}")
        if targets is not None and len(targets):
            kind = torch.as_tensor(targets).dtype
            if kind.is_floating_point or kind.is_complex or kind == torch.bool:
                raise TypeError(f"targets are {kind}; class indices (int64) are needed")
        self.name, self._images, self._targets = name, images, targets

    def __len__(self) -> int:
        return len(self._images)

    def sample(self, index: int) -> Sample:
        """Return the image of an index."""
        return Sample(self.id(index), self._images[index], self.target(index))

    def target(self, index: int) -> int | None:
        """Return the given target."""
        return None if self._targets is None else int(self._targets[index])

    def id(self, index: int) -> str:
        """Return the index."""
        return str(index)

    def fingerprint(self, index: int) -> str:
        """Return the image's shape and a checksum of its values."""
        values = self._images[index].detach().cpu().contiguous().numpy()
        return f"{values.shape} {checksum(values.tobytes())}"


class Unlabelled(Dataset):
    """A dataset whose targets are left out, because they are classes of another network."""

    def __init__(self, dataset: Dataset) -> None:
        self.name, self.settings, self._dataset = dataset.name, dataset.settings, dataset
        self.unread = dataset.unread

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int) -> Sample:
        """Return the sample with target None."""
        return replace(self._dataset[index], target=None)

    def id(self, index: int) -> str:
        """Return the id in the other dataset."""
        return self._dataset.id(index)

    def fingerprint(self, index: int) -> str:
        """Return the fingerprint in the other dataset."""
        return self._dataset.fingerprint(index)


def check_readable(dataset: Dataset, indices: Sequence[int], tries: int = 200) -> None:
    """Raise ImageError if of many images none of about 200, spread over all, can be read.

    So a folder of thousands of broken files is told of before all of them are tried.
    """
    first, tried = None, indices[:: max(1, len(indices) // tries)]
    for index in tried if len(indices) > tries else ():
        try:
            dataset[index]
            return
        except Exception as error:
            if passes(error):
                raise
            first = first or error
    if first is not None:
        raise ImageError(
            f"none of {len(tried)} images of {dataset.name}, spread over its {len(indices)}, can "
            f"be read; the first says: {first}"
        ) from first


def unread_in_words(dataset: Dataset) -> str:
    """Return a sentence that counts and names the files of `unread`; "" without any."""
    names = list(dataset.unread)
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    told = f"images of kinds that can't be read here are left out ({len(names)}): {listed}"
    return f"{told}; convert them to JPEG or PNG" if names else ""


def of_known_classes(classifier: Classifier, dataset: Dataset) -> Dataset:
    """Return a dataset without its targets, and warn, if the classifier does not know them."""
    if knows_classes(classifier, dataset):
        return dataset
    labels = dataset.labels or []
    warnings.warn(
        f"{classifier.name} does not know the classes of {dataset.name} "
        f"({', '.join(labels[:3])}, …): the predicted classes are explained",
        stacklevel=3,
    )
    return Unlabelled(dataset)
