"""What the saliency report shows, and what the others have in common with it."""

from __future__ import annotations

import html
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment
from matplotlib.figure import Figure

from ..methods import METHODS
from ..metrics import METRICS
from ..network import Classifier
from ..paths import data_dir
from ..plots import COLORS, Picture
from .subject import Subject


def paper_table(number: int | str) -> pd.DataFrame:
    """Return a table of the paper: 1 to 5, A7 or A8.

    Returns:
        Columns network, method, and the metrics as the paper prints them; T is seconds per batch
        of 8 on the authors' hardware. `attrs["source"]` names the table.
    """
    table = pd.read_csv(data_dir() / "paper" / f"table{number}.csv")
    table.attrs["source"] = f"Table {number}"
    return table


def ordering(table: pd.DataFrame) -> dict[str, tuple[bool, str]]:
    """Ask of measured figures what the paper found in Tables 1 and 2.

    Args:
        table: What `summarize` returned: AD, AG (percent), a row a method.

    Returns:
        Claim → (whether it holds here, the figures that decide it). Claims about methods that
        were not measured are absent.
    """
    claims: dict[str, tuple[bool, str]] = {}
    table = table.drop(index="opti-cam-fast", errors="ignore")  # the paper did not know it
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


def title(method: str) -> str:
    """Return how a method is written in text, such as Grad-CAM++."""
    return METHODS[method].title if method in METHODS else method


FIGURES = """
table.figures { table-layout: auto; border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; font-size: .88rem; }
table.figures caption { caption-side: bottom; text-align: left; font-size: .84rem;
  padding-top: .6rem; color: var(--soft, var(--jp-ui-font-color2, #5b6475)); }
table.figures td, table.figures th { padding: .28rem .5rem; vertical-align: top;
  border-bottom: 1px solid var(--line, var(--jp-border-color2, #dfe3ea)); }
table.figures tbody tr { background: none !important; }
table.figures thead th { border-bottom: 1px solid #9aa3b2; white-space: nowrap; }
table.figures thead tr:first-child th { border-bottom: 0; padding-bottom: 0; }
table.figures.figures th { text-align: left; }
table.figures td, table.figures thead tr:last-child th { text-align: right; }
table.figures small { font-weight: 400; color: var(--soft, var(--jp-ui-font-color2, #5b6475)); }
table.figures th[colspan] { text-align: center; }
table.figures colgroup + colgroup { border-left: 1px solid var(--line, #dfe3ea); }
table.figures tbody th { font-weight: 600; white-space: nowrap; }
table.figures tr.other > * { color: #7a8292; font-weight: 400; }
table.figures td.best { font-weight: 700; }
table.figures colgroup.measured { background: rgb(0 114 178 / 7%); }
"""
"""Style of the tables. They bring it along, for a notebook opened by hand has no page around it;
the variables are the page's, then JupyterLab's, whose theme may be dark. A class named twice wins
over JupyterLab's own rules for tables."""


def styled(table: str) -> str:
    """Return an HTML table of the class `figures` with the style that it needs anywhere."""
    return f"<style>{FIGURES}</style>{table}"


# Where a style is not trusted, as on GitHub, a line break and <b> still say what they must.
_TABLE = Environment(autoescape=True).from_string("""
<table class="figures">
<caption>{{ caption }}</caption>
<colgroup></colgroup>
{% for name, note in groups %}
<colgroup span="{{ heads|length }}"{% if loop.first %} class="measured"{% endif %}></colgroup>
{% endfor %}
<thead>
<tr><th rowspan="2" scope="col">method</th>
{% for name, note in groups %}
<th colspan="{{ heads|length }}" scope="colgroup">{{ name }}<br><small>{{ note }}</small></th>
{% endfor %}</tr>
<tr>{% for _ in groups %}{% for head, title in heads %}
<th scope="col" title="{{ title }}">{{ head }}</th>{% endfor %}{% endfor %}</tr>
</thead>
<tbody>
{% for row in rows %}<tr{% if not row.measured %} class="other"{% endif %}>
<th scope="row">{{ row.title }}</th>
{% for cell in row.cells %}
{% if cell.best %}<td class="best"><b>{{ cell.text }}</b>{% else %}<td>{{ cell.text }}{% endif %}
{%- if cell.error %}<small> ±{{ cell.error }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table>
""")

_UNITS = {
    "T": "T is seconds per batch of 8 images, here on this machine, in the paper on the authors'",
    **{m: f"{m} is a {METRICS[m].unit}" for m in METRICS if METRICS[m].unit != "percent"},
}


