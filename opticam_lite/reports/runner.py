"""Execute a report's notebook and convert it to one HTML page.

    NAME=value … ──parse, prepare──▶ notebook ──papermill──▶ .ipynb, metrics.json, table.* ──▶ .html

`make report` calls `main`. A report's parameters are the fields of its dataclass in `REPORTS`. Its
`prepare` checks everything before anything runs, and the notebook calls the same `prepare`. No
notebook imports this file, because papermill takes seconds to import in every kernel.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock, Timeout
from jinja2 import Environment, FileSystemLoader
from nbclient.exceptions import CellTimeoutError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from ..paths import given_path
from ..registry import unknown_name
from ..stopping import stoppable
from ..text import plain
from . import REPORTS
from .parameters import Parameters, ReportError, convert
from .tables import FIGURES, HERE

DEFAULT = "saliency"
ESSENTIAL = ("saliency", "benchmark")  # made by `make report` without arguments
SECONDS_A_CELL = 7200.0
MOST_SECONDS = 1e8  # three years; the system's clocks don't take any number
WIDGET = "application/vnd.jupyter.widget-view+json"
_PACKAGE = HERE.parent
STYLE = (HERE / "page.css").read_text(encoding="utf-8")
# What a notebook writes to `out`.
_NUMBERS = ("metrics.json", "table.csv", "table.tex")


# ---------------------------------------------------------------------------------- parameters


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
    """Return the default of OUT, the folder that a report is written to."""
    return Path("build") / f"{report}_report"


def choose_reports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the reports that are asked for, and the other arguments.

    `REPORT=name` names one, `REPORT=all` all; parameters without it are the saliency report's; no
    argument at all asks for the essential ones with their defaults.

    Raises:
        ReportError: For an unknown report.
    """
    named = [a for a in arguments if a.partition("=")[0].strip().lower().lstrip("-") == "report"]
    others = [a for a in arguments if a not in named]
    chosen = [name for a in named if (name := a.partition("=")[2].strip().lower())]
    if "all" in chosen:
        return list(REPORTS), others
    for name in chosen:
        if name not in REPORTS:
            raise ReportError(unknown_name("report", name, REPORTS))
    return chosen or ([DEFAULT] if others else list(ESSENTIAL)), others


def parse(arguments: Sequence[str], report: str = DEFAULT) -> tuple[Parameters, Path, float]:
    """Turn `NAME=value` arguments into a report's parameters.

    Names may be in upper or lower case; an empty value stands for the default.

    Args:
        arguments: Such as `["MODEL=resnet50", "LIMIT=20"]`; besides the report's parameters OUT
            (folder) and TIMEOUT (seconds a cell) are known.
        report: Its name.

    Returns:
        The parameters; the folder to write to; the seconds that a cell may take.

    Raises:
        ReportError: For an unknown name or a value of the wrong type.
    """
    types = {known.name: type(known.default) for known in REPORTS[report].known()}
    types |= {"out": str, "timeout": float}
    values: dict[str, Any] = {}
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
            values[key] = convert(key, text.strip(), types[key])
    out = given_path(values.pop("out", folder(report)), "OUT")
    timeout = values.pop("timeout", SECONDS_A_CELL)
    if not 0 < timeout <= MOST_SECONDS:
        raise ReportError(
            f"TIMEOUT is {timeout:g}; it must be above 0 and at most {MOST_SECONDS:g}, in seconds "
            "a cell"
        )
    return REPORTS[report](**values), out, timeout


def parse_several(
    arguments: Sequence[str], chosen: Sequence[str]
) -> dict[str, tuple[Parameters, Path, float]]:
    """Parse the arguments of several reports, each of which takes those that it knows.

    OUT is the folder of all; each report has a folder in it.
    """
    known = {r: {p.name for p in REPORTS[r].known()} | {"out", "timeout"} for r in chosen}
    everyone = set().union(*known.values())
    found = {}
    for report in chosen:
        own = []
        for argument in arguments:
            name, equals, text = argument.partition("=")
            key = name.strip().lower().lstrip("-")
            if key == "out" and text.strip():
                own.append(f"OUT={Path(text.strip()) / folder(report).name}")
            elif key in known[report] or key not in everyone or not equals:
                own.append(argument)  # `parse` refuses what no report knows
        found[report] = parse(own, report)
    return found


