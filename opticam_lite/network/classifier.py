"""`Classifier`: a frozen network with its normalisation, labels, device and layer to explain."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..registry import check_name, some_of, whole_number
from .activation import ACTIVATIONS
from .cut import Rest, Traced
from .feature_maps import FeatureLayout
from .probe import logits_of
from .quick_copy import QuickCopy, dtype_of, exact, lay_out, usual
from .rerun import opened, reaching
from .transformer import Transformer

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How image files become the network's input (`ol.load_image` follows it).

    Attributes:
        size: Height and width of the centre crop, in pixels.
        resize: The shorter side is resized to this many pixels before the crop.
        interpolation: `"bilinear"` or `"bicubic"`.
    """

    size: tuple[int, int] = (224, 224)
    resize: int = 256
    interpolation: str = "bilinear"


@dataclass
class _Memory:
    """The features of a batch of images."""

    images: Tensor
    maps: Tensor
    rest: Rest
    logits: Tensor
    recalls: int = 0

    def holds(self, images: Tensor) -> bool:
        same = self.images.shape == images.shape and self.images.device == images.device
        return same and not images.requires_grad and torch.equal(self.images, images)


class Classifier:
    """A network in evaluation mode, without parameter gradients, cut at one layer.

    The network is copied, so yours stays as it is. Images are float32 `(N, 3, H, W)`, RGB, in
    [0, 1] and **not** normalised: `mean` and `std` are applied inside, after any masking. Logits
    equal those of your network up to rounding (some 1e-6), because weights and images lie in
    memory with their channels last where that is faster.

    Args:
        network: Any `nn.Module`, images → logits `(N, classes)`, or an output that has them as
            `.logits` or `["logits"]`. It is copied, with the forward hooks that you put on it. One
            that `torch.fx` can't trace is cut by running it again: see `network.rerun`.
        layer: Qualified name of the layer whose feature maps are combined. Default: the last
            convolutional output, or the first norm of the last block of a transformer (App. A).
        mean, std: Normalisation of the channels, three values each. Default: none.
        labels: Names of the classes, in the order of the logits. Default: "class 0", …
        size: Side, or (height, width), of the images that the network is made for. Default: 224.
        preprocessing: How image files are resized and cropped. Default: shorter side to
            size / 0.875, centre crop of `size`, bilinear.
        device: `"auto"` (a CUDA GPU where there is one, else the CPU) or any torch device.
        normalize: False leaves the normalisation out (paper, Appendix H).
        name: Name in tables and figures.
        activation: What makes probabilities of the logits: `"softmax"`, over all classes, or
            `"sigmoid"` for networks with several labels an image (or with one logit): p is then
            each class's own probability, in methods, metrics, tables and reports alike.
        copy: False if the network is yours to give away, which saves its memory once: it is frozen,
            converted and moved itself, and stays in use.

    Attributes:
        mean, std: The three values each by which the channels are normalised.

    Raises:
        ValueError: If an argument has a wrong value. `CutError`, a subclass, if the network
            has no such layer, or none that can be explained.
    """

    @usual()
    @torch.inference_mode(False)  # inference tensors could not be differentiated later
    def __init__(
        self,
        network: nn.Module,
        layer: str | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        device: str | torch.device = "auto",
        normalize: bool = True,
        name: str | None = None,
        activation: str = "softmax",
        copy: bool = True,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network must be a torch.nn.Module, not {type(network).__name__}; for a network "
                "by name use load_model(name)"
            )
        network = _unwrapped(network)
        self.name = name or type(network).__name__
        if getattr(network, "num_classes", None) == 0:  # so timm marks networks without a head
            raise ValueError(
                f"{self.name} has no classifier (its num_classes is 0); build it with "
                "num_classes=…, or pass torch.nn.Sequential(network, head) with a trained head"
            )
        check_name("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.device = _device(device)
        self.size = _size(224 if size is None else size)
        self.preprocessing = preprocessing or Preprocessing(
            self.size, round(min(self.size) / 0.875)
        )
        self.normalize = normalize
        self.mean, self.std = _channels("mean", mean, 0.0), _channels("std", std, 1.0)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        # (x − mean) / std as x · scale + shift, in one pass over the pixels
        shift = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        self._scale, self._shift = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in ([1 / s for s in self.std], shift)
        )
        self.network = _own(network, copy).eval().requires_grad_(False)
        self.network.to(self.device, torch.float32)
        self._cuttable = opened(self.network, self.size, layer)
        # Of the whole network, whatever the layer: None if it is not traced.
        self._graph = self._cuttable.graph if isinstance(self._cuttable, Traced) else None
        self._copies: dict[torch.dtype, QuickCopy | None] = {}  # shared by all cuts
        self._copying = threading.Lock()  # two threads make one copy
        self.classes: int = self._cuttable.classes
        if self.classes == 1 and activation == "softmax":
            raise ValueError(
                f"{self.name} gives one logit, and the probability of a single class is always 1 "
                "by a softmax; pass activation='sigmoid'"
            )
        if isinstance(labels, str):
            raise TypeError(f"labels is {labels!r}; a list of names is needed, one for each logit")
        labels = [f"class {c}" for c in range(self.classes)] if labels is None else labels
        self.labels = [str(label) for label in labels]
        if len(self.labels) != self.classes:
            raise ValueError(
                f"{len(self.labels)} labels were given for a network of {self.classes} classes; "
                "pass one for each logit, in order"
            )
        self._cut_at(layer or self._cuttable.default_layer())
        self._told: list[str] = []  # a warning of the size, shared by all cuts
        if size is None:
            self._check_assumed_size()

    @property
    def default_layer(self) -> str:
        """The layer that is explained where none is named."""
        return self._cuttable.default_layer()

    @property
    def reads_maps(self) -> bool:
        """Whether the logits depend on the layer's maps, not only on its prefix tokens."""
        return self._cuttable.reads(self.layer)

    def _cut_at(self, layer: str) -> None:
        self._cuttable = reaching(self._cuttable, layer)
        self._cut = self._cuttable.cut(layer)
        self._memory: _Memory | None = None
        self.layer = layer

    @property
    def transformer(self) -> Transformer | str:
        """The parts of a vision transformer, or why they are not known.

        See `network.transformer`; the logits of the parts were compared with the network's.
        """
        return self._cuttable.transformer

    @property
    def feature_layout(self) -> FeatureLayout:
        """How the layer's output holds its feature maps."""
        return self._cut.layout

    @property
    def pointwise_reader(self) -> str | None:
        """Name of the 1×1 convolution with which the head begins, or None."""
        return self._cut.pointwise_reader

    @property
    def graph_text(self) -> str:
        """The network as text: which operation follows which.

        Of a network that can't be traced: which module is called after which.
        """
        return str(self._cuttable.graph)

    @property
    def layers(self) -> list[str]:
        """The layers that can be explained, in forward order."""
        return list(self._cuttable.layers)

    def layer_shape(self, layer: str | None = None) -> tuple[int, int, int]:
        """Channels, height and width of a layer's feature maps for an image of `size`."""
        layer = self.layer if layer is None else layer
        return reaching(self._cuttable, layer).shape(layer)

    def at(self, layer: str) -> Classifier:
        """Return the same network cut at another layer; nothing is copied.

        Raises:
            CutError: If there is no such layer; the message lists close matches.
        """
        other = copy.copy(self)
        other._cut_at(layer)
        return other

    def normalizing(self, normalize: bool) -> Classifier:
        """Return the same network with or without input normalisation; nothing is copied."""
        other = copy.copy(self)
        other.normalize, other._memory = normalize, None
        return other

    @usual()
    def quick(self, precision: str = "auto") -> Quick:
        """Return a copy of the network that computes the same logits with less work.

        It is made on first use and kept. For methods that run the network hundreds of times.

        Args:
            precision: `"float32"` (equal but for rounding), `"bfloat16"` (logits to about 1 %), or
                `"auto"`: bfloat16 where the processor has it, the network works in it, and it is
                large enough to become quicker.

        Raises:
            ValueError: If the precision is not one of these, or the network fails in it.
        """
        # In a very small network the conversions cost as much time as the multiplications save.
        small = self._cuttable.values < 1_000_000
        dtype = dtype_of("float32" if precision == "auto" and small else precision, self.device)
        with self._copying:
            if dtype not in self._copies:
                self._copies[dtype] = self._quick_copy(dtype)
        network = self._copies[dtype]
        if network is None and dtype == torch.bfloat16:
            if precision == "bfloat16":
                raise ValueError(
                    f"{self.name} fails in bfloat16, differs in it, or is not traced; use "
                    "precision='auto' or 'float32'"
                )
            return self.quick("float32")
        return Quick(self, network)

    @torch.inference_mode(False)  # the copy is kept, and searches need its gradients
    def _quick_copy(self, dtype: torch.dtype) -> QuickCopy | None:
        """Return a quick copy of the network, or None if it is not traced or its logits differ."""
        if self._graph is None:
            return None
        generator = torch.Generator().manual_seed(0)
        x = self.normalised(torch.rand(2, 3, *self.size, generator=generator))
        described = isinstance(self.transformer, Transformer)
        try:
            last = self._cuttable.channels_last
            copied = QuickCopy(
                self.network, self._graph, dtype, transformer=described, channels_last=last
            )
            with torch.no_grad():
                expected, logits = self._run(x), copied(x)
        except (RuntimeError, TypeError, ValueError):  # an operation does not support the dtype
            return None
        tolerance = (0.1 if dtype == torch.bfloat16 else 1e-3) * expected.abs().amax()
        return copied if (logits - expected).abs().amax() <= tolerance else None

    def __copy__(self) -> Classifier:
        other = object.__new__(type(self))  # `__reduce__` would trace the network again
        other.__dict__.update(self.__dict__)
        return other

    def rebuild_arguments(self) -> dict[str, Any]:
        """Return the arguments with which the constructor makes an equal classifier."""
        return {"network": copy.deepcopy(self.network).cpu(), **self._settings()}

    def _settings(self) -> dict[str, Any]:
        names = ("layer", "mean", "std", "labels", "size", "preprocessing", "name", "normalize")
        settings = {name: getattr(self, name) for name in (*names, "activation")}
        return {**settings, "device": self.device.type}

    def with_network(self, network: nn.Module) -> Classifier:
        """Return a classifier of another network of the same architecture.

        All else is the same: normalisation, labels, size, preprocessing, device, activation, name
        and, where the network has it, the layer. For a copy with other weights, such as random
        ones, which would be normalised wrongly in silence by a classifier made afresh.

        Raises:
            ValueError: If the network does not fit, such as one of another number of classes.
        """
        has = self.layer in dict(_unwrapped(network).named_modules())
        own = {"layer": self.layer if has else None, "device": self.device}
        return type(self)(network, **self._settings() | own)

    def __reduce__(self) -> tuple[Any, ...]:
        # Graphs can't be pickled: the network is traced again when it is unpickled.
        arguments = self.rebuild_arguments()
        if arguments["device"] != "cpu":
            arguments["device"] = "auto"
        return partial(type(self), copy=False, **arguments), ()

    def remember(self, images: Tensor) -> Classifier:
        """Return the same classifier with the feature maps and logits of a batch cached.

        For equal images its `split` returns them without running the network, so several methods
        share the features of a batch; `recalls` counts these calls.
        """
        other = copy.copy(self)
        with torch.no_grad():
            maps, rest = self._split(images)
            other._memory = _Memory(images, maps, rest, self.head(maps, rest))
        return other

    def remembering(self, images: Tensor) -> tuple[Classifier, Tensor]:
        """Return this classifier if it has these images cached, else a copy, and their logits."""
        other = self if self._known(images) else self.remember(images)
        assert other._memory is not None
        return other, other._memory.logits

    def _known(self, images: Tensor) -> _Memory | None:
        return self._memory if self._memory is not None and self._memory.holds(images) else None

    @property
    def recalls(self) -> int:
        """How often `split` returned the cached feature maps of `remember`."""
        return self._memory.recalls if self._memory is not None else 0

    def split(self, images: Tensor) -> tuple[Tensor, Rest]:
        """Return the feature maps `(N, K, h, w)` and the other values that `head` needs."""
        if (known := self._known(images)) is not None:
            known.recalls += 1
            return known.maps.detach(), known.rest
        return self._split(images)

    def _split(self, images: Tensor) -> tuple[Tensor, Rest]:
        with exact(self.device):
            return self._cut.split(self._laid_out(self.normalised(images)))

    def head(self, maps: Tensor, rest: Rest) -> Tensor:
        """Continue from feature maps `(N, K, h, w)` to logits `(N, classes)`.

        Args:
            maps, rest: What `split` returned, or other maps of that shape.
        """
        with exact(self.device):
            return self._cut.head(maps, rest)

    def features(self, images: Tensor) -> Tensor:
        """Return the layer's feature maps `(N, K, h, w)` of images `(N, 3, H, W)` in [0, 1]."""
        return self.split(images)[0].to(images.device)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits `(N, classes)` of images `(N, 3, H, W)` in [0, 1]; differentiable."""
        return self._run(self.normalised(images)).to(images.device)

    def to_probabilities(self, logits: Tensor, *, log: bool = False) -> Tensor:
        """Return p, or log p, of logits `(N, classes)`, by the classifier's activation."""
        return ACTIVATIONS[self.activation][log](logits)

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Return p `(N, classes)` in float32, computed in batches without gradients.

        It is the softmax of the logits, or the sigmoid of each: see `activation`.

        Args:
            images: `(N, 3, H, W)`, RGB in [0, 1].
            batch_size: Images at a time. Default: `images_at_once()`.
        """
        size = batch_size or self.images_at_once(images.shape[2:])
        logits = (self.logits(batch).float() for batch in images.split(size))
        return torch.cat([self.to_probabilities(y) for y in logits])

    def predict(self, images: Tensor) -> Tensor:
        """Return the most probable classes `(N,)`, int64, of images `(N, 3, H, W)` in [0, 1].

        Raises:
            TypeError, ValueError: If type, shape or range of the images is another, or the
                network's output is not finite.
        """
        p = self.probabilities(self.check_images(images))
        self.check_finite(p)
        return p.argmax(1)

    def images_at_once(self, size: Sequence[int] | None = None, *, layer: str | None = None) -> int:
        """Return the batch size for images, masked images or feature maps.

        On a CPU the values of a layer should fit into the caches (4 million of the largest layer);
        a GPU needs larger batches to be used fully (eight times as many). At least 8 and at most
        64, then at most what fits into a quarter of the free memory, with gradients; at least 1.

        Args:
            size: Height and width of the images. Default: what the network is made for.
            layer: Where the computation begins. Default: at the image.
        """
        area = math.prod(size or self.size) / math.prod(self.size)
        if self.device.type == "cuda":
            free, budget = torch.cuda.mem_get_info(self.device)[0], 2**25
        else:
            free, budget = psutil.virtual_memory().available, 2**22
        most = min(64, max(8, int(budget / (self._cuttable.largest(layer) * area))))
        # The backward pass needs all activations and their gradients.
        bytes_each = 2 * 4 * self._cuttable.values * area
        return max(1, min(most, int(free / 4 / bytes_each)))

    def check_images(self, images: Tensor) -> Tensor:
        """Return images as float32, or raise an error that says what is wrong with them.

        Raises:
            TypeError, ValueError: Unless they are a float tensor `(N, 3, H, W)` in [0, 1].
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a torch.Tensor (N, 3, H, W), not {type(images).__name__}; "
                "ol.load_image(path) makes one of a file, torch.from_numpy one of an array and "
                "torch.stack one of a list"
            )
        self._check_shape(images)
        if not images.is_floating_point():
            raise TypeError(
                f"images are {images.dtype}; float32 in [0, 1] is needed: use images / 255"
            )
        images = images.float()
        low, high = torch.stack(images.aminmax()).tolist() if images.numel() else (0, 1)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images have values from {low:.3g} to {high:.3g}; RGB in [0, 1] is needed, not "
                "normalised: the classifier normalises inside"
            )
        sides = zip(images.shape[2:], self.size, strict=True)
        if any(max(given, own) > 2 * min(given, own) for given, own in sides):
            self._tell(
                f"the images have {images.shape[2]}×{images.shape[3]} pixels, and {self.name} is "
                f"said to be made for {self.size[0]}×{self.size[1]}: resize them (ol.load_image "
                "does), or pass the right size= to ol.Classifier"
            )
        return images

    def _check_assumed_size(self) -> None:
        """Warn if the last maps are so large that the network must be made for small images.

        Networks for 224×224 end in maps of 7×7 or 14×14. A transformer knows its size.
        """
        layer = self.default_layer
        _, h, w = self.layer_shape(layer)
        if min(h, w) >= 28 and self.at(layer).feature_layout.kind != "tokens":
            self._tell(
                f"no size was given, and for images of {self.size[0]}×{self.size[1]}, which are "
                f"assumed, {self.name} has maps of {h}×{w} at {layer!r}, as networks for smaller "
                f"images have: pass its own such as size=32, or size={self.size[0]} if it is right",
                stacklevel=6,
            )

    def _tell(self, text: str, stacklevel: int = 4) -> None:
        """Warn of the size, once for this classifier and all cuts of it."""
        if not self._told:
            self._told.append(text)
            warnings.warn(text, stacklevel=stacklevel)

    def check_finite(self, outputs: Tensor, names: Sequence[object] | None = None) -> None:
        """Raise ValueError if a row of logits or probabilities `(N, classes)` is not finite.

        Args:
            outputs: Of N images. Methods would make masks of them all the same, some of NaN.
            names: Of the images. Default: their indices.
        """
        if bad := (~outputs.isfinite().all(1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"the output of {self.name} is not finite (NaN or infinity) for the images "
                f"{some_of([names[i] for i in bad] if names else bad)}, so nothing can be said of "
                "them; leave them out, or look for an overflow in the network"
            )

    @usual()
    def check_targets(self, targets: Tensor | Sequence[int] | int, n: int) -> Tensor:
        """Return targets as int64 `(n,)`, or raise an error that says what is wrong with them.

        Raises:
            TypeError, ValueError: Unless they are n class indices (or one for all).
        """
        targets = torch.as_tensor(targets)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"targets are {targets.dtype}; class indices (int64) are needed")
        if targets.ndim == 0:
            targets = targets.expand(n)
        if tuple(targets.shape) != (n,):
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}; {n} images need shape ({n},)"
            )
        low, high = torch.stack(targets.aminmax()).tolist() if n else (0, 0)
        if low < 0 or high >= self.classes:
            raise ValueError(
                f"target {low if low < 0 else high} is no class of {self.name}: its classes are 0 "
                f"to {self.classes - 1}"
            )
        return targets.long()

    def _check_shape(self, images: Tensor) -> None:
        if images.ndim == 4 and images.shape[1] == 3:
            return
        way = ""
        if images.ndim == 3:
            way = ": use image[None] for a single one"
        elif images.ndim == 4 and images.shape[3] == 3:
            way = ": use images.permute(0, 3, 1, 2) where the channels come last"
        elif images.ndim == 4:
            channels = {
                1: ".expand(-1, 3, -1, -1) for greyscale",
                4: "[:, :3] without transparency",
            }
            way = f": use images{channels[images.shape[1]]}" if images.shape[1] in channels else ""
        raise ValueError(f"images have shape {tuple(images.shape)}; (N, 3, H, W) is needed{way}")

    def normalised(self, images: Tensor) -> Tensor:
        """Return images `(N, 3, H, W)` in [0, 1] normalised, on the network's device."""
        self._check_shape(images)
        x = images.to(self.device, torch.float32)
        return torch.addcmul(self._shift, x, self._scale) if self.normalize else x.clone()

    def _run(self, x: Tensor) -> Tensor:
        with exact(self.device):
            y: Tensor = logits_of(self.network(self._laid_out(x)))
            return y

    def _laid_out(self, x: Tensor) -> Tensor:
        return lay_out(x, self._cuttable.channels_last)

    def __repr__(self) -> str:
        k, h, w = self.layer_shape()
        return (
            f"Classifier({self.name!r}, layer={self.layer!r}: {k} maps of {h}×{w}, "
            f"{self.classes} classes, {self.size[0]}×{self.size[1]} RGB, on {self.device})"
        )


