"""The explorer: its controller without widgets, its view without a browser."""

import html
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import ipywidgets as widgets
import nbclient
import nbformat
import pytest
import torch
from test_text import NASTY
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.explorer import (
    Controller,
    Explorer,
    Settings,
    choices,
    controller,
    drawing,
    panels,
)
from opticam_lite.explorer.state import State
from opticam_lite.scene_networks import NETWORKS

LABELS = ["cup", "key", "bolt", "ring"]


def make_classifier(seed: int = 0, name: str = "tiny") -> ol.Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    return ol.Classifier(network, layer="3", size=32, labels=LABELS, device="cpu", name=name)


@pytest.fixture
def classifier() -> ol.Classifier:
    return make_classifier()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Listener:
    """Keeps all states, and says when two came at once."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.overlapped = False
        self._busy = threading.Lock()

    def __call__(self, state: State) -> None:
        if not self._busy.acquire(blocking=False):
            self.overlapped = True
            return
        self.states.append(state)
        self._busy.release()

    @property
    def phases(self) -> list[str]:
        """The phases that runs went through."""
        return [phase for phase, _ in itertools.groupby(s.run.phase for s in self.states)]

    @property
    def steps(self) -> list[tuple[int, int]]:
        """The steps that were told, each once."""
        steps = [s.run.step for s in self.states if s.run.phase == "running"]
        return [step for step, _ in itertools.groupby(steps) if step != (0, 0)]


def make(classifier: ol.Classifier, images: Tensor, **options) -> tuple[Controller, Listener]:
    listener = Listener()
    options = {"pace": 0, "preview": 0, "listener": listener, **options}
    return Controller({"tiny": classifier}, images, **options), listener


def ask(control: Controller, **settings) -> int:
    """Choose settings, wait until they are prepared, and start a run."""
    control.choose(**settings)
    assert control.join(30)
    return control.start()


class Gate:
    """A method that waits in a worker until it is let go, whatever happens meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.real = controller.explain
        monkeypatch.setattr(controller, "explain", self)

    def __call__(self, method: str, *args, **options) -> Tensor:
        self.entered.set()
        assert self.open.wait(30)
        return self.real(method, *args, **options)


# ---------------------------------------- controller


def test_a_run_tells_each_step_and_ends_with_what_explain_gives(classifier, images) -> None:
    control, listener = make(classifier, images)
    options = {"iterations": 7, "learning_rate": 0.3}
    run = ask(control, image=1, target=2, options=options)
    assert control.join(30)
    assert listener.phases[-3:] == ["working", "running", "done"]
    assert listener.steps == [(i, 7) for i in range(1, 8)]
    assert control.state is listener.states[-1]
    assert control.state.run.number == run
    previews = [s for s in listener.states if s.shown is not None and s.result is None]
    assert {s.run.number for s in previews} == {run}
    assert not listener.overlapped
    assert not control.state.run.busy

    result = control.state.result
    expected = ol.explain("opti-cam", classifier, images[1:2], [2], **options)
    torch.testing.assert_close(result.mask, expected[0])
    p, o = ol.masked_probabilities(classifier, images[1:2], expected, torch.tensor([2]))
    assert result.before == pytest.approx(float(p), abs=1e-6)
    assert result.after == pytest.approx(float(o), abs=1e-6)
    assert result.drop == pytest.approx(float(ol.metrics.drop(p, o)), abs=1e-5)
    assert result.gain == pytest.approx(float(ol.metrics.gain(p, o)), abs=1e-5)
    assert result.target_label == "bolt"
    assert result.settings.layer == "3"
    assert len(result.objective) == 7
    assert result.top_before[0][0] == LABELS[int(classifier.predict(images[1:2]))]
    assert control.state.history == (result,)


def test_without_a_target_the_predicted_class_is_explained(classifier, images) -> None:
    control, _ = make(classifier, images)
    ask(control, method="grad-cam")
    control.join(30)
    result = control.state.result
    assert result.settings.target == int(classifier.predict(images[:1]))
    assert control.state.settings.target is None
    assert control.state.shown.curve is None
    assert result.objective == ()


