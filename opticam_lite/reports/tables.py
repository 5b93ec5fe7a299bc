"""Tables of reports: measured figures beside the paper's, and whether its claims hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from ..datasets.protocol import unread_in_words
from ..metrics import METRICS
from ..paths import data_dir
from ..studies.findings import VERDICTS, Finding, Verdict
from ..studies.paper import title
from ..text import page
from .subject import Subject

HERE = Path(__file__).resolve().parent
FIGURES = (HERE / "figures.css").read_text(encoding="utf-8")
"""Style of the tables. It is part of each table, because a notebook opened by hand has no page
around it. The variables are the page's, then JupyterLab's, whose theme may be dark. A class named
twice takes precedence over JupyterLab's own rules for tables."""

_TEMPLATES = Environment(autoescape=True, loader=FileSystemLoader(HERE), trim_blocks=True)
_TEMPLATES.filters["page"] = page
_UNITS = {
    "T": "T is seconds per batch of 8 images, here on this machine, in the paper on the authors'",
    **{m: f"{m} is a {METRICS[m].unit}" for m in METRICS if METRICS[m].unit != "percent"},
}


def paper_table(number: int | str) -> pd.DataFrame:
    """Return a table of the paper with results, such as 1 or `"A14"`.

    Returns:
        Columns network, method (of a study the label of its variant), and the metrics as the paper
        prints them; T is seconds per batch of 8 on the authors' hardware. `attrs["source"]` names
        the table.
    """
    table = pd.read_csv(data_dir() / "paper" / f"table{number}.csv")
    table.attrs["source"] = f"Table {number}"
    return table


def styled(table: str) -> str:
    """Return an HTML table of the class `figures` with its style."""
    return f"<style>{FIGURES}</style>{table}"


def comparison(table: pd.DataFrame, paper: pd.DataFrame, here: str, note: str = "paper") -> str:
    """Return an HTML table of the measured figures beside the paper's.

    Args:
        table: What `summarize` returned, with intervals (`errors=True`) or without.
        paper: What `paper_table` returned, or the rows of some of its networks. Its methods that
            were not measured follow in grey, its metrics that were not measured are left out.
        here: Heads the measured columns.
        note: Text under the names of the paper's networks.
    """
    columns = [c for c in paper.columns if c in table.columns]
    networks = {n: rows.set_index("method") for n, rows in paper.groupby("network", sort=False)}
    shown = _TEMPLATES.get_template("comparison.html.j2").render(
        groups=[(here, "measured", table), *((n, note, rows) for n, rows in networks.items())],
        columns=columns,
        methods={method: title(method) for method in [*table.index, *paper["method"]]},
        measured=set(table.index),
        intervals=any(f"{c} low" in table.columns for c in columns),
        source=paper.attrs["source"] if networks else "",
        units=[text for c, text in _UNITS.items() if c in columns],
        metrics=METRICS,
        cell=_cell,
    )
    return styled(shown)


def _cell(group: pd.DataFrame, method: str, column: str) -> dict[str, Any]:
    """Return a figure as it is printed, whether it is the best of its column, and its interval.

    Fake-CAM is never the best, as in the paper: its AD is lowest although it explains nothing. With
    intervals a figure is the best if it is surely better than the others.
    """
    if method not in group.index or pd.isna(group.loc[method, column]):
        return {"text": "–", "best": False}
    digits = 2 if column in _UNITS else 1
    values = group[column].round(digits)
    text = f"{values[method] + 0.0:.{digits}f}"
    if f"{column} low" in group:
        low, high = group.loc[method, [f"{column} low", f"{column} high"]]
        ends = "" if math.isnan(low) else f"{low + 0.0:.{digits}f}–{high:.{digits}f}"
        return {"text": text, "best": group.loc[method, f"{column} best"], "interval": ends}
    rivals = values.drop(index="fake-cam", errors="ignore")
    best = None
    if column in METRICS and method != "fake-cam":
        best = rivals.min() if METRICS[column].better == "lower" else rivals.max()
    return {"text": text, "best": values[method] == best}


