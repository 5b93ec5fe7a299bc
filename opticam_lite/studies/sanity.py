"""The sanity check: does the map change when the network does (paper, Appendix G, Figs. A6, A7)?

The layers of a network are given random weights one after the other, from the logits down, and the
maps of each of these networks are compared with the original's (Adebayo et al. 2018). A method
whose maps stay alike does not look at what the network has learnt. Two controls do not pass:
Fake-CAM, whose map is always the same, and the edges of the image. Another network to compare with
is one that has memorised permuted labels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
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
from ..evaluation import store
from ..evaluation.digests import code_digest
from ..evaluation.intervals import interval
from ..evaluation.job import Job
from ..evaluation.settings import describe, weights_digest
from ..evaluation.variants import variants
from ..masking import normalize
from ..methods import explain
from ..network import Classifier
from ..registry import seeded
from .boxes import distinct
from .findings import Finding, between
from .paper import title

EDGES = "edges"  # name of the control that sees the image alone
MEASURES = ("rank", "rank of absolute values", "HOG", "SSIM")
RANDOM_LABELS = 0  # in place of the number of a cut
ALL = "all"  # blocks, where the last to become random is the network's own parameters
HALF = 0.5  # a method whose maps are less alike passes; ours, the papers draw no line
NEAR_ZERO = 0.1  # similarities that are; the paper's is 0.013


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
        rank = _correlation(stats.rankdata(a), stats.rankdata(b))
        found["rank"].append(rank)
        if min(a.min(), b.min()) < 0:
            rank = _correlation(*(stats.rankdata(np.abs(x)) for x in (a, b)))
        found["rank of absolute values"].append(rank)
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
    random_labels: Classifier | None = None,
    batch_size: int = 8,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Compare the maps of networks with more and more random weights with the original's.

    Args:
        classifier: The network.
        dataset: Images; those without a target are explained for the original's predicted class.
        methods: Names, or a mapping from names to options. The control `EDGES` is added.
        indices: Of the images, each used once. Default: all.
        cuts: Networks, see `randomized`.
        seeds: Of the random weights; each draws all networks anew.
        random_labels: One more network to compare with, trained on permuted labels; its maps are
            of the same classes.
        batch_size: Images at a time.
        out: Folder for the rows, as of `evaluate`: the same call continues what was interrupted.
            Methods and seeds may be added. Default: rows are kept in memory.

    Returns:
        A row for each image, method, network, seed and measure: dataset, network, image, method,
        cut (1 to `cuts`; `RANDOM_LABELS` for that network), from (the lowest block with random
        weights, or the name of that network), seed, measure (one of `MEASURES`), value.

    Raises:
        ValueError: If `out` holds another study.
    """
    chosen = distinct(dataset, indices)
    job = Job(classifier, dataset, chosen, variants(methods), [], batch_size, seed=0, workers=0)
    steps = [(seed, cut) for seed in seeds for cut in range(1, cuts + 1)]
    steps += [(0, RANDOM_LABELS)] if random_labels is not None else []
    # The store has a row for a method and a metric: here a measure, a seed and a cut.
    metrics = {f"{m} {seed} {cut}": (m, seed, cut) for seed, cut in steps for m in MEASURES}
    labels = [*job.variants, EDGES]
    targets: dict[int, Tensor] = {}
    originals: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as stack:
        rows = store.Memory()
        if out is not None:
            settings = _settings(job, list(metrics), cuts, random_labels)
            rows = stack.enter_context(store.Store(out, settings))
        table = rows.table(["position", "method", "metric", "error"])
        measured, _ = store.done(table, len(chosen), labels, list(metrics))
        if not measured.all():
            rows.check_writable()
        for seed, cut, lowest, other in _others(classifier, cuts, seeds, random_labels):
            names = {m: f"{m} {seed} {cut}" for m in MEASURES}
            columns = [list(metrics).index(name) for name in names.values()]
            for batch in job.batches:
                positions = job.positions(batch)
                left = ~measured[np.ix_(positions, range(len(labels)), columns)].all((0, 2))
                if not left.any():
                    continue
                x, c = dataset.batch(chosen[i] for i in positions)
                if batch not in targets:
                    targets[batch] = classifier.predict(x) if c is None else c
                for label in np.array(labels)[left]:
                    if (batch, label) not in originals:
                        originals[batch, label] = _map(job, label, classifier, x, targets[batch])
                    second = _map(job, label, other, x, targets[batch])
                    for measure, values in similarities(originals[batch, label], second).items():
                        about = {"network": classifier.name, "layer": lowest, "method": label}
                        about |= {"dataset": dataset.name, "metric": names[measure]}
                        rows.add(
                            [
                                {"position": i, "image": dataset.id(chosen[i]), **about, "value": v}
                                for i, v in zip(positions, values, strict=True)
                            ]
                        )
        frame = store.to_frame(rows.table(store.SCHEMA.names), labels, list(metrics))
    about = pd.DataFrame([metrics[m] for m in frame["metric"]], columns=["measure", "seed", "cut"])
    frame = pd.concat([frame.rename(columns={"layer": "from"}), about], axis="columns")
    keys = ["dataset", "network", "image", "method", "cut", "from", "seed", "measure", "value"]
    return frame[keys]


