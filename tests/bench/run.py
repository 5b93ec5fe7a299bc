"""One run: every measurement in a separate process, and the tables of the results."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from opticam_lite import reports
from opticam_lite.methods import METHODS
from opticam_lite.network import dtype_of
from opticam_lite.registry import unknown_name

from . import measure
from .measure import BATCH, Case, Load
from .peers import CURVES, DIFFERENT, NO_PEER

# Required ratio of the peer's seconds to ours, at least.
WANTED = {"score-cam": 1.3, "ablation-cam": 30.0, "opti-cam": 1.4, "deletion": 1.3}
OVERHEAD = 1.2  # an iteration of Opti-CAM in bare passes, at most
GROWTH = (8, 32, 128)
GROWING = ("grad-cam", "opti-cam")
_VERSIONS = ("torch", "torchvision", "timm", "grad-cam", "captum", "lime", "numpy")

# The server has imported everything and computed nothing, so a new process starts quickly.
_CONTEXT = multiprocessing.get_context("forkserver")
# It finds only installed packages, so those that are slow to import are named.
_CONTEXT.set_forkserver_preload(
    ["captum.attr", "pytorch_grad_cam", "opticam_lite.reports", measure.__name__]
)


@contextlib.contextmanager
def apart(make: Callable[..., Callable[..., Any]], *arguments: Any) -> Iterator[Callable[..., Any]]:
    """Yield a function that calls what `make(*arguments)` returns, both in a separate process.

    Calls return its results and raise its errors, and MemoryError if the system ended the process.
    """
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()

    def call(*arguments: Any) -> Any:
        try:
            here.send(arguments)
            result = here.recv()
        except (EOFError, OSError) as error:
            raise MemoryError("a process of the bench was ended by the system") from error
        if isinstance(result, Exception):
            raise result
        return result

    try:
        yield call
    finally:
        here.close()  # ends the process
        process.join()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function once in a separate process."""
    with apart(partial, function, *arguments) as call:
        return call()


def _serve(
    connection: Connection, make: Callable[..., Callable[..., Any]], arguments: Sequence[Any]
) -> None:
    function = None
    with contextlib.suppress(EOFError):
        while True:
            given = connection.recv()
            try:
                function = function or make(*arguments)
                connection.send(function(*given))
            except Exception as error:
                connection.send(error)


def precisions() -> list[str]:
    """Return the precisions to be timed: float32, and bfloat16 where there is hardware."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = str(dtype_of("auto", device)).removeprefix("torch.")
    return list(dict.fromkeys(("float32", quick)))


def load_case(parameters: dict[str, Any]) -> Case:
    """Load what the parameters of a report name, and eight of its images."""
    subject = reports.Saliency(**parameters).prepare()
    images, targets = subject.dataset.batch(subject.indices)
    device = subject.classifier.device
    images = images.to(device)
    if targets is None:
        targets = subject.classifier.predict(images)
    return Case(subject.classifier, images, targets.to(device))


def bench(
    load: Load,
    methods: Sequence[str],
    *,
    repeats: int = 5,
    budget: float = 20,
    curves: bool = True,
    growth: Sequence[int] = GROWTH,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure methods on a network and a batch of images.

    Args:
        load: Returns the case; must be picklable, for every measurement loads it afresh.
        methods: Names; all of them must fit the network.
        repeats: Of every timing.
        budget: Seconds for all repeats of a candidate; a slower one is measured on fewer images.
        curves: Whether to measure a deletion, too.
        growth: Numbers of images of the tables of growth; none leaves them out.
        say: Called with the name of what is being measured.

    Returns:
        A record for `markdown`, ready for JSON.
    """
    record: dict[str, Any] = {
        "methods": {},
        "curves": {},
        "overhead": {},
        "quality": {},
        "growth": {},
    }
    for method in methods:
        say(method)
        names, whole = alone(measure.known, load, method)
        makers = {name: partial(measure.timed, load, method, name) for name in names}
        found = _compare(makers, whole, repeats, budget)
        for name, row in found.items():
            try:
                found_there = alone(measure.memory, load, method, name, row["images"])
                row["megabytes"] = found_there["megabytes"]  # seconds include initialisation
            except MemoryError:
                row["megabytes"] = None  # the system ended it for lack of memory
        record["methods"][method] = found
    if curves:
        say("a deletion")
        makers = {name: partial(measure.timed_curve, load, name) for name in CURVES}
        record["curves"] = _compare(makers, whole, repeats, budget)
    if "opti-cam" in methods:
        for precision in precisions():
            say(f"an iteration of opti-cam in {precision}")
            record["overhead"][precision] = alone(measure.overhead, load, precision, 6 * repeats)
        for precision in ("float32", "auto"):
            say(f"quality of opti-cam, precision {precision}")
            record["quality"][precision] = alone(measure.quality, load, precision)
    for method in (m for m in GROWING if m in methods and growth):
        say(f"growth of {method}")
        record["growth"][method] = {n: alone(measure.growth, load, method, n) for n in growth}
    return record


