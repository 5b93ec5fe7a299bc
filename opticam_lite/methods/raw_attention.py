"""Raw attention: the class token's attention in the last block (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from ..masking import to_masks
from ..network import Classifier
from .attention import attentions_of, need_transformer, to_map, unfit
from .registry import METHODS


@METHODS.register(
    "raw-attention",
    title="Raw attention",
    source="Dosovitskiy et al. 2021",
    unfit=unfit,
    uses_layer=False,
)
def raw_attention(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Return the class token's attention to the patches in the last block.

        S = mean over heads of P_L[class token, patches],    P_L = softmax(q kᵀ/√d) of block L

    It does not depend on the target class. Where the head reads the mean of the patches' tokens
    instead of the class token (most BEiT, EVA-02 and DINOv3), S is the mean of the patches' rows.

    Args:
        classifier: A vision transformer; its layer is not used.
        images: `(N, 3, H, W)` in [0, 1].
        targets: Not used.

    Returns:
        Masks `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: If the network is none, with the reason.
    """
    parts = need_transformer("raw-attention", classifier)
    (P,) = attentions_of(parts, classifier.normalised(images), last_only=True)  # (N, T, T)
    S = to_map(parts.rows_read(P), parts.prefix, images.shape[2:])
    return to_masks(S, images.shape[2:])
