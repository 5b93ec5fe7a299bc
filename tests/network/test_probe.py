"""What a network is asked before it is cut, and errors that name the place in it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import Sized, cnn
from torch import Tensor, nn
from torch.nn import functional as F

import opticam_lite as ol
from opticam_lite.network import CutError
from opticam_lite.network.probe import hooked


class Forgotten(nn.Module):
    """Drops values always: F.dropout does not know of evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x)


class MadeWithin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Dropout(0.5)(x)


@pytest.mark.parametrize("way", [lambda network: network, Sized])
@pytest.mark.parametrize("module", [Forgotten, MadeWithin])
def test_dropout_that_never_ends_is_found(way: Any, module: Any) -> None:
    layers = list(cnn())
    network = way(nn.Sequential(*layers[:5], nn.Sequential(module(), nn.ReLU()), *layers[5:]))
    name = rf"'(network\.)?5\.0' \({module.__name__}\)"
    with pytest.raises(CutError, match=f"answers differently each time, as does {name} .*dropout"):
        ol.Classifier(network, size=32)
    hooks = [module._forward_hooks for module in network.modules()]
    assert not any(hooks)


def test_a_second_input_is_named_and_wrapped(images: Tensor) -> None:
    class WithMetadata(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = cnn()

        def forward(self, x: Tensor, age: Tensor, *, scale: float = 1.0, **more: Any) -> Tensor:
            return scale * self.network(x) + age[:, None]

    class AtAge(nn.Module):
        def __init__(self, network: nn.Module, age: float) -> None:
            super().__init__()
            self.network, self.age = network, age

        def forward(self, images: Tensor) -> Tensor:
            age = torch.full((len(images),), self.age, device=images.device)
            return self.network(images, age)

    message = r"WithMetadata\.forward takes 'age' besides .* returns self\.network\(images, age\)"
    with pytest.raises(CutError, match=message):
        ol.Classifier(WithMetadata(), size=32)
    classifier = ol.Classifier(AtAge(WithMetadata().eval(), 50.0), size=32, device="cpu")
    assert classifier.layer == "network.network.4"
    torch.testing.assert_close(classifier.logits(images), cnn().eval()(images) + 50)


def test_hooks_are_of_one_thread_and_one_context() -> None:
    module, x, seen = nn.ReLU(), torch.ones(2), []

    def hook(name: str, arguments: Any, output: Tensor) -> Tensor:
        seen.append(name)
        if len(seen) == 2:
            raise ZeroDivisionError
        return 2 * output

    with hooked({"it": module}, hook):
        assert torch.equal(module(x), 2 * x)
        other = threading.Thread(target=lambda: seen.append(module(x)))
        other.start()
        other.join()
    assert seen[0] == "it"
    assert torch.equal(seen.pop(), x)
    with pytest.raises(ZeroDivisionError), hooked({"it": module}, hook):
        module(x)
    assert not module._forward_hooks
