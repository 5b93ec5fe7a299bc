"""Image files of your own: a folder of photographs, or a folder for each class."""

from __future__ import annotations

import csv
import io
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..network import Classifier, Preprocessing
from ..paths import given_path, unicode_forms
from ..registry import unknown_name
from .images import (
    IMAGE_SUFFIXES,
    SourceError,
    crop_image,
    is_image,
    preprocessing,
    read_rgb,
    unreadable_kind,
)
from .protocol import Dataset, Sample, checksum, has_names, unread_in_words


class Files(Dataset):
    """Image files below a folder; the path below it, with `/`, is a sample's id.

    Args:
        name: What tables call it.
        root: The folder.
        files: Path below the folder and class (None if unknown) of each image.
        labels: Names of the classes.
        settings: How images are resized and cropped.

    Files that look like images of kinds that can't be read, such as HEIC, are left out with a
    warning, and are named by `unread`.

    Raises:
        ValueError: If there are no files to read, or a name is not UTF-8, which tables require.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Iterable[tuple[str, int | None]],
        labels: Sequence[str] | None,
        settings: Preprocessing,
    ) -> None:
        self.name, self.root = name, root
        self.settings: Preprocessing = settings
        self.labels = None if labels is None else list(labels)
        found = list(files)
        self.files = [(file, c) for file, c in found if not unreadable_kind(file)]
        self.unread = [file for file, _ in found if unreadable_kind(file)]
        if not self.files:
            raise ValueError(
                f"there are no images in {root}; files with these endings are read: "
                f"{' '.join(IMAGE_SUFFIXES)}. {unread_in_words(self)}".rstrip(". ")
            )
        if self.unread:
            warnings.warn(f"{name}: {unread_in_words(self)}", stacklevel=3)
        for text in (name, str(root), *(file for file, _ in self.files)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the name {text!r} is not UTF-8, so no table can hold it; rename it"
                ) from error

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int) -> Sample:
        """Read the file of an index."""
        file, target = self.files[index]
        return Sample(file, crop_image(self.read(index), self.settings), target)

    def id(self, index: int) -> str:
        """Return the path below the folder."""
        return self.files[index][0]

    def target(self, index: int) -> int | None:
        """Return the class of a file, None if it is unknown."""
        return self.files[index][1]

    def fingerprint(self, index: int) -> str:
        """Return a file's size and a checksum of its contents."""
        return fingerprint_file(self.root / self.files[index][0], self.root)

    def read(self, index: int) -> Image.Image:
        """Read the file of an index as RGB.

        Raises:
            SourceError: If its whole folder is missing.
            ImageError, FileNotFoundError: If this file can't be read.
        """
        return read_file(self.root / self.files[index][0], self.root)


def check_at_hand(folder: Path, root: Path) -> None:
    """Raise SourceError if a folder is missing, or the root is empty, as for an unmounted disk."""
    if not folder.is_dir():
        raise SourceError(f"the folder {folder} is gone; bring it back, and repeat the same call")
    with os.scandir(root) as entries:  # `iterdir` would list all of them
        if next(entries, None) is None:
            raise SourceError(
                f"the folder {root} is empty; bring it back, and repeat the same call"
            )


def read_file(path: Path, root: Path) -> Image.Image:
    """Read a file below a root as RGB; the errors are those of `Files.read`."""
    try:
        return read_rgb(path)
    except FileNotFoundError:
        check_at_hand(path.parent, root)
        raise


def fingerprint_file(path: Path, root: Path) -> str:
    """Return a file's size and a checksum of its contents.

    Raises:
        SourceError: If its whole folder is missing.
    """
    try:
        known = path.stat()
        if not stat.S_ISREG(known.st_mode):
            return "unreadable"
        # A file whose content was changed has another ctime, whatever its other times say.
        return _contents(path, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns)
    except OSError:
        check_at_hand(path.parent, root)
        return "unreadable"


@lru_cache(maxsize=2**17)
def _contents(path: Path, *known: int) -> str:
    """Return size and checksum of a file; read once for what is known of it."""
    return f"{known[1]} {checksum(path.read_bytes())}"


class Photos(Files):
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
        path = given_path(path)
        if not os.path.lexists(path):  # a link that leads nowhere is an image that can't be read
            raise FileNotFoundError(f"there is no folder or image at {path}; check the path")
        names = classifier.labels if classifier is not None else None
        files: Iterable[tuple[str, int | None]]
        if labels is not None:
            table = given_path(labels, "the table of labels")
            files = list(_read_table(table, path if path.is_dir() else path.parent, names or []))
            if not files:
                raise ValueError(f"{table} names no image; it needs a line for each")
            file, times = Counter(name for name, _ in files).most_common(1)[0]
            if times > 1:
                raise ValueError(f"{table} names {file} {times} times; one line for each image")
        elif not path.is_dir():
            files = [(path.name, None)]
        else:
            files = [(p.name, None) for p in sorted(path.iterdir()) if is_image(p)]
        root = path if path.is_dir() else path.parent
        super().__init__(path.name, root, files, names, preprocessing(classifier))


