"""What users named, such as files, classes and networks, made safe to show in pages and terminals.

A name may hold anything: markup, formulas, line breaks. `plots.fitted` is the same for figures.
"""

from __future__ import annotations

import html
import re

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
