"""Exercises of lesson 07, Transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masking import masked_probabilities
from ..metrics import average_drop, average_gain
from ..network import Classifier
from .exercise import Exercise, Inputs, Wrong
from .inputs import generator, smooth, tiny


def _attention(seed: int, blocks: int, patches: int) -> list[Tensor]:
    """Attention (N, heads, T, T) of each block, with a class token in front."""
    shape = (blocks, 2, 3, patches + 1, patches + 1)
    return [*(2 * torch.randn(shape, generator=generator(seed))).softmax(dim=-1)]


def _one_block(seed: int) -> Inputs:
    return _attention(seed, 1, 6)[0], 2, 3


Row = Callable[[Tensor], Tensor]


def _heads(row: Row, swapped: bool = False) -> Callable[..., Tensor]:
    """A function (P, h, w) that lays a row (N, heads, patches) out as a grid."""

    def maps(P: Tensor, h: int, w: int) -> Tensor:
        return row(P).unflatten(-1, (w, h)).mT if swapped else row(P).unflatten(-1, (h, w))

    return maps


def _row(P: Tensor) -> Tensor:
    return P[:, :, 0, 1:]


def _blocks(seed: int) -> Inputs:
    return (_attention(seed, 4, 5),)


def _own(
    step: Callable[[Tensor], Tensor] | None = None,
    *,
    left: bool = True,
    pick: Callable[[Tensor], Tensor] = lambda product: product[:, 0, 0],
) -> Callable[[list[Tensor]], Tensor]:
    """A function that follows the class token's share; `step` makes A of P."""

    def own(attention: list[Tensor]) -> Tensor:
        product, shares = torch.eye(attention[0].shape[-1]), []
        for P in attention:
            A = _step(P) if step is None else step(P)
            product = A @ product if left else product @ A
            shares.append(pick(product).mean())
        return torch.stack(shares)

    return own


def _with_identity(P: Tensor) -> Tensor:
    return P.mean(dim=1) + torch.eye(P.shape[-1])


def _step(P: Tensor) -> Tensor:
    A = _with_identity(P)
    return A / A.sum(dim=-1, keepdim=True)


def _to_brighten(seed: int) -> Inputs:
    classifier, x = tiny(seed), smooth(seed, 5, 3, 32, 32)
    order = classifier.logits(x).argsort(dim=1)
    targets = order[range(5), torch.tensor([3, 2, 1, 3, 2])]
    return classifier, x, smooth(70 + seed, 5, 1, 32, 32), targets, (0.5, 0.25)[seed % 2]


Power = Callable[[Tensor, float], Tensor]


def _scores(power: Power) -> Callable[..., tuple[float, float]]:
    """A function that returns AD and AG of the masks that `power` makes."""

    def scores(
        classifier: Classifier, images: Tensor, masks: Tensor, targets: Tensor, gamma: float
    ) -> tuple[float, float]:
        p, o = masked_probabilities(classifier, images, power(masks, gamma), targets)
        return average_drop(p, o), average_gain(p, o)

    return scores


_reference_scores = _scores(lambda masks, gamma: masks**gamma)


def _image_powered(
    classifier: Classifier, images: Tensor, masks: Tensor, targets: Tensor, gamma: float
) -> tuple[float, float]:
    rows = range(len(images))
    p = classifier.probabilities(images)[rows, targets]
    o = classifier.probabilities((images * masks) ** gamma)[rows, targets]
    return average_drop(p, o), average_gain(p, o)


