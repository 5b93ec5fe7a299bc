"""Exercises of lesson 06, Fake-CAM."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..datasets import load_dataset
from ..masking import masked_probabilities
from ..methods import explain
from ..metrics import average_drop, average_gain, average_increase, drop
from ..models import load_model
from ..network import Classifier
from .exercise import Demand, Exercise, Inputs, Wrong
from .inputs import smooth
from .values import Outputs

LEAST_AG, MOST_AD = 3, 5  # what exercise 2 asks for, in percent
Make = Callable[[Tensor], Tensor]


def _hidden(images: Tensor, rows: slice, columns: slice) -> Tensor:
    masks = torch.ones_like(images[:, :1])
    masks[:, :, rows, columns] = 0
    return masks


def _middle(length: int, size: int) -> slice:
    return slice((length - size) // 2, (length - size) // 2 + size)


def _square(place: Callable[[int, int], slice], both: bool = True) -> Callable[[int], Make]:
    """A function size → masks that hide a square whose rows and columns `place` says."""

    def hide(size: int) -> Make:
        def make(images: Tensor) -> Tensor:
            rows, columns = (place(length, size) for length in images.shape[2:])
            return _hidden(images, rows, columns if both else slice(None))

        return make

    return hide


_hide_middle = _square(_middle)


def _made(hide: Callable[[int], Make], size: int, images: Tensor) -> Tensor:
    return hide(size)(images)


def _scenes_from(start: int, count: int) -> tuple[Tensor, Tensor]:
    images, targets = load_dataset("scenes").batch(range(start, start + count))
    assert targets is not None
    return images, targets


def _scenes(seed: int) -> Inputs:
    """Images that the lesson does not use, always the same ones."""
    return (_scenes_from(124, 24)[0],)


@cache
def _network() -> Classifier:
    return load_model("scenes_resnet", device="cpu")


@cache
def _before() -> Tensor:
    images, targets = _scenes_from(124, 24)
    return _network().probabilities(images)[range(24), targets]


def _before_and_after(masks: Tensor) -> tuple[Tensor, Tensor]:
    images, targets = _scenes_from(124, 24)
    return _before(), _network().probabilities(images * masks)[range(24), targets]


def _twice(cheat: Make, images: Tensor) -> tuple[Tensor, Tensor]:
    """The masks of images, and of quite different ones."""
    return cheat(images), cheat(1 - images.flip(0, 3))


def _same_for_all(inputs: Inputs, outputs: Outputs) -> bool:
    return all(bool((masks == outputs[0][:1]).all()) for masks in outputs)


def _border(width: int, value: float = 1.0) -> Make:
    def make(images: Tensor) -> Tensor:
        masks = torch.zeros_like(images[:, :1])
        masks[:, :, width:-width, width:-width] = value
        return masks

    return make


def _constant(value: float) -> Make:
    return lambda images: torch.full_like(images[:, :1], value)


def _corner(images: Tensor) -> Tensor:
    return _hidden(images, slice(1), slice(1))


@cache
def _three_kinds() -> tuple[Tensor, ...]:
    """Masks of Opti-CAM, of the dimmer and of Fake-CAM."""
    images, targets = _scenes_from(210, 3)
    levels = torch.linspace(0.5, 1, 6).view(-1, 1, 1, 1, 1)
    ones = torch.ones_like(images[:, :1])
    o = [masked_probabilities(_network(), images, level * ones, targets)[1] for level in levels]
    dimmer = levels[torch.stack(o).argmax(dim=0)][:, 0] * ones
    opti = explain("opti-cam", _network(), images, targets, iterations=6, precision="float32")
    return opti, dimmer, _corner(images)


def _candidates(seed: int) -> Inputs:
    network = load_model("scenes_resnet", device="cpu")
    return network, *_scenes_from(210, 3), [masks.clone() for masks in _three_kinds()]


Number = Callable[[Classifier, Tensor, Tensor, Tensor], object]


def _numbers(
    number: Number, network: Classifier, images: Tensor, targets: Tensor, masks: list[Tensor]
) -> list[float]:
    """The number of each of the three kinds of mask."""
    return [float(number(network, images, some, targets)) for some in masks]  # type: ignore[arg-type]


def _metric(metric: Callable[[Tensor, Tensor], float]) -> Number:
    return lambda network, x, masks, c: metric(*masked_probabilities(network, x, masks, c))


def _lost_by_moving(network: Classifier, x: Tensor, masks: Tensor, c: Tensor) -> float:
    moved = masks.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3))
    here, there = (masked_probabilities(network, x, s, c)[1] for s in (masks, moved))
    return 100 * float(drop(here, there).mean())


def _small(place: int) -> Callable[[Inputs, Outputs], bool]:
    """Whether the number of a kind of mask is less than a tenth of Opti-CAM's."""
    return lambda inputs, outputs: bool(outputs[0][place].abs() < 0.1 * outputs[0][0].abs())


