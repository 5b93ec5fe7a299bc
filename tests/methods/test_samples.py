"""LIME and GradientSHAP average over samples, some at a time, of the quick network."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import make_classifier
from test_lime import patchwork
from torch import Tensor

import opticam_lite as ol

BOTH = ["lime", "gradient-shap"]


@pytest.mark.parametrize("method", BOTH)
def test_passes_are_those_of_the_quick_network(
    method: str, images: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier("cnn")
    expected = ol.explain(method, classifier, images, targets, samples=4)
    monkeypatch.setattr(classifier.network, "forward", None)  # the untouched one can't be run
    masks = ol.explain(method, classifier, images, targets, samples=4)
    assert torch.equal(masks, expected)


def test_the_packages_are_loaded_when_they_are_needed() -> None:
    """Together they would double the time that the package adds to that of PyTorch and timm."""
    code = "import sys, opticam_lite; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"IPython", "captum", "ipywidgets", "lime", "matplotlib", "pandas", "papermill"}
    slow |= {"pyarrow", "ray", "scipy", "skimage", "sklearn"}
    assert slow & set(done.stdout.split()) == set()


def test_names_whose_rooms_are_loaded_when_they_are_used() -> None:
    code = """
import opticam_lite as ol
assert set(ol.__all__) <= set(dir(ol))
from opticam_lite import *
assert (plots.grid, explore, evaluate) == (ol.plots.grid, ol.explore, ol.evaluate)
print(hasattr(ol, "nothing"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("method", BOTH)
def test_chunks_do_not_matter_and_seeds_do(method: str, targets: Tensor) -> None:
    classifier, images = make_classifier("dense"), patchwork()

    def run(**options: object) -> Tensor:
        return ol.explain(method, classifier, images, targets, samples=12, **options)

    steps: list[ol.methods.Step] = []
    first = run(chunk=4, callback=steps.append)
    assert [(s.index, s.total) for s in steps] == [(i, 9) for i in range(1, 10)]  # 3 images × 3
    torch.testing.assert_close(run(chunk=100), first, rtol=0, atol=1e-4)
    torch.testing.assert_close(run(batch_size=1), first, rtol=0, atol=1e-4)
    assert not torch.allclose(run(seed=1), first, atol=1e-2)
