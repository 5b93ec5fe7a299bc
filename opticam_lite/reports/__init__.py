"""Reports: notebooks with parameters, each executed and made one HTML page by `make report`.

    Saliency(model=…) ──prepare──▶ Subject ──the notebook──▶ figures, metrics.json, table.*

A report is a file here, with the dataclass of its parameters and what this report alone shows, a
notebook, and its name in `REPORTS`. `parameters` is the base of the dataclasses, `subject` loads
what they name, `tables` and `records` are what reports have in common, `runner` makes the page.
"""

from .benchmark import Benchmark
from .boxes import Boxes
from .parameters import Parameters, ReportError
from .saliency import Saliency
from .tables import paper_table

__all__ = [
    "REPORTS",
    "Benchmark",
    "Boxes",
    "Parameters",
    "ReportError",
    "Saliency",
    "paper_table",
]

REPORTS: dict[str, type[Parameters]] = {
    "saliency": Saliency,
    "benchmark": Benchmark,
    "boxes": Boxes,
}
