"""The sanity report: do maps change when the network's weights, or its labels, become random?

Sanity.prepare ──▶ measured ──▶ curves and maps by cut, random labels, which methods pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..evaluation.settings import weights_digest
from ..methods import explain
from ..network import Classifier
from ..plots import Picture, curves, grid, intervals
from ..registry import LARGEST_SEED
from ..studies.findings import Finding
from ..studies.paper import title
from ..studies.sanity import ALL, EDGES, MEASURES, RANDOM_LABELS, edges, randomized, sanity_study
from ..text import page
from .benchmark import rows_folder
from .boxes import load_given
from .parameters import NAMES, OneNetwork, parameter
from .records import figures, write
from .subject import Subject, load, readable
from .tables import styled

PAPER = {("opti-cam", "SSIM"): 0.013}
"""What the paper reports of random labels: (method, measure) → similarity, of a ResNet50."""
ORIGINAL = "trained"


@dataclass(frozen=True, kw_only=True)
class Sanity(OneNetwork):
    """Parameters of the sanity report."""

    images: str = parameter("scenes", "scenes, a folder of photos, imagenet:PATH, folders:PATH, …")
    labels: str = parameter("", "CSV with file and class_index or label; empty: predicted classes")
    cuts: int = parameter(5, "networks with more and more random layers; the paper has 5", least=1)
    draws: int = parameter(2, "how often the random weights of all of them are drawn", least=1)
    random_labels: str = parameter(
        "scenes_random_labels", "one that learnt permuted labels; empty: none"
    )
    examples: int = parameter(2, "show the maps of this many of the images", least=1)
    methods: str = parameter("grad-cam, layer-cam, opti-cam, fake-cam", NAMES)
    iterations: int = parameter(20, "of Opti-CAM; the paper has 100", least=1)
    seed: int = parameter(0, "of the draw, and of the random weights", least=0, most=LARGEST_SEED)

    def prepare(self) -> SanitySubject:
        """Check the parameters and load what they name; leave out images that can't be read.

        A network of random labels that has other layers than the network itself is left out.
        """
        subject = readable(load(self, self.images, self.labels))
        found, other = dict(vars(subject)), None
        if self.random_labels:
            other = load_given(self.random_labels, self.device, "RANDOM_LABELS")
            if shapes(other) != shapes(subject.classifier):
                reason = f"it has not the layers of {subject.classifier.name}"
                found["left_out"] = subject.left_out | {other.name: reason}
                other = None
            else:
                other = other.normalizing(self.normalize).at(subject.classifier.layer)
        step = max(1, len(subject.indices) // self.examples)  # neighbours are of one class
        found["examples"] = subject.indices[::step][: self.examples]
        return SanitySubject(**found, random_labels=other)


@dataclass(frozen=True)
class SanitySubject(Subject):
    """What the sanity report is about.

    Attributes:
        random_labels: The network that was trained on permuted labels, if there is one.
    """

    random_labels: Classifier | None = None


def shapes(classifier: Classifier) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's weights by their names."""
    return {name: tuple(v.shape) for name, v in classifier.network.state_dict().items()}


def measured(subject: SanitySubject, rows: str = "") -> pd.DataFrame:
    """Compare the maps of all networks with the original's.

    Args:
        subject: The network, the images and the methods.
        rows: Folder of all runs, to resume; `""` keeps rows in memory.

    Returns:
        What `sanity_study` returns.
    """
    asked, other = subject.parameters, subject.random_labels
    assert isinstance(asked, Sanity)
    folder = rows_folder(rows, subject)
    if folder is not None:
        labels = "none" if other is None else weights_digest(other)[:12]
        folder = folder / f"sanity-{asked.cuts}-{labels}"
    return sanity_study(
        subject.classifier,
        subject.dataset,
        subject.methods,
        indices=subject.indices,
        cuts=asked.cuts,
        seeds=seeds(asked),
        random_labels=other,
        out=folder,
    )


def seeds(asked: Sanity) -> list[int]:
    """Return the seeds of the random weights."""
    return [asked.seed * asked.draws + k for k in range(asked.draws)]


