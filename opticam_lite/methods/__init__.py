"""Saliency methods: one paper a file, each a function `(classifier, images, targets, *, options)`.

Every method walks down one staircase: images → feature maps → weights → saliency map → mask.
`explain` is the door: it checks what it is given, moves it to the network's device and back.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..classifier import Classifier
from .registry import METHODS, Step

__all__ = ["METHODS", "Step", "applicable", "explain", "list_methods"]

# Every file of this folder is imported, which enters its method into METHODS.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def list_methods() -> list[str]:
    """Return the names of all methods."""
    return list(METHODS)


def applicable(classifier: Classifier) -> dict[str, str | None]:
    """Return for each method None if it can explain the classifier, else the reason why not."""
    return {name: METHODS[name].unfit(classifier) for name in METHODS}


def explain(
    method: str,
    classifier: Classifier,
    images: Tensor,
    targets: Tensor | Sequence[int] | int | None = None,
    *,
    batch_size: int = 32,
    **options: Any,
) -> Tensor:
    """Explain what a classifier sees of the target class in each image.

    Args:
        method: A name of `list_methods()`.
        classifier: The network, cut at the layer to explain.
        images: `(N, 3, H, W)`, RGB in [0, 1], not normalised; on any device.
        targets: `(N,)` class indices, or one for all. Default: the predicted classes.
        batch_size: Images computed at a time; bounds the memory. An image's mask does not depend
            on its batch-mates.
        options: The method's own options, see its docstring
            (`ol.methods.METHODS["opti-cam"].function`).

    Returns:
        Masks float32 `(N, 1, H, W)` in [0, 1], on the images' device, so that `images * masks`
        is the masked image.

    Raises:
        ValueError: For an unknown method, wrong shapes, values or options, or a method that
            can't explain this network.
        TypeError: For an unknown option or wrong types.
    """
    entry = METHODS[method]
    entry.check_options(options)
    if not isinstance(classifier, Classifier):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}; make one with ol.load_model(name) or "
            "ol.Classifier(network)"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    images = classifier.check_images(images)
    if not len(images):
        return images.new_zeros(0, 1, *images.shape[2:])
    with torch.inference_mode(False), torch.no_grad():
        # A clone of a tensor made in inference mode may enter autograd; the tensor itself may not.
        x = images.detach().clone().to(classifier.device)
        if targets is None:
            targets = classifier.predict(x)
        c = classifier.check_targets(targets, len(x)).clone().to(classifier.device)
        splits = _per_image(options, len(x), batch_size)
        masks = [
            entry.function(classifier, x_b, c_b, **split)
            for x_b, c_b, split in zip(
                x.split(batch_size), c.split(batch_size), splits, strict=True
            )
        ]
    return torch.cat(masks).to(images.device)


def _per_image(options: dict[str, Any], n: int, batch_size: int) -> list[dict[str, Any]]:
    """Return the options of each batch: options that hold a row an image are split like images."""
    batches = [dict(options) for _ in range(0, n, batch_size)]
    u = options.get("initial_u")
    if isinstance(u, Tensor) and u.ndim == 2:
        if len(u) != n:
            raise ValueError(
                f"initial_u has shape {tuple(u.shape)}; {n} images need one row each, or (K,)"
            )
        for batch, rows in zip(batches, u.split(batch_size), strict=True):
            batch["initial_u"] = rows
    return batches
