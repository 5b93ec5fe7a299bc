"""The peers of the methods: other packages, and plain loops where there is none.

A peer gets the network in its usual state: in PyTorch's default memory format and with parameters
that require gradients. It returns masks in this package's form, so that they can be compared.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opticam_lite as ol

with warnings.catch_warnings():  # the packages' own warnings on import
    warnings.simplefilter("ignore")
    import captum.attr
    import pytorch_grad_cam as package
    import quantus
    from pytorch_grad_cam.ablation_layer import AblationLayerVit
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

Explain = Callable[[Tensor, Tensor], Tensor]
Curve = Callable[[Tensor, Tensor, Tensor], Tensor]


class Plain:
    """A classifier's network without this package's optimisations."""

    def __init__(self, classifier: ol.Classifier) -> None:
        network = copy.deepcopy(classifier.network).requires_grad_(True)
        self.network = network.to(memory_format=torch.contiguous_format)
        self.layer = network.get_submodule(classifier.layer)
        self.layout = classifier.feature_layout
        self.classifier = classifier

    def normalised(self, images: Tensor) -> Tensor:
        return self.classifier.normalised(images).contiguous()

    def maps(self, output: Tensor) -> Tensor:
        """The layer's output as maps `(N, K, h, w)`."""
        return self.layout.to_maps(output, self.classifier.size)[0]


@dataclass(frozen=True)
class Peer:
    """Another implementation of a method.

    Attributes:
        name: Name in tables.
        prepare: Takes the plain network and returns a function that explains images and is timed.
        fits: Whether it can explain such a network.
    """

    name: str
    prepare: Callable[[Plain], Explain]
    fits: Callable[[Plain], bool] = field(default=lambda plain: True)


# ------------------------------------------------------------------------------------- packages


def of_package(name: str) -> Peer:
    """A class of the `grad-cam` package. It enlarges and normalises its maps itself."""

    def prepare(plain: Plain) -> Explain:
        options: dict[str, Any] = {}
        if plain.layout.kind != "NCHW":
            options["reshape_transform"] = plain.maps
            if name == "AblationCAM":
                options["ablation_layer"] = AblationLayerVit()

        def explain(images: Tensor, targets: Tensor) -> Tensor:
            chosen = [ClassifierOutputTarget(c) for c in targets.tolist()]
            x = plain.normalised(images)
            with (
                contextlib.redirect_stderr(io.StringIO()),  # its progress bars
                getattr(package, name)(plain.network, [plain.layer], **options) as cam,
            ):
                maps = cam(x, chosen)
            return ol.normalize(torch.as_tensor(maps)[:, None])

        return explain

    return Peer("grad-cam package", prepare)


def captum_grad_cam(plain: Plain) -> Explain:
    peer = captum.attr.LayerGradCam(plain.network, plain.layer)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        maps = peer.attribute(plain.normalised(images), targets, relu_attributions=True)
        return ol.to_masks(maps.detach(), images.shape[2:])

    return explain


def captum_gradient_shap(plain: Plain) -> Explain:
    peer = captum.attr.GradientShap(lambda x: plain.network(plain.normalised(x)))

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        maps = []
        for x, c in zip(images.split(1), targets.tolist(), strict=True):
            torch.manual_seed(0)  # the seed of this package's method for each image
            np.random.seed(0)  # noqa: NPY002
            baselines = torch.cat([torch.zeros_like(x), x])
            phi = peer.attribute(x, baselines, n_samples=50, stdevs=1e-4, target=c)
            maps.append(phi.detach().abs().sum(1, keepdim=True))
        return ol.to_masks(torch.cat(maps), images.shape[2:])

    return explain


# ---------------------------------------------------------------------------------- plain loops


@contextlib.contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Hook modules; their outputs are appended to the list."""
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, out: outputs.append(out)) for m in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def plain_opti_cam(plain: Plain) -> Explain:
    """Eqs. 8-11 of the paper with the settings of its Appendix A, implemented directly.

    The loop stops when the sum of the batch's objectives does not change, and returns the map after
    the last step.
    """

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad(), outputs_of([plain.layer]) as outputs:
            plain.network(plain.normalised(images))
        A = plain.maps(outputs[-1]).clone()
        u = torch.zeros(*A.shape[:2], 1, 1, device=A.device, requires_grad=True)
        optimizer = torch.optim.Adam([u], lr=0.1)

        def masks() -> Tensor:
            S = (u.softmax(1) * A).sum(1, keepdim=True)  # eq. 8
            S = F.interpolate(S, size=images.shape[2:], mode="bilinear", align_corners=False)
            low, high = S.amin((2, 3), keepdim=True), S.amax((2, 3), keepdim=True)
            return (S - low) / (high - low)  # eq. 4

        previous = float("inf")
        for _ in range(100):
            logits = plain.network(plain.normalised(images * masks()))  # eq. 10
            loss = -logits.gather(1, targets[:, None]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if abs(loss.item() - previous) < 1e-10:
                break
            previous = loss.item()
        return masks().detach()

    return explain


def plain_attention(roll_out: bool) -> Callable[[Plain], Explain]:
    """Hooks on timm's attention, unfused; one image at a time, as in the published notebooks."""

    def prepare(plain: Plain) -> Explain:
        network: Any = plain.network
        for block in network.blocks:
            block.attn.fused_attn = False

        def explain(images: Tensor, targets: Tensor) -> Tensor:
            maps = []
            for x in images.split(1):
                with (
                    torch.no_grad(),
                    outputs_of([block.attn.attn_drop for block in network.blocks]) as attentions,
                ):
                    network(plain.normalised(x))
                if roll_out:
                    identity = torch.eye(attentions[0].shape[-1], device=x.device)
                    R = identity
                    for P in attentions:
                        A = P[0].mean(0) + identity
                        R = A / A.sum(-1, keepdim=True) @ R
                else:
                    R = attentions[-1][0].mean(0)
                maps.append(R[0, network.num_prefix_tokens :])
            side = round(len(maps[0]) ** 0.5)
            return ol.to_masks(torch.stack(maps).view(-1, 1, side, side), images.shape[2:])

        return explain

    return prepare


