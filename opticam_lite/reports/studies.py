"""Reports on the paper's studies: components of Opti-CAM, and maps of other classes.

prepare ──▶ measure, a study at a time ──▶ section: table beside the paper's, chart, findings
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ..evaluation import evaluate, summarize
from ..methods import METHODS, explain
from ..metrics import METRICS
from ..metrics.curves import deletion, insertion
from ..plots import Picture, curves, grid
from ..registry import check_name, names_in
from ..studies.findings import Finding
from ..studies.paper import (
    EXPONENTS,
    RATES,
    STUDIES,
    study,
    title,
    with_misclassified,
)
from .benchmark import chart, counterpart, rows_folder
from .parameters import NAMES, OneNetwork, ReportError, parameter
from .records import figures, write
from .subject import Subject, load, readable
from .tables import comparison, findings_list, paper_table

CLASSES = "table-a9"
NAMES_OF = [name for name in STUDIES if name != CLASSES]


@dataclass(frozen=True, kw_only=True)
class _OfStudies(OneNetwork):
    """What reports on studies have in common."""

    images: str = parameter("scenes", "scenes, a folder of photos, imagenet:PATH, folders:PATH, …")
    labels: str = parameter("", "CSV with file and class_index or label; empty: predicted classes")

    def prepare(self) -> Subject:
        """Check the parameters and load what they name."""
        return load(self, self.images, self.labels)


@dataclass(frozen=True, kw_only=True)
class Ablation(_OfStudies):
    """Parameters of the report on the components of Opti-CAM."""

    studies: str = parameter("all", "such as table6, figure-a4")
    methods: str = parameter(
        "grad-cam, grad-cam++, layer-cam, opti-cam, fake-cam", "of A14 and A4, or all"
    )
    iterations: int = parameter(20, "of Opti-CAM; the paper has 100, in Table A12 50", least=1)

    def prepare(self) -> Subject:
        """Check the parameters and load what they name."""
        self.chosen()
        return super().prepare()

    def chosen(self) -> list[str]:
        """Return the names of the studies."""
        names = names_in(self.studies)
        if names == ["all"]:
            return NAMES_OF
        for name in names:
            check_name("study", name, NAMES_OF)
        if not names:
            raise ReportError(f"STUDIES names none; choose among {', '.join(NAMES_OF)}")
        return names


@dataclass(frozen=True, kw_only=True)
class Classes(_OfStudies):
    """Parameters of the report on maps of other classes, and on images where methods disagree."""

    methods: str = parameter("grad-cam, grad-cam++, score-cam, opti-cam", NAMES)
    iterations: int = parameter(50, "of Opti-CAM; the paper has 100", least=1)
    pair: str = parameter("opti-cam, grad-cam", "two methods; images are shown where they disagree")
    success_insertion: float = parameter(90.0, "success: I above it, percent", least=0, most=100)
    success_deletion: float = parameter(10.0, "and D below it", least=0, most=100)
    failure_insertion: float = parameter(70.0, "failure: I below it, percent", least=0, most=100)
    failure_deletion: float = parameter(15.0, "and D above it", least=0, most=100)
    examples: int = parameter(2, "show this many images of each kind", least=1)

    def prepare(self) -> Subject:
        """Check the parameters and load what they name; leave out images that can't be read."""
        names = self.both()
        subject = readable(super().prepare())
        for name in names:
            if (reason := METHODS[name].unfit(subject.classifier)) is not None:
                raise ReportError(f"PAIR names {name}, which can't explain the network: {reason}")
        return subject

    def both(self) -> tuple[str, str]:
        """Return the two methods that are compared image by image."""
        names = names_in(self.pair)
        for name in names:
            METHODS[name]  # an unknown name raises the error that lists the close ones
        if len(names) != 2:
            raise ReportError(f"PAIR is {self.pair!r}; two methods are needed")
        return names[0], names[1]


class Measured(NamedTuple):
    """A study that was measured: the table of its variants, and what the paper says of them."""

    name: str
    table: pd.DataFrame
    findings: list[Finding]