def _settings(
    job: Job, metrics: list[str], cuts: int, random_labels: Classifier | None
) -> dict[str, Any]:
    """Return the settings of a study: all that its rows depend on."""
    settings = describe(job, job.classifier.device.type)
    settings["cuts"] = cuts
    settings["random labels"] = None if random_labels is None else weights_digest(random_labels)
    settings["metrics"] = metrics
    settings["methods"][EDGES] = {}
    code = code_digest(similarities, randomized)
    settings["codes"]["metrics"] = dict.fromkeys(metrics, code)
    settings["codes"]["methods"][EDGES] = code_digest(edges)
    return settings


def _others(
    classifier: Classifier, cuts: int, seeds: Sequence[int], random_labels: Classifier | None
) -> Iterator[tuple[int, int, str, Classifier]]:
    """Yield seed, cut, what tells the network apart, and the network."""
    for seed in seeds:
        for cut, (lowest, other) in enumerate(randomized(classifier, cuts, seed), start=1):
            yield seed, cut, lowest or ALL, other
    if random_labels is not None:
        yield 0, RANDOM_LABELS, random_labels.name, random_labels


def _map(job: Job, label: str, classifier: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    if label == EDGES:
        return edges(images)
    options = job.variants[label].options
    return explain(label, classifier, images, targets, progress=False, warn=False, **options)


def sanity_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return how alike maps are, averaged over seeds and images.

    Args:
        frame: What `sanity_study` returned.

    Returns:
        A row for each method and network: method, cut, from; for each of `MEASURES` its mean over
        images, and `rank ±`, `rank low`, `rank high`, …: the standard error and the 95 % interval
        over images, of each the mean over seeds; n, the images that have a rank correlation.
    """
    of_image = frame.groupby(["method", "cut", "from", "measure", "image"], sort=False)["value"]
    rows = []
    keys = ["method", "cut", "from"]
    for key, group in of_image.mean().reset_index().groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        for measure, own in group.groupby("measure", sort=False)["value"]:
            ends = interval(torch.tensor(own.to_numpy()))
            row |= {measure: own.mean(), f"{measure} ±": own.sem()}
            row |= dict(zip((f"{measure} low", f"{measure} high"), ends, strict=True))
        defined = group[group["measure"] == MEASURES[0]]["value"].notna()
        rows.append(row | {"n": int(defined.sum())})
    return pd.DataFrame(rows)


def findings(frame: pd.DataFrame) -> list[Finding]:
    """Return whether each method passes, with random weights and with random labels.

    A method passes if the rank correlation of the maps is surely below `HALF`, on average over
    images, where all cuts have random weights. Unrelated maps need not have 0: those of two images
    of the embedded scenes have 0.5 to 0.7, since objects stand near the middle of both.

    Args:
        frame: What `sanity_study` returned.
    """
    deepest = frame.sort_values("cut").iloc[-1]
    found = []
    for method in frame["method"].unique():
        name = "The edge detector, a control," if method == EDGES else title(method)
        last, first = (_of_images(frame, method, cut) for cut in (deepest["cut"], 1))
        found.append(
            Finding(
                f"{name} passes: with random weights down to {deepest['from']} its "
                f"maps are less than half alike (rank correlation below {HALF})",
                between(last, -1, HALF),
                f"{_show(last)}; with the first cut alone {_show(first)}",
            )
        )
    if not (frame["cut"] == RANDOM_LABELS).any():
        return found
    for method in frame["method"].unique():
        name = "The edge detector, a control," if method == EDGES else title(method)
        rank = _of_images(frame, method, RANDOM_LABELS)
        found.append(
            Finding(
                f"{name} tells a network that has learnt true labels from one that has memorised "
                f"random ones (rank correlation below {HALF})",
                between(rank, -1, HALF),
                _show(rank),
            )
        )
        if method == "opti-cam":
            ssim = _of_images(frame, method, RANDOM_LABELS, "SSIM")
            found.append(
                Finding(
                    f"With random labels the SSIM of Opti-CAM's maps is near 0, as the paper's "
                    f"0.013 (within ±{NEAR_ZERO})",
                    between(ssim, -NEAR_ZERO, NEAR_ZERO),
                    _show(ssim),
                )
            )
    return found


def _of_images(frame: pd.DataFrame, method: str, cut: int, measure: str = MEASURES[0]) -> Tensor:
    """Return a measure of each image that has it, averaged over seeds, `(N,)`."""
    rows = frame[(frame["method"] == method) & (frame["cut"] == cut)]
    rows = rows[rows["measure"] == measure]
    return torch.tensor(rows.groupby("image")["value"].mean().dropna().to_numpy())


def _show(values: Tensor) -> str:
    low, high = interval(values)
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f}, n = {len(values)})"


def edges(images: Tensor) -> Tensor:
    """Return the edges of images `(N, 3, H, W)` in [0, 1] as masks `(N, 1, H, W)`: Sobel's filter.

    They look like many saliency maps, and no network has been asked.
    """
    grey = images.mean(1).double().numpy()
    found = torch.stack([torch.from_numpy(sobel(x)) for x in grey])[:, None]
    return normalize(found.float())
