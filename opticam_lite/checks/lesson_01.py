"""Exercises of lesson 01, CAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .exercise import Demand, Exercise, Inputs, Wrong
from .inputs import generator, smooth
from .values import Outputs, close

OTHER_WAY = "The rows of `W` belong to classes, its columns to channels."


def _mask_and_boxes(seed: int) -> Inputs:
    boxes = [[3, 5 + seed, 12, 21], [14 + seed, 24, 23, 30], [6, 18, 20, 22]]
    return smooth(seed, 1, 1, 32, 24)[0, 0], torch.tensor(boxes)


def _in_boxes(pool: Callable[[Tensor], Tensor], swapped: bool = False) -> Callable[..., Tensor]:
    """A function (mask, boxes) that returns the pooled values of each box."""

    def inside(mask: Tensor, boxes: Tensor) -> Tensor:
        mask = mask.mT if swapped else mask
        return torch.stack([pool(mask[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes.tolist()])

    return inside


_means, _sums, _swapped = _in_boxes(torch.mean), _in_boxes(torch.sum), _in_boxes(torch.mean, True)


def _marked(mask: Tensor, boxes: Tensor) -> Tensor:
    return _means(mask, boxes) / mask.mean()


def _outside(mask: Tensor, boxes: Tensor) -> Tensor:
    sizes = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (mask.sum() - _sums(mask, boxes)) / (mask.numel() - sizes)


def _on_objects(seed: int) -> Inputs:
    masks = smooth(seed, 4, 1, 20, 24)
    return masks, smooth(60 + seed, 4, 1, 20, 24) > 0.4 + 0.05 * seed


def _sum(values: Tensor) -> Tensor:
    return values.sum(dim=(1, 2, 3))


def _both(repair: Callable[[Tensor], Tensor], W: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes of the weights of two networks that give the same probabilities."""
    return repair(W), repair(W + v)


def _rows(seed: int) -> Inputs:
    W = torch.randn(5, 7, generator=generator(seed))
    return W, 2 * torch.randn(7, generator=generator(30 + seed)) + 1


def _same_probabilities(inputs: Inputs, outputs: Outputs) -> bool:
    moved = outputs[0] - inputs[0]  # the same for every class, or the softmax would notice
    return bool(moved.allclose(moved[:1].expand_as(moved), atol=1e-4))