def _read_table(
    table: Path, folder: Path, names: Sequence[str]
) -> Iterable[tuple[str, int | None]]:
    if not table.is_file():
        raise FileNotFoundError(f"there is no table of labels at {table}; check the path")
    try:
        text = table.read_text(encoding="utf-8-sig")
        # Spreadsheets write semicolons in locales with a decimal comma.
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns, rows = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{table} can't be read as a table ({error}); save it as CSV in UTF-8"
        ) from error
    column = next((c for c in ("class_index", "target", "label") if c in columns), None)
    if "file" not in columns or column is None:
        raise ValueError(
            f"{table} has the columns {', '.join(columns) or '(none)'}; it needs file, "
            "and class_index or label"
        )
    for line, row in rows:
        where = f"{table}, line {line}"
        if not row["file"]:
            raise ValueError(f"{where}: there is no file name; remove the line or complete it")
        # Normalised, so that `./a.jpg` is `a.jpg` and none is measured twice.
        image = Path(os.path.normpath(row["file"]))
        if image.is_relative_to(folder.absolute()):
            image = image.relative_to(folder.absolute())
        forms = unicode_forms(image.as_posix())
        found = next((file for file in forms if os.path.lexists(folder / file)), None)
        if found is None:
            raise FileNotFoundError(f"{where}: there is no image at {folder / image}")
        yield found, _target(row[column], names, where, column == "label")


def _target(text: str | None, names: Sequence[str], where: str, by_name: bool) -> int:
    """Turn a class index or name into a target; digits are a name only if `by_name`."""
    text, names = _composed((text or "").strip()), list(map(_composed, names))
    if text in names and (by_name or not text.isdecimal()):
        if names.count(text) > 1:
            raise ValueError(
                f"{where}: the network has {names.count(text)} classes named {text!r}; give the "
                "class_index instead"
            )
        return names.index(text)
    if not text.isdecimal():
        known = f"; {unknown_name('class', text, names, show=20)}" if names else ""
        raise ValueError(f"{where}: {text!r} is neither a class index nor a class name{known}")
    if names and int(text) >= len(names):
        raise ValueError(
            f"{where}: class {text} does not exist; the network has classes 0 to {len(names) - 1}"
        )
    return int(text)


class Folders(Files):
    """A folder for each class: `PATH/duck/1.jpg`, `PATH/goose/any/depth/2.jpg`.

    Files beside the folders, files that are no images and hidden ones are ignored. A folder that is
    no class of the network is an error: results without its images, or with another class for
    them, would be wrong.

    Args:
        path: The folder of the folders.
        classifier: Gives the preprocessing and the classes. Folders are matched by name with its
            labels (case and `_` for a space don't matter). For a network whose classes have no
            names the folders are the classes in alphabetical order, if there are as many.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a folder is no class, or there are no images.
    """

    def __init__(self, path: str | Path, classifier: Classifier | None = None) -> None:
        root = existing(path)
        indices, labels = class_indices(class_folders(root), classifier, root)
        files = [(file, c) for folder, c in indices.items() for file in images_of(root, folder)]
        super().__init__(root.resolve().name, root, files, labels, preprocessing(classifier))


def existing(path: str | Path) -> Path:
    """Return the path of a folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = given_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder at {path}; check the path")
    return path


def class_folders(root: Path) -> list[str]:
    """Return the names of a folder's subfolders, sorted, without such as `.git` and `__MACOSX`."""
    names = (p.name for p in root.iterdir() if p.is_dir())
    return sorted(name for name in names if not name.startswith((".", "__")))


def images_of(root: Path, folder: str) -> list[str]:
    """Return the images of a class's folder, at any depth, as sorted paths below `root`."""
    found = [
        Path(here, name)
        for here, folders, files in os.walk(root / folder, onerror=_refuse)
        for name in [*folders, *files]
    ]
    return sorted(path.relative_to(root).as_posix() for path in found if is_image(path))


def _refuse(error: OSError) -> None:
    """Raise the error of a folder that can't be listed: its images would be missing unnoticed."""
    raise error


def class_indices(
    folders: Sequence[str], classifier: Classifier | None, root: Path
) -> tuple[dict[str, int], list[str]]:
    """Return the class of each folder, and the names of all classes.

    Raises:
        ValueError: If a folder is no class of the network, or more than one.
    """
    if classifier is None:
        return {folder: c for c, folder in enumerate(folders)}, list(folders)
    labels = classifier.labels
    if not has_names(classifier):
        if len(folders) != len(labels):
            raise ValueError(
                f"{root} has {len(folders)} class folders and {classifier.name} {len(labels)} "
                "classes without names; give the network labels=[…], or remove the folders that "
                "are no classes"
            )
        return {folder: c for c, folder in enumerate(folders)}, labels
    keys, found = [class_key(label) for label in labels], {}
    for folder, key in zip(folders, map(class_key, folders), strict=True):
        same = [c for c, known in enumerate(keys) if known == key]
        if not same:
            raise ValueError(
                f"{root / folder} is no class of {classifier.name}: "
                f"{unknown_name('class', folder, labels, show=20)} Rename the folder or move it "
                "away; folders named by synset are read as imagenet:PATH"
            )
        if len(same) > 1:
            raise ValueError(
                f"{root / folder}: {classifier.name} has {len(same)} classes of this name; use a "
                "table of labels with the class indices instead"
            )
        found[folder] = same[0]
    return found, labels


def class_key(name: str) -> str:
    """Return the form in which names of classes and of folders are compared."""
    return _composed(name.replace("_", " ")).casefold()


def _composed(name: str) -> str:
    """Return a name in one form of Unicode: é may be one letter, or an e and an accent."""
    return unicodedata.normalize("NFC", name)
