"""Memory: how much is taken at a time, and that it is kept for the next time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..classifier import Classifier


def images_at_once(
    classifier: Classifier,
    images: Tensor,
    layers: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return how many images of this size to run through layers at a time, at least 4.

    Args:
        classifier: The network.
        images: `(N, 3, H, W)`; only their size matters.
        layers: Names of the layers that are run, of `classifier.layers`.
        dtype: The number format in which they are run.
    """
    largest = max(math.prod(classifier.layer_shape(layer)) for layer in layers)
    values = largest * math.prod(images.shape[2:]) / math.prod(classifier.size)
    return at_once(classifier, values, dtype)


def at_once(classifier: Classifier, values: float, dtype: torch.dtype = torch.float32) -> int:
    """Return how many runs to do at a time, at least 4, whose largest layer has so many values.

    A layer needs its input, its output and a copy or two in another memory format: four times the
    largest map. On a CPU the fastest chunk is a small one, which stays near the caches (64 MB of
    float32 in all); a GPU wants more to do at a time (512 MB).
    """
    if classifier.device.type == "cpu":
        return max(4, int(2**26 / (4 * 4 * values)))
    return max(4, int(2**29 / (4 * dtype.itemsize * values)))


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of freed memory for the next layer.

    glibc gives large blocks back to the system, and every layer of a network then waits for new
    pages: up to a fifth of the time in small networks. It learns from what it is made to free
    (mallopt(3), M_MMAP_THRESHOLD), so it is shown one block of just under 32 MB, the most from
    which it learns. Nothing is written into it, and to other libraries it is a block like others.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