EXERCISES = {
    "06.1": Exercise(
        asks="the function hide_middle(size), which returns a function that makes the masks "
        "(N, 1, H, W) of images",
        reference=_hide_middle,
        inputs=lambda seed: (1 + 4 * seed, smooth(seed, 3, 3, 31, 45)),
        call=_made,
        batched=(1,),
        within=(0, 1),
        wrong=(
            Wrong(
                "the square lies in the top left corner",
                "Where does it begin if as much is to be left on both sides?",
                _square(lambda length, size: slice(size)),
            ),
            Wrong(
                "the square begins in the middle: it should have its centre there",
                "Half of it lies before the middle.",
                _square(lambda length, size: slice(length // 2, length // 2 + size)),
            ),
            Wrong(
                "only the square is kept, and the rest is hidden",
                "0 hides.",
                lambda size: lambda images: 1 - _hide_middle(size)(images),
            ),
            Wrong(
                "a bar over the whole width is hidden",
                "The last axis of the masks needs a range, too.",
                _square(_middle, both=False),
            ),
            Wrong(
                "the square is twice as large as it should be",
                "`size` is its side, not half of it.",
                _square(lambda length, size: slice(length // 2 - size, length // 2 + size)),
            ),
            Wrong(
                "height and width are exchanged",
                "`images.shape` is (N, 3, H, W).",
                lambda size: (
                    lambda images: _hidden(
                        images, _middle(images.shape[3], size), _middle(images.shape[2], size)
                    )
                ),
            ),
            Wrong(
                "nothing is hidden",
                "Where do the masks become 0?",
                lambda size: lambda images: torch.ones_like(images[:, :1]),
            ),
            Wrong(
                "the masks have three channels",
                "One mask serves all three colours: `images[:, :1]`.",
                lambda size: lambda images: _hide_middle(size)(images).expand_as(images),
            ),
        ),
        hint="Make the masks of a small image with `size=3`, and print them.",
        more="The square begins at (H − size) // 2, and that is row or column 0 for the largest.",
    ),
    "06.2": Exercise(
        asks="a function (images) that returns masks (N, 1, H, W), the same for all images",
        reference=_border(15, 0.8),
        inputs=_scenes,
        fresh=1,
        call=_twice,
        within=(0, 1),
        wrong=(
            Wrong(
                "the masks hide nothing, so nothing is won",
                "Begin with something that changes the image a little.",
                _constant(1.0),
            ),
            Wrong(
                "this is Fake-CAM itself, whose AG is next to nothing",
                "Hide or darken more than a pixel.",
                _corner,
            ),
            Wrong(
                "half the brightness everywhere loses too much",
                "Somewhat brighter?",
                _constant(0.5),
            ),
            Wrong(
                "a hundredth less brightness wins next to nothing",
                "Somewhat darker?",
                _constant(0.99),
            ),
            Wrong(
                "so broad a border hides parts of the objects, which loses too much",
                "A narrower one?",
                _border(40),
            ),
            Wrong(
                "everything is hidden",
                "1 keeps, 0 hides.",
                _constant(0.0),
            ),
            Wrong(
                "the mask is the image in grey: it looks at the image",
                "From `images` only the shape may be used.",
                lambda images: images.mean(dim=1, keepdim=True),
            ),
        ),
        demands=(
            Demand(
                "the masks differ from image to image: they look at the image, at the network, "
                "or are drawn by chance",
                "From `images` only the shape may be used.",
                _same_for_all,
            ),
            Demand(
                f"on other images the masks lose {MOST_AD} % or more of the probability (AD)",
                "Hide less, or darken less.",
                lambda inputs, outputs: average_drop(*_before_and_after(outputs[0])) < MOST_AD,
            ),
            Demand(
                f"on other images the masks win less than {LEAST_AG} % (AG)",
                "Where in an image does clutter stand, and where hardly ever the subject?",
                lambda inputs, outputs: average_gain(*_before_and_after(outputs[0])) > LEAST_AG,
            ),
        ),
        hint="`score(my_cheat)` shows the metrics on the lesson's images.",
        more="Combine two things that each win a little: darker everywhere, and a hidden part.",
    ),
    "06.3": Exercise(
        asks="a function (classifier, images, masks, targets) that returns a number for the masks",
        reference=_lost_by_moving,
        inputs=_candidates,
        fresh=1,
        call=_numbers,
        wrong=(
            Wrong(
                "this is AG, of which the dimmer has some",
                "Ask something that depends on *where* the mask is bright.",
                _metric(average_gain),
            ),
            Wrong(
                "this is AI, of which Fake-CAM and the dimmer have plenty",
                "Ask something that depends on *where* the mask is bright.",
                _metric(average_increase),
            ),
            Wrong(
                "this is AD, which is good for whoever hides nothing",
                "Ask something that depends on *where* the mask is bright.",
                _metric(average_drop),
            ),
            Wrong(
                "this is how bright the masks are",
                "A mask may be bright and point nowhere.",
                lambda network, x, masks, c: masks.mean(),
            ),
            Wrong(
                "this is how dark the masks are: the dimmer is dark, too",
                "Dark everywhere is not the same as dark in places.",
                lambda network, x, masks, c: 1 - masks.mean(),
            ),
            Wrong(
                "this is the distance from the darkest to the brightest pixel: Fake-CAM has "
                "one pixel for that",
                "One pixel should not be enough.",
                lambda network, x, masks, c: (
                    masks.amax(dim=(1, 2, 3)) - masks.amin(dim=(1, 2, 3))
                ).mean(),
            ),
            Wrong(
                "this is the probability behind the masks, high for whoever hides nothing",
                "Ask something that depends on *where* the mask is bright.",
                lambda network, x, masks, c: masked_probabilities(network, x, masks, c)[1].mean(),
            ),
        ),
        demands=(
            Demand(
                "Fake-CAM's number is not small beside Opti-CAM's",
                "What would your number be for a mask with a single black pixel?",
                _small(2),
            ),
            Demand(
                "the dimmer's number is not small beside Opti-CAM's",
                "What would your number be for a mask that is 0.7 everywhere?",
                _small(1),
            ),
        ),
        hint="The number of a mask that is the same everywhere should be 0.",
        more="How unlike are the pixels of a mask? Or: does the network mind if it is moved?",
    ),
}