def test_a_method_in_chunks_tells_its_progress(classifier, images, monkeypatch) -> None:
    real = controller.explain
    monkeypatch.setattr(controller, "explain", lambda *a, **k: real(*a, chunk=2, **k))
    control, listener = make(classifier, images)
    ask(control, method="score-cam")
    control.join(30)
    A = classifier.features(images[:1])[0]
    total = -(-int((A.amax((1, 2)) > A.amin((1, 2))).sum()) // 2)  # flat channels are left out
    assert total > 1
    assert listener.steps == [(i, total) for i in range(1, total + 1)]
    assert control.state.result is not None


def test_progress_and_previews_are_paced(classifier, images) -> None:
    control, listener = make(classifier, images, pace=3600, preview=3600)
    ask(control, options={"iterations": 20})
    control.join(30)
    assert listener.steps == [(1, 20), (20, 20)]
    assert all(s.shown is None for s in listener.states[:-1])


def cancelling(classifier: ol.Classifier, images: Tensor, at: int) -> tuple[Controller, Listener]:
    """A controller whose listener cancels a run in that step."""
    listener = Listener()

    def cancel(state: State) -> None:
        listener(state)
        if state.run.phase == "running" and state.run.step[0] == at:
            control.cancel()

    control = Controller({"tiny": classifier}, images, listener=cancel, pace=0, preview=3600)
    return control, listener


def assert_untouched(network: nn.Module) -> None:
    assert not network.training
    assert not any(m._forward_hooks or m._backward_hooks for m in network.modules())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_a_run_cancelled_midway_leaves_the_network_as_it_was(classifier, images) -> None:
    state = {k: v.clone() for k, v in classifier.network.state_dict().items()}
    before = ol.explain("opti-cam", classifier, images[:1], [0], iterations=5)
    control, listener = cancelling(classifier, images, at=3)
    ask(control, options={"iterations": 10**6})
    assert control.join(30)
    assert control.state.run.phase == "cancelled"
    assert control.state.run.step == (3, 10**6)
    assert listener.steps == [(i, 10**6) for i in (1, 2, 3)]
    assert control.state.history == ()

    assert_untouched(classifier.network)
    for name, value in classifier.network.state_dict().items():
        assert torch.equal(value, state[name])
    torch.testing.assert_close(
        ol.explain("opti-cam", classifier, images[:1], [0], iterations=5), before
    )
    ask(control, options={"iterations": 2})
    control.join(30)
    assert control.state.run.phase == "done"


TELLING = [name for name in ol.list_methods() if "callback" in ol.methods.METHODS[name].options]


@pytest.mark.parametrize("method", TELLING)
def test_every_method_that_tells_its_steps_can_be_cancelled(classifier, images, method) -> None:
    control, listener = cancelling(classifier, images, at=1)
    random = torch.get_rng_state()
    ask(control, method=method)
    assert control.join(60)
    assert [index for index, _ in listener.steps] == [1]
    assert control.state.run.phase == "cancelled"
    assert control.state.run.message == ""
    assert_untouched(classifier.network)
    assert torch.equal(torch.get_rng_state(), random)
    ask(control, method="fake-cam")
    assert control.join(30)
    assert control.state.run.phase == "done"


def test_cancelling_nothing_says_so(classifier, images) -> None:
    control, listener = make(classifier, images)
    assert control.cancel() is False
    assert listener.states == []


def test_of_twenty_quick_starts_the_last_one_counts(classifier, images) -> None:
    control, listener = make(classifier, images)
    ask(control, options={"iterations": 5})
    runs = [control.start() for _ in range(20)]
    assert control.join(60)
    assert runs == list(range(runs[0], runs[0] + 20))
    assert (control.state.run.number, control.state.run.phase) == (runs[-1], "done")
    assert not listener.overlapped
    target = control.state.result.settings.target
    expected = ol.explain("opti-cam", classifier, images[:1], target, iterations=5)
    torch.testing.assert_close(control.state.result.mask, expected[0])


def test_a_new_run_cancels_the_former_whose_result_is_dropped(
    classifier, images, monkeypatch
) -> None:
    control, listener = make(classifier, images)
    gate = Gate(monkeypatch)
    former = ask(control, method="grad-cam")
    assert gate.entered.wait(30)
    control.choose(target=1)
    new = control.start()
    gate.open.set()  # only now does the former's method return, with a result
    assert control.join(30)
    assert new > former
    phases = [s.run.phase for s in listener.states if s.run.number == former]
    assert phases[-1] == "cancelled"
    assert control.state.run.number == new
    assert control.state.result.settings.target == 1
    assert len(control.state.history) == 1


def test_an_error_of_a_stale_run_is_not_shown(classifier, images, monkeypatch) -> None:
    control, listener = make(classifier, images)
    gate = Gate(monkeypatch)
    monkeypatch.setattr(gate, "real", lambda *a, **k: 1 / 0)
    ask(control, method="grad-cam")
    assert gate.entered.wait(30)
    control.cancel()
    gate.open.set()
    control.join(30)
    assert "failed" not in listener.phases


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": 9}, "arget 9 is no class of tiny"),
        ({"layer": "7"}, "ayer"),
        ({"options": {"learning_rate": -1}}, "earning_rate is -1"),
        ({"options": {"lerning_rate": 1}}, "no option 'lerning_rate'; did you mean"),
    ],
)
def test_errors_are_told_in_plain_words(classifier, images, settings, words) -> None:
    control, _ = make(classifier, images)
    ask(control, **settings)
    assert control.join(30)
    run = control.state.run
    assert run.phase == "failed"
    assert words in run.message
    assert "Traceback" not in run.message
    assert "\n" not in run.message
    assert "Traceback" in run.details
    ask(control, layer=None, method="grad-cam", target=0)
    control.join(30)
    assert control.state.run.phase == "done"
    assert control.state.run.message == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "grad-kam"}, "unknown method 'grad-kam'; did you mean"),
        ({"network": "tinny"}, "unknown network 'tinny'; did you mean 'tiny'"),
    ],
)
def test_what_there_is_not_cannot_be_chosen(classifier, images, settings, words) -> None:
    control, listener = make(classifier, images)
    with pytest.raises(ValueError, match=words):
        control.choose(**settings)
    assert listener.states == []


def test_an_unforeseen_error_names_the_method_and_the_network() -> None:
    settings = Settings(0, "tiny", method="cam")
    say = controller.in_plain_words
    assert say(RuntimeError("mat1\nmat2"), settings) == "cam on tiny failed: mat1"
    assert say(ZeroDivisionError(), settings) == "cam on tiny failed: ZeroDivisionError"
    assert say(KeyError("no such thing"), settings) == "No such thing"
    for error in (MemoryError(), RuntimeError("CUDA out of memory"), torch.OutOfMemoryError()):
        assert say(error, settings).startswith("Not enough memory for cam on tiny")


