"""Loading in one thread and explaining in another leave each other alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import cnn, make_classifier, vit
from torch import Tensor, fx, nn

import opticam_lite as ol
from opticam_lite.registry import seeded

CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns a hundred times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run each function in a thread of its own; return the results, or raise the first error."""
    results: list[Any] = [None] * len(functions)
    errors: list[Exception] = []

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return results


class Meanwhile(nn.Module):
    """While it is traced, something else happens in another thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.network, self.work = cnn(), work
        self.done: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            self.done += in_threads(self.work)
        return self.network(x)


def test_calls_of_other_threads_pass_through_a_trace(images: Tensor) -> None:
    other = vit().eval()
    with torch.no_grad():
        expected = other(images)
    # `torch.no_grad` is of a thread
    network = Meanwhile(lambda: (other(images).detach(), other.patch_embed.proj.weight))
    network.__deepcopy__ = lambda memo: network
    ol.Classifier(network, size=32, device="cpu")
    ((found, weight),) = network.done
    assert torch.equal(found, expected)
    assert weight is dict(other.named_parameters())["patch_embed.proj.weight"]
    assert (nn.Module.__call__, nn.Module.__getattr__) == (CALL, GETATTR)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("grad-cam", {}),
    ("opti-cam", {"iterations": 2}),
    ("gradient-shap", {"samples": 4}),
]


@pytest.mark.slow
def test_explaining_beside_loading_gives_the_same_maps(
    often: None, images: Tensor, targets: Tensor
) -> None:
    def maps(classifier: ol.Classifier, i: int) -> Tensor:
        method, options = METHODS[i % len(METHODS)]
        return ol.explain(method, classifier, images[:1], targets[:1], **options)

    def load(i: int) -> ol.Classifier:
        name = ("test_resnet", "test_vit")[i % 2]
        return ol.load_model(name, weights="random", device="cpu")

    alone = [load(i) for i in range(2)]
    expected = [maps(make_classifier("vit"), i) for i in range(len(METHODS))]
    classifier = make_classifier("vit")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    explained = threading.Event()

    def explain() -> list[Tensor]:
        try:
            return [maps(classifier, i) for i in range(40)]
        finally:
            explained.set()

    def keep_loading(first: int) -> list[ol.Classifier]:
        loaded = [load(first)]
        while not explained.is_set():
            loaded.append(load(first + len(loaded)))
        return loaded

    found, *loaded = in_threads(explain, lambda: keep_loading(0), lambda: keep_loading(1))
    for i, mask in enumerate(found):
        torch.testing.assert_close(mask, expected[i % len(METHODS)], rtol=0, atol=1e-5)
    for first, classifiers in enumerate(loaded):
        for i, one in enumerate(classifiers):
            same = alone[(first + i) % 2]
            assert one.graph_text == same.graph_text
            assert one.layers == same.layers
            weights = zip(one.network.parameters(), same.network.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in weights)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (nn.Module.__call__, nn.Module.__getattr__) == (CALL, GETATTR)


def test_two_threads_share_one_quick_copy(often: None) -> None:
    classifier = make_classifier("vit")
    meet = threading.Barrier(2)

    def quick(cut: ol.Classifier) -> Any:
        meet.wait()
        return cut.quick("float32")._network

    one, other = in_threads(
        lambda: quick(classifier), lambda: quick(classifier.at("blocks.0.norm1"))
    )
    assert one is other is not None


def test_seeds_of_two_threads_do_not_mix(often: None) -> None:
    def draw(seed: int) -> list[Tensor]:
        with seeded(seed):
            return [torch.rand(2) for _ in range(200)]

    state = torch.random.get_rng_state()
    alone = [torch.stack(draw(seed)) for seed in (1, 2)]
    for found, expected in zip(in_threads(lambda: draw(1), lambda: draw(2)), alone, strict=True):
        assert torch.equal(torch.stack(found), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
