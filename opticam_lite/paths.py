"""Where the embedded data lie (in a checkout or the package), and the paths that users give."""

from __future__ import annotations

import errno
import os
import unicodedata
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir() -> Path:
    """Return the folder of the embedded scenes and networks.

    `OPTICAM_DATA` in the environment names another one.

    Raises:
        FileNotFoundError: If there is none; the message says where it was looked for.
    """
    chosen = os.environ.get("OPTICAM_DATA")
    places = [Path(chosen)] if chosen else [_PACKAGE.parent / "data", _PACKAGE / "data"]
    for place in places:
        if (place / "networks").is_dir():
            return place
    raise FileNotFoundError(
        f"the embedded data were looked for in {' and '.join(map(str, places))} and not found; "
        "set OPTICAM_DATA to the repository's data/ folder"
    )


def given_path(path: str | Path, what: str = "the path") -> Path:
    """Return the path that a user gave: `~` is their folder, and é is found however it is written.

    Raises:
        ValueError: If it is empty, too long, holds a null character, or names an unknown user.
    """
    text = str(path)
    if not text.strip():
        raise ValueError(f"{what} is empty; name a file or a folder, or . for the current one")
    try:
        forms = [Path(text).expanduser()]
        if any(len(os.fsencode(part)) > 255 for part in forms[0].parts):  # even where none exists
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.lstat(forms[0])
    except FileNotFoundError:
        forms = list(map(Path, unicode_forms(str(forms[0]))))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{what} is {text!r}, which is no path here: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{what} is too long, {len(text)} letters ({text[:40]!r}…); shorten it"
            ) from error
    return next((path for path in forms if os.path.lexists(path)), forms[0])


def unicode_forms(name: str) -> list[str]:
    """Return a name as it is and in both forms of Unicode (é as one letter, or as e and accent).

    Systems and archives mix them, so the one that exists is to be taken.
    """
    return [name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