def test_an_error_of_the_listener_is_shown_too(classifier, images) -> None:
    def clumsy(state: State) -> None:
        if state.run.step[0] and state.run.phase == "running":
            raise RuntimeError("the view stumbled")

    control, _ = make(classifier, images, listener=clumsy)
    control.start()
    assert control.join(30)
    assert control.state.run.message == "opti-cam on tiny failed: the view stumbled"


def test_two_explorers_never_use_a_network_at_once(classifier, images, monkeypatch) -> None:
    first, _ = make(classifier, images)
    second, _ = make(classifier, images)
    gate = Gate(monkeypatch)
    ask(first, method="grad-cam")
    assert gate.entered.wait(30)
    gate.entered.clear()
    ask(second, method="grad-cam")
    assert second.join(0.3) is False
    assert second.state.run.phase == "waiting"
    assert not gate.entered.is_set()
    # The one that waits can be cancelled, and started again.
    second.cancel()
    assert second.join(30)
    second.start()
    gate.open.set()
    assert first.join(30)
    assert second.join(30)
    assert first.state.run.phase == second.state.run.phase == "done"


def test_join_gives_up_after_its_time(classifier, images, monkeypatch) -> None:
    control, _ = make(classifier, images)
    assert control.join(0)  # nothing to wait for
    gate = Gate(monkeypatch)
    ask(control, method="grad-cam")
    assert gate.entered.wait(30)
    began = time.monotonic()
    assert control.join(0.1) is False
    assert time.monotonic() - began < 5
    gate.open.set()
    assert control.join()


def test_shutting_stops_all_and_tells_nothing(classifier, images) -> None:
    control, listener = make(classifier, images)
    ask(control, options={"iterations": 10**6})
    assert control.shut(30)
    assert not {"done", "cancelled"} & set(listener.phases)


def test_networks_are_loaded_when_needed_once_and_in_the_worker(images, monkeypatch) -> None:
    calls = []

    def load(name: str) -> ol.Classifier:
        calls.append((name, threading.current_thread() is threading.main_thread()))
        return make_classifier(3, name)

    monkeypatch.setattr(controller, "load_model", load)
    listener = Listener()
    control = Controller({"tiny": make_classifier(), "far": "far"}, images, listener=listener)
    assert calls == []
    control.choose(network="far")
    assert control.join(30)
    for layer in (None, "1", None):
        ask(control, layer=layer, options={"iterations": 1})
        assert control.join(30)
    assert calls == [("far", False)]
    assert listener.phases[:4] == ["ready", "loading", "ready", "working"]
    assert [r.settings.layer for r in control.state.history] == ["3", "1", "3"]


def test_a_network_that_cannot_be_loaded_is_an_error_in_words(classifier, images) -> None:
    control = Controller({"tiny": classifier, "rasnet50": "rasnet50"}, images)
    control.choose(network="rasnet50")
    assert control.join(60)
    assert "did you mean" in control.state.run.message


def test_preparing_tells_what_fits_and_why_the_rest_does_not(classifier, images) -> None:
    control, listener = make(classifier, images)
    control.choose(layer="1")
    assert control.join(30)
    assert listener.phases == ["ready", "working", "ready"]
    offered = control.state.choices
    assert control.state.settings.layer == "1"
    assert offered.shape == (6, 16, 16)
    assert set(offered.methods) | set(offered.refused) == set(ol.list_methods())
    assert "opti-cam" in offered.methods
    assert "cam" in offered.refused
    assert offered.labels == tuple(LABELS)


def test_options_that_have_a_slider_come_from_the_method_with_their_defaults() -> None:
    assert choices.tunable("opti-cam") == {"learning_rate": 0.1, "iterations": 100}
    assert choices.tunable("opti-cam-fast") == {"passes": 20}
    assert choices.tunable("lime") == {"samples": 1000}
    assert choices.tunable("grad-cam") == {}
    assert choices.slider_range("opti-cam", "iterations") == (1, 300)
    assert choices.slider_range("extremal-perturbation", "iterations") == (1, 800)
    assert choices.slider_range("opti-cam", "learning_rate") == pytest.approx((-2, 0))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (
            "vit_tiny_patch16_224",
            [*(f"blocks.{i}" for i in range(11)), "blocks.11.norm1", "blocks.11"],
        ),
        ("resnet18", [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
        (
            "squeezenet1_0",
            [f"features.{i}" for i in (1, 3, 4, 5, 7, 8, 9, 10, 12)] + ["classifier.2"],
        ),
    ],
)
def test_the_layer_slider_stops_at_ends_of_blocks(name, layers) -> None:
    assert choices.block_layers(ol.load_model(name, weights="random", device="cpu")) == layers


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_layer_slider_has_a_handful_of_stops_for_embedded_networks(name) -> None:
    classifier = ol.load_model(name, weights="random", device="cpu")
    layers = choices.block_layers(classifier)
    assert classifier.layer in layers
    assert 5 <= len(layers) <= 10