def _compare(
    makers: dict[str, Callable[[], measure.Timed]], whole: int, repeats: int, budget: float
) -> dict[str, dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(apart(make)) for name, make in makers.items()}
        return measure.compare(found, whole, repeats, budget, alike=torch.cuda.is_available())


def machine() -> dict[str, Any]:
    """Return the hardware and versions that the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "bfloat16": [name for name in ("avx512_bf16", "amx_bf16") if has.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
    }


# ------------------------------------------------------------------------------------- Markdown


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Return the page that shows runs."""
    parts = [
        "# Ours against peers",
        "Made by `make bench OUT=docs`; the figures behind it are in [bench.json](bench.json). "
        f"Seconds are for a batch of {BATCH} images: the median, and in brackets the least and the "
        "most of all repeats; ours and the peers ran alternately, A B A B …, each in a separate "
        "process. A peer has the network as it comes from its library (parameters with gradients, "
        "PyTorch's default memory format). Memory is the peak of a run minus that of the loaded "
        "network and images, each in a new process. Agreement is the mean correlation of the "
        "masks, and their largest difference, after both were upsampled and normalised by range.",
    ]
    if len(runs) > 1:
        parts += ["## At a glance", _glance(runs)]
    parts += [_run(run) for run in runs]
    return "\n\n".join(parts) + "\n"


