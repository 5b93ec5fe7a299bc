"""Saliency methods: one paper a file, each a function `(classifier, images, targets, *, options)`.

Most methods have the same steps: images → feature maps → weights → saliency map → mask. `explain`
checks its arguments, moves images to the network's device and returns the masks on the images'.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..datasets import Dataset, ImageError, load_dataset, of_known_classes
from ..datasets.protocol import check_readable
from ..network import Classifier, CutError, exact, usual
from ..registry import some_of, whole_number
from ..text import log_lines
from .registry import METHODS, Step

__all__ = ["METHODS", "Step", "applicable", "explain", "list_methods"]

# Importing every file of this folder registers its method in METHODS.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def list_methods() -> list[str]:
    """Return the names of all methods, sorted; `METHODS[name]` has a method's title and paper."""
    return sorted(METHODS)


@usual()
def applicable(classifier: Classifier) -> dict[str, str | None]:
    """Return for each method None if it can explain the classifier, else the reason why not."""
    return {name: METHODS[name].unfit(classifier) for name in list_methods()}


Methods = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


def explain(
    method: Methods,
    classifier: Classifier,
    images: Tensor | Dataset | str | Path,
    targets: Tensor | Sequence[int] | int | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = True,
    warn: bool = True,
    **options: Any,
) -> Any:
    """Explain what a classifier sees of the target class in each image.

    Args:
        method: A name of `list_methods()`; or several; or a mapping from names to their options.
        classifier: The network, cut at the layer to explain.
        images: `(N, 3, H, W)`, RGB in [0, 1], not normalised, on any device; or one image
            `(3, H, W)`; or a dataset, or the path of an image or of a folder of images, which are
            read batch by batch.
        targets: `(N,)` class indices, or one for all. Default: those of the dataset, else the
            predicted classes; the predicted one, too, for an image of the dataset without a target
            and, with a warning, for a dataset of classes that the network does not know.
        batch_size: Images computed at a time. Default: `classifier.images_at_once()`, at most 64.
            The mask of an image does not depend on the rest of its batch except for rounding, which
            a search of many steps can amplify: the objective reached stays the same, and single
            pixels of the mask may differ.
        progress: Show a progress bar if it takes longer than two seconds.
        warn: Warn, once a method, of masks that are 0 everywhere.
        options: The method's own options, see its docstring
            (`ol.methods.METHODS["opti-cam"].function`). With several methods, each gets those that
            it takes.

    Returns:
        Masks float32 `(N, 1, H, W)` in [0, 1], on the images' device, so that `images * masks`
        is the masked image. For several methods a dictionary from their names to their masks.

        An image of the dataset that can't be read has a mask of NaN, so that rows stay those of the
        dataset, and is named in a warning.

    Raises:
        ValueError: For an unknown method, wrong shapes, values or options, a method that can't
            explain this network, or images for which its logits are not finite.
        ImageError: If no image can be read.
        TypeError: For an unknown option or wrong types.
    """
    if not isinstance(classifier, Classifier):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}; make one with ol.load_model(name) or "
            "ol.Classifier(network)"
        )
    wanted = _wanted(method, options)
    for name in wanted:
        _check_fit(name, classifier)
    batch_size = None if batch_size is None else whole_number("batch_size", batch_size, 1)
    if isinstance(images, str | Path):
        images = load_dataset(images, classifier=classifier)
    if isinstance(images, Tensor) and images.ndim == 3:
        images = images[None]
    if not isinstance(images, Dataset):
        images = classifier.check_images(images)
        if not len(images):
            empty = {name: images.new_zeros(0, 1, *images.shape[2:]) for name in wanted}
            return empty[method] if isinstance(method, str) else empty
    n, broken = len(images), dict[int, str]()
    if isinstance(images, Dataset):
        check_readable(images, range(n))
    if targets is not None:
        targets = classifier.check_targets(targets, n)
    elif isinstance(images, Dataset):
        images = of_known_classes(classifier, images)
    size = images.shape[2:] if isinstance(images, Tensor) else classifier.size
    batch_size = batch_size or classifier.images_at_once(size)
    masks: dict[str, list[Tensor]] = {name: [] for name in wanted}
    shown = {"unit": "image", "delay": 2, "leave": False, "disable": not progress}
    bar = tqdm(total=n * len(wanted), **shown, **log_lines(tqdm))
    with bar, torch.inference_mode(False), torch.no_grad(), exact(classifier.device):
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            x, known = _batch(classifier, images, targets, indices, broken)
            device = images.device if isinstance(images, Tensor) else x.device
            x = x.to(classifier.device)
            _check_size(classifier, x)
            # One pass for this check, for the predicted classes and for the methods' features.
            shared, y = classifier.remembering(x)
            names = [images.id(i) if isinstance(images, Dataset) else i for i in indices]
            classifier.check_finite(y, names)
            predicted = classifier.to_probabilities(y).argmax(1).tolist()
            wanted_classes = [p if t is None else t for t, p in zip(known, predicted, strict=True)]
            c = classifier.check_targets(wanted_classes, len(x)).to(classifier.device)
            for name in wanted:
                bar.set_description(name, refresh=False)
                own = _rows_of(wanted[name], indices, n)
                with _telling(bar, name, own, len(indices)) as told:
                    result = METHODS[name].function(shared, x, c, **told)
                result[[i - start for i in broken if i >= start]] = math.nan
                masks[name].append(result.to(device))
    if broken:
        listed = "; ".join(broken.values())
        if len(broken) == n:
            raise ImageError(listed)
        lost = f"{len(broken)} of {n} images can't be read, so their masks are NaN: {listed}"
        warnings.warn(lost, stacklevel=2)
    whole = {name: torch.cat(parts) for name, parts in masks.items()}
    for name, found in whole.items() if warn else ():
        if zeros := (~found.flatten(1).any(1)).nonzero()[:, 0].tolist():
            warnings.warn(
                f"{name} gives a mask of zeros for {len(zeros)} of {n} images ({some_of(zeros)}): "
                "its map is constant there, mostly because all that it weighs speaks against the "
                "class, and relu leaves nothing of it; another layer, or opti-cam, may show more",
                stacklevel=2,
            )
    return whole[method] if isinstance(method, str) else whole