def test_the_layer_slider_of_a_plain_sequence_stops_at_activations() -> None:
    vgg = ol.load_model("scenes_vgg", weights="random", device="cpu")
    layers = choices.block_layers(vgg)
    modules = dict(vgg.network.named_modules())
    assert vgg.layer in layers
    assert len(layers) >= 5
    assert {type(modules[layer]) for layer in layers} == {nn.ReLU}


def test_the_layer_slider_has_no_more_stops_than_a_hand_can_set() -> None:
    deep = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(40)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    classifier = ol.Classifier(deep, layer="8.0", size=32, device="cpu")
    layers = choices.block_layers(classifier)
    assert 20 <= len(layers) <= choices.MAX_LAYERS + 1
    assert "8.0" in layers
    assert "40" in " ".join(layers)
    assert layers == [layer for layer in classifier.layers if layer in layers]  # forward order


# ---------------------------------------- drawing


def test_where_a_mask_is_bright_in_words() -> None:
    mask = torch.zeros(1, 40, 40)
    assert drawing.where_in_words(mask) == "zero everywhere"
    mask[:, :10, :10] = 1
    assert drawing.where_in_words(mask).endswith("its weight lies in the top left")
    assert drawing.where_in_words(mask).startswith("6%")
    mask[:] = 0
    mask[:, 15:25, 15:25] = 1
    assert drawing.where_in_words(mask).endswith("the centre")
    assert drawing.where_in_words(torch.ones(1, 40, 40)) == "bright nearly everywhere"


def test_pictures_are_png_of_at_most_twice_their_size_on_the_screen() -> None:
    small = drawing.draw_image(torch.rand(3, 20, 30), "small")
    assert (small.width, small.height) == (30, 20)
    large = drawing.draw_image(torch.rand(3, 600, 1200), "large")
    assert (large.width, large.height) == (2 * drawing.TILE, drawing.TILE)
    assert large.png.startswith(b"\x89PNG")


def test_the_curve_says_in_words_where_it_goes() -> None:
    assert "rises from 1.00 to 3.00 in 3" in drawing.draw_curve([1, 2, 3], 10).alt
    assert "falls from 3.00 to 1.00 in 2" in drawing.draw_curve([3, 1], 10).alt


# ---------------------------------------- view


@pytest.fixture
def explorer(classifier, images) -> Iterator[Explorer]:
    explorer = ol.explore(classifier, images, targets=[0, 1, 2])
    assert explorer.join(30)
    yield explorer
    explorer.close()


def shown(explorer: Explorer) -> str:
    """The words in the status line."""
    return html.unescape(re.sub(r"<[^>]+>", "", explorer.status.value))


def choose(explorer: Explorer, **values) -> None:
    """Set controls as code does, and wait until the explorer is ready."""
    for name, value in values.items():
        getattr(explorer, name).value = value
        assert explorer.join(60)


def finish(explorer: Explorer, **values) -> None:
    """Set controls, press Run and wait for the end of the run."""
    choose(explorer, **values)
    explorer.run_button.click()
    assert explorer.join(30)


def test_it_opens_with_the_classifiers_own_settings(explorer, classifier) -> None:
    assert shown(explorer) == "Ready: press Run."
    assert [label for label, _ in explorer.image.options] == ["0: cup", "1: key", "2: bolt"]
    assert explorer.target.value == 0
    assert explorer.network.options == ("tiny",)
    assert explorer.method.value == "opti-cam"
    assert explorer.layer.value == classifier.layer
    assert explorer.iterations.value == 100
    assert (explorer.iterations.min, explorer.iterations.max) == (1, 300)
    assert explorer.learning_rate.value == pytest.approx(0.1)
    assert 10**explorer.learning_rate.min == pytest.approx(0.01)
    assert 10**explorer.learning_rate.max == pytest.approx(1)
    sliders = (explorer.layer, explorer.learning_rate, explorer.iterations)
    assert not any(slider.continuous_update for slider in sliders)
    assert not explorer.run_button.disabled
    assert explorer.cancel_button.disabled
    assert explorer.result is None
    assert repr(explorer) == "Explorer(opti-cam on tiny, image 0)"


def test_it_opens_with_the_methods_that_fit_so_that_one_can_be_chosen_in_code(
    classifier, images, monkeypatch
) -> None:
    def slowly(classifier):
        time.sleep(0.2)
        return {"opti-cam": None, "cam": "it has another head", "grad-cam": None}

    monkeypatch.setattr(choices, "applicable", slowly)
    with closing(ol.explore(classifier, images)) as explorer:
        assert explorer.method.options == ("opti-cam", "grad-cam")
        choose(explorer, method="grad-cam")
        assert explorer.method.value == "grad-cam"


def test_the_run_button_returns_at_once_and_shows_a_result(explorer, classifier, images) -> None:
    finish(explorer, iterations=12, learning_rate=0.5)
    expected = ol.explain("opti-cam", classifier, images[:1], [0], iterations=12, learning_rate=0.5)
    torch.testing.assert_close(explorer.result.mask, expected[0])
    assert shown(explorer).startswith("Done in")
    assert explorer.progress.value == explorer.progress.max == 12
    assert explorer.progress.bar_style == "success"
    views = (explorer.image_view, explorer.overlay_view, explorer.masked_view, explorer.curve_view)
    for view in views:
        assert re.search(r'<img [^>]*alt="[^"]{8,}" src="data:image/png;base64,', view.value)
        assert "olx-old" not in view._dom_classes
    assert panels.probability(explorer.result.before) in explorer.scores_view.value
    assert panels.probability(explorer.result.after) in explorer.scores_view.value
    assert "drop <b>" in explorer.scores_view.value
    assert explorer.history_view.value.count("<tr>") == 2
    assert explorer.run_button.description == "Run"
    assert explorer.cancel_button.disabled


