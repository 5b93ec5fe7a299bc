"""The measurements: time, memory and agreement of methods, overhead of Opti-CAM's iterations.

Every function here runs in a separate process (`run.alone`), so that it is not affected by what
others left in memory, in caches or in the network.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import opticam_lite as ol
from opticam_lite.network.quick_copy import lay_out, lay_out_weights

from .peers import CURVES, PEERS, Explain, Plain

BATCH = 8
# With all steps the measurement of growth would take hours, and all steps cost the same.
CHEAP = {"opti-cam": {"iterations": 10}}


@dataclass(frozen=True)
class Case:
    """A network and a batch of images to measure on."""

    classifier: ol.Classifier
    images: Tensor
    targets: Tensor

    def repeated(self, n: int) -> tuple[Tensor, Tensor]:
        """Return n images and targets: those of the case, repeated."""
        again = torch.arange(n) % len(self.images)
        return self.images[again], self.targets[again]


Load = Callable[[], Case]


def candidates(case: Case, method: str) -> dict[str, Explain]:
    """Return our implementation and its peers as functions of images and targets."""

    def ours(images: Tensor, targets: Tensor) -> Tensor:
        return ol.explain(method, case.classifier, images, targets, progress=False)

    found = {"ours": ours}
    for peer in PEERS.get(method, ()):
        plain = Plain(case.classifier)
        if peer.fits(plain):
            found[peer.name] = peer.prepare(plain)
    return found


# ----------------------------------------------------------------------------- time and agreement


Timed = Callable[[int], tuple[float, np.ndarray]]


def known(load: Load, method: str) -> tuple[list[str], int]:
    """Return the names of the method's candidates, ours first, and the number of images."""
    case = load()
    return list(candidates(case, method)), len(case.images)


def timed(load: Load, method: str, name: str) -> Timed:
    """Return a function that runs a candidate on n images and returns seconds and masks."""
    case = load()
    return _clocked(case, candidates(case, method)[name], case.images, case.targets)


def timed_curve(load: Load, name: str) -> Timed:
    """Return a function that runs a deletion of n images by Grad-CAM: seconds and curves."""
    case = load()
    masks = ol.explain("grad-cam", case.classifier, case.images, case.targets, progress=False)
    # No two pixels are equal, because implementations order ties differently.
    masks = masks + torch.linspace(0, 1e-3, masks[0].numel(), device=masks.device).view_as(masks[0])
    curve = CURVES[name](Plain(case.classifier))
    return _clocked(case, curve, case.images, masks, case.targets)


def _clocked(case: Case, function: Callable[..., Tensor], *batch: Tensor) -> Timed:
    def run(n: int) -> tuple[float, np.ndarray]:
        some = [x[:n] for x in batch]
        gc.disable()  # as timeit does
        started = _now(case)
        result = function(*some)
        seconds = _now(case) - started
        gc.enable()
        return seconds, result.cpu().numpy()

    return run


def compare(
    found: Mapping[str, Timed], whole: int, repeats: int, budget: float, *, alike: bool = False
) -> dict[str, dict[str, Any]]:
    """Time ours and its peers alternately, A B A B …, and compare their masks.

    A candidate that would take longer than `budget` seconds for all repeats on the `whole` batch
    gets two images or one, and if necessary fewer repeats; its seconds are then scaled to 8.

    Args:
        found: Candidate → function that runs it on n images.
        whole: Number of images.
        repeats, budget: Largest number of repeats of every timing; seconds for all of them.
        alike: Whether all get as few images as the slowest. A GPU takes hardly longer for eight
            images than for one, so scaling the seconds of one candidate only would be unfair.

    Returns:
        For each candidate `images` (how many it was run on), `seconds` (per batch of 8, one number
        per repeat), `correlation` (mean over images) and `difference` (largest) to ours, if the
        results have the same shape.
    """
    n, slowest = {}, 0.0
    for name, run in found.items():
        one, _ = run(1)
        if one < 1:  # the first call may include initialisation
            one, _ = run(1)
        n[name] = next((k for k in (whole, 2) if (1 if alike else k) * one * repeats <= budget), 1)
        taken, _ = run(n[name]) if n[name] > 1 else (one, None)
        slowest = max(slowest, taken)
    if alike:
        n = dict.fromkeys(n, min(n.values()))
    repeats = min(repeats, max(2, int(budget / slowest)))  # one alone has no spread
    seconds: dict[str, list[float]] = {name: [] for name in found}
    masks = {}
    for _ in range(repeats):
        for name, run in found.items():
            taken, masks[name] = run(n[name])
            seconds[name].append(taken * BATCH / n[name])
    return {
        name: {
            "images": n[name],
            "seconds": seconds[name],
            **_agreement(masks["ours"], masks[name]),
        }
        for name in found
    }


