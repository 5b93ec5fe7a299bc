"""Runs methods in worker threads; knows neither widgets nor notebooks."""

from __future__ import annotations

import atexit
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import METHODS, applicable, explain
from ..methods.registry import Step
from ..metrics import drop, gain
from ..models import load_model
from ..network import Classifier
from .drawing import draw_curve, draw_maps
from .events import (
    Cancelled,
    Done,
    Event,
    Failed,
    Prepared,
    Preview,
    Progress,
    Result,
    Settings,
    Started,
    Waiting,
)

MAX_LAYERS = 24
"""A slider with more stops than this can't be set with a mouse."""

_NETWORKS = threading.Lock()  # whoever holds it may run a network; explorers can share one
_LIVE: weakref.WeakSet[Controller] = weakref.WeakSet()


class _Stop(Exception):  # noqa: N818 - it ends a run, and is no error
    """Raised in a worker whose run was cancelled."""


class Controller:
    """Runs methods in worker threads, one run at a time, and tells a listener what happens.

    Runs are numbered. Starting one cancels the one before, and from then on nothing of the former
    is posted any more, whatever its thread still does: the listener never sees stale events, nor
    two events at once.

    Args:
        networks: Names → classifiers, or names that `ol.load_model` knows, which are loaded in a
            worker when they are first needed.
        images: `(N, 3, H, W)` in [0, 1].
        listener: Called with each `Event`, mostly from a worker thread, under `lock`.
        pace: Least seconds between two `Progress` events; 0 posts every step.
        preview: Least seconds between two `Preview` events; drawing never takes more than a
            quarter of the time, whatever this says.
    """

    def __init__(
        self,
        networks: Mapping[str, Classifier | str],
        images: Tensor,
        listener: Callable[[Event], object] = lambda event: None,
        *,
        pace: float = 0.05,
        preview: float = 0.4,
    ) -> None:
        self.lock = threading.RLock()
        self.images = images
        self.history: list[Result] = []
        self.error: str | None = None
        self._sources = dict(networks)
        self._loading = {name: threading.Lock() for name in networks}
        self._cuts: dict[tuple[str, str | None], Classifier] = {}
        self._listener, self._pace, self._preview = listener, pace, preview
        self._run = 0
        self._step = (0, 0)
        self._explains = False
        self._stop: threading.Event | None = None  # of the present run; None when none is running
        self._workers: dict[threading.Thread, threading.Event] = {}
        _LIVE.add(self)

    @property
    def networks(self) -> list[str]:
        """Names of the networks that can be chosen."""
        return list(self._sources)

    @property
    def running(self) -> bool:
        """Whether the present run is still under way."""
        return self._stop is not None

    def loaded(self, network: str) -> Classifier | None:
        """Return a network if it is in memory already."""
        source = self._sources[network]
        return source if isinstance(source, Classifier) else None

    def prepare(self, settings: Settings) -> int:
        """Load and cut the network in a worker, without a run; return its number."""
        return self._start(settings, explains=False)

    def start(self, settings: Settings) -> int:
        """Cancel the present run, if any, start another and return its number."""
        return self._start(settings, explains=True)

    def cancel(self) -> bool:
        """End the present run; return False if there was none.

        Its thread ends at its next step; until then another run waits for the network.
        """
        with self.lock:
            if self._stop is None:
                return False
            run, (index, total) = self._run, self._step
            self._abandon()
            self._listener(Cancelled(run, index, total, self._explains))
            return True

    def join(self, timeout: float | None = None) -> bool:
        """Wait until no worker is left; return False if `timeout` seconds were not enough."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self.lock:
                alive = [worker for worker in self._workers if worker.is_alive()]
            if not alive:
                return True
            alive[0].join(None if end is None else max(0.0, end - time.monotonic()))
            if end is not None and time.monotonic() >= end:
                return not any(worker.is_alive() for worker in alive)

    def shut(self, timeout: float = 5.0) -> bool:
        """Stop all workers, post nothing any more, and wait for them."""
        with self.lock:
            self._abandon()
        return self.join(timeout)

    def _abandon(self) -> None:
        """Make all running workers stale."""
        for stop in self._workers.values():
            stop.set()
        self._run += 1
        self._stop = None

    def _start(self, settings: Settings, *, explains: bool) -> int:
        with self.lock:
            self.cancel()
            self._abandon()
            run, stop = self._run, threading.Event()
            worker = threading.Thread(
                target=self._work,
                args=(run, settings, stop, explains),
                name=f"explorer-run-{run}",
                daemon=True,  # a kernel must be able to end; see _shut_all
            )
            self._workers = {w: s for w, s in self._workers.items() if w.is_alive()}
            self._workers[worker] = self._stop = stop
            self._step, self._explains = (0, 0), explains
            self.error = None
            self._listener(Started(run, settings, explains))
            worker.start()
            return run

    def _post(self, event: Event, *, last: bool = False) -> None:
        """Hand an event of the present run to the listener; end the worker of a stale one."""
        with self.lock:
            if event.run != self._run:
                raise _Stop
            if isinstance(event, Progress):
                self._step = (event.index, event.total)
            if isinstance(event, Done):
                self.history.append(event.result)
            if isinstance(event, Failed):
                self.error = event.message
            if last:
                self._stop = None
            self._listener(event)

    def _work(self, run: int, settings: Settings, stop: threading.Event, explains: bool) -> None:
        """Run in the worker thread; no exception leaves it."""
        try:
            classifier = self._classifier(settings.network, settings.layer, stop)
            self._post(self._prepared(run, settings, classifier, explains), last=not explains)
            if explains:
                with self._network(run, stop):
                    done = self._explain(run, settings, stop, classifier)
                self._post(done, last=True)
        except _Stop:
            pass
        except Exception as error:
            message = in_plain_words(error, settings)
            details = "".join(traceback.format_exception(error))
            with suppress(_Stop):
                self._post(Failed(run, message, details), last=True)
        finally:
            with self.lock:
                self._workers.pop(threading.current_thread(), None)

    @contextmanager
    def _network(self, run: int, stop: threading.Event) -> Iterator[None]:
        """Hold the networks' lock, and give up waiting for it when the run is cancelled."""
        if not _NETWORKS.acquire(blocking=False):
            self._post(Waiting(run))
            _acquire(_NETWORKS, stop)
        try:
            yield
        finally:
            _NETWORKS.release()

    def _classifier(self, name: str, layer: str | None, stop: threading.Event) -> Classifier:
        if name not in self._sources:
            raise ValueError(f"no network {name!r} here; choose one of {', '.join(self._sources)}")
        _acquire(self._loading[name], stop)
        try:
            source = self._sources[name]
            if not isinstance(source, Classifier):
                source = self._sources[name] = load_model(source)
            if (name, layer) not in self._cuts:
                self._cuts[name, layer] = source if layer is None else source.at(layer)
            return self._cuts[name, layer]
        finally:
            self._loading[name].release()

    def _prepared(
        self, run: int, settings: Settings, classifier: Classifier, explains: bool
    ) -> Prepared:
        reasons = applicable(classifier)
        return Prepared(
            run,
            network=settings.network,
            layer=classifier.layer,
            layers=tuple(block_layers(classifier)),
            shape=classifier.layer_shape(),
            labels=tuple(classifier.labels),
            methods=tuple(method for method, reason in reasons.items() if reason is None),
            refused={method: reason for method, reason in reasons.items() if reason is not None},
            explains=explains,
        )

    def _explain(
        self, run: int, settings: Settings, stop: threading.Event, classifier: Classifier
    ) -> Done:
        image = self.images[settings.image][None]
        probabilities = classifier.probabilities(image)[0]
        target = int(probabilities.argmax()) if settings.target is None else settings.target
        settings = replace(settings, target=target, layer=classifier.layer)
        label = classifier.labels[int(classifier.check_targets([target], 1))]

        objective: list[float] = []
        total = 0
        began = time.monotonic()
        posted, drawn, cost = began - self._pace, began, 0.0

        def callback(step: Step) -> None:
            nonlocal posted, drawn, cost, total
            if stop.is_set():
                raise _Stop
            if step.objective is not None:
                objective.append(float(step.objective[0]))
            total = step.total
            now = time.monotonic()
            if now - posted >= self._pace or step.index == step.total:
                posted = now
                self._post(Progress(run, step.index, step.total))
            if objective and now - drawn >= max(self._preview, 4 * cost):
                masks = step.masks()
                if masks is not None:
                    mask = masks[0].detach().cpu()
                    overlay, masked = draw_maps(image[0], mask, settings, label)
                    curve = draw_curve(objective, total)
                    self._post(Preview(run, settings, overlay, masked, curve))
                drawn = time.monotonic()
                cost = drawn - now

        takes = METHODS[settings.method].options
        # A bar of tqdm's would be written by this thread, wherever the notebook prints just then.
        options: dict[str, Any] = {"progress": False}
        if "callback" in takes:
            options["callback"] = callback
        for option in ("iterations", "learning_rate", "passes"):
            if option in takes:
                options[option] = getattr(settings, option)
        mask = explain(settings.method, classifier, image, torch.tensor([target]), **options)[0]
        seconds = time.monotonic() - began
        if stop.is_set():
            raise _Stop
        mask = mask.cpu()
        masked_probabilities = classifier.probabilities(image * mask)[0]
        p, o = probabilities[target][None], masked_probabilities[target][None]
        result = Result(
            settings=settings,
            image=image[0],
            mask=mask,
            target_label=label,
            before=float(p),
            after=float(o),
            drop=float(drop(p, o)),
            gain=float(gain(p, o)),
            top_before=_top(probabilities, classifier.labels),
            top_after=_top(masked_probabilities, classifier.labels),
            objective=tuple(objective),
            steps=total,
            seconds=seconds,
        )
        overlay, masked = draw_maps(image[0], mask, settings, label)
        curve = draw_curve(objective, total) if objective else None
        return Done(run, result, overlay, masked, curve)