def test_the_bar_moves_and_cancel_ends_a_long_run(explorer) -> None:
    explorer.controller.pace = 0
    explorer.iterations.value = 300
    seen: list[int] = []
    reached = threading.Event()

    def watch(change) -> None:
        seen.append(change["new"])
        if len(seen) == 5:
            reached.set()

    explorer.progress.observe(watch, "value")
    explorer.run_button.click()
    assert not explorer.cancel_button.disabled
    assert explorer.run_button.description == "Restart"
    assert reached.wait(30)
    explorer.cancel_button.click()
    assert shown(explorer).startswith("Cancelled after")
    assert explorer.join(30)
    assert seen[:5] == [1, 2, 3, 4, 5]
    assert explorer.progress.value < 300
    assert explorer.progress.bar_style == "warning"
    assert explorer.cancel_button.disabled
    assert explorer.result is None
    finish(explorer, iterations=3)
    assert explorer.result is not None


def test_cancelled_after_a_preview_keeps_the_map_but_no_score(explorer) -> None:
    explorer.controller.preview = 0
    explorer.iterations.value = 300
    arrived = threading.Event()
    explorer.overlay_view.observe(lambda change: "<img" in change["new"] and arrived.set(), "value")
    explorer.run_button.click()
    assert arrived.wait(30)
    explorer.cancel_button.click()
    explorer.join(30)
    assert "the map is the last one drawn" in shown(explorer)
    assert "<img" in explorer.overlay_view.value
    assert "Not measured" in explorer.scores_view.value


def test_what_was_found_fades_until_the_next_run_replaces_it(explorer, monkeypatch) -> None:
    finish(explorer, method="grad-cam")
    picture = explorer.overlay_view.value
    gate = Gate(monkeypatch)
    explorer.run_button.click()
    assert gate.entered.wait(30)
    assert explorer.overlay_view.value == picture
    assert "olx-old" in explorer.overlay_view._dom_classes
    gate.open.set()
    explorer.join(30)
    assert "olx-old" not in explorer.overlay_view._dom_classes
    assert "olx-old" not in explorer.scores_view._dom_classes


def test_sliders_are_shown_only_for_methods_that_take_them(explorer) -> None:
    takes = {}
    for method in explorer.method.options:
        explorer.method.value = method
        names = ("learning_rate", "iterations", "passes", "samples")
        takes[method] = [getattr(explorer, name).layout.display != "none" for name in names]
        options = ol.methods.METHODS[method].options
        assert takes[method] == [name in options for name in names]
        assert explorer.method.layout.display is None  # a layout is easily shared by accident
    assert takes["opti-cam"] == [True, True, False, False]
    assert takes["opti-cam-fast"] == [False, False, True, False]
    assert takes["grad-cam"] == [False, False, False, False]


def test_passes_are_handed_on(explorer, classifier, images, capfd) -> None:
    finish(explorer, method="opti-cam-fast", passes=6)
    expected = ol.explain("opti-cam-fast", classifier, images[:1], [0], passes=6)
    torch.testing.assert_close(explorer.result.mask, expected[0])
    assert len(explorer.result.objective) == explorer.result.steps == 5
    assert "<td class=n>6</td>" in explorer.history_view.value
    assert "what opti-cam-fast maximises" in explorer.curve_view.value
    assert "image/s" not in capfd.readouterr().err  # no bar of tqdm's


def test_the_layer_can_be_chosen_only_where_it_matters(explorer) -> None:
    for method in explorer.method.options:
        explorer.method.value = method
        assert explorer.layer.disabled != ol.methods.METHODS[method].uses_layer
        hint = f"{method} uses no layer" in explorer.layer_note.value
        assert hint == explorer.layer.disabled
        assert ("8 feature maps of 16 × 16" in explorer.layer_note.value) != hint
    explorer.method.value = "fake-cam"
    assert explorer.layer.disabled
    finish(explorer)
    assert "of tiny" in explorer.overlay_view.value
    assert "at 3 of tiny" not in explorer.overlay_view.value
    assert "the map of fake-cam of tiny for" in explorer.snapshot().alt


def test_each_method_keeps_its_own_settings(explorer, monkeypatch) -> None:
    def slow(classifier, images, targets, *, iterations=800, learning_rate=0.01): ...

    entry = ol.methods.METHODS["grad-cam"]
    monkeypatch.setitem(ol.methods.METHODS._entries, "grad-cam", replace(entry, function=slow))
    explorer.iterations.value, explorer.learning_rate.value = 20, 0.5
    explorer.method.value = "grad-cam"
    assert explorer.iterations.value == 800
    assert explorer.learning_rate.value == pytest.approx(0.01)
    explorer.iterations.value = 700
    explorer.method.value = "opti-cam"
    assert (explorer.iterations.value, explorer.iterations.max) == (20, 300)
    assert explorer.learning_rate.value == pytest.approx(0.5)
    explorer.method.value = "grad-cam"
    assert explorer.iterations.value == 700


