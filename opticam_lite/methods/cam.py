"""CAM: class activation mapping (Zhou et al. 2016; eq. 1 of the paper with h = identity)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..masking import to_masks
from ..network import Classifier
from .registry import METHODS


def linear_head(classifier: Classifier) -> nn.Linear | nn.Conv2d | str:
    """Return the linear layer after global average pooling, or why the head is not of this form.

    A 1×1 convolution before the pooling is the same function. Candidates are found by type and
    shape; whether the head computes W·mean(A) + b, without a norm or a relu in between, is then
    checked on random maps, once for each layer of a network.
    """
    found, layer = _heads.setdefault(classifier.network, {}), classifier.layer
    if layer not in found:
        found[layer] = _find_linear_head(classifier)
    return found[layer]


# Network → layer → its head.
_heads: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Linear | nn.Conv2d | str]]
_heads = weakref.WeakKeyDictionary()


def _find_linear_head(classifier: Classifier) -> nn.Linear | nn.Conv2d | str:
    k, h, w = classifier.layer_shape()
    linears = [m for m in classifier.network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    shapes = ((classifier.classes, k), (classifier.classes, k, 1, 1))
    fitting = [m for m in linears if m.weight.shape in shapes]
    if not fitting:
        return f"no linear layer takes the {k} channels of {classifier.layer!r} to the logits"
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *classifier.size, generator=generator).to(classifier.device)
    with torch.no_grad():
        rest = classifier.split(images)[1]
        maps = torch.randn(2, k, h, w, generator=generator).to(classifier.device)
        logits = classifier.head(maps, rest)
        pooled = maps.mean((2, 3))
        for linear in fitting:  # one of them may be an auxiliary head
            y = F.linear(pooled, linear.weight.flatten(1), linear.bias)
            if torch.allclose(y, logits, atol=1e-3):
                return linear
    return (
        f"more than pooling and one linear layer lies between {classifier.layer!r} and the logits"
    )


def unfit(classifier: Classifier) -> str | None:
    """Return why CAM can't explain a classifier, or None if it can."""
    head = linear_head(classifier)
    return head if isinstance(head, str) else None


@METHODS.register("cam", title="CAM", source="Zhou et al. 2016", unfit=unfit)
def cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Weigh the feature maps by the linear classifier's weights of the class.

        S = Σ_k w_ck A_k        with logits y_c = Σ_k w_ck mean(A_k) + b_c

    Args:
        classifier: Cut at the layer before global average pooling and a linear layer.
        images: `(N, 3, H, W)` in [0, 1].
        targets: `(N,)` class indices.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If the head is not global average pooling and one linear layer.
    """
    head = linear_head(classifier)
    if isinstance(head, str):
        raise ValueError(
            f"CAM needs global average pooling and one linear layer after the cut, and in "
            f"{classifier.name} {head}; grad-cam generalises CAM to any network"
        )
    A = classifier.features(images)  # (N, K, h, w)
    w = head.weight.flatten(1)[targets]  # (N, K)
    S = torch.einsum("nk,nkhw->nhw", w, A)[:, None]
    return to_masks(S, images.shape[2:])
