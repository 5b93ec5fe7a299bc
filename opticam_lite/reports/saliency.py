"""The saliency report: maps side by side, and AD, AG and AI beside the paper's Tables 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..evaluation import choose
from ..plots import Picture, lost_and_won
from .parameters import NAMES, OneNetwork, parameter
from .records import figures, write
from .subject import Subject, load, readable
from .tables import ordering, title


@dataclass(frozen=True, kw_only=True)
class Saliency(OneNetwork):
    """Parameters of the saliency report."""

    images: str = parameter("scenes", "scenes, scenes-swapped, scenes-empty, or a folder of photos")
    labels: str = parameter("", "CSV with file and class_index or label; empty: predicted classes")
    examples: int = parameter(4, "show this many of the images", least=1)
    methods: str = parameter("cam, grad-cam, score-cam, opti-cam, fake-cam", NAMES)

    def prepare(self) -> Subject:
        """Check the parameters and load what they name; leave out images that can't be read."""
        subject = readable(load(self, self.images, self.labels))
        targets = {i: subject.dataset.target(i) for i in subject.indices}
        return replace(subject, examples=_different(targets, self.examples))


def _different(targets: Mapping[int, int | None], examples: int) -> list[int]:
    """Choose examples: first one image each of different classes, then others."""
    firsts: dict[int | None, int] = {}
    for i, target in targets.items():
        firsts.setdefault(target, i)
    chosen = [list(firsts.values())[k] for k in choose(len(firsts), examples)]
    others = [i for i in targets if i not in chosen]
    return sorted(chosen + [others[k] for k in choose(len(others), examples - len(chosen))])


def predictions(subject: Subject, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return the targets and the predicted classes of the measured images, each `(N,)`."""
    targets, predicted = [], []
    for start in range(0, len(subject.indices), batch_size):
        images, known = subject.dataset.batch(subject.indices[start : start + batch_size])
        predicted.append(subject.classifier.predict(images))
        targets.append(predicted[-1] if known is None else known)
    return torch.cat(targets), torch.cat(predicted)


def chart(table: pd.DataFrame, paper: pd.DataFrame) -> Picture:
    """Draw AD and AG as bars, with those of the paper's first network as marks.

    Args:
        table: What `summarize` returned.
        paper: What `paper_table` returned.
    """
    network = paper["network"].iloc[0]
    theirs = paper[paper["network"] == network].set_index("method")
    measured, printed = (
        rows.rename(index=title)[["AD", "AG"]].T.to_dict("list") for rows in (table, theirs)
    )
    return lost_and_won(
        measured,
        marks=printed,
        marked=f"the paper's {network}",
        lost="average drop, % (shorter is better)",
        won="average gain, % (longer is better)",
        width=8.4,
    )


def write_metrics(
    folder: str | Path, subject: Subject, table: pd.DataFrame, quality: Mapping[str, float | None]
) -> dict[str, Any]:
    """Write `metrics.json` (settings, versions and every figure of the report) and the table.

    Args:
        folder: Where to; `""` writes nothing.
        subject: What was measured.
        table: What `summarize(…, errors=True)` returned.
        quality: `top1` (percent, None without true classes) and `mean_probability` (fraction).

    Returns:
        What was written.
    """
    methods = [
        {
            "method": str(method),
            **{metric: float(row[metric]) for metric in ("AD", "AG", "AI")},
            "metrics": {metric: figures(row, metric) for metric in ("AD", "AG", "AI")},
            "seconds": float(row["T"]),
            "n": len(subject.indices),
        }
        for method, row in table.iterrows()
    ]
    claims = ordering(table).values()
    holds = bool(claims) and all(holds for holds, _ in claims)
    more: dict[str, Any] = {**quality, "ordering_holds": holds, "broken": len(subject.broken)}
    return write(folder, "saliency", subject, table, methods, None, **more)
