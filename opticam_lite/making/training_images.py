"""The training images of the networks: rendered scenes, subsampled, augmented or mislabelled."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.scenes import Scenes
from .rendering import SIZE, VERSION, render
from .sampling import sample

TRAINING_SEED = 1


def _render_some(job: tuple[Path, int, int, int, float]) -> None:
    path, first, last, seed, home_rate = job
    images = np.load(path, mmap_mode="r+")
    for index in range(first, last):
        images[index] = render(sample(seed, index, home_rate=home_rate), size=images.shape[1]).image
    images.flush()


def training_split(
    count: int,
    home_rate: float,
    *,
    seed: int = TRAINING_SEED,
    folder: str | Path = "build/training",
    size: int = SIZE,
    processes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(count, size, size, 3)`` uint8 and labels ``(count,)`` int64 of a training split.

    Rendered on all cores at the first call and then read from ``folder`` (a memory map: 150 kB a
    scene on disk, little in memory).
    """
    path = Path(folder) / f"scenes-v{VERSION}-{seed}-{count}-{home_rate:.2f}-{size}.npy"
    labels = [sample(seed, i, home_rate=home_rate).label for i in range(count)]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # renamed when it is complete
        np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3))
        jobs = [(part, k, min(k + 50, count), seed, home_rate) for k in range(0, count, 50)]
        processes = processes or os.cpu_count() or 1
        if processes == 1:
            for job in jobs:
                _render_some(job)
        else:
            # "spawn": a child forked from a process that has used torch's threads can hang.
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                pool.map(_render_some, jobs, chunksize=1)
        part.rename(path)
    return np.load(path, mmap_mode="r"), np.array(labels, np.int64)


def thinned(count: int, home_rate: float, thin_to: float | None) -> np.ndarray:
    """Indices, in order, of the scenes of a training split that are used.

    Scenes not at home are left out until a share of ``thin_to`` is at home; with None all are used.
    """
    everything = np.arange(count)
    if thin_to is None:
        return everything
    home = np.array([sample(TRAINING_SEED, i, home_rate=home_rate).home for i in everything])
    others = everything[~home]
    # Evenly over the split, so that the share is the same for the held-out scenes at its end.
    wanted = int(home.sum() * (1 - thin_to) / thin_to)
    spread = np.linspace(0, len(others) - 1, wanted).astype(int)
    return np.sort(np.concatenate([everything[home], others[spread]]))


def permuted_scenes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The evaluation scenes as `training_split` returns its own, their labels permuted by a seed.

    Each class keeps its number of scenes; a scene may keep its label, as one in eight does.
    """
    scenes = Scenes()
    images = [(scenes[i].image.permute(1, 2, 0) * 255).round().byte() for i in range(len(scenes))]
    labels = np.array([scenes.target(i) for i in range(len(scenes))], np.int64)
    order = np.random.default_rng(seed).random(len(labels)).argsort()
    return torch.stack(images).numpy(), labels[order]


def halved(images: np.ndarray) -> np.ndarray:
    """Images ``(N, H, W, 3)`` uint8 at half the size: each pixel is the mean of four."""
    n, h, w, c = images.shape
    out = np.empty((n, h // 2, w // 2, c), np.uint8)
    for small, image in zip(out, images, strict=True):  # one at a time: the split is large
        small[:] = image.reshape(h // 2, 2, w // 2, 2, c).mean(axis=(1, 3)) + 0.5
    return out


def plain(batch: Tensor, size: int) -> Tensor:
    """Return images, uint8 ``(N, H, W, 3)``, as float32 ``(N, 3, size, size)`` in [0, 1]."""
    images = batch.permute(0, 3, 1, 2).float() / 255
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def augment(
    batch: Tensor, size: int, *, erase: float, dim: float, generator: torch.Generator
) -> Tensor:
    """Augment a batch of images: translate, scale, mirror, relight, erase and mask.

    batch: uint8 ``(N, H, W, 3)``. erase, dim: Probabilities per image that a rectangle is erased
    and that the image is multiplied by a smooth mask. Returns float32 ``(N, 3, size, size)`` in
    [0, 1].

    What lies outside the image, erased rectangles and masked pixels are **black**: saliency maps
    are measured on masked images, which are so in the distribution of the training images.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    n = len(batch)
    images = batch.permute(0, 3, 1, 2).float() / 255
    zoom, mirror = uniform(-0.3, 0.2).exp(), (uniform(0, 1) < 0.5).float() * -2 + 1
    frame = torch.zeros(n, 2, 3)
    frame[:, 0, 0], frame[:, 1, 1] = zoom * mirror, zoom
    frame[:, :, 2] = uniform(-0.2, 0.2, 2)
    grid = F.affine_grid(frame, [n, 3, size, size], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)

    images = images * uniform(0.7, 1.3, 1, 1, 1) * uniform(0.9, 1.1, 3, 1, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = ((images - mean) * uniform(0.75, 1.25, 1, 1, 1) + mean).clamp(0, 1)

    # Rectangles of up to half the side each way.
    line = (torch.arange(size) + 0.5) / size
    down, across = ((line - uniform(0, 1, 1)).abs() < uniform(0.1, 0.3, 1) for _ in range(2))
    erased = down[:, None, :, None] & across[:, None, None, :]
    erased &= uniform(0, 1, 1, 1, 1) < erase
    # Smooth masks similar to saliency maps: low resolution, range-normalised.
    low = uniform(0, 1, 1, 5, 5)
    mask = F.interpolate(low, (size, size), mode="bilinear", align_corners=False)
    least, most = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
    mask = (mask - least) / (most - least)
    mask = torch.where(uniform(0, 1, 1, 1, 1) < dim, mask, torch.ones(()))
    return images * mask * ~erased