def ordering(table: pd.DataFrame) -> dict[str, tuple[bool, str]]:
    """Check whether measured figures are ordered as those of the paper's Tables 1 and 2.

    Args:
        table: What `summarize` returned: a row a method, AD and AG in percent.

    Returns:
        Claim → (whether it holds here, the figures that decide it). Claims about methods or
        metrics that were not measured are absent.
    """
    claims: dict[str, tuple[bool, str]] = {}
    if not {"AD", "AG"} <= set(table):
        return claims
    table = table.drop(index="opti-cam-fast", errors="ignore")  # it is not in the paper
    others = table.drop(index=["fake-cam", "opti-cam"], errors="ignore")
    if "fake-cam" in table.index:
        drop, gain = table.loc["fake-cam", ["AD", "AG"]]
        claims["Fake-CAM, a mask that explains nothing, hardly changes the probability"] = (
            bool(drop < 1 and gain < 2),
            f"AD {drop:.2f} % (below 1), AG {gain:.2f} % (below 2)",
        )
    if "opti-cam" in table.index and len(others):
        drop, gain = table.loc["opti-cam", ["AD", "AG"]]
        best = others["AD"].idxmin()
        claims["Opti-CAM has the lowest average drop, Fake-CAM aside"] = (
            bool(drop < others["AD"].min()),
            f"AD {drop:.2f} % against {others.loc[best, 'AD']:.2f} % of the next, {title(best)}",
        )
        rivals = table.drop(index="opti-cam")["AG"]
        second = rivals.idxmax()
        claims["Opti-CAM has at least twice the average gain of any other"] = (
            bool(gain >= 2 * rivals.max()),
            f"AG {gain:.1f} % against {rivals.max():.1f} % of the next, {title(second)}"
            + (f": {gain / rivals.max():.1f} times" if rivals.max() > 0 else ""),
        )
    return claims


def notes(subject: Subject, broken: Mapping[str, str] | None = None) -> list[str]:
    """Return sentences in Markdown: what was left out and why, and which methods are related.

    Args:
        subject: What was measured.
        broken: Id → reason of the images that could not be read. Default: those of the subject.
    """
    broken = subject.broken if broken is None else broken
    found = [f"{page(title(n))} is left out: {page(why)}." for n, why in subject.left_out.items()]
    found += [f"{page(name)} is broken and left out: {page(why)}" for name, why in broken.items()]
    if subject.dataset.unread:
        found.append(f"{page(unread_in_words(subject.dataset))}.")
    alike = [title(m) for m in ("grad-cam", "xgrad-cam", "hires-cam") if m in subject.methods]
    if "cam" in subject.methods and alike:
        found.append(
            f"One linear layer follows the pooling of this network, so CAM weighs the maps as "
            f"{' and '.join(alike)} would, but for a factor. What differs is the relu, which CAM "
            "lacks: where the sum is negative the others are 0, and CAM is scaled from its minimum."
        )
    return found


def caveats(subject: Subject) -> list[str]:
    """Return caveats, as sentences, of comparing a subject's figures with the paper's."""
    n, iterations = len(subject.indices), subject.methods.get("opti-cam", {}).get("iterations", 100)
    found = []
    if iterations != 100:
        found.append(f"Opti-CAM took {iterations} iterations here, 100 in the paper.")
    if n < 100:
        found.append(f"{n} images are few: on others a claim may turn out otherwise.")
    return found


def checklist(claims: Mapping[str, tuple[bool, str]], caveats: Sequence[str] = ()) -> str:
    """Return an HTML list of what `ordering` found, a verdict above it and caveats below."""
    failed = sum(not holds for holds, _ in claims.values())
    headline = "The paper's ordering holds here."
    if failed:
        headline = (
            f"The paper's ordering does not hold here: {failed} of {len(claims)} claims fail."
        )
    if not claims:
        headline = "The paper's ordering can't be judged: its methods were not measured."
    return _listed(headline, claims, caveats)


def findings_list(found: Sequence[Finding], caveats: Sequence[str] = ()) -> str:
    """Return an HTML list of findings with their verdicts, counted above it, and caveats below."""
    verdicts = [finding.verdict for finding in found]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    headline = f"Of {len(found)} findings of the paper {counts[True]} hold here and "
    headline += f"{counts[False]} do not; for {counts[None]} the images are too few to say."
    if not found:
        headline = "The paper has no findings here."
    return _listed(headline, {f.claim: (f.verdict, f.figures) for f in found}, caveats)


def _listed(
    headline: str, claims: Mapping[str, tuple[Verdict, str]], caveats: Sequence[str]
) -> str:
    template = _TEMPLATES.get_template("checklist.html.j2")
    classes = {True: "yes", False: "no", None: "open"}
    return template.render(
        headline=headline, claims=claims, caveats=caveats, words=VERDICTS, classes=classes
    )
