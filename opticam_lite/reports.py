"""Reports: check what was asked for, execute the notebook, make one HTML page of it.

    NAME=value … ──parse, prepare──▶ notebook ──papermill──▶ .ipynb, metrics.json ──▶ .html

`make report` calls `main`. A report's parameters are those of its notebook's parameters cell:
adding one there is all it takes. Everything is checked before anything runs, by the function that
the notebook itself begins with, such as `prepare`; so what passes the check is what runs. What the
saliency report shows is here, what the benchmark report shows in `benchmark`.
"""

from __future__ import annotations

import ast
import copy
import html
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from nbclient.exceptions import CellTimeoutError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers
from torch import Tensor

from . import studies
from .classifier import Classifier
from .datasets import Dataset, ImageError, Unlabelled, load_dataset
from .evaluation import choose
from .evaluation.run import lacks
from .methods import METHODS, applicable
from .metrics import METRICS
from .models import load_model
from .paths import data_dir
from .plots import COLORS, Picture
from .registry import Registry, unknown_name

DEFAULT = "saliency"
ESSENTIAL = ("saliency", "benchmark")  # what `make report` makes when it is told nothing
SECONDS_A_CELL = 7200
_PACKAGE = Path(__file__).resolve().parent
_TYPES = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "yes or no"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# Where a notebook puts its numbers is the runner's business, not a parameter of the report.
_PLACES = ("out", "rows")
_TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


class ReportError(ValueError):
    """A report that can't be made as asked for; the message says why in one sentence."""


# ---------------------------------------------------------------------------------- parameters


def checks() -> dict[str, Callable[..., Subject | studies.Study]]:
    """Return report → the function that checks its parameters and loads what they name."""
    return {"saliency": prepare, "benchmark": prepare_benchmark, "boxes": studies.prepare}


def notebook_path(report: str = DEFAULT) -> Path:
    """Return a report's notebook: in a checkout, or inside the package when installed.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    places = [
        root / "notebooks" / "reports" / f"{report}_report.ipynb"
        for root in (_PACKAGE.parent, _PACKAGE)
    ]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"the report's notebook is not at {' or '.join(map(str, places))}")


def folder(report: str) -> Path:
    """Return where a report is written to unless OUT says otherwise."""
    return Path("build") / f"{report}_report"


def choose_reports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the reports that are asked for, and the other arguments.

    `REPORT=name` names one; parameters without it are the saliency report's; no argument at all
    asks for the essential ones with their defaults.

    Raises:
        ReportError: For an unknown report.
    """
    named = [a for a in arguments if a.partition("=")[0].strip().lower().lstrip("-") == "report"]
    others = [a for a in arguments if a not in named]
    chosen = [name for a in named if (name := a.partition("=")[2].strip().lower())]
    for name in chosen:
        if name not in checks():
            raise ReportError(unknown_name("report", name, checks()))
    return chosen or ([DEFAULT] if others else list(ESSENTIAL)), others


def parse(
    arguments: Sequence[str], notebook: Path | None = None, report: str = DEFAULT
) -> tuple[dict[str, Any], Path, float]:
    """Turn `NAME=value` arguments into parameters of the notebook.

    Names may be in upper or lower case; an empty value stands for the default.

    Args:
        arguments: Such as `["MODEL=resnet50", "LIMIT=20"]`; besides the notebook's parameters OUT
            (folder) and TIMEOUT (seconds a cell) are known.
        notebook: Whose parameters. Default: the report's.
        report: Its name.

    Returns:
        All parameters of the notebook, those given in place of its defaults; the folder to write
        to; the seconds that a cell may take.

    Raises:
        ReportError: For an unknown name or a value of the wrong type.
    """
    known = _parameters(notebook or notebook_path(report))
    values = {name: default for name, (default, _, _) in known.items()}
    types = {name: kind for name, (_, kind, _) in known.items()}
    types |= {"out": "str", "timeout": "float"}
    values |= {"out": str(folder(report)), "timeout": SECONDS_A_CELL}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ReportError(f"{argument!r} is no parameter; write NAME=value, such as LIMIT=20")
        key = name.strip().lower().lstrip("-")
        if key not in types:
            raise ReportError(
                unknown_name("parameter", name.strip().upper(), [n.upper() for n in types])
            )
        if text.strip():
            values[key] = _convert(key, text.strip(), types[key])
    out, timeout = Path(values.pop("out")).expanduser(), values.pop("timeout")
    if timeout <= 0:
        raise ReportError(f"TIMEOUT is {timeout:g}; it must be above 0, in seconds a cell")
    return values, out, timeout