def test_a_method_that_tells_no_steps_still_shows_that_it_runs(explorer, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    explorer.method.value = "grad-cam"
    assert "olx-busy" not in explorer.progress._dom_classes
    explorer.run_button.click()
    assert gate.entered.wait(30)
    assert shown(explorer) == "Running grad-cam …"
    assert "olx-busy" in explorer.progress._dom_classes
    assert not explorer.cancel_button.disabled
    gate.open.set()
    assert explorer.join(30)
    assert "olx-busy" not in explorer.progress._dom_classes
    assert shown(explorer).startswith("Done")


def test_the_bar_no_longer_moves_to_and_fro_when_steps_are_told(explorer) -> None:
    explorer.controller.pace = 0
    busy = []
    explorer.progress.observe(
        lambda change: busy.append("olx-busy" in explorer.progress._dom_classes), "value"
    )
    finish(explorer, iterations=4)
    assert busy == [True, False, False, False]  # the first step ends it, after its value is set


def test_a_method_without_iterations_has_no_curve(explorer) -> None:
    finish(explorer, method="grad-cam")
    assert "grad-cam optimises nothing" in explorer.curve_view.value
    assert explorer.progress.value == explorer.progress.max
    assert "<td class=n>–</td>" in explorer.history_view.value


def test_another_image_brings_its_class_and_drops_the_result(explorer) -> None:
    finish(explorer, iterations=2)
    former = explorer.image_view.value
    choose(explorer, image=2)
    assert explorer.target.value == 2
    assert explorer.image_view.value != former
    assert "Image 2: bolt" in explorer.image_view.value
    assert "Press Run" in explorer.overlay_view.value
    assert explorer.result is None
    finish(explorer)
    assert explorer.result.settings.image == 2
    assert explorer.result.target_label == "bolt"


def test_another_image_ends_the_run_of_the_former(explorer, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    explorer.run_button.click()
    assert gate.entered.wait(30)
    explorer.image.value = 1
    gate.open.set()
    assert explorer.join(30)
    assert explorer.result is None
    assert shown(explorer) == "Ready: press Run."


def test_another_class_is_explained_after_run(explorer, classifier, images) -> None:
    finish(explorer, method="grad-cam")
    explorer.target.value = 3
    assert shown(explorer).startswith("Settings changed")
    finish(explorer)
    expected = ol.explain("grad-cam", classifier, images[:1], [3])
    torch.testing.assert_close(explorer.result.mask, expected[0])
    assert "Probability of “ring”" in explorer.scores_view.value
    finish(explorer, target=None)
    assert explorer.target.label == "the one that the network predicts"
    assert explorer.result.settings.target == int(classifier.predict(images[:1]))


def test_another_layer_changes_map_and_methods(explorer, classifier, images) -> None:
    explorer.method.value = "cam"
    choose(explorer, layer="1")
    assert "cam" not in explorer.method.options
    assert explorer.method.value == "opti-cam"
    assert "cam does not fit" in shown(explorer)
    assert "6 feature maps of 16 × 16" in explorer.layer_note.value
    why = r">cam(, [\w+-]+)* do(es)? not fit here: why\?<"
    assert re.search(why, explorer.layer_note.value)
    assert not explorer.iterations.disabled
    finish(explorer, iterations=3)
    expected = ol.explain("opti-cam", classifier.at("1"), images[:1], [0], iterations=3)
    torch.testing.assert_close(explorer.result.mask, expected[0])


def test_a_method_that_does_not_fit_for_a_while_comes_back(explorer, classifier) -> None:
    explorer.method.value = "cam"
    choose(explorer, layer="1")
    finish(explorer)  # as opti-cam, which the user never asked for
    assert explorer.method.value == "opti-cam"
    choose(explorer, layer="3")
    assert explorer.method.value == "cam"
    assert shown(explorer) == "cam fits this layer and is chosen again."
    # A choice made meanwhile is a choice.
    choose(explorer, layer="1")
    explorer.method.value = "grad-cam"
    choose(explorer, layer="3")
    assert explorer.method.value == "grad-cam"


def test_a_run_begun_before_the_layer_is_there_keeps_its_method(explorer, monkeypatch) -> None:
    explorer.method.value = "cam"
    choose(explorer, layer="1")
    with explorer.controller.lock:  # no worker can tell yet that cam fits again
        explorer.layer.value = "3"
        explorer.start()
    assert explorer.join(30)
    assert explorer.method.value == explorer.result.settings.method == "opti-cam"
    assert "changed" not in shown(explorer)


def test_a_result_of_other_settings_is_paler_and_the_status_says_so(explorer) -> None:
    def paler() -> bool:
        found = (explorer.overlay_view, explorer.masked_view, explorer.scores_view)
        (state,) = {"olx-other" in view._dom_classes for view in found}
        return state

    finish(explorer, method="grad-cam")
    assert not paler()
    for control, other in ((explorer.layer, "1"), (explorer.target, 3)):
        own = control.value
        control.value = other
        assert explorer.join(30)
        assert paler()
        assert shown(explorer) == "Settings changed: press Run to see their effect."
        control.value = own
        assert explorer.join(30)
        assert not paler()
        assert shown(explorer) == "These settings gave this map."
    # What a method does not take makes no difference to its map.
    explorer.method.value = "opti-cam"
    assert paler()
    explorer.iterations.value = 7
    explorer.method.value = "grad-cam"
    assert not paler()
    finish(explorer, target=3)
    assert not paler()
    explorer.target.value = 2
    explorer.image.value = 1
    assert not paler()  # there is no result any more


def test_looking_through_the_layers_keeps_the_result_in_sight(explorer, monkeypatch) -> None:
    finish(explorer, method="grad-cam")
    picture = explorer.overlay_view.value
    waiting, go = threading.Event(), threading.Event()
    real = choices.applicable
    monkeypatch.setattr(choices, "applicable", lambda c: waiting.set() or (go.wait(30) and real(c)))
    explorer.layer.value = "1"
    assert waiting.wait(30)
    explorer.layer.value = "2"  # the first look is cut short
    go.set()
    assert explorer.join(30)
    assert explorer.overlay_view.value == picture
    assert explorer.result is not None
    assert shown(explorer).startswith("Settings changed")
    explorer.cancel_button.click()
    assert shown(explorer).startswith("Settings changed")


def test_cancelling_a_preparation_says_so(explorer, monkeypatch) -> None:
    go = threading.Event()
    real = choices.applicable
    monkeypatch.setattr(choices, "applicable", lambda c: go.wait(30) and real(c))
    explorer.layer.value = "1"
    explorer.cancel_button.click()
    go.set()
    assert explorer.join(30)
    assert shown(explorer) == "Cancelled."


def test_another_network_brings_its_layers_and_classes(images) -> None:
    other = ol.Classifier(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        layer="1", size=32, device="cpu",
    )  # fmt: skip
    explorer = ol.explore({"mine": make_classifier(), "other": other}, images, targets=[0, 1, 2])
    assert explorer.network.options == ("mine", "other")
    choose(explorer, network="other")
    assert explorer.layer.value == "1"
    assert explorer.layer.options == ("0", "1")
    assert len(explorer.target.options) == 6
    assert explorer.target.value is None  # the targets given are classes of the first network
    finish(explorer)
    assert explorer.result.settings.network == "other"
    choose(explorer, network="mine")
    assert explorer.target.value == 0
    explorer.close()


def test_errors_are_shown_in_the_interface_and_go_away(explorer, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(
            controller, "explain", lambda *a, **k: (_ for _ in ()).throw(ValueError("odd <image>"))
        )
        finish(explorer)
        with pytest.raises(RuntimeError, match="Odd <image>"):
            explorer.snapshot()
    assert shown(explorer) == "Stopped by an error."
    sentence, _, details = explorer.problem.value.partition("<details>")
    assert "Odd &lt;image&gt;" in sentence
    assert 'role="alert"' in sentence
    assert "Traceback" not in sentence
    assert "Traceback" in details
    assert explorer.progress.bar_style == "danger"
    finish(explorer, method="grad-cam")
    assert explorer.problem.value == ""
    assert shown(explorer).startswith("Done")


def test_a_network_that_fails_to_load_can_be_left_again(images) -> None:
    explorer = ol.explore({"mine": make_classifier(), "gone": "rasnet50"}, images)
    choose(explorer, network="gone")
    assert explorer.layer_note.value == ""
    assert "Unknown network &#x27;rasnet50&#x27;" in explorer.problem.value
    choose(explorer, network="mine")
    assert explorer.problem.value == ""
    assert explorer.layer.value == "3"
    finish(explorer)
    assert shown(explorer).startswith("Done")
    explorer.close()


def test_the_table_keeps_the_last_runs(explorer) -> None:
    explorer.method.value = "fake-cam"
    for _ in range(panels.LAST + 2):
        finish(explorer)
    assert explorer.history_view.value.count("<tr>") == panels.LAST + 1
    assert f"<td class=n>{panels.LAST + 2}</td>" in explorer.history_view.value


def test_any_name_is_text_in_the_explorer(images) -> None:
    labels = [f"{NASTY}{i}" for i in range(4)]
    named = ol.Classifier(
        make_classifier().network, layer="3", size=32, labels=labels, device="cpu", name=NASTY
    )
    with closing(ol.explore(named, images, [0, 1, 2])) as explorer:
        explorer.method.value = "grad-cam"
        assert explorer.snapshot().png
        assert any(NASTY in label for label, _ in explorer.target.options)
        shown = [w.value for w in vars(explorer).values() if isinstance(w, widgets.HTML)]
    assert any("&lt;img src=x" in text for text in shown)
    assert not any("<img src=x" in text for text in shown)
    assert panels.problem(NASTY, NASTY).count("<img") == 0


def test_a_snapshot_is_a_picture_with_words(explorer) -> None:
    explorer.iterations.value = 3
    picture = explorer.snapshot()  # runs, since nothing was run before
    assert explorer.result is not None
    assert picture.alt.startswith("Image 0, the map of opti-cam at 3 of tiny for the class cup")
    assert f"to {explorer.result.after:.3f}" in picture.alt
    assert " The objective " in picture.alt
    assert picture.alt.endswith(" in 3 iterations.")
    assert picture.png.startswith(b"\x89PNG")
    assert len(picture.figure.axes) == 5  # three pictures, a colour scale, a curve
    run = explorer.controller.state.run
    explorer.snapshot()
    assert explorer.controller.state.run == run  # nothing has changed: nothing runs
    explorer.method.value = "grad-cam"
    assert "the map of grad-cam" in explorer.snapshot().alt
    assert "objective" not in explorer.snapshot().alt
    assert len(explorer.snapshot().figure.axes) == 4


def test_probabilities_near_one_keep_the_digits_that_tell_them_apart() -> None:
    values = (0.0, 0.00012, 0.25, 0.99987, 1.0)
    assert [panels.probability(v) for v in values] == [
        "0.000",
        "0.00012",
        "0.250",
        "0.99987",
        "1.000",
    ]


def test_scores_say_what_they_mean(explorer) -> None:
    finish(explorer, method="fake-cam")
    result = explorer.result
    assert "<b>more</b> certain" in panels.scores(replace(result, before=0.2, after=0.4), "")
    assert "<b>less</b> certain" in panels.scores(replace(result, before=0.4, after=0.2), "")
    assert "<b>about as</b> certain" in panels.scores(replace(result, before=0.4, after=0.401), "")


# ---------------------------------------- ol.explore


def test_embedded_networks_bring_their_siblings() -> None:
    shortcut = ol.load_model("scenes_shortcut", weights="random", device="cpu")
    explorer = ol.explore(shortcut, torch.rand(3, 224, 224))
    assert explorer.network.options[0] == "scenes_shortcut"
    assert set(explorer.network.options) == set(NETWORKS)
    assert [label for label, _ in explorer.image.options] == ["0"]
    assert "as the network gets it" in explorer.image_view.value
    explorer.close()


def test_classifiers_come_as_a_list_or_by_name(images, monkeypatch) -> None:
    monkeypatch.setattr("opticam_lite.explorer.load_model", lambda name: make_classifier(0, name))
    explorer = ol.explore(["a", make_classifier(1, "b")], images, run=True)
    assert explorer.network.options == ("a", "b")
    assert explorer.join(30)
    assert explorer.result.settings.network == "a"
    assert ol.explore("a", images).network.options == ("a",)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], ValueError, "no classifier was given"),
        ([nn.ReLU()], TypeError, "is a ReLU; a Classifier"),
        ({"x": 3}, TypeError, "'x' is a int"),
    ],
)
def test_what_is_no_classifier_is_refused(images, given, error, words) -> None:
    with pytest.raises(error, match=re.escape(words)):
        ol.explore(given, images)