def measured(name: str, subject: Subject, rows: str = "") -> Measured | None:
    """Measure a study of the paper; None if it is not among the studies that were asked for.

    Args:
        name: A key of `STUDIES`.
        subject: The network, the images and the methods.
        rows: Folder of all runs, to resume; `""` keeps rows in memory.
    """
    asked = subject.parameters
    if isinstance(asked, Ablation) and name not in asked.chosen():
        return None
    folder = rows_folder(rows, subject)
    frame = evaluate(
        subject.classifier,
        subject.dataset,
        study(name, subject.classifier, list(subject.methods), asked.iterations),
        limit=asked.limit,
        seed=asked.seed,
        out=None if folder is None else folder / name,
        progress=False,
    )
    findings = STUDIES[name].findings(frame)
    if name == CLASSES:
        frame = with_misclassified(frame)
        return Measured(name, summarize(frame, errors=True, common=False), findings)
    return Measured(name, summarize(frame, errors=True), findings)


def section(study: Measured | None, subject: Subject) -> str:
    """Return a study as HTML: figures beside the paper's, chart, findings."""
    if study is None:
        return "<p>Not measured: the parameter studies does not name it.</p>"
    name, table, findings = study
    here, source = subject.classifier.name, STUDIES[name].source
    paper, note = pd.DataFrame(columns=["network", "method", "AD", "AG", "AI"]), ""
    if source is not None:
        paper = paper_table(source)
        network, same = counterpart(subject)
        known = list(paper["network"].unique())
        same = same and network in known
        paper = paper[paper["network"] == (network if network in known else known[0])]
        note = "paper, ImageNet" if same else "paper: another network"
    drawn = CHARTS.get(name, _bars)(table)
    charts = "".join(picture.html() for picture in drawn)
    shown = "" if name in CHARTS else comparison(table, paper, here=here, note=note)
    listed = findings_list(findings) if findings else ""
    return f'{shown}<div class="charts">{charts}</div>{listed}'


def _bars(table: pd.DataFrame) -> list[Picture]:
    return [chart(table, metric) for metric in ("AD", "AG")]


def _powers(table: pd.DataFrame) -> list[Picture]:
    """Draw AD, AG and AI of each method by the exponent of its mask (Fig. A4)."""
    methods = list(dict.fromkeys(label.partition(",")[0] for label in table.index))
    lines = {title(m): [f"{m}, α = {a:g}" for a in EXPONENTS] for m in methods}
    return [_lines(table, lines, EXPONENTS, metric, "exponent α") for metric in ("AD", "AG", "AI")]


def _steps(table: pd.DataFrame) -> list[Picture]:
    """Draw AD and AG by iterations, a line a learning rate (Fig. A5)."""
    counts = sorted({int(label.split()[-2]) for label in table.index})
    lines = {f"rate {r:g}": [f"rate {r:g}, {n} iterations" for n in counts] for r in RATES}
    return [_lines(table, lines, counts, metric, "iterations") for metric in ("AD", "AG", "AI")]


def _lines(
    table: pd.DataFrame,
    lines: Mapping[str, Sequence[str]],
    x: Sequence[float],
    metric: str,
    xlabel: str,
) -> Picture:
    known = METRICS[metric]
    ends = [f"{metric} low", f"{metric} high"]
    return curves(
        {name: table.loc[labels, metric].tolist() for name, labels in lines.items()},
        x=x,
        bands={
            name: tuple(table.loc[labels, end] for end in ends) for name, labels in lines.items()
        },
        log=True,
        xlabel=xlabel,
        ylabel=f"{metric}, {known.unit}",
        title=f"{known.title}, {known.better} is better",
        size=(4.6, 3.2),
    )


CHARTS = {"figure-a4": _powers, "figure-a5": _steps}


# ------------------------------------------------------------- where two methods disagree


class Disagreement(NamedTuple):
    """Images on which one of two methods succeeds and the other fails (Fig. 3).

    Attributes:
        text: Which images are shown, in words.
        maps: The images with the maps of both.
        charts: Insertion and deletion curves of each image.
    """

    text: str
    maps: Picture
    charts: list[Picture]


