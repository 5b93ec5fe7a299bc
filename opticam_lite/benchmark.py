"""What the benchmark report shows: the paper's tables for any network, and its best and worst maps.

reports.prepare_benchmark ──▶ evaluate ──▶ summarize ──▶ a section for each of the paper's tables
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .evaluation.job import Job
from .evaluation.settings import describe, digest
from .methods import explain
from .metrics import METRICS
from .plots import Picture, bars, grid
from .reports import (
    Subject,
    about,
    comparison,
    ordering,
    paper_table,
    title,
    write_json,
    write_table,
)

# Name → the paper's tables for CNNs and for transformers.
SECTIONS: dict[str, tuple[int | str, int | str]] = {
    "What the mask keeps": (1, 2),
    "Insertion and deletion": (3, 3),
    "AOPC, sensitivity, ADCC": (4, 4),
    "Localisation": ("A7", "A8"),
}
# The networks of the paper by their names here.
_OWN = {
    "resnet50": "ResNet50",
    "vgg16_bn": "VGG16",
    "vit_base_patch16_224": "ViT-B",
    "deit_base_patch16_224": "DeiT-B",
}
_UNASKED = "the parameter metrics does not name them; “all” measures every one"
_PACKAGE = Path(__file__).resolve().parent
# What shows figures and makes none.
_SHOWING = ("explorer", "reports", "plots.py", "benchmark.py", "__main__.py")


def rows_folder(rows: str, subject: Subject, settings: Mapping[str, Any]) -> Path | None:
    """Return where the rows of a run belong, so that the same run, and no other, resumes there.

    Everything that rows depend on makes the name: weights, images, options, and the code that
    measures. Methods and metrics do not: they can be added.

    Args:
        rows: Folder of all runs; `""` is None: rows are kept in memory.
        subject: What is measured.
        settings: The notebook's parameters.
    """
    if not rows:
        return None
    job = Job(subject.classifier, subject.dataset, subject.indices, {}, [], 8, settings["seed"], 0)
    known = describe(job, subject.classifier.device.type)
    known["iterations"] = settings["iterations"]
    files = sorted(_PACKAGE.glob("**/*.py"))
    files = [file for file in files if file.relative_to(_PACKAGE).parts[0] not in _SHOWING]
    known["code"] = digest(b"".join(file.read_bytes() for file in files))
    name = re.sub(r"[^\w.-]+", "-", subject.classifier.name)
    return Path(rows) / f"{name}-{digest(json.dumps(known).encode())[:12]}"


def counterpart(subject: Subject) -> tuple[str, bool]:
    """Return the paper's network of the same kind, and whether it is the very network."""
    name = subject.classifier.name.partition(".")[0]
    if name in _OWN:
        return _OWN[name], True
    if subject.transformer:
        return ("DeiT-B" if "deit" in name else "ViT-B"), False
    return ("VGG16" if "vgg" in name else "ResNet50"), False


def section(name: str, subject: Subject, table: pd.DataFrame) -> str:
    """Return a section of `SECTIONS` as HTML: measured figures beside the paper's, and bar charts.

    Args:
        name: Of the section.
        subject: What was measured.
        table: What `summarize(…, errors=True)` returned.
    """
    paper = paper_table(SECTIONS[name][subject.transformer])
    metrics = [c for c in paper.columns if c in METRICS]
    measured = [c for c in metrics if c in table.columns]
    reasons: dict[str, list[str]] = {}
    for metric in metrics:
        if metric not in measured:
            reason = subject.left_out.get(metric, _UNASKED)
            reasons.setdefault(reason, []).append(metric)
    absent = "".join(
        f"<p>Not measured: {', '.join(names)} ({html.escape(reason)}).</p>"
        for reason, names in reasons.items()
    )
    if not measured:
        return absent
    network, same = counterpart(subject)
    source = paper.attrs["source"]
    theirs = paper[paper["network"] == network]
    theirs.attrs["source"] = source
    note = "paper, ImageNet" if same else "paper: another network"
    shown = comparison(table, theirs, here=subject.classifier.name, note=note)
    if not len(theirs):
        absent += f"<p>The paper's {source} has no network of this kind.</p>"
    charts = "".join(chart(table, metric).html() for metric in measured)
    return f'{shown}{absent}<div class="charts">{charts}</div>'