# --------------------------------------------------------------------------------------- curves


def ours_deletion(plain: Plain) -> Curve:
    def curve(images: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
        return ol.metrics.deletion(plain.classifier, images, masks, targets).values

    return curve


def rise_deletion(plain: Plain) -> Curve:
    """RISE's procedure implemented directly: one image and one step at a time."""

    @torch.no_grad()
    def curve(images: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
        curves = []
        for x, S, c in zip(images, masks, targets.tolist(), strict=True):
            order, width = S.flatten().argsort(descending=True, stable=True), x.shape[2]
            x, p = x.clone(), []
            for step in range(x.shape[1] + 1):
                p.append(plain.network(plain.normalised(x[None])).softmax(1)[0, c])
                x.flatten(1)[:, order[step * width : (step + 1) * width]] = 0
            curves.append(torch.stack(p))
        return torch.stack(curves)

    return curve


def quantus_deletion(plain: Plain) -> Curve:
    """Quantus counts values of all channels, and the number per step has to divide H·W."""

    class Logits(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return plain.network(plain.normalised(images))

    def curve(images: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
        measure = quantus.PixelFlipping(
            features_in_step=images.shape[3], perturb_baseline=0.0,
            normalise=False, abs=False, disable_warnings=True,
        )  # fmt: skip
        arrays = (x.cpu().numpy() for x in (images, targets, masks))
        device = str(plain.classifier.device)
        p = measure(Logits().eval(), *arrays, device=device, softmax=True)
        return torch.as_tensor(np.array(p))

    return curve


CURVES = {
    "ours": ours_deletion,
    "plain loop of RISE": rise_deletion,
    "Quantus, three times the steps": quantus_deletion,
}


def _convolutional(plain: Plain) -> bool:
    return plain.layout.kind == "NCHW"


def _timm_attention(plain: Plain) -> bool:
    blocks = getattr(plain.network, "blocks", [None])
    return all(hasattr(getattr(block, "attn", None), "attn_drop") for block in blocks)


_LOOP = "plain loop with hooks"
PEERS: dict[str, tuple[Peer, ...]] = {
    "grad-cam": (
        of_package("GradCAM"),
        Peer("captum", captum_grad_cam, _convolutional),
    ),
    "grad-cam++": (of_package("GradCAMPlusPlus"),),
    "xgrad-cam": (of_package("XGradCAM"),),
    "layer-cam": (of_package("LayerCAM"),),
    "hires-cam": (of_package("HiResCAM"),),
    "score-cam": (of_package("ScoreCAM"),),
    "ablation-cam": (of_package("AblationCAM"),),
    "opti-cam": (Peer("plain loop of the paper", plain_opti_cam),),
    "raw-attention": (Peer(_LOOP, plain_attention(roll_out=False), _timm_attention),),
    "rollout": (Peer(_LOOP, plain_attention(roll_out=True), _timm_attention),),
    "gradient-shap": (Peer("captum", captum_gradient_shap),),
}

# Reasons why a method has no peer, and why masks differ where definitions differ.
NO_PEER = {
    "cam": "no package has it for any network",
    "extremal-perturbation": "TorchRay is not on the package index, and its licence forbids reuse",
    "fake-cam": "nothing to compute",
    "lime": "this implementation uses the package `lime`, too",
    "opti-cam-fast": "of this kit",
    "tibav": "not on the package index",
}
DIFFERENT = {
    "grad-cam++": "the package adds 1e-6 to the denominator, which matters for small gradients",
    "score-cam": "the package masks the normalised image (grey, here black) and aligns corners",
    "ablation-cam": "the package fills maps that have no zero with another value than 0",
    "opti-cam": "the plain loop returns the last map, ours the best; several optima are close",
}