def _parameters(notebook: Path) -> dict[str, tuple[Any, str, str]]:
    """Return name → (default, type, explanation) of the notebook's parameters cell."""
    return {
        name: (ast.literal_eval(p["default"]), p["inferred_type_name"], p["help"])
        for name, p in papermill.inspect_notebook(str(notebook)).items()
        if name not in _PLACES
    }


def _convert(name: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return _TRUTH[text.lower()]
        return {"str": str, "int": int, "float": float}[kind](text)
    except (KeyError, ValueError) as error:
        raise ReportError(f"{name.upper()} is {text!r}; it must be {_TYPES[kind]}") from error


def usage() -> str:
    """Return the help text: every report's parameters, what they are for and their defaults."""
    lines = [
        "make report              the saliency and the benchmark report on the embedded data",
        "make report NAME=value … the saliency report with parameters",
        "make report REPORT=name NAME=value …",
    ]
    for report in checks():
        lines += ["", f"Parameters of REPORT={report}:", ""]
        rows = [(n, d, h) for n, (d, _, h) in _parameters(notebook_path(report)).items()]
        rows += [("out", str(folder(report)), "folder to write to")]
        rows += [("timeout", SECONDS_A_CELL, "seconds that one cell of the notebook may take")]
        for name, default, explanation in rows:
            shown = "" if default == "" else f" [{default}]"
            lines.append(f"  {name.upper():<12}{explanation}{shown}")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------- what is reported on


@dataclass(frozen=True)
class Subject:
    """What a report is about, checked.

    Attributes:
        classifier: The network, cut at the layer.
        dataset: The images; without a target where the predicted class is explained.
        indices: The images to measure.
        examples: Those of them that are shown: of different classes, as far as there are any.
        methods: Names of the methods that apply to the network.
        left_out: Name → reason of those that don't.
        options: Options of the methods, as `evaluate` takes them.
        targets: Which class is explained, in words.
        labelled: Whether that is the true class.
        metrics: Names of the metrics that the dataset allows.
    """

    classifier: Classifier
    dataset: Dataset
    indices: list[int]
    examples: list[int]
    methods: list[str]
    left_out: dict[str, str]
    options: dict[str, dict[str, Any]]
    targets: str
    labelled: bool
    metrics: tuple[str, ...] = ("AD", "AG", "AI")

    @property
    def transformer(self) -> bool:
        """Whether the network attends: its counterpart in the paper is Table 2, not Table 1."""
        return any(
            type(m).__name__.endswith("Attention") for m in self.classifier.network.modules()
        )


def prepare(
    *,
    model: str = "scenes_resnet",
    checkpoint: str = "",
    weights: str = "hub",
    layer: str = "",
    images: str = "scenes",
    labels: str = "",
    methods: str = "cam, grad-cam, score-cam, opti-cam, fake-cam",
    limit: int = 24,
    seed: int = 0,
    examples: int = 6,
    iterations: int = 100,
    normalize: bool = True,
    device: str = "auto",
) -> Subject:
    """Check the parameters of a report and load what they name.

    Args:
        model, checkpoint, weights, layer, normalize, device: See `load_model`; `""` is None.
        images: `"scenes"`, one of its twins, or a folder of image files.
        labels: Table of a folder's true classes. Without one the predicted classes are explained,
            also if the scenes are shown to a network that was not trained on them.
        methods: Names separated by commas. Those that do not apply to the network are left out.
        limit: Measure at most this many images.
        seed: Of their draw.
        examples: Show this many of them.
        iterations: Of Opti-CAM.

    Raises:
        ReportError, ValueError, FileNotFoundError, ConnectionError: The first thing that is wrong.
    """
    subject = _subject(
        model=model,
        checkpoint=checkpoint,
        weights=weights,
        layer=layer,
        data=images,
        labels=labels,
        methods=methods,
        limit=limit,
        seed=seed,
        examples=examples,
        iterations=iterations,
        normalize=normalize,
        device=device,
    )
    shown = _different(subject.dataset, subject.indices, examples)
    return replace(subject, examples=shown)


def prepare_benchmark(
    *,
    model: str = "scenes_resnet",
    checkpoint: str = "",
    weights: str = "hub",
    layer: str = "",
    data: str = "scenes",
    labels: str = "",
    methods: str = "grad-cam, grad-cam++, layer-cam, opti-cam, fake-cam",
    metrics: str = "AD, AG, AI, AOPC, ADCC, OM, LE, F1, BA, SP, EP, SM",
    limit: int = 8,
    seed: int = 0,
    examples: int = 1,
    iterations: int = 50,
    normalize: bool = True,
    device: str = "auto",
) -> Subject:
    """Check the parameters of the benchmark report and load what they name.

    Broken images are not looked for: `evaluate` counts them and goes on.

    Args:
        model, checkpoint, weights, layer, normalize, device: See `load_model`; `""` is None.
        data, labels: See `load_dataset`.
        methods: Names separated by commas, or `all`. Those that do not apply are left out.
        metrics: Names separated by commas, or `all`, of which I, D and MS take longest. Those that
            the dataset does not allow are left out.
        limit: Measure at most this many images.
        seed: Of their draw, and of metrics that draw.
        examples: Show this many of the best and of the worst maps of each method.
        iterations: Of Opti-CAM.

    Raises:
        ReportError, ValueError, FileNotFoundError, ConnectionError: The first thing that is wrong.
    """
    names = _listed("METRICS", metrics, METRICS)
    subject = _subject(
        model=model,
        checkpoint=checkpoint,
        weights=weights,
        layer=layer,
        data=data,
        labels=labels,
        methods=methods,
        limit=limit,
        seed=seed,
        examples=examples,
        iterations=iterations,
        normalize=normalize,
        device=device,
    )
    reasons = {name: lacks(subject.dataset, name) for name in names}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(left_out) == len(names):
        name, reason = next(iter(left_out.items()))
        raise ReportError(f"no metric of METRICS can be measured on {data}; {name}: {reason}")
    return replace(
        subject,
        metrics=tuple(name for name in names if name not in left_out),
        left_out=subject.left_out | left_out,
    )


def _listed(what: str, text: str, registry: Registry[Any]) -> list[str]:
    """Return the names of a list, each once; `all` stands for every name of the registry."""
    names = list(dict.fromkeys(text.replace(",", " ").split()))
    if names == ["all"]:
        return list(registry)
    for name in names:
        registry[name]  # an unknown name raises the error that lists the close ones
    if not names:
        raise ReportError(f"{what} names none; choose among {', '.join(registry)}")
    return names


def _subject(
    *,
    model: str,
    checkpoint: str,
    weights: str,
    layer: str,
    data: str,
    labels: str,
    methods: str,
    limit: int,
    seed: int,
    examples: int,
    iterations: int,
    normalize: bool,
    device: str,
) -> Subject:
    """Check what all reports have in common; the examples are not chosen yet."""
    for name, number in {"limit": limit, "examples": examples, "iterations": iterations}.items():
        if number < 1:
            raise ReportError(f"{name.upper()} is {number}; it must be at least 1")
    names = _listed("METHODS", methods, METHODS)
    # The cheap checks come first: a network may take a while.
    for what, given in {"CHECKPOINT": checkpoint, "LABELS": labels}.items():
        if given and not Path(given).expanduser().is_file():
            raise FileNotFoundError(f"{what} is {given!r}, and there is no such file")
    if not Path(data).expanduser().exists():
        load_dataset(data)  # the scenes, or the error that says what is missing
    classifier = load_model(
        model,
        checkpoint=_path(checkpoint),
        layer=layer or None,
        weights=weights,
        normalize=normalize,
        device=device,
    )
    dataset = load_dataset(Path(data).expanduser(), labels=_path(labels), classifier=classifier)
    reasons = applicable(classifier)
    left_out = {name: reason for name in names if (reason := reasons[name]) is not None}
    chosen = [name for name in names if name not in left_out]
    if not chosen:
        name, reason = next(iter(left_out.items()))
        raise ReportError(f"no method of METHODS can explain {classifier.name}; {name}: {reason}")
    if dataset.labels is not None and dataset.labels != classifier.labels:
        dataset = Unlabelled(dataset)
        targets = f"predicted class, since {classifier.name} does not know the classes of {data}"
    elif _first_target(dataset) is None:
        targets = "predicted class, since no table of true classes (LABELS) was given"
    else:
        targets = "true class"
    return Subject(
        classifier,
        dataset,
        choose(len(dataset), limit, seed),
        [],
        chosen,
        left_out,
        {"opti-cam": {"iterations": iterations}} if "opti-cam" in chosen else {},
        targets,
        targets == "true class",
    )


def _first_target(dataset: Dataset) -> int | None:
    """Return the target of the first image that can be read."""
    for i in range(len(dataset)):
        with suppress(ImageError):
            return dataset[i].target
    return None


def _path(text: str) -> str | None:
    return str(Path(text).expanduser()) if text else None


def _different(dataset: Dataset, indices: list[int], examples: int) -> list[int]:
    """Choose examples: one image of each of as many classes as possible, then others.

    Every image to be measured is read here, so that a damaged file is found before the run.
    """
    firsts: dict[int | None, int] = {}
    for i in indices:
        firsts.setdefault(dataset[i].target, i)
    chosen = [list(firsts.values())[k] for k in choose(len(firsts), examples)]
    others = [i for i in indices if i not in chosen]
    chosen += [others[k] for k in choose(len(others), examples - len(chosen))] if others else []
    return sorted(chosen[:examples])


# ------------------------------------------------------------------------------- what it shows


def predictions(subject: Subject, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return the targets and the predicted classes of the measured images, each `(N,)`."""
    targets, predicted = [], []
    for start in range(0, len(subject.indices), batch_size):
        images, known = subject.dataset.batch(subject.indices[start : start + batch_size])
        classes = subject.classifier.predict(images)
        predicted.append(classes)
        targets.append(classes if known is None else known)
    return torch.cat(targets), torch.cat(predicted)


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
<th colspan="{{ heads|length }}" scope="colgroup">{{ name }}<small>{{ note }}</small></th>
{% endfor %}</tr>
<tr>{% for _ in groups %}{% for head, title in heads %}
<th scope="col" title="{{ title }}">{{ head }}</th>{% endfor %}{% endfor %}</tr>
</thead>
<tbody>
{% for row in rows %}<tr{% if not row.measured %} class="other"{% endif %}>
<th scope="row">{{ row.title }}</th>
{% for cell in row.cells %}
<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}
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
    return _TABLE.render(
        caption=(
            f"Measured here{' ± standard error over images' if errors else ''}{beside}. {units}. "
            "Bold: best of its column, Fake-CAM aside."
            + (" Grey: methods of the paper that were not measured here." if len(paper) else "")
        ),
        groups=[(here, "measured"), *((network, note) for network in list(groups)[1:])],
        heads=[head(c) for c in columns],
        rows=rows,
    )


def checklist(claims: Mapping[str, tuple[bool, str]]) -> str:
    """Return an HTML list of what `ordering` found, with a verdict above it."""
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
    return f'<p><strong>{verdict}</strong></p><ul class="claims">{items}</ul>'


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
    """Write `metrics.json`: settings, versions and every figure of the report.

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
    }
    write_json(folder, record)
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


# -------------------------------------------------------------------------------- making it


@dataclass(frozen=True)
class Failure:
    """A cell that failed: where, and with which error (one line)."""

    where: str
    error: str


def failures(notebook: NotebookNode) -> list[Failure]:
    """Find every error in an executed notebook, also those that runners do not see.

    An error inside an `Output` widget is in no cell's outputs but in the widgets' state.
    """
    found = []
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(Failure(_where(cell, index), f"{output.ename}: {output.evalue}"))
    widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json")
    for model in (widgets or {}).get("state", {}).values():
        for output in model.get("state", {}).get("outputs", []):
            if output.get("output_type") == "error":
                found.append(Failure("a widget", f"{output['ename']}: {output['evalue']}"))
    return found


def _where(cell: NotebookNode, index: int) -> str:
    first = cell.source.partition("\n")[0]
    _, given, name = first.partition("papermill_description=")
    described = f" ({name.strip().replace('_', ' ')})" if given else ""
    count = cell.get("execution_count")
    return f"cell {'In [' + str(count) + ']' if count else index + 1}{described}"


def run(
    parameters: Mapping[str, Any],
    out: Path | None = None,
    timeout: float = SECONDS_A_CELL,
    notebook: Path | None = None,
    report: str = DEFAULT,
) -> list[Failure]:
    """Execute the notebook and put the report into a folder.

    What was in the folder from an earlier run stays until this run is over. After a failure the
    notebook and the page, with the error marked, replace the earlier ones, and `metrics.json` is
    removed, for its figures would not be those of the page.

    Args:
        parameters: Of the notebook, checked.
        out: The folder; created if need be. Default: `folder(report)`. Rows that a notebook
            measures are kept in its `rows/`, whatever happens, so that a later run resumes.
        timeout: Seconds that a cell may take.
        notebook: Default: the report's.
        report: Its name.

    Returns:
        What failed; empty for a good run.
    """
    out, notebook = out or folder(report), notebook or notebook_path(report)
    name = f"{report}_report"
    with tempfile.TemporaryDirectory(prefix="opticam-") as temporary:
        executed = Path(temporary) / f"{name}.ipynb"
        places = {"out": temporary, "rows": str(out.absolute() / "rows")}
        wanted = papermill.inspect_notebook(str(notebook))
        error = None
        try:
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                {**parameters, **{key: places[key] for key in _PLACES if key in wanted}},
                cwd=str(Path.cwd()),
                progress_bar=sys.stderr.isatty(),
                execution_timeout=timeout,
                kernel_name="python3",
                # Kernels otherwise warn, on everybody's terminal, that TCP is not encrypted.
                extra_arguments=["--log-level=ERROR"],
            )
        except Exception as caught:
            # A failed cell, a cell that took too long, a kernel that died: all end on the page.
            error = caught
            result = nbformat.read(executed if executed.exists() else notebook, as_version=4)
            if not isinstance(caught, PapermillExecutionError):
                _mark(result, caught, timeout)
        else:
            result = nbformat.read(executed, as_version=4)
        found = failures(result)
        nbformat.write(result, executed)
        write_html(result, Path(temporary) / f"{name}.html", found)
        if error is not None or found:
            (Path(temporary) / "metrics.json").unlink(missing_ok=True)
        _publish(Path(temporary), out, name)
    return found