def test_two_classifiers_of_one_name_are_refused(classifier, images) -> None:
    with pytest.raises(ValueError, match="two classifiers are called 'tiny'"):
        ol.explore([classifier, classifier], images)


def test_wrong_images_and_targets_are_refused(classifier, images) -> None:
    with pytest.raises(ValueError, match="empty batch"):
        ol.explore(classifier, images[:0])
    with pytest.raises(ValueError, match=r"in\s+\[0, 1\] is needed"):
        ol.explore(classifier, images * 255)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        ol.explore(classifier, images.numpy())
    with pytest.raises(ValueError, match="no class of tiny"):
        ol.explore(classifier, images, targets=[0, 1, 4])
    with pytest.raises(TypeError, match="must be a Classifier"):
        Controller({"tiny": "tiny"}, images)


# ---------------------------------------- without a reader, and at the end

SETUP = """
import torch
from torch import nn
import opticam_lite as ol

network = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
)
classifier = ol.Classifier(network, layer="1", size=224, device="cpu")
explorer = ol.explore(classifier, torch.rand(1, 3, 224, 224))
"""
LONG_RUN = """
import time
explorer.iterations.value = 300
explorer.start()
while explorer.progress.value < 2:
    time.sleep(0.01)
assert explorer.progress.value < 300
"""


