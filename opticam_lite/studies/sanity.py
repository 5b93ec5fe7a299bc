"""The sanity check: does the map change when the network does (paper, Appendix G, Figs. A6, A7)?

The layers of a network are given random weights one after the other, from the logits down, and the
maps of each of these networks are compared with the original's (Adebayo et al. 2018). A method
whose maps stay alike does not look at what the network has learnt. Two controls do not pass:
Fake-CAM, whose map is always the same, and the edges of the image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from skimage.feature import hog
from skimage.filters import sobel
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from ..datasets import Dataset
from ..masking import normalize
from ..methods import explain
from ..network import Classifier
from ..registry import seeded
from .boxes import distinct

EDGES = "edges"  # name of the control that sees the image alone
MEASURES = ("rank", "rank of absolute values", "HOG", "SSIM")


def similarities(first: Tensor, second: Tensor) -> dict[str, list[float]]:
    """Compare two maps of each image, by the four measures of Adebayo et al. (2018).

    Args:
        first, second: `(N, 1, H, W)`.

    Returns:
        Measure → a value for each image: Spearman's rank correlation of the pixels, and that of
        their absolute values (the same for maps without negative values); Pearson's correlation of
        histograms of oriented gradients (8 directions, cells of 16×16 pixels); structural
        similarity of the maps normalised to [0, 1]. NaN where a correlation is not defined, as for
        a constant map.
    """
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for a, b in zip(first[:, 0].double().numpy(), second[:, 0].double().numpy(), strict=True):
        found["rank"].append(_correlation(stats.rankdata(a), stats.rankdata(b)))
        ranks = (stats.rankdata(np.abs(x)) for x in (a, b))
        found["rank of absolute values"].append(_correlation(*ranks))
        histograms = (hog(x, 8, (16, 16), (1, 1)) for x in (a, b))
        found["HOG"].append(_correlation(*histograms))
    pairs = zip(*(normalize(m.double())[:, 0].numpy() for m in (first, second)), strict=True)
    found["SSIM"] = [float(structural_similarity(a, b, data_range=1.0)) for a, b in pairs]
    return found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 1e-12 else float("nan")


def randomized(
    classifier: Classifier, cuts: int = 5, seed: int = 0
) -> Iterator[tuple[str, Classifier]]:
    """Yield copies of a network with more and more random weights, from the logits down.

    A block is a part of the network with parameters: its children, of which one with many parts
    gives way to these while there are no more than `cuts`, or while one block holds more than five
    sixths of all parameters. So they are the stages of a ResNet, the layers of a VGG, the blocks of
    a transformer. With more than `cuts` + 2 of them, neighbours are put together, so that the last
    copy has no trained weights; else the first are kept, as the paper keeps the stem of a ResNet.

    Args:
        classifier: Any; its own network is left as it is.
        cuts: How many copies.
        seed: Of the weights. Modules draw them as at their construction; parameters that no module
            draws, such as a class token, are permuted.

    Yields:
        Name of the lowest block that has random weights, and the classifier.
    """
    network = copy.deepcopy(classifier.network)
    blocks = _blocks(network, cuts)
    if len(blocks) > cuts + 2:
        groups = [list(group) for group in np.array_split(np.arange(len(blocks))[::-1], cuts)]
    else:
        groups = [[i] for i in range(len(blocks))[::-1][:cuts]]
    for k, group in enumerate(groups):
        with seeded(seed * cuts + k):
            for i in group:
                _randomize(blocks[i][1])
        yield blocks[group[-1]][0], classifier.with_network(network)


def _blocks(network: nn.Module, cuts: int) -> list[tuple[str, nn.Module]]:
    """Return the parts of a network that have parameters, in their order, with their names."""
    blocks = [("", network)]
    while able := [block for block in blocks if len(_parts(*block)) > 1]:
        large = [block for block in able if _size(block[1]) > _size(network) * 5 / 6]
        if len(blocks) > cuts and not large:
            break
        chosen = max(large or able, key=lambda block: len(_parts(*block)))
        at = blocks.index(chosen)
        blocks[at : at + 1] = _parts(*chosen)
    return blocks


def _parts(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module's own parameters, such as a class token, and its children that have some."""
    children = [(f"{name}.{n}".lstrip("."), m) for n, m in module.named_children() if _size(m)]
    own = [(name, _Own(module))] if list(module.parameters(recurse=False)) else []
    return own + children


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Own(nn.Module):
    """The parameters of a module that none of its children has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def _randomize(block: nn.Module) -> None:
    for module in block.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            for parameter in module.parameters(recurse=False):
                order = torch.randperm(parameter.numel())
                parameter.data.copy_(parameter.data.flatten()[order].view_as(parameter))


def sanity_study(
    classifier: Classifier,
    dataset: Dataset,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    indices: Iterable[int] | None = None,
    cuts: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the maps of networks with more and more random weights with the original's.

    Args:
        classifier: The network.
        dataset: Images; those without a target are explained for the original's predicted class.
        methods: Names, or a mapping from names to options. The control `EDGES` is added.
        indices: Of the images, each used once. Default: all.
        cuts: Networks, see `randomized`.
        seeds: Of the random weights; each draws all networks anew.
        batch_size: Images at a time.

    Returns:
        A row for each image, method, network, seed and measure: dataset, network, image, method,
        cut (1 to `cuts`), from (the lowest block with random weights), seed, measure (one of
        `MEASURES`), value.
    """
    options = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    chosen = distinct(dataset, indices)
    batches = []
    for start in range(0, len(chosen), batch_size):
        x, c = dataset.batch(chosen[start : start + batch_size])
        batches.append((x, classifier.predict(x) if c is None else c))
    originals = [_maps(classifier, *batch, options) for batch in batches]
    ids = [dataset.id(i) for i in chosen]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for cut, (lowest, other) in enumerate(randomized(classifier, cuts, seed), start=1):
            maps = [_maps(other, *batch, options) for batch in batches]
            for method in (*options, EDGES):
                first, second = (torch.cat([m[method] for m in of]) for of in (originals, maps))
                about = {"method": method, "cut": cut, "from": lowest, "seed": seed}
                for measure, values in similarities(first, second).items():
                    rows += [
                        {"image": image, **about, "measure": measure, "value": value}
                        for image, value in zip(ids, values, strict=True)
                    ]
    frame = pd.DataFrame(rows)
    frame.insert(0, "dataset", dataset.name)
    frame.insert(1, "network", classifier.name)
    return frame


def _maps(
    classifier: Classifier, images: Tensor, targets: Tensor, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    found = {
        method: explain(method, classifier, images, targets, progress=False, **own)
        for method, own in options.items()
    }
    return found | {EDGES: edges(images)}


def edges(images: Tensor) -> Tensor:
    """Return the edges of images `(N, 3, H, W)` in [0, 1] as masks `(N, 1, H, W)`: Sobel's filter.

    They look like many saliency maps, and no network has been asked.
    """
    grey = images.mean(1).double().numpy()
    found = torch.stack([torch.from_numpy(sobel(x)) for x in grey])[:, None]
    return normalize(found.float())
