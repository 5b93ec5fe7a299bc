"""Fake-CAM: a map without meaning that has the best average drop (Poppi et al. 2021; section 4)."""

from __future__ import annotations

from torch import Tensor

from ..network import Classifier
from .registry import METHODS


@METHODS.register("fake-cam", title="Fake-CAM", source="Poppi et al. 2021", uses_layer=False)
def fake_cam(classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """All ones, the top-left pixel zero.

    Masking changes one pixel, so the probability hardly changes: AD ≈ 0. On about half of the
    images it rises very little, which AI counts fully. AG ≈ 0 shows that nothing is gained.

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
