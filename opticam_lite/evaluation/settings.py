"""The settings that determine a run's rows, as JSON: compared when a run is resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from dataclasses import asdict
from typing import Any

import torch

from ..methods import METHODS
from ..metrics import METRICS
from ..network import Classifier, dtype_of
from .digests import as_json, bytes_of, code_digest, digest
from .job import Job
from .measuring import measure
from .variants import Variant

# Packages that numbers depend on, whatever the method.
PACKAGES = ("opticam-lite", "torch", "torchvision", "timm", "pillow")


def describe(job: Job, device: str) -> dict[str, Any]:
    """Return the settings of a run: all that its rows depend on.

    Args:
        job: The run.
        device: Kind of device that computes, `"cpu"` or `"cuda"`.
    """
    classifier = job.classifier
    return {
        "network": classifier.name,
        "weights": weights_digest(classifier),
        "layer": classifier.layer,
        "activation": classifier.activation,
        "dataset": job.dataset.name,
        "images": len(job.chosen),
        "ids": digest(json.dumps([(i, job.dataset.id(i)) for i in job.chosen]).encode()),
        "contents": digest(json.dumps([job.dataset.fingerprint(i) for i in job.chosen]).encode()),
        "targets": digest(json.dumps([job.dataset.target(i) for i in job.chosen]).encode()),
        "preprocessing": as_json(asdict(job.dataset.settings)) if job.dataset.settings else None,
        "seed": job.seed,
        "batch_size": job.batch_size,
        "device": device,
        "precision": str(dtype_of("auto", classifier.device)).removeprefix("torch."),
        "code": code_digest(measure, type(classifier), type(job.dataset)),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name).partition("+")[0] for name in PACKAGES},
        "codes": {
            "methods": {label: _code_of_variant(own) for label, own in job.variants.items()},
            "metrics": {name: _code_of_metric(name) for name in job.metrics},
        },
        "methods": {label: own.settings for label, own in job.variants.items()},
        "metrics": job.metrics,
    }


def version(package: str) -> str:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def _code_of_variant(variant: Variant) -> str:
    """Return what tells the rows of one variant, code and settings, apart from those of others."""
    settings, function = json.dumps(variant.settings), METHODS[variant.method].function
    return code_digest(variant.label, settings, function)


def _code_of_metric(name: str) -> str:
    metric = METRICS[name]
    return code_digest(name, metric.function, metric.of_case, metric.detail)


def weights_digest(classifier: Classifier) -> str:
    """Return a digest of the network's weights, its layers and its normalisation."""
    state = hashlib.blake2b(digest_size=16)
    tensors = classifier.network.state_dict() | dict(classifier.network.named_buffers())
    # The network's input is x / std − mean / std, in float32.
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
        for v in (classifier.mean, classifier.std)
    )
    tensors |= {"mean": (-mean / std).float(), "std": (1 / std).float()}
    for name, tensor in tensors.items():
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(bytes_of(tensor))
    # Networks with the same weights may compute different functions.
    function = f"{classifier.network!r} {classifier.graph_text} {classifier.normalize}"
    state.update(re.sub(r" at 0x[0-9a-f]+", "", function).encode())
    return state.hexdigest()
