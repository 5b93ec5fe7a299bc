"""Where the embedded data lie: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

import os
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
