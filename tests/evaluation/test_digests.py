"""Digests of code: what changes them, and what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opticam_lite.datasets import Folders, Scenes
from opticam_lite.evaluation import measuring
from opticam_lite.evaluation.digests import code_digest
from opticam_lite.methods import METHODS, grad_cam, opti_cam
from opticam_lite.metrics import METRICS, localization
from opticam_lite.network import Classifier
from opticam_lite.network.cut import Cut

SOURCE = '''
import math
SIGMA = 3
WEIGHTS = {"a": (0.5, {1, 2})}
count = 0

def helper(x):
    return x + SIGMA

def decorated(function):
    def inside(x):
        return function(x) / 2
    return inside

class Blur:
    size = 5
    def __call__(self, x):
        return math.sqrt(x) * self.size

@decorated
def method(x, *, power=2):
    """A title."""
    global count
    count += 1
    return Blur()(helper(x)) ** power + WEIGHTS["a"][0] + (lambda y: y + 1)(x)
'''


def digest_of(source: str) -> str:
    """The digest of a method as a notebook has it: its code is in no file."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), names)
    names["count"] = len(source)
    return code_digest(names["method"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SIGMA = 3", "SIGMA = 4"),
        ('(0.5, {1, 2})', '(0.5, {1, 3})'),
        ("x + SIGMA", "x - SIGMA"),
        ("power=2", "power=3"),
        ("y + 1", "y + 2"),
        ("size = 5", "size = 6"),
        ("math.sqrt(x)", "math.exp(x)"),
        ("function(x) / 2", "function(x) / 3"),
        ("@decorated\n", ""),
        ("Blur()(helper(x))", "helper(Blur()(x))"),
    ],
)  # fmt: skip
def test_code_and_what_it_uses_count(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert digest_of(SOURCE.replace(old, new)) != digest_of(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A title.", "Another title."),
        ("    global count", "    # A comment.\n\n    global count"),
        ("SIGMA = 3", "UNUSED = 7\n\n\nSIGMA = 3"),
    ],
)
def test_words_do_not_count(old: str, new: str) -> None:
    assert digest_of(SOURCE.replace(old, new)) == digest_of(SOURCE)


def test_tensors_are_known_by_their_values() -> None:
    def made(kernel: Tensor) -> Callable[[], Tensor]:
        return lambda: kernel.sum()

    assert code_digest(made(torch.ones(3))) == code_digest(made(torch.ones(3)))
    assert code_digest(made(torch.ones(3))) != code_digest(made(torch.tensor([1.0, 1.0, 2.0])))


def of_package() -> list[str]:
    """The digests of what all rows depend on, and of each method and metric."""
    metrics = [
        code_digest(m.function, m.of_case, m.detail) for m in map(METRICS.__getitem__, METRICS)
    ]
    methods = [code_digest(METHODS[name].function) for name in sorted(METHODS)]
    return [code_digest(measuring.measure, Classifier, Scenes), *methods, *metrics]


def test_each_depends_on_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["all", *sorted(METHODS), *METRICS]
    before = of_package()
    assert of_package() == before
    assert len({*before}) == len(before)

    def changed(where: Any, name: str, to: Any = lambda *_: None) -> set[str]:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, to)
            now = of_package()
        return {n for n, a, b in zip(names, before, now, strict=True) if a != b}

    assert changed(opti_cam, "search") == {"opti-cam"}
    assert changed(localization, "_largest_box") == {"OM", "LE", "BA", "SM"}
    assert changed(grad_cam, "features_and_gradients") == {"grad-cam"}
    # Of the classifier, which methods get as an argument, and of all that it is made of.
    assert changed(Cut, "split") == {"all"}
    assert changed(Scenes, "sample") == {"all"}
    assert changed(Folders, "__init__") == {"all"}  # `explain` may load them


@pytest.mark.slow
def test_digests_are_the_same_in_every_process() -> None:
    """Sets, and what was defined in which order, must not matter."""
    folder = Path(__file__).parent
    code = "from test_digests import of_package; print(*of_package())"
    path = os.pathsep.join([str(folder), str(folder.parent), str(folder.parents[1])])
    for seed in "12":
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.split() == of_package()
