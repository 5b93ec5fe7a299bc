"""The benchmark report: the paper's tables for any network, and its best and worst maps.

Benchmark.prepare ──▶ evaluate ──▶ summarize ──▶ a section for each of the paper's tables
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..evaluation.digests import digest
from ..evaluation.job import Job
from ..evaluation.run import lacks
from ..evaluation.settings import describe
from ..methods import explain
from ..metrics import METRICS
from ..plots import Picture, bars, grid
from ..registry import LARGEST_SEED
from ..text import page
from .parameters import NAMES, OneNetwork, ReportError, parameter
from .records import figures, write
from .subject import Subject, listed, load
from .tables import comparison, paper_table, title

# Name → the paper's tables for CNNs and for transformers.
SECTIONS: dict[str, tuple[int | str, int | str]] = {
    "What the mask keeps": (1, 2),
    "Insertion and deletion": (3, 3),
    "AOPC, sensitivity, ADCC": (4, 4),
    "Localisation": ("A7", "A8"),
}
# Section → the paper's tables of fine-tuned CNNs on medical images (Appendix E).
MEDICAL_SECTIONS = {"What the mask keeps": "A10", "Insertion and deletion": "A11"}
# Beginning of a dataset's name → the paper's.
MEDICAL = {"chest-xray": "Chest X-ray", "kvasir": "Kvasir"}
# The networks of the paper by their names here.
_OWN = {
    "resnet50": "ResNet50",
    "vgg16_bn": "VGG16",
    "vit_base_patch16_224": "ViT-B",
    "deit_base_patch16_224": "DeiT-B",
}
_UNASKED = "the parameter metrics does not name them; “all” measures every one"


@dataclass(frozen=True, kw_only=True)
class Benchmark(OneNetwork):
    """Parameters of the benchmark report."""

    data: str = parameter("scenes", "scenes, a folder of photos, imagenet:PATH, folders:PATH, …")
    labels: str = parameter("", "for a folder of photos: CSV with file and class_index or label")
    metrics: str = parameter(
        "AD, AG, AI, AOPC, ADCC, OM, LE, F1, BA, SP, EP, SM", "or all: I, D and MS take long"
    )
    examples: int = parameter(1, "show this many of each method's best and worst maps", least=1)
    methods: str = parameter("grad-cam, grad-cam++, layer-cam, opti-cam, fake-cam", NAMES)
    iterations: int = parameter(50, "of Opti-CAM; the paper has 100", least=1)
    seed: int = parameter(0, "of the draw, and of metrics that draw", least=0, most=LARGEST_SEED)

    def prepare(self) -> Subject:
        """Check the parameters and load what they name, with the metrics that the data allow.

        Images are not checked here: `evaluate` counts broken ones and continues.
        """
        names = listed("METRICS", self.metrics, METRICS)
        subject = load(self, self.data, self.labels)
        left_out = {
            name: reason.replace("it has", f"{subject.dataset.name} has", 1)
            for name in names
            if (reason := lacks(subject.dataset, name)) is not None
        }
        metrics = tuple(name for name in names if name not in left_out)
        if not metrics:
            name, reason = next(iter(left_out.items()))
            raise ReportError(
                f"no metric of METRICS can be measured on {self.data}; {name}: {reason}"
            )
        return replace(subject, metrics=metrics, left_out=subject.left_out | left_out)


def rows_folder(rows: str, subject: Subject) -> Path | None:
    """Return the folder of a run's rows, so that only the same run is resumed.

    Its name is a digest of all that every row depends on: weights, images, options, and the code
    that measures. Methods and metrics are not included, so that they can be added later; `evaluate`
    itself measures again what their own code has changed.

    Args:
        rows: Folder of all runs; `""` returns None, and rows are kept in memory.
        subject: What is measured.
    """
    if not rows:
        return None
    asked, classifier = subject.parameters, subject.classifier
    job = Job(classifier, subject.dataset, subject.indices, {}, [], 8, asked.seed, 0)
    known = describe(job, classifier.device.type) | {"iterations": asked.iterations}
    name = re.sub(r"[^\w.-]+", "-", classifier.name)
    return Path(rows) / f"{name}-{digest(json.dumps(known).encode())[:12]}"


def counterpart(subject: Subject) -> tuple[str, bool]:
    """Return the paper's network of the same kind, and whether it is the same one."""
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
            reasons.setdefault(subject.left_out.get(metric, _UNASKED), []).append(metric)
    absent = "".join(
        f"<p>Not measured: {', '.join(names)} ({page(reason)}).</p>"
        for reason, names in reasons.items()
    )
    if not measured:
        return absent
    network, same = counterpart(subject)
    note = "paper, ImageNet" if same else "paper: another network"
    images = medical(subject)
    if images is not None:
        paper = paper_of(images, name, paper)
        note = f"paper, {MEDICAL[images]}{'' if same else ': another network'}"
    theirs = paper[paper["network"] == network]
    shown = comparison(table, theirs, here=subject.classifier.name, note=note)
    if not len(theirs):
        absent += f"<p>The paper's {paper.attrs['source']} has no network of this kind.</p>"
    charts = "".join(chart(table, metric).html() for metric in measured)
    return f'{shown}{absent}<div class="charts">{charts}</div>'


