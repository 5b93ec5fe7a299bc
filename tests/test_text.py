"""Names of any kind are shown as they are, in pages, terminals and logs."""

from __future__ import annotations

import io
import sys
from html.parser import HTMLParser

import pytest
from nbconvert.filters import markdown2html
from tqdm import tqdm

from opticam_lite.text import log_lines, page, plain

NASTY = "price_$10_vs_$20 <img src=x onerror=alert(1)> |*_`#\n# h\x1b[2J\u202e [a](b) https://x.y"
SAFE = {"table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong", "span", "code", "p"}


class Shown(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "name",
    [NASTY, "# head", "- item", "10. item", "_a_ b_c", "\\*", "&lt;", "~~a~~", "|-|", "<b"],
)
def test_markdown_and_html_show_any_name(name: str) -> None:
    shown = page(name)
    source = f"| **{shown}** | <code>{shown}</code> |\n|---|---|\n| {shown} | 2 |\n\n- {shown}"
    for text in (markdown2html(source), f"<p>{shown}</p>"):
        found = Shown(text)
        assert found.tags <= SAFE
        assert plain(name) in found.text
        assert text.count("<tr>") == text.count("<table>") * 2
    assert "$" not in shown  # which would begin a formula in JupyterLab
    assert "\n" not in shown


def test_a_terminal_gets_no_control_characters() -> None:
    assert plain("a\nb\x1b[2J\x9b\u202e\udcff") == r"a\nb\x1b[2J\x9b\u202e\udcff"
    assert plain("né 日本 🦆 a\\b") == "né 日本 🦆 a\\b"


def test_progress_in_a_log_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bars = [tqdm(total=3, desc=name, **log_lines(tqdm, seconds=0)) for name in ("one", "two")]
    for bar in [*bars, *bars]:
        bar.update()
    for bar in bars:
        bar.close()
    lines = sys.stderr.getvalue().splitlines()
    assert not set("\r\x1b") & set("".join(lines))
    assert all(line[:3] in ("one", "two") for line in lines)
    assert any(line.startswith("two:  67%") for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert log_lines(tqdm) == {}