def chart(table: pd.DataFrame, metric: str) -> Picture:
    """Draw a metric of each method, with its standard error over images."""
    known = METRICS[metric]
    names = [title(method) for method in table.index]
    return bars(
        dict(zip(names, table[metric], strict=True)),
        errors=dict(zip(names, table[f"{metric} ±"], strict=True)),
        ylabel=known.unit,
        title=f"{metric}: {known.title[0].lower() + known.title[1:]}, {known.better} is better",
        size=(max(4.4, 0.55 * len(names)), 2.9),
    )


def extremes(
    frame: pd.DataFrame, subject: Subject, examples: int = 1, *, best: bool = True
) -> Picture:
    """Draw for each method the images whose probability rises most under its mask, or falls most.

    Args:
        frame: What `evaluate` returned.
        subject: What was measured.
        examples: Images a method.
        best: False for the worst.
    """
    index = {subject.dataset.id(i): i for i in subject.indices}
    rows = frame.dropna(subset=["p", "o"]).drop_duplicates(["method", "image"])
    rows = rows.assign(change=rows["o"] - rows["p"])
    images: list[Tensor] = []
    masks: list[Tensor] = []
    titles: list[str] = []
    classes: list[str] = []
    captions: list[str] = []
    for method, of_method in rows.groupby("method", sort=False):
        chosen = of_method.sort_values("change", ascending=not best, kind="stable").head(examples)
        batch, _ = subject.dataset.batch(index[image] for image in chosen["image"])
        targets = torch.tensor(chosen["target"].to_numpy(int))
        options = subject.options.get(str(method), {})
        images.append(batch)
        masks.append(explain(str(method), subject.classifier, batch, targets, **options))
        titles += [title(str(method))] * len(chosen)
        named = zip(targets, chosen["image"], strict=True)
        classes += [f"{subject.classifier.labels[c]}\n{image}" for c, image in named]
        pairs = zip(chosen["p"], chosen["o"], strict=True)
        captions += [f"{_probability(p)} → {_probability(o)}" for p, o in pairs]
    return grid(
        torch.cat(images),
        {"map": torch.cat(masks)},
        row_titles=titles,
        captions={"input": classes, "map": captions},
        title="Best: probability rises most, or falls least"
        if best
        else "Worst: probability falls most, or rises least",
    )


def _probability(value: float) -> str:
    """Return a probability with two decimals, or two digits where it is small."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def write_metrics(
    folder: str | Path,
    subject: Subject,
    settings: Mapping[str, Any],
    table: pd.DataFrame,
    frame: pd.DataFrame,
) -> dict[str, Any]:
    """Write `metrics.json` (settings, versions, figures with standard errors) and the table.

    Args:
        folder: Where to; `""` writes nothing.
        subject: What was measured.
        settings: The notebook's parameters.
        table: What `summarize(frame, errors=True)` returned.
        frame: What `evaluate` returned.

    Returns:
        What was written.
    """
    network, same = counterpart(subject)
    claims = ordering(table) if {"AD", "AG"} <= set(table.columns) else {}
    record = {
        **about("benchmark", subject, settings),
        "paper": {"network": network, "same": same},
        "mean_probability": float(frame.drop_duplicates("image")["p"].mean()),
        "broken": frame.loc[frame["error"].notna(), "image"].nunique(),
        "methods": [
            {
                "method": str(method),
                "seconds": float(row["T"]),
                "n": int(row["images"]),
                "metrics": {
                    metric: {"value": float(row[metric]), "error": float(row[f"{metric} ±"])}
                    for metric in subject.metrics
                },
            }
            for method, row in table.iterrows()
        ],
        "ordering": {claim: holds for claim, (holds, _) in claims.items()},
    }
    write_json(folder, record)
    write_table(folder, table)
    return record