def charts(table: pd.DataFrame) -> list[Picture]:
    """Draw each measure against the layers that are random, a line a method (Fig. A6).

    Where the maps have no negative values, both rank correlations are one chart.

    Args:
        table: What `sanity_table` returned.
    """
    rows = table[table["cut"] != RANDOM_LABELS]
    names = [ORIGINAL, *dict.fromkeys(rows["from"])]
    pictures = []
    for measure, text in _measures(rows).items():
        lines, bands = {}, {}
        for method, own in rows.groupby("method", sort=False):
            own = own.sort_values("cut")
            lines[title(method)] = [1.0, *own[measure]]
            low, high = ([1.0, *own[f"{measure} {end}"]] for end in ("low", "high"))
            bands[title(method)] = low, high
        pictures.append(
            curves(
                lines,
                bands=bands,
                ticks=names,
                xlabel="random from the logits down to",
                ylabel="similarity to the trained network's map",
                title=text[0].upper() + text[1:],
                alt=f"{text} with the trained network's maps, by the lowest layer that is random: "
                f"{'; '.join(map(_told, lines, lines.values(), repeat(names)))}.",
                size=(4.5, 3.3),
            )
        )
        # Below the controls and to the right, where curves that fall leave room.
        (ax,) = pictures[-1].figure.axes
        ax.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))
    return pictures


def _measures(rows: pd.DataFrame) -> dict[str, str]:
    """Return measures with their names; both rank correlations are one where they are equal."""
    rank, absolute, *_ = MEASURES
    if not rows[rank].equals(rows[absolute]):
        return {measure: measure for measure in MEASURES}
    both = {rank: "rank, with and without absolute values"}
    return {m: both.get(m, m) for m in MEASURES if m != absolute}


def _told(name: str, values: Sequence[float], at: Sequence[str]) -> str:
    return f"{name} {', '.join(f'{x} {v:.2f}' for x, v in zip(at, values, strict=True))}"


def maps(subject: SanitySubject) -> Picture:
    """Draw the maps of the examples by each method and network (Fig. A7)."""
    x, c = subject.dataset.batch(subject.examples)
    c = subject.classifier.predict(x) if c is None else c
    asked = subject.parameters
    assert isinstance(asked, Sanity)
    columns: dict[str, torch.Tensor] = {}

    def add(name: str, classifier: Classifier) -> None:
        own = [
            explain(method, classifier, x, c, progress=False, warn=False, **options)
            for method, options in subject.methods.items()
        ]
        columns[name] = torch.stack([*own, edges(x)], dim=1).flatten(0, 1)  # image by image

    add(ORIGINAL, subject.classifier)
    for name, other in randomized(subject.classifier, asked.cuts, seeds(asked)[0]):
        add(name or ALL, other)
    if subject.random_labels is not None:
        add("random labels", subject.random_labels)
    methods = [title(method) for method in (*subject.methods, EDGES)]
    labels = [subject.classifier.labels[i] for i in c.tolist()]
    return grid(
        x.repeat_interleave(len(methods), dim=0),
        columns,
        row_titles=methods * len(x),
        captions={"input": [label for label in labels for _ in methods]},
        title="Maps of networks whose layers are random, from the logits down to the one named",
        width=1.25,
    )


def labels_chart(table: pd.DataFrame) -> Picture:
    """Draw how alike the maps of the network and of that of random labels are, by each measure."""
    rows = table[table["cut"] == RANDOM_LABELS]
    values = {
        text: {
            title(row["method"]): (row[measure], row[f"{measure} low"], row[f"{measure} high"])
            for row in rows.to_dict("records")
        }
        for measure, text in _measures(rows).items()
    }
    return intervals(
        values,
        xlabel="similarity, with 95 % interval over images",
        title="Maps of the network and of one that has learnt random labels",
    )


def labels_table(table: pd.DataFrame) -> str:
    """Return the same as an HTML table, with the paper's figure."""
    rows = table[table["cut"] == RANDOM_LABELS]
    cells = {
        measure: [
            f"{row[measure]:.2f}<br><small>{row[f'{measure} low']:.2f} to "
            f"{row[f'{measure} high']:.2f}</small>"
            for row in rows.to_dict("records")
        ]
        for measure in MEASURES
    }
    cells["SSIM, paper’s ResNet50"] = [
        f"{PAPER[method, 'SSIM']}" if (method, "SSIM") in PAPER else "–"
        for method in rows["method"]
    ]
    names = [page(title(method)) for method in rows["method"]]
    shown = pd.DataFrame(cells, index=names).style.set_table_attributes('class="figures"')
    return styled(shown.to_html())


def write_metrics(
    folder: str | Path, subject: SanitySubject, table: pd.DataFrame, found: Sequence[Finding]
) -> dict[str, Any]:
    """Write `metrics.json` (settings, versions, figures, findings) and the table.

    Args:
        folder: Where to; `""` writes nothing.
        subject: What was measured.
        table: What `sanity_table` returned.
        found: The findings.

    Returns:
        What was written.
    """
    methods = [
        {
            **{name: row[name] for name in ("method", "cut", "from", "n")},
            "measures": {measure: figures(row, measure) for measure in MEASURES},
        }
        for row in table.to_dict("records")
    ]
    other = None if subject.random_labels is None else subject.random_labels.name
    return write(folder, "sanity", subject, table, methods, found=found, random_labels=other)
