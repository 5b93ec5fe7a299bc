"""What users named, such as files, classes and networks, made safe to show in pages and terminals.

A name may hold anything: markup, formulas, line breaks. `plots.fitted` is the same for figures.
"""

from __future__ import annotations

import html
import re
import sys
from typing import Any

# Control characters, surrogates of undecodable bytes, and what breaks or turns round a line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What Markdown reads as markup: anywhere; at the edge of a word; in an address; at the beginning.
_MARKUP = re.compile(r"[\\`*|~\[\]]|(?<!\w)_|_(?!\w)|:(?=//)|^[-+=#]|^\d(?=\d*[.)]\s)")


def plain(text: object) -> str:
    r"""Return a text as one line, with control characters as escapes.

    >>> print(plain("one\ntwo"))
    one\ntwo
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def page(text: object) -> str:
    """Return a text that Markdown and HTML show as it is, on one line; not for attributes.

    >>> page("<b> *_*")
    '&lt;b&gt; &#42;&#95;&#42;'
    """
    coded = _MARKUP.sub(lambda found: f"&#{ord(found[0])};", html.escape(plain(text)))
    # JupyterLab's formulas end with the element, so no two dollars make one.
    return coded.replace("$", "<span>&#36;</span>")


class LogLines:
    """The `file` of a tqdm bar where stderr is no terminal: each state is a line of its own."""

    def write(self, text: str) -> None:
        """Write a state, without the control characters around it."""
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Flush stderr."""
        sys.stderr.flush()


def log_lines(tqdm: type, seconds: float = 30) -> dict[str, Any]:
    """Return options of tqdm for a line every `seconds`; none in a notebook or on a terminal.

    `position` 0 keeps several bars from moving the cursor to lines of their own.
    """
    if sys.stderr.isatty() or any(c.__module__ == "tqdm.notebook" for c in tqdm.__mro__):
        return {}
    return {"file": LogLines(), "position": 0, "mininterval": seconds, "maxinterval": seconds}