EXERCISES = {
    "07.1": Exercise(
        asks="a function (P, h, w) that returns a map for each head, a tensor (N, heads, h, w)",
        reference=_heads(_row),
        inputs=_one_block,
        batched=(0,),
        wrong=(
            Wrong(
                "this is a column: how much the patches attend to the class token",
                "Row i of P says what token i looks at.",
                _heads(lambda P: P[:, :, 1:, 0]),
            ),
            Wrong(
                "the class token is not set aside, and the last patch is missing",
                "Token 0 is no patch.",
                _heads(lambda P: P[:, :, 0, :-1]),
            ),
            Wrong(
                "this is the row of the first patch",
                "Which token does the network's head read?",
                _heads(lambda P: P[:, :, 1, 1:]),
            ),
            Wrong(
                "this is the row of the last token",
                "Where does the class token stand?",
                _heads(lambda P: P[:, :, -1, 1:]),
            ),
            Wrong(
                "the grid is laid out by columns",
                "Patches are counted row by row.",
                _heads(_row, swapped=True),
            ),
            Wrong(
                "the heads are averaged",
                "Each head by itself.",
                lambda P, h, w: _row(P).mean(dim=1).unflatten(-1, (h, w)),
            ),
            Wrong(
                "all tokens are averaged, not the class token's row taken",
                "One row of P.",
                _heads(lambda P: P.mean(dim=2)[:, :, 1:]),
            ),
        ),
        hint="Two places of P are fixed, the row and where the columns begin; then make a grid.",
        more="`.unflatten(-1, (h, w))` makes a grid of h·w numbers.",
    ),
    "07.2": Exercise(
        asks="a function (attention) that returns the class token's share after each block, (L,)",
        reference=_own(),
        inputs=_blocks,
        wrong=(
            Wrong(
                "the skip connection is missing: the identity is not added",
                "What does the paper of rollout add to P?",
                _own(lambda P: P.mean(dim=1)),
            ),
            Wrong(
                "the rows are not divided by their sum",
                "What does a row of P + I add up to?",
                _own(_with_identity),
            ),
            Wrong(
                "later blocks stand to the right",
                "In the equation, A of the last block stands first.",
                _own(left=False, pick=lambda product: product[:, 0, 0]),
            ),
            Wrong(
                "this is what the patches get: the rest",
                "1 minus that?",
                _own(pick=lambda product: product[:, 0, 1:].sum(dim=1)),
            ),
            Wrong(
                "each block is looked at by itself",
                "The share after block 2 depends on block 1.",
                lambda attention: torch.stack([_step(P)[:, 0, 0].mean() for P in attention]),
            ),
            Wrong(
                "only one head is followed",
                "Rollout takes the mean over the heads.",
                _own(lambda P: _step(P[:, :1])),
            ),
            Wrong(
                "this is the share after the last block alone",
                "One number for each block: note it inside the loop.",
                lambda attention: _own()(attention)[-1],
            ),
            Wrong(
                "columns are divided by their sum, not rows",
                "A row says how a token mixes all others: it is the row that adds up to 1.",
                _own(lambda P: _with_identity(P) / _with_identity(P).sum(dim=-2, keepdim=True)),
            ),
        ),
        hint="It is the loop of `rollout`, with a look at one number of the product in each round.",
        more="`product[:, 0, 0]` is that number for each image; take the mean over the images.",
    ),
    "07.3": Exercise(
        asks="a function (classifier, images, masks, targets, gamma) that returns AD and AG of the "
        "brightened masks, two numbers",
        reference=_reference_scores,
        inputs=_to_brighten,
        wrong=(
            Wrong(
                "the masks are as dark as before",
                "`gamma` plays no part.",
                _scores(lambda masks, gamma: masks),
            ),
            Wrong(
                "the masks are multiplied, which makes them darker",
                "A power, not a product.",
                _scores(lambda masks, gamma: gamma * masks),
            ),
            Wrong(
                "the exponent is the inverse",
                "For γ < 1 the mask is to become brighter.",
                _scores(lambda masks, gamma: masks ** (1 / gamma)),
            ),
            Wrong(
                "the masked image is brightened, not the mask",
                "First the power of the mask, then the product.",
                _image_powered,
            ),
            Wrong(
                "AD and AG are exchanged",
                "In which order are they asked for?",
                lambda *given: _reference_scores(*given)[::-1],
            ),
            Wrong(
                "the masks are turned round before they are brightened",
                "Where the map is bright the image stays.",
                _scores(lambda masks, gamma: (1 - masks) ** gamma),
            ),
            Wrong(
                "these are fractions",
                "`ol.metrics` gives percent.",
                lambda *given: [value / 100 for value in _reference_scores(*given)],
            ),
        ),
        hint="One line makes the masks brighter; two calls do the rest.",
        more="`ol.masked_probabilities` gives p and o of the brightened masks.",
    ),
}