def _glance(runs: Sequence[dict[str, Any]]) -> str:
    """Speedup of each method over its fastest peer, on each kind of hardware."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for run in sorted(runs, key=lambda run: run["date"]):  # the newest figure counts
        measured = run["methods"] | ({"deletion": run["curves"]} if run.get("curves") else {})
        for method, found in measured.items():
            ratios = [_ratio(row, found["ours"]) for name, row in found.items() if name != "ours"]
            if ratios:
                row = cells.setdefault((method, run["network"]), {})
                row[_hardware(run["machine"])] = f"{min(ratios):.3g} ×"
    columns = sorted({name for row in cells.values() for name in row})
    rows = [[*key, *(row.get(name, "") for name in columns)] for key, row in sorted(cells.items())]
    return (
        "How many times as fast as the fastest peer ours is, as of the dates of the tables below: "
        "older figures are of older code.\n\n" + _table(["method", "network", *columns], rows)
    )


def _hardware(machine: dict[str, Any]) -> str:
    formats = machine["bfloat16"]
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    # Of two, the later one is used for matrix products.
    return machine["gpu"] or (f"CPU, {names[formats[-1]]}" if formats else "CPU, no bfloat16")


def _run(run: dict[str, Any]) -> str:
    m = run["machine"]
    hardware = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    extras = f"; bfloat16 by {', '.join(m['bfloat16'])}" if m["bfloat16"] else ""
    if m["gpu"]:
        extras = "; peers' convolutions use TF32, PyTorch's default, ours float32"
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    parts = [
        f"## {run['title']}",
        f"As of {run['date']}, on {hardware}, {m['memory_gb']} GB{extras}. {run['network']} at "
        f"layer `{run['layer']}` ({run['maps']} maps), images of {run['size']}; "
        f"{run['repeats']} repeats unless noted; Python {m['python']}, {versions}.",
        _methods(run["methods"]),
    ]
    if run.get("curves"):
        parts += [
            "### A deletion",
            "Of the same images, by Grad-CAM's masks: a step changes a row's worth of pixels.",
            _methods({"deletion": run["curves"]}),
        ]
    if run["overhead"]:
        parts += ["### An iteration of Opti-CAM", _overhead(run["overhead"])]
    if run["quality"]:
        parts += [
            "### Quality of the search's precision",
            _quality(run["quality"]),
        ]
    if run["growth"]:
        parts += ["### Growth with the number of images", _growth(run["growth"])]
    return "\n\n".join(parts)


def _methods(methods: dict[str, Any]) -> str:
    rows = []
    notes: dict[str, str] = {}

    def note(text: str) -> str:
        notes.setdefault(text, str(len(notes) + 1))
        return f" ({notes[text]})"

    for method, found in methods.items():
        ours = found["ours"]
        rows.append([f"**{method}**", _time(ours, note), "", _memory(ours, note), ""])
        if len(found) == 1:
            reason = NO_PEER.get(method, "its peer can't explain this network")
            rows[-1][2] = "–" + note(f"No peer: {reason}.")
        for name, row in found.items():
            if name == "ours":
                continue
            ratio, wanted = _ratio(row, ours), WANTED.get(method, 1.0)
            agreement = ""
            if "correlation" in row:
                agreement = f"{row['correlation']:.4f}, {row['difference']:.2g}"
            if method in DIFFERENT and row.get("correlation", 1) < 0.9999:
                agreement += note(f"{method}: {DIFFERENT[method]}.")
            met = "" if ratio >= wanted else f" **below {wanted:g} ×**"
            rows.append(
                [
                    f"… {name}",
                    _time(row, note),
                    f"{ratio:.3g} ×{met}",
                    _memory(row, note),
                    agreement,
                ]
            )
    table = _table(["method", "seconds", "ours is faster", "memory, MB", "agreement"], rows)
    lines = [f"({number}) {text}" for text, number in notes.items()]
    return "\n\n".join([table, *lines])


def _ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    return statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])


def _time(row: dict[str, Any], note: Callable[[str], str]) -> str:
    s = row["seconds"]
    text = f"{statistics.median(s):.3g} ({min(s):.3g}–{max(s):.3g})"
    n = row["images"]
    if n == BATCH:
        return text
    scaled = f"{len(s)} repeats on {n} image{'s' * (n > 1)}; the seconds are scaled to {BATCH}, "
    return text + note(f"{scaled}the memory is not scaled.")


def _memory(row: dict[str, Any], note: Callable[[str], str]) -> str:
    if "megabytes" not in row:
        return ""
    if row["megabytes"] is None:
        return "–" + note("Ended by the system for lack of memory.")
    return f"{row['megabytes']:.0f}"


def _overhead(overhead: dict[str, Any]) -> str:
    rows = []
    for precision, seconds in overhead.items():
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        cells = [precision]
        for name, values in seconds.items():
            cells.append(
                f"{1e3 * middle[name]:.1f} ({1e3 * min(values):.1f}–{1e3 * max(values):.1f})"
            )
        for name in ("untouched", "quick"):
            ratio = middle["iteration"] / middle[name]
            met = "" if ratio <= OVERHEAD else f" **above {OVERHEAD}**"
            cells.append(f"{ratio:.2f}{met if name == 'untouched' else ''}")
        rows.append(cells)
    repeats = len(next(iter(overhead.values()))["iteration"])
    header = ["precision", "iteration, ms", "bare pass, untouched network", "… quick network"]
    header += ["iteration / untouched", "iteration / quick"]
    return (
        f"Forward and gradient of the input, a batch of {BATCH}; medians of {repeats}, alternating."
        " The untouched network is converted to the dtype and to its fastest memory format "
        "(`network.quick_copy.lay_out`); the iterations use the quick copy (`Classifier.quick`)."
        "\n\n" + _table(header, rows)
    )


def _quality(quality: dict[str, Any]) -> str:
    rows = [[p, *(f"{q[m]:.2f}" for m in ("AD", "AG", "AI"))] for p, q in quality.items()]
    return (
        "Opti-CAM, 100 iterations, on the same images; always measured in float32, in percent.\n\n"
        + _table(["precision", "AD", "AG", "AI"], rows)
    )


def _growth(growth: dict[str, Any]) -> str:
    rows = [
        [method if first else "", n, f"{q['seconds']:.3g}", f"{1e3 * q['seconds'] / int(n):.3g}",
         f"{q['megabytes']:.0f}"]
        for method, found in growth.items()
        for first, (n, q) in zip([True, *[False] * len(found)], found.items(), strict=False)
    ]  # fmt: skip
    header = ["method", "images", "seconds", "ms an image", "memory, MB"]
    return "One run each; Opti-CAM with 10 iterations.\n\n" + _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --------------------------------------------------------------------------------- command line

_USAGE = """\
Parameters of the bench: make bench NAME=value …

  MODEL       network; several, separated by commas, run one after the other
              [scenes_resnet, scenes_vit]
  CHECKPOINT, LAYER, IMAGES, LABELS   as for make report
  METHODS     names separated by commas; those that do not fit are left out [all]
  REPEATS     of every timing [5]
  BUDGET      seconds for all repeats of one candidate; a slower one is measured on fewer images
              and scaled [20]
  CURVES      0 leaves out the timing of a deletion [1]
  TITLE       heading of the run's tables [the network's name]
  OUT         folder for bench.json and bench.md; runs of other titles that are there stay
              [build/bench]
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench from the command line: `NAME=value …`.

    Returns:
        0, or 2 if a parameter is wrong (nothing was run).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(a in ("-h", "--help") for a in arguments):
        sys.stdout.write(_USAGE)
        return 0
    values = {"model": "scenes_resnet, scenes_vit", "checkpoint": "", "layer": ""}
    values |= {"images": "scenes", "labels": "", "methods": ", ".join(METHODS)}
    values |= {"repeats": "5", "budget": "20", "curves": "1", "title": "", "out": "build/bench"}
    try:
        for argument in arguments:
            name, _, text = argument.partition("=")
            if name.lower() not in values:
                raise ValueError(unknown_name("parameter", name, map(str.upper, values)))
            values[name.lower()] = text.strip() or values[name.lower()]
        repeats, budget = int(values.pop("repeats")), float(values.pop("budget"))
        if repeats < 1 or not budget > 0:
            raise ValueError(f"REPEATS is {repeats} and BUDGET {budget:g}; both must be above 0")
        curves = bool(int(values.pop("curves")))
        title, out = values.pop("title"), Path(values.pop("out")).expanduser()
        models = [model.strip() for model in values.pop("model").split(",")]
        cases = [{**values, "model": model, "limit": BATCH} for model in models]
        subjects = [reports.Saliency(**case).prepare() for case in cases]
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"bench: {' '.join(str(error).split())}\n")
        return 2
    for case, subject in zip(cases, subjects, strict=True):
        name = subject.classifier.name
        k, _, _ = subject.classifier.layer_shape()
        n = len(subject.indices)
        run = {
            "title": title or f"{name}, {n} images of {subject.dataset.name}",
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "network": name,
            "layer": subject.classifier.layer,
            "maps": k,
            "size": "×".join(map(str, subject.classifier.size)),
            "repeats": repeats,
        }
        run |= bench(
            partial(load_case, case),
            list(subject.methods),
            repeats=repeats,
            budget=budget,
            curves=curves,
            say=lambda text, name=name: sys.stderr.write(f"bench: {name}: {text}\n"),
        )
        write(out, run)
    sys.stdout.write(f"{out / 'bench.md'}\n")
    return 0


def write(out: Path, run: dict[str, Any]) -> None:
    """Add a run to the files of a folder, in the place of one of the same title."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "bench.json"
    runs = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    titles = [r["title"] for r in runs]
    # As it will be read again: keys of JSON are strings.
    run = json.loads(json.dumps(run))
    if run["title"] in titles:
        runs[titles.index(run["title"])] = run
    else:
        runs.append(run)
    text = json.dumps(runs, indent=1, ensure_ascii=False)
    kept.write_text(text + "\n", encoding="utf-8")
    (out / "bench.md").write_text(markdown(runs), encoding="utf-8")