def disagreement(subject: Subject) -> Disagreement:
    """Find and draw the images on which two methods differ most by insertion and deletion.

    A method succeeds on an image if I is above and D below the thresholds of success, and fails if
    I is below and D above those of failure; the curves are of the predicted class. Where no image
    is a success of one method and a failure of the other, those are shown whose I − D differ most.
    """
    asked = subject.parameters
    assert isinstance(asked, Classes)
    both = asked.both()
    ids, images = list[str](), list[Tensor]()
    masks, areas, values = (defaultdict[Any, list[Tensor]](list) for _ in range(3))
    for start in range(0, len(subject.indices), 8):
        indices = subject.indices[start : start + 8]
        x, _ = subject.dataset.batch(indices)
        c = subject.classifier.predict(x)
        ids += [subject.dataset.id(i) for i in indices]
        images.append(x)
        for method in both:
            own = {"iterations": asked.iterations} if method == "opti-cam" else {}
            mask = explain(method, subject.classifier, x, c, warn=False, progress=False, **own)
            masks[method].append(mask)
            for kind, curve in (("I", insertion), ("D", deletion)):
                found = curve(subject.classifier, x, mask, c)
                areas[method, kind].append(100 * found.areas)
                values[method, kind].append(found.values)
    area = {key: torch.cat(parts) for key, parts in areas.items()}
    value = {key: torch.cat(parts) for key, parts in values.items()}
    chosen, told = _opposed(area, both, asked)
    picked = [i for group in chosen for i in group]
    x = torch.cat(images)[picked]
    maps = grid(
        x,
        {title(m): torch.cat(masks[m])[picked] for m in both},
        captions={
            "input": [ids[i] for i in picked],
            **{title(m): [f"I {area[m, 'I'][i]:.0f}, D {area[m, 'D'][i]:.0f}" for i in picked]
               for m in both},
        },
        title="Where the two methods disagree",
    )  # fmt: skip
    charts = [
        curves(
            {f"{title(m)}, {kind}": value[m, kind][i] for m in both for kind in ("I", "D")},
            x=torch.linspace(0, 100, value[both[0], "I"].shape[1]).tolist(),
            xlabel="pixels changed, %",
            ylabel="probability",
            title=f"{ids[i]}",
            size=(4.4, 2.8),
        )
        for i in picked
    ]
    return Disagreement(told, maps, charts)


def _opposed(
    area: Mapping[tuple[str, str], Tensor], both: tuple[str, str], asked: Classes
) -> tuple[list[list[int]], str]:
    """Return the images to show, for each of both methods those on which it is right, and why."""
    chosen, told = [], []
    for right, wrong in (both, both[::-1]):
        succeeds = (area[right, "I"] > asked.success_insertion) & (
            area[right, "D"] < asked.success_deletion
        )
        fails = (area[wrong, "I"] < asked.failure_insertion) & (
            area[wrong, "D"] > asked.failure_deletion
        )
        passing = succeeds & fails
        gap = (area[right, "I"] - area[right, "D"]) - (area[wrong, "I"] - area[wrong, "D"])
        order = (gap + 1000 * passing).argsort(descending=True).tolist()
        n = int(passing.sum())
        group = [i for i in order[: asked.examples] if gap[i] > 0 or passing[i]]
        chosen.append(group)
        names = f"{title(right)} succeeds and {title(wrong)} fails"
        if n:
            told.append(f"On {n} of {len(gap)} images {names}.")
        else:
            told.append(
                f"On no image {names} by these thresholds; shown are those on which "
                f"{title(right)} is ahead the most."
            )
    return chosen, " ".join(told)


# ---------------------------------------------------------------------------- what is written


def write_metrics(
    folder: str | Path, report: str, subject: Subject, studies: Sequence[Measured | None]
) -> dict[str, Any]:
    """Write `metrics.json` (settings, versions, figures, findings) and the tables.

    Args:
        folder: Where to; `""` writes nothing.
        report: Its name.
        subject: What was measured.
        studies: What was measured; None is left out.
    """
    measured = [m for m in studies if m is not None]
    tables = [m.table.assign(study=STUDIES[m.name].title) for m in measured]
    whole = pd.concat([table[["study", *table.columns[:-1]]] for table in tables])
    whole.index.name = "method"
    variants = [
        {
            "study": m.name,
            "variant": str(label),
            "n": int(row["images"]),
            "seconds": float(row["T"]),
            "metrics": {metric: figures(row, metric) for metric in ("AD", "AG", "AI")},
        }
        for m in measured
        for label, row in m.table.iterrows()
    ]
    found = [finding for m in measured for finding in m.findings]
    return write(folder, report, subject, whole, variants, None, found)
