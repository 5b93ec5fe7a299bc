"""Reports: notebooks with parameters, each executed and made one HTML page by `make report`.

What a report is about is in `subject`, what the saliency report shows in `contents`, what the
benchmark report shows in `opticam_lite.benchmark`; `runner` makes the page.
"""

from .contents import (
    about,
    caveats,
    chart,
    checklist,
    comparison,
    ordering,
    paper_table,
    settings_table,
    styled,
    title,
    versions,
    write_json,
    write_metrics,
    write_table,
)
from .subject import ReportError, Subject, predictions, prepare, prepare_benchmark

__all__ = [
    "ReportError",
    "Subject",
    "about",
    "caveats",
    "chart",
    "checklist",
    "comparison",
    "ordering",
    "paper_table",
    "predictions",
    "prepare",
    "prepare_benchmark",
    "settings_table",
    "styled",
    "title",
    "versions",
    "write_json",
    "write_metrics",
    "write_table",
]
