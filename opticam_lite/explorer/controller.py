"""Owns the explorer's state and runs methods in worker threads; imports no widgets."""

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
from torch import Tensor

from ..methods import METHODS, explain, list_methods
from ..methods.registry import Step
from ..metrics import drop, gain
from ..models import load_model
from ..network import Classifier
from ..registry import check_name
from .choices import Choices, choices_of, tunable
from .drawing import draw_image, draw_shown, image_name
from .state import Result, Run, Settings, Shown, State

_NETWORKS = threading.Lock()  # held while a network runs: explorers can share one
_LIVE: weakref.WeakSet[Controller] = weakref.WeakSet()


class _Stop(Exception):  # noqa: N818 - it ends a run, and is not an error
    """Raised in a worker whose run was cancelled."""


class Controller:
    """Owns one immutable `State`; changes it as settings are chosen and as runs proceed.

    One run at a time has a worker thread. Starting a run cancels the previous one, which changes
    nothing from then on, even if its thread still computes. All changes are made under `lock`.

    Args:
        networks: Names → classifiers, or names of `ol.load_model`, which are loaded in a worker
            when they are first needed. The first must be a classifier.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` classes of the first network, selected at first for each image. Default:
            the predicted class.
        listener: Called with every new state, mostly from a worker thread, under `lock`.
        pace: Minimum seconds between two states that differ only in the step; 0 reports every step.
        preview: Minimum seconds between two previews. At most a quarter of the time is spent on
            drawing them.

    Raises:
        TypeError: If the first network is a name.
    """

    def __init__(
        self,
        networks: Mapping[str, Classifier | str],
        images: Tensor,
        targets: Tensor | None = None,
        listener: Callable[[State], object] = lambda state: None,
        *,
        pace: float = 0.05,
        preview: float = 0.4,
    ) -> None:
        name, first = next(iter(networks.items()))
        if not isinstance(first, Classifier):
            raise TypeError("the first network must be a Classifier, not a name")
        self.lock = threading.RLock()
        self.images = images
        self._targets = [None] * len(images) if targets is None else targets.tolist()
        self._labels = tuple(first.labels)  # the targets are classes of the first network
        self.sources = dict(networks)
        self._loading = {name: threading.Lock() for name in networks}
        self.listener, self.pace, self.preview = listener, pace, preview
        self._workers: set[threading.Event] = set()  # what stops each worker
        self._ended = threading.Condition(self.lock)
        classes = tuple("" if t is None else first.labels[t] for t in self._targets)
        settings = Settings(0, name, target=self._targets[0], options=tunable(Settings.method))
        self.state = State(
            settings,
            draw_image(images[0], image_name(0, classes)),
            Run(0, settings),
            Choices(self._labels, tuple(list_methods())),
            preferred=settings.method,
            classes=classes,
        )
        _LIVE.add(self)

    def choose(self, **changes: Any) -> None:
        """Change fields of the settings; of `options` only those given.

        A new image selects its class, a new network its default layer, a new method the options
        that were set for it before. A new image, network or layer ends the current run.

        Raises:
            ValueError: If there is no such method or network.
        """
        with self.lock:
            state = self.state
            image = changes.get("image", state.settings.image)
            method = changes.get("method", state.settings.method)
            network = changes.get("network", state.settings.network)
            check_name("network", network, self.sources)
            own = {**state.tuned.get(method, {}), **changes.get("options", {})}
            changes["options"] = tunable(method) | own
            update: dict[str, Any] = {"tuned": {**state.tuned, method: own}}
            if "method" in changes:
                update["preferred"] = method
            if "image" in changes:
                changes.setdefault("target", self._target(image, state.choices.labels))
                picture = draw_image(self.images[image], image_name(image, state.classes))
                update |= {"picture": picture, "shown": None, "former": None}
            if "network" in changes:
                changes.setdefault("layer", None)
                choices = replace(state.choices, layers=(), shape=None)
                update |= {"choices": choices, "shown": None, "former": None}
            update["settings"] = replace(state.settings, **changes)
            update["run"] = state.run if state.run.busy else replace(state.run, outdated=True)
            self._set(**update)
            if changes.keys() & {"image", "network", "layer"}:
                self.start(explains=False)

    def start(self, *, explains: bool = True) -> int:
        """Cancel the current run, if any, start another and return its number.

        With `explains=False` it only loads the network and cuts it at the layer.
        """
        with self.lock:
            self.cancel()
            state = self.state
            run = Run(state.run.number + 1, state.settings, explains, "working")
            if not isinstance(self.sources[state.settings.network], Classifier):
                run = replace(run, phase="loading")
            former = {"shown": None, "former": state.shown if state.result else None}
            self._set(run=run, **(former if explains else {}))
            stop = threading.Event()
            self._workers.add(stop)
            # A daemon thread, so that the kernel can exit; see _shut_all.
            threading.Thread(target=self._work, args=(run, stop), daemon=True).start()
            return run.number

    def cancel(self) -> bool:
        """Cancel the current run; return False if there was none.

        Its thread ends at its next step; until then another run waits for the network.
        """
        with self.lock:
            run = self.state.run
            if not run.busy:
                return False
            self._abandon()
            self._set(run=replace(run, phase="cancelled"), former=None)
            return True

    def join(self, timeout: float | None = None) -> bool:
        """Wait until no worker is left; return False if `timeout` seconds were not enough."""
        with self._ended:
            return self._ended.wait_for(lambda: not self._workers, timeout)

    def shut(self, timeout: float = 5.0) -> bool:
        """Stop all workers and calls of the listener, and wait for the workers."""
        with self.lock:
            self._abandon()
        return self.join(timeout)

    def _target(self, image: int, labels: tuple[str, ...]) -> int | None:
        """Return the given class of an image, if the network knows the classes given."""
        return self._targets[image] if labels == self._labels else None

    # ------------------------------------ runs

    def _set(self, **changes: Any) -> None:
        """Change fields of the state and call the listener."""
        self.state = replace(self.state, **changes)
        self.listener(self.state)

    def _post(self, stop: threading.Event, run: Mapping[str, Any], **changes: Any) -> None:
        """Change fields of the run and of the state; end the worker if its run was cancelled."""
        with self.lock:
            if stop.is_set():
                raise _Stop
            self._set(run=replace(self.state.run, **run), **changes)

    def _abandon(self) -> None:
        """Prevent all workers from changing the state."""
        for stop in self._workers:
            stop.set()

    def _work(self, run: Run, stop: threading.Event) -> None:
        """Run in the worker thread; no exception leaves it."""
        try:
            classifier = self._classifier(run.asked, stop)
            self._offer(run, stop, choices_of(classifier), classifier.layer)
            if run.explains:
                with _held(_NETWORKS, stop, lambda: self._post(stop, {"phase": "waiting"})):
                    self._explain(run, stop, classifier)
        except _Stop:
            pass
        except Exception as error:
            failed = {
                "phase": "failed",
                "message": in_plain_words(error, run.asked),
                "details": "".join(traceback.format_exception(error)),
            }
            with suppress(_Stop):
                self._post(stop, failed, shown=None, former=None)
        finally:
            with self._ended:
                self._workers.remove(stop)
                self._ended.notify_all()

    def _classifier(self, asked: Settings, stop: threading.Event) -> Classifier:
        """Return the network, loaded when it is first asked for, cut at the layer."""
        with _held(self._loading[asked.network], stop):
            source = self.sources[asked.network]
            if not isinstance(source, Classifier):
                source = self.sources[asked.network] = load_model(source)
        return source if asked.layer in (None, source.layer) else source.at(asked.layer)

    def _offer(self, run: Run, stop: threading.Event, choices: Choices, layer: str) -> None:
        """Set the choices for the network at this layer, and keep the settings that are valid.

        A chosen method that did not apply to an earlier layer is restored, unless a run has begun.
        """
        with self.lock:
            state, settings = self.state, self.state.settings
            method = settings.method if run.explains else state.preferred
            fits = method in choices.methods
            if not fits:
                method = "opti-cam" if "opti-cam" in choices.methods else choices.methods[-1]
            if method == settings.method:
                note = ""
            elif fits:
                note = f"{method} fits this layer and is chosen again."
            else:
                note = f"{settings.method} does not fit this layer; {method} is chosen now."
            target = settings.target
            if choices.labels != state.choices.labels:
                target = self._target(settings.image, choices.labels)
            options = {**tunable(method), **state.tuned.get(method, {})}
            settings = replace(settings, method=method, target=target, layer=layer, options=options)
            told = {"phase": "working" if run.explains else "ready", "note": note}
            self._post(stop, told, choices=choices, settings=settings)

    def _explain(self, run: Run, stop: threading.Event, classifier: Classifier) -> None:
        asked = replace(run.asked, layer=classifier.layer)
        image = self.images[asked.image][None]
        probabilities = classifier.probabilities(image)[0]
        target = int(probabilities.argmax()) if asked.target is None else asked.target
        label = classifier.labels[int(classifier.check_targets([target], 1))]
        self._post(stop, {"phase": "running"})

        objective: list[float] = []
        total = 0
        began = time.monotonic()
        tell_at, draw_at = began, began + self.preview

        def draw(mask: Tensor) -> Shown:
            return draw_shown(asked, image[0], mask.cpu(), label, objective, total)

        def callback(step: Step) -> None:
            nonlocal tell_at, draw_at, total
            if stop.is_set():
                raise _Stop
            if step.objective is not None:
                objective.append(float(step.objective[0]))
            total = step.total
            now = time.monotonic()
            if now >= tell_at or step.index == total:
                tell_at = now + self.pace
                self._post(stop, {"step": (step.index, total)})
            if objective and now >= draw_at and (masks := step.masks()) is not None:
                self._post(stop, {}, shown=draw(masks[0].detach()))
                end = time.monotonic()
                draw_at = end + max(self.preview, 4 * (end - now))

        # A progress bar of tqdm would appear below the cell that is running at that time.
        options: dict[str, Any] = {**asked.options, "progress": False, "warn": False}
        if "callback" in METHODS[asked.method].options:
            options["callback"] = callback
        mask = explain(asked.method, classifier, image, torch.tensor([target]), **options)[0].cpu()
        seconds = time.monotonic() - began
        if stop.is_set():
            raise _Stop
        masked_probabilities = classifier.probabilities(image * mask)[0]
        p, o = probabilities[target][None], masked_probabilities[target][None]
        result = Result(
            settings=replace(asked, target=target),
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
        self._post(
            stop,
            {"phase": "done", "step": (max(total, 1),) * 2},
            shown=replace(draw(mask), result=result),
            former=None,
            history=(*self.state.history, result),
        )


@contextmanager
def _held(
    lock: threading.Lock, stop: threading.Event, wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold a lock, after `wait()` if it isn't free; stop waiting when the run is cancelled."""
    if not lock.acquire(blocking=False):
        wait()
        while not lock.acquire(timeout=0.05):
            if stop.is_set():
                raise _Stop
    try:
        if stop.is_set():
            raise _Stop
        yield
    finally:
        lock.release()


def _top(probabilities: Tensor, labels: Sequence[str]) -> tuple[tuple[str, float], ...]:
    values, indices = probabilities.topk(min(3, len(labels)))
    return tuple((labels[int(i)], float(v)) for v, i in zip(values, indices, strict=True))


@atexit.register
def _shut_all() -> None:
    # A thread inside torch while the interpreter exits can crash it, so threads are stopped first.
    for controller in list(_LIVE):
        controller.shut()


def in_plain_words(error: Exception, settings: Settings) -> str:
    """Return one sentence about an error for the user of the widget."""
    what = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in what.lower():
        return (
            f"Not enough memory for {settings.method} on {settings.network}. Try a later layer, "
            "a smaller network, or close other notebooks."
        )
    if isinstance(error, (ValueError, KeyError, TypeError, OSError)) and what:
        # The package's own errors are sentences written for users.
        return what[0].upper() + what[1:]
    first = what.splitlines()[0] if what else type(error).__name__
    return f"{settings.method} on {settings.network} failed: {first}"