def medical(subject: Subject) -> str | None:
    """Return which of the paper's medical datasets is measured, a key of `MEDICAL`, or None."""
    return next((key for key in MEDICAL if subject.dataset.name.startswith(key)), None)


def paper_of(images: str, name: str, usual: pd.DataFrame) -> pd.DataFrame:
    """Return the paper's figures of medical images for a section.

    Args:
        images: A key of `MEDICAL`.
        name: Of the section.
        usual: The figures of ImageNet, whose columns are taken where the paper has none of these
            images.
    """
    if name not in MEDICAL_SECTIONS:
        table = usual[:0]
        table.attrs["source"] = f"appendix on {MEDICAL[images]}"
        return table
    table = paper_table(MEDICAL_SECTIONS[name])
    return table[table["dataset"] == images].drop(columns="dataset")


def chart(table: pd.DataFrame, metric: str) -> Picture:
    """Draw a metric of each method, with its 95 % interval over images."""
    known = METRICS[metric]
    named = table.rename(index=title)
    return bars(
        named[metric].to_dict(),
        intervals=named[[f"{metric} low", f"{metric} high"]].T.to_dict("list"),
        ylabel=known.unit,
        title=f"{metric}: {known.title[0].lower() + known.title[1:]}, {known.better} is better",
        size=(max(4.4, 0.55 * len(named)), 2.9),
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
    rows = rows.sort_values("change", ascending=not best, kind="stable")
    chosen = {name: rows[rows["method"] == name].head(examples) for name in subject.methods}
    images, masks = [], []
    for method, own in chosen.items():
        batch, _ = subject.dataset.batch(index[image] for image in own["image"])
        targets = torch.tensor(own["target"].to_numpy(int))
        images.append(batch)
        masks.append(explain(method, subject.classifier, batch, targets, **subject.methods[method]))
    shown = pd.concat(chosen.values())
    labels = subject.classifier.labels
    return grid(
        torch.cat(images),
        {"map": torch.cat(masks)},
        row_titles=[title(method) for method in shown["method"]],
        captions={
            "input": [f"{labels[int(row.target)]}\n{row.image}" for row in shown.itertuples()],
            "map": [f"{_probability(p)} → {_probability(o)}" for p, o in shown[["p", "o"]].values],
        },
        title="Best: probability rises most, or falls least"
        if best
        else "Worst: probability falls most, or rises least",
    )


def _probability(value: float) -> str:
    """Return a probability with two decimals, or two digits where it is small."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def write_metrics(
    folder: str | Path, subject: Subject, table: pd.DataFrame, frame: pd.DataFrame
) -> dict[str, Any]:
    """Write `metrics.json` (settings, versions, figures with standard errors) and the table.

    Args:
        folder: Where to; `""` writes nothing.
        subject: What was measured.
        table: What `summarize(frame, errors=True)` returned.
        frame: What `evaluate` returned.

    Returns:
        What was written.
    """
    network, same = counterpart(subject)
    methods = [
        {
            "method": str(method),
            "seconds": float(row["T"]),
            "n": int(row["images"]),
            "metrics": {metric: figures(row, metric) for metric in subject.metrics},
        }
        for method, row in table.iterrows()
    ]
    more = {
        "paper": {"network": network, "same": same},
        "mean_probability": float(frame.dropna(subset="p").drop_duplicates("image")["p"].mean()),
        "broken": frame.loc[frame["error"].notna(), "image"].nunique(),
    }
    parts = {
        name: [*paper_table(numbers[subject.transformer]).columns]
        for name, numbers in SECTIONS.items()
    }
    others = [name for name in subject.metrics if not any(name in part for part in parts.values())]
    parts = {**parts, "Other metrics": others}
    return write(folder, "benchmark", subject, table, methods, parts, **more)
