"""Fake-CAM: the map that means nothing and wins average drop (Poppi et al. 2021; section 4)."""

from __future__ import annotations

from torch import Tensor

from ..network import Classifier
from .registry import METHODS


@METHODS.register("fake-cam", title="Fake-CAM", source="Poppi et al. 2021", uses_layer=False)
def fake_cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """All ones, the top-left pixel zero.

    Masking changes one pixel, so the probability can hardly drop: AD ≈ 0. On about half of the
    images it rises by a trifle, which counts as a full point in AI. AG shows that nothing is won.

    Args:
        classifier: Not used.
        images: `(N, 3, H, W)` in [0, 1].
        targets: Not used.

    Returns:
        Masks `(N, 1, H, W)` in {0, 1}.
    """
    masks = images.new_ones(len(images), 1, *images.shape[2:])
    masks[:, :, 0, 0] = 0
    return masks