def _now(case: Case) -> float:
    if case.classifier.device.type == "cuda":
        torch.cuda.synchronize(case.classifier.device)
    return time.perf_counter()


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Pearson correlation of the masks, mean over images, and their largest difference."""
    n = min(len(ours), len(theirs))
    if ours[0].shape != theirs[0].shape:
        return {}
    a, b = (torch.as_tensor(masks[:n]).flatten(1).double() for masks in (ours, theirs))
    correlations = [
        float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if x.std() > 0 and y.std() > 0
        # The correlation of a constant mask is undefined: 1 if both masks are equal, else 0.
        else float(torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    return {"correlation": statistics.fmean(correlations), "difference": float((a - b).abs().max())}


# ------------------------------------------------------------------------------------------ memory


def memory(load: Load, method: str, name: str, n: int) -> dict[str, float]:
    """Run a candidate on n images once, in a new process.

    Returns:
        `megabytes`: the peak memory of the run minus that of the process before it, with the
        network and the images loaded and one image classified; `seconds`.
    """
    case = load()
    explain = candidates(case, method)[name]
    return _peak(case, explain, *case.repeated(n))


def growth(load: Load, method: str, n: int) -> dict[str, float]:
    """Measure time and memory of a method for n images (Opti-CAM: 10 iterations)."""
    case = load()

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        options = CHEAP.get(method, {})
        return ol.explain(method, case.classifier, images, targets, progress=False, **options)

    explain(case.images[:1], case.targets[:1])
    return _peak(case, explain, *case.repeated(n))


def _peak(case: Case, explain: Explain, images: Tensor, targets: Tensor) -> dict[str, float]:
    with torch.enable_grad():  # so that libraries are initialised
        case.classifier.logits(images[:1].clone().requires_grad_()).sum().backward()
    meter = _Cuda() if case.classifier.device.type == "cuda" else _Resident()
    started = _now(case)
    explain(images, targets)
    return {"seconds": _now(case) - started, "megabytes": meter.peak() / 1e6}


class _Cuda:
    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


class _Resident:
    """The peak of this process's resident memory minus its present resident memory.

    On Linux the peak can be reset; elsewhere an earlier, higher peak hides that of the run, and
    the result is 0.
    """

    def __init__(self) -> None:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # return free memory, so that reuse of it is counted
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = psutil.Process().memory_info().rss

    def peak(self) -> int:
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text(encoding="ascii")
            highest = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return max(0, highest - self.before)


# -------------------------------------------------------------------------------------- Opti-CAM


def overhead(load: Load, precision: str, repeats: int) -> dict[str, list[float]]:
    """Time an iteration of Opti-CAM and bare forward and backward passes of the same network.

    Its callback runs the bare passes: iteration, pass, iteration, pass, … so that the load of the
    machine is the same for all. The gradient of a bare pass is that of the input.

    Returns:
        Seconds of each `iteration`, each pass of the `untouched` network in that dtype and its
        fastest memory format, and of the `quick` one that the iterations use.
    """
    case = load()
    quick = case.classifier.quick(precision)
    dtype = getattr(torch, precision)
    network = copy.deepcopy(case.classifier.network).to(dtype)
    lay_out_weights(network)
    x = lay_out(case.classifier.normalised(case.images).to(dtype))
    c = case.targets[:, None]

    def untouched() -> None:
        inputs = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(network(inputs).gather(1, c).sum(), inputs)

    def quick_copy() -> None:
        inputs = case.images.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(quick.logits(inputs).gather(1, c).sum(), inputs)

    seconds: dict[str, list[float]] = {"iteration": [], "untouched": [], "quick": []}
    last = 0.0

    def between(step: object) -> None:
        nonlocal last
        seconds["iteration"].append(_now(case) - last)
        for name, bare in (("untouched", untouched), ("quick", quick_copy)):
            started = _now(case)
            bare()
            seconds[name].append(_now(case) - started)
        last = _now(case)

    ol.explain(
        "opti-cam",
        case.classifier,
        case.images,
        case.targets,
        iterations=repeats + 3,
        precision=precision,
        tolerance=0,  # no image stops early
        callback=between,
        progress=False,
    )
    return {name: values[3:] for name, values in seconds.items()}  # the first ones warm up


def quality(load: Load, precision: str) -> dict[str, float]:
    """Return AD, AG and AI of Opti-CAM (percent, measured in float32), searched in a precision."""
    case = load()
    options = {"precision": precision, "progress": False}
    masks = ol.explain("opti-cam", case.classifier, case.images, case.targets, **options)
    p, o = ol.masked_probabilities(case.classifier, case.images, masks, case.targets)
    return {
        "AD": float(ol.metrics.average_drop(p, o)),
        "AG": float(ol.metrics.average_gain(p, o)),
        "AI": float(ol.metrics.average_increase(p, o)),
    }
