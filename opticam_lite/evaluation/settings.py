"""The settings that determine a run's rows, as JSON: compared when a run is resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..network import Classifier, dtype_of
from .job import Job


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
        "preprocessing": _plain(asdict(job.dataset.settings)) if job.dataset.settings else None,
        "seed": job.seed,
        "batch_size": job.batch_size,
        "device": device,
        "precision": str(dtype_of("auto", classifier.device)).removeprefix("torch."),
        "version": _version(),
        "torch": torch.__version__.partition("+")[0],
        "methods": {name: plain(options) for name, options in job.methods.items()},
        "metrics": job.metrics,
    }


def _version() -> str:
    try:
        return importlib.metadata.version("opticam-lite")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


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
        state.update(_bytes(tensor))
    # Networks with the same weights may compute different functions.
    function = f"{classifier.network!r} {classifier.graph_text} {classifier.normalize}"
    state.update(re.sub(r" at 0x[0-9a-f]+", "", function).encode())
    return state.hexdigest()


def digest(data: bytes) -> str:
    """Return a short digest."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON values: tensors become their digest, callbacks are left out."""
    return {name: _plain(value) for name, value in sorted(options.items()) if not callable(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {digest(_bytes(value))}"
    return json.loads(json.dumps(value, default=str))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