def usage() -> str:
    """Return the help text: every report's parameters, what they are for and their defaults."""
    lines = [
        "make report              the saliency and the benchmark report on the embedded data",
        "make report NAME=value … the saliency report with parameters",
        "make report REPORT=name NAME=value …",
        "make report REPORT=all NAME=value …  every report, and a page that lists them",
    ]
    for report, parameters in REPORTS.items():
        lines += ["", f"Parameters of REPORT={report}:", ""]
        rows = [(p.name, p.metadata["explanation"], p.default) for p in parameters.known()]
        rows += [("out", "folder to write to", str(folder(report)))]
        rows += [("timeout", "seconds that one cell of the notebook may take", SECONDS_A_CELL)]
        for name, explanation, default in rows:
            shown = f" [{default:g}]" if isinstance(default, float) else f" [{default}]"
            lines.append(f"  {name.upper():<12}{explanation}{shown if default != '' else ''}")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------- making it


@dataclass(frozen=True)
class Failure:
    """A cell that failed: where, and with which error (one line)."""

    where: str
    error: str


def failures(notebook: NotebookNode) -> list[Failure]:
    """Find every error in an executed notebook, also those that papermill does not report.

    An error inside an `Output` widget is not in a cell's outputs but in the widgets' state.
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
    out: Path,
    timeout: float = SECONDS_A_CELL,
    notebook: Path | None = None,
    report: str = DEFAULT,
) -> list[Failure]:
    """Execute the notebook and put the report into a folder.

    Files of an earlier run stay in the folder until this run has ended. After a failure the
    notebook and the page, with the error marked, replace the earlier ones, and `metrics.json`
    and the tables are removed, because their figures would not be those of the page.

    Args:
        parameters: Of the notebook, checked.
        out: The folder; created if necessary. Rows that a notebook measures are kept in its
            `rows/`, even after a failure, so that a later run resumes.
        timeout: Seconds that a cell may take.
        notebook: Default: the report's.
        report: Its name.

    Returns:
        What failed; empty for a good run.

    Raises:
        Timeout: If another report is being written to the folder.
        OSError: If the report can't be written.
    """
    notebook, name = notebook or notebook_path(report), f"{report}_report"
    out.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(out / ".lock", timeout=0),
        tempfile.TemporaryDirectory(prefix="opticam-") as temporary,
    ):
        executed = Path(temporary) / f"{name}.ipynb"
        # The notebook's output folder is not a parameter of the report.
        places = {"out": temporary, "rows": str(out.absolute() / "rows")}
        wanted = papermill.inspect_notebook(str(notebook))
        stopped = None
        try:
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                {**parameters, **{key: place for key, place in places.items() if key in wanted}},
                cwd=str(Path.cwd()),
                progress_bar=sys.stderr.isatty(),
                execution_timeout=timeout,
                kernel_name="python3",
                # Kernels otherwise warn on the terminal that TCP is not encrypted.
                extra_arguments=["--log-level=ERROR"],
            )
        except PapermillExecutionError:
            pass  # the cell that failed shows its error
        except Exception as error:
            stopped = error  # a timeout, or a kernel that died: no cell shows it
        result = nbformat.read(executed if executed.exists() else notebook, as_version=4)
        if stopped is not None:
            _mark(result, stopped, timeout)
        found = failures(result)
        nbformat.write(result, executed)
        if found:
            for file in _NUMBERS:
                (Path(temporary) / file).unlink(missing_ok=True)
        try:
            write_html(result, Path(temporary) / f"{name}.html", found)
        except Exception as error:  # such as a template that is missing: the notebook is kept
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found = [*found, Failure("the conversion to a page", text)]
        _publish(Path(temporary), out, name)
    return found


def _mark(notebook: NotebookNode, error: Exception, timeout: float) -> None:
    """Write an error that no cell raised (a timeout, a dead kernel) into the running cell."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # After such an error papermill marks every cell as completed; only start times are reliable.
    started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    running = started[-1] if started else code[0]
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, CellTimeoutError):
        text = f"the cell took longer than {timeout:g} s; allow it more with TIMEOUT=seconds"
    # A cell that is interrupted shows a KeyboardInterrupt, which is not an error of its code.
    running.outputs = [o for o in running.outputs if o.output_type != "error"]
    running.outputs.append(
        nbformat.v4.new_output("error", ename=type(error).__name__, evalue=text, traceback=[text])
    )


def _publish(made: Path, out: Path, name: str) -> None:
    """Put the files into place, all or none of them; other files there are not touched."""
    files = (f"{name}.ipynb", f"{name}.html", *_NUMBERS)
    parts = {file: out / f".{file}.part" for file in files if (made / file).exists()}
    try:
        for file, part in parts.items():
            shutil.copyfile(made / file, part)
    except OSError:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise
    for file in files:
        if file in parts:
            parts[file].replace(out / file)
        else:
            (out / file).unlink(missing_ok=True)