def _wanted(method: Methods, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each method, checked."""
    if isinstance(method, str):
        METHODS[method].check_options(options)
        return {method: options}
    given = method if isinstance(method, Mapping) else {name: {} for name in method}
    if not given:
        raise ValueError("no method was given; name at least one of ol.list_methods()")
    for option in options:
        if not any(option in METHODS[name].options for name in given):
            raise TypeError(f"none of {', '.join(given)} has an option {option!r}")
    wanted = {}
    for name, own in given.items():
        METHODS[name].check_options(own)
        shared = {k: v for k, v in options.items() if k in METHODS[name].options}
        wanted[name] = {**shared, **own}
    return wanted


@usual()
def _check_fit(name: str, classifier: Classifier) -> None:
    reason = METHODS[name].unfit(classifier)
    if reason is not None:
        able = [other for other, why in applicable(classifier).items() if why is None]
        raise ValueError(
            f"{name} can't explain {classifier.name}: {reason}. These can: {', '.join(able)}"
        )


def _batch(
    classifier: Classifier,
    images: Tensor | Dataset,
    targets: Tensor | None,
    indices: range,
    broken: dict[int, str],
) -> tuple[Tensor, list[int | None]]:
    """Return images `(n, 3, H, W)` and their targets, None where the predicted one is meant.

    An image that can't be read is added to `broken`, and is black.
    """
    known: list[int | None] = [None] * len(indices)
    if isinstance(images, Tensor):
        # A clone of a tensor made in inference mode may enter autograd; the tensor itself may not.
        x = images[indices.start : indices.stop].detach().clone()
    else:
        samples = {}
        for i in indices:
            try:
                samples[i] = images[i]
            except ImageError as error:
                broken[i] = str(error)
        shape = next((s.image.shape for s in samples.values()), (3, *classifier.size))
        read = [samples[i].image if i in samples else torch.zeros(shape) for i in indices]
        x = classifier.check_images(torch.stack(read))
        known = [samples[i].target if i in samples else None for i in indices]
    return x, known if targets is None else targets[indices.start : indices.stop].tolist()


@contextlib.contextmanager
def _telling(
    bar: tqdm, name: str, options: dict[str, Any], images: int
) -> Iterator[dict[str, Any]]:
    """Update the progress bar by a long method's steps, and by the rest when it is done."""
    before = bar.n
    own = options.get("callback")

    def tell(step: Step) -> None:
        bar.update(before + round(images * step.index / step.total, 2) - bar.n)
        if own is not None:
            own(step)

    yield {**options, "callback": tell} if "callback" in METHODS[name].options else options
    bar.update(before + images - bar.n)


def _check_size(classifier: Classifier, images: Tensor) -> None:
    """Raise ValueError if the network fails on images of this size; many networks take any size."""
    (h, w), (own_h, own_w) = images.shape[2:], classifier.size
    if (h, w) == (own_h, own_w):
        return
    try:
        classifier.head(*classifier.split(images[:1]))
    except (RuntimeError, AssertionError, CutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{classifier.name} fails on images of {h}×{w} ({reason}); it is made for "
            f"{own_h}×{own_w}: resize them, or build the network for that size"
        ) from error


def _rows_of(options: dict[str, Any], indices: range, n: int) -> dict[str, Any]:
    """Return the options for some of n images: those with one row per image are indexed, too."""
    u = options.get("initial_u")
    u = None if u is None else torch.as_tensor(u)
    if u is None or u.ndim != 2:
        return options
    if len(u) != n:
        raise ValueError(
            f"initial_u has shape {tuple(u.shape)}; {n} images need one row each, or (K,)"
        )
    return {**options, "initial_u": u[indices.start : indices.stop]}