class Quick:
    """The quick copy of a network with the normalisation of its classifier: images → logits.

    Attributes:
        dtype: The dtype that it computes in.
    """

    def __init__(self, classifier: Classifier, network: QuickCopy | None) -> None:
        self._classifier = classifier
        self._network = network or classifier._run  # the network itself if it can't be copied
        self.dtype = torch.float32 if network is None else network.dtype

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits `(N, classes)` of images `(N, 3, H, W)` in [0, 1]; differentiable."""
        x = self._classifier.normalised(images)
        with exact(x.device):
            return self._network(x).to(images.device)


def _unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside a wrapper of torch.compile or DataParallel."""
    while True:
        inner = dict(network.named_children())
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = inner["module"]
        elif "_orig_mod" in inner:
            network = inner["_orig_mod"]
        else:
            return network


def _own(network: nn.Module, copied: bool) -> nn.Module:
    for module in network.modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or ".quantized" in type(module).__module__:
            held = "TorchScript" if scripted else f"quantised layers ({type(module).__name__})"
            raise ValueError(
                f"{type(network).__name__} holds {held}, which can't be "
                f"{'traced' if scripted else 'differentiated'}; pass the network that it was made "
                "of"
            )
    # Values that a module computed and kept, such as the weight of weight_norm, have no copy.
    kept = [v for m in network.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    memo: dict[int, Any] = {id(v): v.detach().clone() for v in kept if not v.is_leaf}
    try:
        return copy.deepcopy(network, memo) if copied else network
    except RuntimeError as error:
        raise ValueError(
            f"{type(network).__name__} can't be copied ({' '.join(str(error).split())}); pass a "
            "network that was just built and has loaded its weights"
        ) from error


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int | float) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size is {size!r}; a side or (height, width) is needed")
    return whole_number("size", sides[0], 1), whole_number("size", sides[1], 1)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} can't be used here ({str(error).splitlines()[0]}); use "
            "'auto', 'cpu' or 'cuda'"
        ) from error
    return chosen


def _channels(name: str, values: Sequence[float] | None, default: float) -> tuple[float, ...]:
    values = (default,) * 3 if values is None else tuple(float(v) for v in values)
    if len(values) != 3:
        raise ValueError(f"{name} must have three values, one a channel, not {len(values)}")
    return values