def _acquire(lock: threading.Lock, stop: threading.Event) -> None:
    while not lock.acquire(timeout=0.05):
        if stop.is_set():
            raise _Stop
    if stop.is_set():
        lock.release()
        raise _Stop


def _top(probabilities: Tensor, labels: Sequence[str]) -> tuple[tuple[str, float], ...]:
    values, indices = probabilities.topk(min(3, len(labels)))
    return tuple((labels[int(i)], float(v)) for v, i in zip(values, indices, strict=True))


@atexit.register
def _shut_all() -> None:
    # A thread inside torch while the interpreter is taken down can crash it: stop them first.
    for controller in list(_LIVE):
        controller.shut()


def in_plain_words(error: Exception, settings: Settings) -> str:
    """Return one sentence about an error for the person who pressed the button."""
    what = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in what.lower():
        return (
            f"Not enough memory for {settings.method} on {settings.network}. Try a later layer, "
            "a smaller network, or close other notebooks."
        )
    if isinstance(error, (ValueError, KeyError, TypeError, OSError)) and what:
        # The package's own errors are sentences written for people.
        return what[0].upper() + what[1:]
    first = what.splitlines()[0] if what else type(error).__name__
    return f"{settings.method} on {settings.network} failed: {first}"


def block_layers(classifier: Classifier) -> list[str]:
    """Return the layers worth a stop of a slider, in forward order: ends of blocks.

    Those are numbered modules made of others (`layer4.1`, `blocks.11`), the activations of a plain
    sequence such as VGG's, and always the classifier's present layer. A stage that ends where its
    last block does is left out. At most `MAX_LAYERS` (and the present one) are kept, evenly.
    """
    modules = dict(classifier.network.named_modules())

    def is_block(name: str) -> bool:
        module = modules[name]
        children = list(module.named_children())
        if not children:
            in_sequence = name.rpartition(".")[2].isdigit()
            return in_sequence and type(module).__module__.endswith(".activation")
        if isinstance(module, nn.Sequential) and f"{name}.{children[-1][0]}" in blocks:
            return False
        return name[-1].isdigit()

    blocks: set[str] = set()
    for name in sorted(classifier.layers, key=lambda n: -n.count(".")):  # the insides first
        if is_block(name):
            blocks.add(name)
    # Blocks inside blocks (the branches of a residual unit) are its own affair.
    outer = {b for b in blocks if not any(b.startswith(f"{a}.") for a in blocks)}
    kept = [name for name in classifier.layers if name in outer]
    if len(kept) < 3:  # a network of another build: all that it is made of, at its top
        kept = [name for name in classifier.layers if "." not in name] or classifier.layers
    if len(kept) > MAX_LAYERS:
        last = len(kept) - 1
        kept = [kept[round(i * last / (MAX_LAYERS - 1))] for i in range(MAX_LAYERS)]
    return [name for name in classifier.layers if name in kept or name == classifier.layer]