def comparison(table: pd.DataFrame, paper: pd.DataFrame, here: str, note: str = "paper") -> str:
    """Return an HTML table of the measured figures beside the paper's.

    Args:
        table: What `summarize` returned, with the standard errors or without.
        paper: What `paper_table` returned, or the rows of some of its networks. Its methods that
            were not measured follow in grey, its metrics that were not measured are left out.
        here: Heads the measured columns.
        note: Under the names of the paper's networks.
    """
    columns = [c for c in paper.columns if c in table.columns]
    groups = {here: table} | {
        network: rows.set_index("method") for network, rows in paper.groupby("network", sort=False)
    }

    def cell(group: pd.DataFrame, method: str, column: str) -> dict[str, Any]:
        if method not in group.index or pd.isna(group.loc[method, column]):
            return {"text": "–", "best": False}
        digits = 2 if column in _UNITS else 1
        values = group[column].round(digits)
        # Bold as in the paper: Fake-CAM aside, which would win AD with nothing.
        rivals = values.drop(index="fake-cam", errors="ignore")
        best = None
        if column in METRICS:
            best = rivals.min() if METRICS[column].better == "lower" else rivals.max()
        error = group.loc[method].get(f"{column} ±", math.nan)
        return {
            "text": f"{values[method]:.{digits}f}",
            "best": method != "fake-cam" and best is not None and values[method] == best,
            "error": "" if math.isnan(error) else f"{error:.{digits}f}",
        }

    def head(column: str) -> tuple[str, str]:
        if column not in METRICS:
            return "T, s", "seconds per batch of 8 images"
        metric = METRICS[column]
        return f"{column} {metric.arrow}", f"{metric.title}: {metric.better} is better"

    rows = [
        {
            "title": title(method),
            "measured": method in table.index,
            "cells": [cell(g, method, c) for g in groups.values() for c in columns],
        }
        for method in dict.fromkeys([*table.index, *paper["method"]])
    ]
    errors = any(f"{c} ±" in table.columns for c in columns)
    units = "; ".join(["Percent", *(text for c, text in _UNITS.items() if c in columns)])
    beside = f", and the paper's {paper.attrs['source']}" if len(paper) else ""
    page = _TABLE.render(
        caption=(
            f"Measured here{' ± standard error over images' if errors else ''}{beside}. {units}. "
            "Bold: best of its column, Fake-CAM aside."
            + (" Grey: methods of the paper that were not measured here." if len(paper) else "")
        ),
        groups=[(here, "measured"), *((network, note) for network in list(groups)[1:])],
        heads=[head(c) for c in columns],
        rows=rows,
    )
    return styled(page)


def caveats(subject: Subject) -> list[str]:
    """Return what speaks against comparing a subject's figures with the paper's, in sentences."""
    n, iterations = len(subject.indices), subject.options.get("opti-cam", {}).get("iterations", 100)
    found = []
    if iterations != 100:
        found.append(f"Opti-CAM took {iterations} iterations here, 100 in the paper.")
    if n < 100:
        found.append(f"{n} images are few: on others a claim may turn out otherwise.")
    return found


def checklist(claims: Mapping[str, tuple[bool, str]], caveats: Sequence[str] = ()) -> str:
    """Return an HTML list of what `ordering` found, a verdict above it and caveats below."""
    if not claims:
        return "<p>The paper's ordering can't be judged: its methods were not measured.</p>"
    failed = sum(not holds for holds, _ in claims.values())
    verdict = (
        "The paper's ordering holds here."
        if not failed
        else f"The paper's ordering does not hold here: {failed} of {len(claims)} claims fail."
    )
    items = "".join(
        f'<li class="{"yes" if holds else "no"}"><b>{"holds" if holds else "fails"}</b> '
        f"{html.escape(claim)}: {html.escape(figures)}.</li>"
        for claim, (holds, figures) in claims.items()
    )
    below = f"<p>{html.escape(' '.join(caveats))}</p>" if caveats else ""
    return f'<p><strong>{verdict}</strong></p><ul class="claims">{items}</ul>{below}'