def test_a_process_may_end_in_the_middle_of_a_run() -> None:
    code = f"{SETUP}{LONG_RUN}import sys\nassert 'matplotlib.pyplot' not in sys.modules"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert "Exception" not in run.stderr


def test_a_notebook_may_end_in_the_middle_of_a_run() -> None:
    cells = [
        SETUP + "explorer",
        "explorer.method.value = 'grad-cam'\nexplorer.snapshot()",
        "explorer.method.value = 'opti-cam'" + LONG_RUN,
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    widget, snapshot, long_run = (cell.outputs for cell in notebook.cells)
    assert [list(o.data) for o in widget] == [
        ["text/plain", "application/vnd.jupyter.widget-view+json"]
    ]
    assert widget[0].data["text/plain"] == "Explorer(opti-cam on Sequential, image 0)"
    assert "<figure" in snapshot[0].data["text/html"]
    assert "the map of grad-cam" in snapshot[0].data["text/html"]
    assert long_run == []


def test_settings_changed_during_a_run_are_told_at_its_end(explorer, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    explorer.run_button.click()
    assert gate.entered.wait(30)
    explorer.target.value = 3
    gate.open.set()
    assert explorer.join(30)
    assert shown(explorer).startswith("Done")
    assert "Settings changed meanwhile" in shown(explorer)
    explorer.run_button.click()
    assert explorer.join(30)
    assert "changed" not in shown(explorer)


def test_photographs_without_classes_are_shown_by_number(classifier, images) -> None:
    explorer = ol.explore(classifier, images)
    assert [label for label, _ in explorer.image.options] == ["0", "1", "2"]
    assert explorer.target.value is None
    assert "as the network gets it" in explorer.image_view.value
    assert "its class" not in explorer.image_view.value
    finish(explorer)
    label = LABELS[int(classifier.predict(images[:1]))]
    assert f"Probability of “{label}”" in explorer.scores_view.value
    explorer.close()
