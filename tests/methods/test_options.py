"""Options: their defaults are those of the papers; which numbers they take, up to the last."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import NETWORKS, make_classifier, make_images

import opticam_lite as ol

CHUNKED = {"chunk": None, "callback": None}
# opti-cam: Appendix A of the paper; extremal-perturbation: TorchRay; lime: the authors' package;
# gradient-shap: captum's example.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ablation-cam": CHUNKED,
    "extremal-perturbation": {
        "areas": 0.1, "iterations": 800, "learning_rate": 0.01, "momentum": 0.9, "step": 7,
        "sigma": 21, "levels": 8, "blur": 20, "weight": 300, "growth": 1.0035, "jitter": True,
        "selector": "logit", "precision": "auto", "callback": None,
    },
    "gradient-shap": {"samples": 50, "stdev": 1e-4, "seed": 0, **CHUNKED},
    "lime": {"samples": 1000, "seed": 0, **CHUNKED},
    "opti-cam": {
        "iterations": 100, "learning_rate": 0.1, "objective": "mask", "normalization": "range",
        "selector": "logit", "tolerance": 1e-10, "initial_u": None, "precision": "auto",
        "callback": None,
    },
    "opti-cam-fast": {"passes": 20, "precision": "auto", "callback": None},
    "score-cam": {"precision": "float32", **CHUNKED},
}  # fmt: skip


# They look at pixels, at the attention of all blocks or at nothing.
WITHOUT_LAYER = {
    *("extremal-perturbation", "fake-cam", "gradient-shap", "lime"),
    *("raw-attention", "rollout", "tibav"),
}


@pytest.mark.parametrize("method", ol.list_methods())
def test_facts(method: str) -> None:
    entry = ol.methods.METHODS[method]
    assert entry.defaults == DEFAULTS.get(method, {})
    assert entry.uses_layer == (method not in WITHOUT_LAYER)


INF, NAN = math.inf, math.nan
POSITIVE = ([0.5, 1e-3], [0, -0.5, INF, NAN])
# What is taken and what is refused.
LIMITS: dict[str, dict[str, tuple[list, list]]] = {
    "ablation-cam": {"chunk": ([1], [0])},
    "extremal-perturbation": {
        "areas": ([0.02, 0.98], [0, 1, -0.5, 1.5, [0.5, 1]]),
        "iterations": ([0], [-1]),
        "learning_rate": POSITIVE,
        "momentum": ([0, 0.99], [-0.5, 1]),
        "step": ([1], [0]),
        "sigma": POSITIVE,
        "levels": ([2], [1]),
        "blur": POSITIVE,
        "weight": ([0], [-0.5, INF, NAN]),
        "growth": POSITIVE,
    },
    "gradient-shap": {
        "samples": ([1], [0]),
        "stdev": ([0, 0.5], [-0.5, INF, NAN]),
        "seed": ([0, 2**32 - 1], [-1, 2**32]),
        "chunk": ([1], [0]),
    },
    "lime": {"samples": ([1], [0]), "seed": ([0, 2**31 - 1], [-1, 2**31]), "chunk": ([1], [0])},
    "opti-cam": {
        "iterations": ([0], [-1]),
        "learning_rate": POSITIVE,
        "tolerance": ([0, 0.5], [-0.5, NAN]),
    },
    "opti-cam-fast": {"passes": ([2], [1])},
    "score-cam": {"chunk": ([1], [0])},
}
QUICK = {
    "extremal-perturbation": {"iterations": 1, "step": 8, "sigma": 8.0, "levels": 2},
    "gradient-shap": {"samples": 2},
    "lime": {"samples": 4},
    "opti-cam": {"iterations": 1},
}


@pytest.mark.filterwarnings("ignore:R.2 score")  # of LIME's regression on a single sample
@pytest.mark.parametrize(
    ("method", "option"), [(method, option) for method in LIMITS for option in LIMITS[method]]
)
def test_limits(method: str, option: str) -> None:
    classifier, images = make_classifier("cnn"), make_images(1)
    taken, refused = LIMITS[method][option]
    for value in taken:
        options = {**QUICK.get(method, {}), option: value}
        assert torch.isfinite(ol.explain(method, classifier, images, 0, **options)).all()
    for value in refused:
        with pytest.raises(ValueError, match=rf"^{option} is .*needed"):
            ol.explain(method, classifier, images, 0, **{option: value})


def test_batches_of_one() -> None:
    """The least batch size that is taken, for every network."""
    for kind in NETWORKS:
        classifier, images = make_classifier(kind), make_images(2)
        alone = ol.explain("grad-cam", classifier, images, 0, batch_size=1)
        torch.testing.assert_close(alone, ol.explain("grad-cam", classifier, images, 0))
