"""Exercises of lesson 00, Start here."""

from __future__ import annotations

import torch
from torch import Tensor

from .exercise import Exercise, Inputs, Wrong
from .inputs import generator, smooth

Boxes = list[list[int]]


def _predictions(seed: int) -> Inputs:
    p = (2 * torch.randn(9, 5, generator=generator(seed))).softmax(dim=1)
    return p, torch.randint(5, (9,), generator=generator(100 + seed))


def _of_target(p: Tensor, targets: Tensor) -> Tensor:
    return p[range(len(p)), targets]


def _boxes(seed: int) -> Inputs:
    """Boxes of which the second lies at the upper left edge, a margin, and an upright size."""
    x, y = 2 + seed, 4 + 2 * seed
    edge = [x, y, x + 9, y + 5]
    return [[22, 30 + seed, 30, 42], edge, [24, 8, 31, 12 + seed]], 6 + seed, (60, 40)


def _rectangles(
    boxes: Boxes, margin: int, size: tuple[int, int], *, swapped: bool = False, cut: bool = True
) -> Tensor:
    mask = torch.zeros(1, 1, *size)
    for x0, y0, x1, y1 in boxes:
        left, top = (max(0, v - margin) if cut else v - margin for v in (x0, y0))
        rows, columns = slice(top, y1 + margin), slice(left, x1 + margin)
        if swapped:
            rows, columns = columns, rows
        mask[:, :, rows, columns] = 1
    return mask


def _hull(boxes: Boxes) -> Boxes:
    x0, y0, x1, y1 = torch.tensor(boxes).T
    return [[int(x0.min()), int(y0.min()), int(x1.max()), int(y1.max())]]


def _pair(seed: int) -> Inputs:
    a, b = smooth(seed, 4, 1, 20, 24), smooth(50 + seed, 4, 1, 20, 24)
    return a, (0.5 * a + 0.5 * b) if seed % 2 else (0.2 + 0.6 * b - 0.2 * a).clamp(0, 1)


def _likeness(a: Tensor, b: Tensor) -> Tensor:
    a, b = ((x - x.mean(dim=1, keepdim=True)) for x in (a.flatten(1), b.flatten(1)))
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))


EXERCISES = {
    "00.1": Exercise(
        asks="a function (p, targets) that returns the number of an image, an int",
        reference=lambda p, targets: int(_of_target(p, targets).argmin()),
        inputs=_predictions,
        fresh=6,
        wrong=(
            Wrong(
                "this is the image with the surest target",
                "Smallest or largest?",
                lambda p, targets: int(_of_target(p, targets).argmax()),
            ),
            Wrong(
                "the network's favourite class is looked at, not the target",
                "Which column of `p` belongs to an image's target?",
                lambda p, targets: int(p.amax(dim=1).argmin()),
            ),
            Wrong(
                "each image is paired with the targets of all images",
                "Look at the shape of `p[:, targets]`: one number an image is needed.",
                lambda p, targets: int(p[:, targets].argmin()),
            ),
            Wrong(
                "the smallest probability of any class is looked for",
                "`targets` plays no part in this answer.",
                lambda p, targets: int(p.amin(dim=1).argmin()),
            ),
            Wrong(
                "this is the class of the image that was asked for, not its number",
                "Which image, not: which class?",
                lambda p, targets: int(targets[_of_target(p, targets).argmin()]),
            ),
            Wrong(
                "this is the probability itself",
                "`min` gives the value. What gives its place?",
                lambda p, targets: float(_of_target(p, targets).min()),
            ),
            Wrong(
                "the images are counted from 1",
                "`images[0]` is the first.",
                lambda p, targets: 1 + int(_of_target(p, targets).argmin()),
            ),
        ),
        hint="Write down the probabilities of the targets, one an image, before you compare them.",
        more="`p[range(len(p)), targets]` picks one number of each row.",
    ),
    "00.2": Exercise(
        asks="a function (boxes, margin, size) that returns a mask, a float tensor (1, 1, H, W)",
        reference=_rectangles,
        inputs=_boxes,
        within=(0, 1),
        wrong=(
            Wrong(
                "x and y are exchanged",
                "The first of the two axes of an image is its height: rows, that is y.",
                lambda *inputs: _rectangles(*inputs, swapped=True),
            ),
            Wrong(
                "a box near the edge is lost: its corner has become negative",
                "What does a negative index mean in Python?",
                lambda *inputs: _rectangles(*inputs, cut=False),
            ),
            Wrong(
                "the margin is missing",
                "Where does the rectangle begin if it is to be larger by `margin`?",
                lambda boxes, margin, size: _rectangles(boxes, 0, size),
            ),
            Wrong(
                "only the first box is marked",
                "An image may show several objects.",
                lambda boxes, margin, size: _rectangles(boxes[:1], margin, size),
            ),
            Wrong(
                "only the last box is marked",
                "Where is the mask made: before the loop, or inside?",
                lambda boxes, margin, size: _rectangles(boxes[-1:], margin, size),
            ),
            Wrong(
                "the objects are hidden, and the rest is kept",
                "A mask is 1 where the image is to stay.",
                lambda *inputs: 1 - _rectangles(*inputs),
            ),
            Wrong(
                "one rectangle spans all objects and what lies between them",
                "Each box has a rectangle of its own.",
                lambda boxes, margin, size: _rectangles(_hull(boxes), margin, size),
            ),
        ),
        hint="Draw the mask for one box at the left edge: `ol.plots.gallery` shows it.",
        more="`mask[:, :, y0:y1, x0:x1] = 1` marks a box; `max(0, …)` keeps a corner inside.",
    ),
    "00.3": Exercise(
        asks="a function (first, second) that returns the correlation of two masks for each image, "
        "a tensor (N,)",
        reference=_likeness,
        inputs=_pair,
        fresh=4,
        batched=(0, 1),
        within=(-1, 1),
        wrong=(
            Wrong(
                "the mean of each mask is not taken away before the masks are multiplied",
                "Two masks that are bright all over are not alike for that reason.",
                lambda a, b: torch.cosine_similarity(a.flatten(1), b.flatten(1)),
            ),
            Wrong(
                "this is the covariance: it depends on the contrast of the masks",
                "What is 1 for two equal masks, however pale they are?",
                lambda a, b: (
                    _likeness(a, b)
                    * a.flatten(1).std(dim=1, correction=0)
                    * b.flatten(1).std(dim=1, correction=0)
                ),
            ),
            Wrong(
                "the sign is lost",
                "What is the likeness of a mask and its negative, 1 or −1?",
                lambda a, b: _likeness(a, b).abs(),
            ),
            Wrong(
                "this is the square of the correlation",
                "A correlation can be negative.",
                lambda a, b: _likeness(a, b) ** 2,
            ),
            Wrong(
                "this is how much the masks differ",
                "The less alike, the smaller is a correlation.",
                lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)),
            ),
            Wrong(
                "all images are taken together",
                "One number an image: where does the batch axis go?",
                lambda a, b: _likeness(a.flatten()[None], b.flatten()[None])[0],
            ),
            Wrong(
                "the correlations are averaged",
                "One number an image is needed.",
                lambda a, b: _likeness(a, b).mean(),
            ),
        ),
        hint="What must come out for a mask and itself, and for a mask and its negative?",
        more="`torch.corrcoef` of two rows of pixels is a table of 2 × 2: which cell is it?",
    ),
}
