"""Reports: notebooks with parameters, executed and converted to an HTML page by `make report`.

    Saliency(model=…) ──prepare──▶ Subject ──the notebook──▶ figures, metrics.json, table.*

A report has a file here with the dataclass of its parameters and its own figures, a notebook, and
an entry in `REPORTS`. `parameters` has the base of the dataclasses, `subject` loads the network and
the images, `tables` and `records` are shared by reports, `runner` makes the page.
"""

from .benchmark import Benchmark
from .boxes import Boxes
from .parameters import Parameters, ReportError
from .saliency import Saliency
from .studies import Ablation, Classes
from .tables import paper_table

__all__ = [
    "REPORTS",
    "Ablation",
    "Benchmark",
    "Boxes",
    "Classes",
    "Parameters",
    "ReportError",
    "Saliency",
    "paper_table",
]

REPORTS: dict[str, type[Parameters]] = {
    "saliency": Saliency,
    "benchmark": Benchmark,
    "boxes": Boxes,
    "ablation": Ablation,
    "classes": Classes,
}
