"""The files of a report, `metrics.json`, `table.csv`, `table.tex`, and its table of settings."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..evaluation.settings import PACKAGES, version
from ..evaluation.summary import in_words
from ..studies.findings import Finding
from ..text import page, plain
from .subject import Subject
from .tables import ordering, title

_COMMANDS = {  # what pandas does not write as LaTeX
    **{"∩": r"$\cap$", "∖": r"$\setminus$", "α": r"$\alpha$"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def write(
    folder: str | Path,
    report: str,
    subject: Subject,
    table: pd.DataFrame,
    methods: list[dict[str, Any]],
    parts: Mapping[str, Sequence[str]] | None = None,
    found: Sequence[Finding] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write what a report on one network measured: `metrics.json` and the table.

    Args:
        folder: Where to; `""` writes nothing.
        report: Its name.
        subject: What was measured.
        table: What `summarize` returned.
        methods: The figures of each method.
        parts: See `write_table`.
        found: Findings, in the place of the paper's ordering.
        more: Further entries.

    Returns:
        What was written to `metrics.json`.
    """
    classifier, dataset = subject.classifier, subject.dataset
    record = {
        "report": f"{report}_report",
        "settings": subject.parameters.settings(),
        "network": {
            "name": classifier.name,
            "layer": classifier.layer,
            "classes": classifier.classes,
            "device": str(classifier.device),
        },
        "data": {
            "name": dataset.name,
            "n": len(subject.indices),
            "of": len(dataset),
            "targets": subject.targets,
        },
        "left_out": subject.left_out,
        "versions": versions(),
        **more,
        "methods": methods,
    }
    if found is None:
        record["ordering"] = {claim: holds for claim, (holds, _) in ordering(table).items()}
    else:
        record["findings"] = [asdict(finding) for finding in found]
    write_json(folder, record)
    write_table(folder, table, parts)
    return record


def figures(row: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return value, standard error and 95 % interval of a metric in a row of a summary."""
    names = {"value": "", "error": " ±", "low": " low", "high": " high"}
    return {name: float(row[f"{metric}{of}"]) for name, of in names.items()}


def write_json(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write `metrics.json` into a folder; `""` writes nothing. NaN becomes null."""
    if folder:
        text = json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)
        (Path(folder) / "metrics.json").write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(
    folder: str | Path, table: pd.DataFrame, parts: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write `table.csv` and `table.tex` (LaTeX, booktabs) into a folder, to copy from.

    Args:
        folder: Where to; `""` writes nothing.
        table: What `summarize` or `box_table` returned.
        parts: Caption → columns, a table for each in LaTeX, whose pages are narrow; columns that
            `table` lacks are left out. Default: one table of all columns, or, if `table` has a
            column `study`, one of each study.
    """
    if not folder:
        return
    index = bool(table.index.name)  # methods, not row numbers
    table.to_csv(Path(folder) / "table.csv", index=index, encoding="utf-8")
    shown = in_words(table).rename(index=title).rename(index=plain)
    shown = shown.map(lambda value: plain(value) if isinstance(value, str) else value)
    texts = [
        "% \\usepackage{booktabs,graphicx}\n% in brackets: 95 % intervals; *: surely the best\n"
    ]
    if "study" in shown:
        blocks = {
            name: rows.drop(columns="study") for name, rows in shown.groupby("study", sort=False)
        }
    else:
        parts = parts or {"": [*shown.columns]}
        blocks = {name: shown[[c for c in shown if c in own]] for name, own in parts.items()}
    for caption, block in blocks.items():
        if len(block.columns):
            numbers = ("r" if table[c].dtype.kind in "fiu" else "l" for c in block)
            text = block.to_latex(
                index=index,
                index_names=False,
                escape=True,
                float_format="%.2f",
                na_rep="--",
                column_format="l" * index + "".join(numbers),
            )
            for sign, command in _COMMANDS.items():
                text = text.replace(sign, command)
            head = f"\\caption{{{caption}}}\n" if caption else ""
            texts.append(
                f"\\begin{{table}}\n\\centering\\footnotesize\\setlength{{\\tabcolsep}}{{3pt}}\n{head}"
                # Shrunk if it is wider than the text.
                r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
                f"\n{text}}}\n\\end{{table}}\n"
            )
    (Path(folder) / "table.tex").write_text("\n".join(texts), encoding="utf-8")


def settings_table(subject: Subject) -> str:
    """Return settings and versions as a table in Markdown, with the values that were used."""
    shown = subject.parameters.settings() | {"device": subject.classifier.device}
    if "layer" in shown:
        shown["layer"] = subject.classifier.layer
    if shown.get("checkpoint"):
        shown.pop("weights")  # the checkpoint's are used
    rows = [*shown.items(), *versions().items()]
    lines = [f"| {name} | {'–' if value == '' else page(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def versions() -> dict[str, str]:
    """Return the versions that figures may depend on, and the number of threads."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in (*PACKAGES, "numpy")},
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
