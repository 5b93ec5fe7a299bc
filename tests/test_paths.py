"""Paths that users give: refused in one sentence, and found in either form of Unicode."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from opticam_lite.paths import given_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "OUT is empty; name a file or a folder, or . for the current one"),
        ("  ", "OUT is empty"),
        ("~nobody-here/x", "OUT is '~nobody-here/x', which is no path here"),
        ("a\0b", "OUT is 'a\\x00b', which is no path here"),
        ("nowhere/" + "x" * 256, "OUT is too long, 264 letters ('nowhere/xx"),
        ("x/" * 3000, "OUT is too long, 6000 letters"),
    ],
)
def test_a_wrong_path_is_told(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        given_path(path, "OUT")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("there", "given"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_form_of_unicode_that_exists_is_taken(there: str, given: str, tmp_path: Path) -> None:
    place = tmp_path / unicodedata.normalize(there, "Schönes é")
    place.mkdir()
    asked = tmp_path / unicodedata.normalize(given, "Schönes é")
    assert given_path(asked) == place
    assert given_path(tmp_path / "ö") == tmp_path / "ö"  # to be made
    assert given_path(".") == Path()