def _mark(notebook: NotebookNode, error: Exception, timeout: float) -> None:
    """Write an error that is no cell's own into the cell that was running."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Papermill calls every cell completed once one has ended the run; only start times tell.
    started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    running = started[-1] if started else code[0]
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, CellTimeoutError):
        text = f"the cell took longer than {timeout:g} s; allow it more with TIMEOUT=seconds"
    # A cell that is stopped shows a KeyboardInterrupt, which nobody caused.
    running.outputs = [o for o in running.outputs if o.output_type != "error"]
    running.outputs.append(
        nbformat.v4.new_output("error", ename=type(error).__name__, evalue=text, traceback=[text])
    )


def _publish(made: Path, out: Path, name: str) -> None:
    """Put the files into place, each whole or not at all; other files there are not touched."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (f"{name}.ipynb", f"{name}.html", "metrics.json"):
        if (made / file).exists():
            part = out / f".{file}.part"
            shutil.copyfile(made / file, part)
            part.replace(out / file)
        else:
            (out / file).unlink(missing_ok=True)


def write_html(notebook: NotebookNode, path: Path, failed: Sequence[Failure] = ()) -> None:
    """Write a notebook as one self-contained page that needs no network.

    Args:
        notebook: Executed.
        path: Of the page.
        failed: Told in a banner at the top.
    """
    # Papermill's own marks say less than the banner and the open, framed cell.
    notebook = remove_error_markers(copy.deepcopy(notebook))
    # Nothing on the page could show a widget; a progress bar would stand there as text, half full.
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell["outputs"] = [o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})]
    template = (_PACKAGE / "report.html.j2").read_text(encoding="utf-8")
    exporter = HTMLExporter(raw_template=template, embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, resources={"failed": list(failed)})
    path.write_text(page, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make reports from the command line.

    Returns:
        0 for good reports, 1 if a cell failed (the page marks it), 2 if a parameter is wrong
        (nothing was run or written), 130 if it was interrupted (no page was written).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(a in ("-h", "--help") for a in arguments):
        sys.stdout.write(usage())
        return 0
    plans: dict[str, tuple[dict[str, Any], Path, float]] = {}
    try:
        chosen, others = choose_reports(arguments)
        for report in chosen:
            plans[report] = parse(others, report=report)
            _check_folder(plans[report][1])
            checks()[report](**plans[report][0])
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"report: {' '.join(str(error).split())}\n")
        return 2
    failed = False
    for report, (parameters, out, timeout) in plans.items():
        sys.stderr.write(f"Executing the {report} report's notebook; it is written to {out}\n")
        try:
            found = run(parameters, out, timeout, report=report)
        except KeyboardInterrupt:
            kept = (
                f" but the rows measured so far, {out / 'rows'}" if (out / "rows").exists() else ""
            )
            sys.stderr.write(f"report: interrupted; nothing was written{kept}\n")
            return 130
        for failure in found:
            sys.stderr.write(f"report: {failure.where} failed with {failure.error}\n")
        sys.stdout.write(f"{out / report}_report.html\n")
        failed |= bool(found)
    return 1 if failed else 0


def _check_folder(out: Path) -> None:
    nearest = next(p for p in (out, *out.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise ReportError(f"OUT is {str(out)!r}, and {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise ReportError(f"OUT is {str(out)!r}, and {nearest} can't be written to")


if __name__ == "__main__":
    sys.exit(main())