def chart(table: pd.DataFrame, paper: pd.DataFrame) -> Picture:
    """Draw AD against AG: bars to the left for what is lost, to the right for what is gained.

    Args:
        table: What `summarize` returned.
        paper: What `paper_table` returned; its first network is marked for comparison.
    """
    methods = list(table.index)[::-1]
    names = [title(method) for method in methods]
    network = paper["network"].iloc[0]
    theirs = paper[paper["network"] == network].set_index("method")
    theirs = theirs.loc[[method for method in methods if method in theirs.index]]
    figure = Figure(figsize=(8.4, 1.1 + 0.4 * len(methods)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    highest = max(10.0, *table[["AD", "AG"]].max(), *theirs[["AD", "AG"]].max())
    sides = (
        (left, "AD", "← average drop, % (shorter is better)", COLORS[1], "//"),
        (right, "AG", "average gain, % (longer is better) →", COLORS[0], ""),
    )
    for ax, column, label, colour, hatch in sides:
        widths = table.loc[methods, column]
        ax.barh(names, widths, height=0.6, color=colour, hatch=hatch, edgecolor="white")
        diamonds = ax.scatter(
            theirs[column],
            [title(method) for method in theirs.index],
            marker="D",
            s=26,
            facecolor="white",
            edgecolor="black",
            zorder=3,
            clip_on=False,
            label=f"the paper's {network}",
        )
        # The figures stand in a column at the edge, where neither bar nor diamond covers them.
        edge = 1.3 * highest
        for method, name in zip(methods, names, strict=True):
            side = "left" if ax is left else "right"
            value = f"{widths[method]:.1f}"
            ax.text(
                edge, name, value, ha=side, va="center", fontsize=9, color=colour, weight="bold"
            )
        ax.set_xlim((edge, 0) if ax is left else (0, edge))
        ax.set_xlabel(label, fontsize=9)
        ax.tick_params(labelsize=9.5, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    left.tick_params(axis="y", labelleft=False)
    right.tick_params(axis="y", labelleft=True, pad=8)
    figure.legend(handles=[diamonds], fontsize=9, frameon=False, loc="outside upper center")
    told = "; ".join(
        f"{title(m)} {table.loc[m, 'AD']:.1f} and {table.loc[m, 'AG']:.1f}" for m in table.index
    )
    return Picture(figure, f"Bar chart of average drop and average gain in percent: {told}.")


def write_metrics(
    folder: str | Path,
    subject: Subject,
    settings: Mapping[str, Any],
    table: pd.DataFrame,
    quality: Mapping[str, float | None],
) -> dict[str, Any]:
    """Write `metrics.json` (settings, versions and every figure of the report) and the table.

    Args:
        folder: Where to; `""` writes nothing.
        subject: What was measured.
        settings: The notebook's parameters.
        table: What `summarize` returned.
        quality: `top1` (percent, None without true classes) and `mean_probability` (fraction).

    Returns:
        What was written.
    """
    claims = ordering(table)
    record = {
        **about("saliency", subject, settings),
        **quality,
        "methods": [
            {
                "method": str(method),
                "AD": float(row["AD"]),
                "AG": float(row["AG"]),
                "AI": float(row["AI"]),
                "seconds": float(row["T"]),
                "n": len(subject.indices),
            }
            for method, row in table.iterrows()
        ],
        "ordering": {claim: holds for claim, (holds, _) in claims.items()},
        "ordering_holds": bool(claims) and all(holds for holds, _ in claims.values()),
        "broken": len(subject.broken),
    }
    write_json(folder, record)
    write_table(folder, table)
    return record


def about(report: str, subject: Subject, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every `metrics.json` says: what was measured, and with which versions."""
    return {
        "report": f"{report}_report",
        "settings": dict(settings),
        "network": {
            "name": subject.classifier.name,
            "layer": subject.classifier.layer,
            "classes": subject.classifier.classes,
            "device": str(subject.classifier.device),
        },
        "data": {
            "name": subject.dataset.name,
            "n": len(subject.indices),
            "of": len(subject.dataset),
            "targets": subject.targets,
        },
        "left_out": subject.left_out,
        "versions": versions(),
    }


def write_json(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write `metrics.json` into a folder; `""` writes nothing. NaN becomes null."""
    if folder:
        text = json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)
        (Path(folder) / "metrics.json").write_text(text + "\n", encoding="utf-8")


def write_table(folder: str | Path, table: pd.DataFrame) -> None:
    """Write `table.csv` and `table.tex` (LaTeX) into a folder, to copy from; `""` writes nothing.

    Args:
        folder: Where to.
        table: What `summarize` or `box_table` returned.
    """
    if not folder:
        return
    index = bool(table.index.name)  # methods, not mere numbers
    table.to_csv(Path(folder) / "table.csv", index=index, encoding="utf-8")
    text = table.rename(index=title).to_latex(
        index=index, index_names=False, escape=True, float_format="%.2f", na_rep="--"
    )
    for sign, command in {"±": r"$\pm$", "∩": r"$\cap$", "∖": r"$\setminus$"}.items():
        text = text.replace(sign, command)
    (Path(folder) / "table.tex").write_text(text, encoding="utf-8")


def settings_table(settings: Mapping[str, Any], *classifiers: Classifier) -> str:
    """Return settings and versions as a table in Markdown, with the values that were really used.

    Args:
        settings: The notebook's parameters.
        classifiers: What was measured; all are on one device.
    """
    shown = {**settings, "device": classifiers[0].device}
    if "layer" in shown:
        shown["layer"] = classifiers[0].layer
    if shown.get("checkpoint"):
        shown.pop("weights")  # the checkpoint's are used
    rows = [*shown.items(), *versions().items()]
    lines = [f"| {name} | {'–' if value == '' else value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not know, by None."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Return the versions that figures may depend on, and the number of threads."""
    packages = ("opticam-lite", "torch", "torchvision", "timm", "numpy", "pillow")
    found = dict.fromkeys(packages, "not installed")  # as the package is, run from its sources
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        **found,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