EXERCISES = {
    "01.1": Exercise(
        asks="a function (mask, boxes) that returns for each box how bright the mask is in it, "
        "compared with the whole mask, a tensor (M,)",
        reference=_marked,
        inputs=_mask_and_boxes,
        wrong=(
            Wrong(
                "the brightness is added up in each box: a large box wins",
                "A large object is not marked better for being large.",
                lambda mask, boxes: _sums(mask, boxes) / mask.mean(),
            ),
            Wrong(
                "x and y are exchanged",
                "Which of the two axes of `mask` comes first: the rows, that is y, or the columns?",
                lambda mask, boxes: _swapped(mask, boxes) / mask.mean(),
            ),
            Wrong(
                "the boxes are not compared with the whole mask",
                "0.3 is bright in a dark mask and dark in a bright one.",
                _means,
            ),
            Wrong(
                "only the brightest pixel of each box counts",
                "One bright pixel at the edge does not mark an object.",
                lambda mask, boxes: _in_boxes(torch.max)(mask, boxes) / mask.mean(),
            ),
            Wrong(
                "this is the share of the brightness that lies in each box",
                "What comes out for a mask that is 1 everywhere? It should be 1 for every box.",
                lambda mask, boxes: _sums(mask, boxes) / mask.sum(),
            ),
            Wrong(
                "the boxes are compared with what lies outside them",
                "Compare with the mean of the whole mask.",
                lambda mask, boxes: _means(mask, boxes) / _outside(mask, boxes),
            ),
            Wrong(
                "the boxes are averaged",
                "If one of two objects is missing, an average hides it.",
                lambda mask, boxes: _marked(mask, boxes).mean(),
            ),
        ),
        hint="What comes out for a mask that is 1 everywhere, and for one that is 1 in a box only?",
        more="`mask[y0:y1, x0:x1].mean()` is the brightness of one box.",
    ),
    "01.2": Exercise(
        asks="a function (masks, on_object) that returns for each image the share of the mask's "
        "brightness that lies on the objects, a tensor (N,)",
        reference=lambda masks, on: _sum(masks * on) / _sum(masks),
        inputs=_on_objects,
        batched=(0, 1),
        within=(0, 1),
        wrong=(
            Wrong(
                "this is the mean brightness on the objects",
                "What comes out for a mask that is 1 everywhere? It should be the objects' share "
                "of the image.",
                lambda masks, on: _sum(masks * on) / _sum(on),
            ),
            Wrong(
                "this is the brightness on the objects as a share of all pixels",
                "Share of what? Of the mask's brightness.",
                lambda masks, on: (masks * on).mean(dim=(1, 2, 3)),
            ),
            Wrong(
                "this is the share that lies beside the objects",
                "1 minus that?",
                lambda masks, on: _sum(masks * ~on) / _sum(masks),
            ),
            Wrong(
                "this is the objects' share of the image: the mask plays no part",
                "The mask weighs each pixel.",
                lambda masks, on: on.float().mean(dim=(1, 2, 3)),
            ),
            Wrong(
                "the mask is cut at one half before it is counted",
                "Every brightness counts as much as it is.",
                lambda masks, on: _sum((masks > 0.5) & on) / _sum(masks > 0.5),
            ),
            Wrong(
                "all images are taken together",
                "One number an image: over which axes does the sum run?",
                lambda masks, on: (masks * on).sum() / masks.sum(),
            ),
            Wrong(
                "the shares are averaged over the images",
                "One number an image is needed.",
                lambda masks, on: (_sum(masks * on) / _sum(masks)).mean(),
            ),
        ),
        hint="What must come out for a mask that is 1 everywhere, and for the objects themselves?",
        more="Two sums over the axes 1, 2 and 3, divided.",
    ),
    "01.3": Exercise(
        asks="a function (W) that returns weights (C, K) of the same probabilities, the same "
        "whatever v was added to the rows of W",
        reference=lambda W: W - W.mean(dim=0),
        inputs=_rows,
        call=_both,
        wrong=(
            Wrong(
                "the weights are returned as they were",
                "Choose a v from W itself, so that what was added before goes away again.",
                lambda W: W.clone(),
            ),
            Wrong(
                "the mean is taken over the channels of each class",
                OTHER_WAY + " v is a row: it has one number a channel.",
                lambda W: W - W.mean(dim=1, keepdim=True),
            ),
            Wrong(
                "the same number is taken away everywhere",
                "v has K numbers, one a channel.",
                lambda W: W - W.mean(),
            ),
            Wrong(
                "all weights are 0: that is the same whatever v was, but it says nothing",
                "The network has to give the same probabilities as before.",
                torch.zeros_like,
            ),
            Wrong(
                "a softmax over the classes forgets v, but it changes the probabilities",
                "Only adding a row to all rows is allowed.",
                lambda W: W.softmax(dim=0),
            ),
            Wrong(
                "the rows are centred, and then stretched, which changes the probabilities",
                "Subtracting is enough.",
                lambda W: (W - W.mean(dim=0)) / W.std(dim=0),
            ),
            Wrong(
                "each row is scaled to length 1",
                "Adding v is undone by subtracting, not by dividing.",
                lambda W: W / W.norm(dim=1, keepdim=True),
            ),
        ),
        demands=(
            Demand(
                "the result still depends on what was added",
                "Call it with W and with W + v, and look at the difference.",
                lambda inputs, outputs: close([outputs[:1]], [outputs[1:]]),
            ),
            Demand(
                "the new weights give other probabilities",
                "The softmax is blind only to what all classes share.",
                _same_probabilities,
            ),
        ),
        hint="What do all rows share after v was added to each of them?",
        more="Take a row that you can compute from W, and that grows by v when all rows do.",
    ),
}