def write_html(notebook: NotebookNode, path: Path, failed: Sequence[Failure] = ()) -> None:
    """Write a notebook as one self-contained page that needs no network.

    Args:
        notebook: Executed.
        path: Of the page.
        failed: Listed in a banner at the top.
    """
    # Papermill's own error marks are less informative than the banner and the framed cell.
    notebook = remove_error_markers(copy.deepcopy(notebook))
    # The page can't show widgets; a progress bar would appear as the text of an unfinished bar.
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell["outputs"] = [o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})]
    template = (HERE / "report.html.j2").read_text(encoding="utf-8")
    exporter = HTMLExporter(raw_template=template)
    resources = {"failed": list(failed), "figures": FIGURES, "style": STYLE}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    path.write_text(page, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make reports from the command line.

    Returns:
        0 for success, 1 if a cell failed (the page marks it) or the disk is full, 2 if a parameter
        is wrong (nothing was run or written), 130 if it was interrupted or 143 if it was terminated
        (no page was written).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(a in ("-h", "--help") for a in arguments):
        sys.stdout.write(usage())
        return 0
    try:
        with stoppable():
            return _make(arguments)
    except KeyboardInterrupt as stop:
        sys.stderr.write("report: interrupted; nothing was written but the rows measured so far\n")
        return getattr(stop, "code", 130)


def _make(arguments: Sequence[str]) -> int:
    try:
        chosen, others = choose_reports(arguments)
        several = len(chosen) > 1
        plans = parse_several(others, chosen) if several else {chosen[0]: parse(others, chosen[0])}
        for parameters, out, _ in plans.values():
            _check_folder(out)
            parameters.prepare()
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"report: {plain(' '.join(str(error).split()))}\n")
        return 2
    failed = dict[str, str]()  # report → why it is not complete
    for report, (parameters, out, timeout) in plans.items():
        sys.stderr.write(f"Executing the {report} report's notebook; it is written to {out}\n")
        try:
            found = run(parameters.settings(), out, timeout, report=report)
        except OSError as error:
            reason = error.strerror or error
            if isinstance(error, Timeout):
                reason = "another report is being written there; wait for it, or choose another OUT"
            sys.stderr.write(
                f"report: the page could not be written to {out} ({reason}); what was there is "
                "unchanged\n"
            )
            failed[report] = str(reason)
            continue
        for failure in found:
            sys.stderr.write(f"report: {plain(f'{failure.where} failed with {failure.error}')}\n")
        page, kept = (out / f"{report}_report.{end}" for end in ("html", "ipynb"))
        sys.stdout.write(f"{kept if kept.exists() and not page.exists() else page}\n")
        if found:
            failed[report] = f"{found[0].where} failed"
    if several:
        index = write_index({report: out for report, (_, out, _) in plans.items()}, failed, others)
        sys.stdout.write(f"{index}\n")
    return 1 if failed else 0


def write_index(
    folders: Mapping[str, Path], failed: Mapping[str, str], arguments: Sequence[str]
) -> Path:
    """Write a page that lists reports, beside their folders; return its path.

    Args:
        folders: Report → its folder.
        failed: Report → why it is not complete.
        arguments: That all reports were given.
    """
    root = next(iter(folders.values())).parent
    root.mkdir(parents=True, exist_ok=True)  # if every report failed it may not exist
    reports = []
    for report, out in folders.items():
        first = nbformat.read(notebook_path(report), as_version=4).cells[0].source
        heading, _, text = first.partition("\n")
        page, *files = [
            f"{out.name}/{file}" if (out / file).exists() else ""
            for file in (f"{report}_report.html", *_NUMBERS)
        ]
        about = " ".join(text.replace("*", "").split())
        entry = {"title": heading.lstrip("# "), "about": about, "page": page}
        entry |= {"files": [f for f in files if f], "settings": ", ".join(arguments)}
        reports.append(entry | {"failed": failed.get(report)})
    template = Environment(autoescape=True, loader=FileSystemLoader(HERE), trim_blocks=True)
    text = template.get_template("index.html.j2").render(reports=reports, style=STYLE)
    (root / "index.html").write_text(text, encoding="utf-8")
    return root / "index.html"


def _check_folder(out: Path) -> None:
    nearest = next(p for p in (out, *out.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise ReportError(f"OUT is {str(out)!r}, and {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise ReportError(f"OUT is {str(out)!r}, and {nearest} can't be written to")
