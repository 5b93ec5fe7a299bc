"""The box study (paper, section 5.4, Table 5): does the network need the object?

With B the union of the true boxes as a mask, I the whole image and S a saliency map, the image is
masked by B, by I∖B, and for each method by S, B∩S = S ⊙ B and S∖B = S ⊙ (1 − B).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..datasets import Dataset, Sample, knows_classes
from ..evaluation.intervals import interval, surely_better
from ..methods import explain
from ..metrics import drop, gain, increase
from ..network import Classifier

BOX = "box"  # name of the method for the masks B and I∖B
MASKS = ("S", "B∩S", "S∖B")
LIMITS = (0.0, 100.0)  # of the metrics, percent
METRICS = {"AD": drop, "AG": gain, "AI": increase}


def box_mask(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Return B, the union of boxes `(M, 4)`, as a mask `(1, H, W)` of zeros and ones.

    Boxes are x0, y0, x1, y1 in pixels, right and bottom exclusive.
    """
    B = torch.zeros(1, *size)
    for x0, y0, x1, y1 in boxes.clamp(min=0).tolist():
        B[:, y0:y1, x0:x1] = 1
    return B


def box_study(
    classifier: Classifier,
    dataset: Dataset,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    indices: Iterable[int] | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Mask images by boxes, by maps, and by both (Table 5).

    Args:
        classifier: The network.
        dataset: With boxes and true classes.
        methods: Names, or a mapping from names to options.
        indices: Of the images, each used once. Default: all. Images without a box are left out.
        batch_size: Images at a time.

    Returns:
        A row for each image, method and mask: dataset, network, image (its id), method, mask (one
        of `MASKS`; `B` and `I∖B` for the method `box`), p and o (the true class's probability
        before and after masking), object and environment (the shares of the mask's sum on the
        objects' visible pixels and elsewhere: both 0 for a mask of zeros, NaN where the dataset
        has no object masks).

    Raises:
        ValueError: If there are no boxes or no true classes, or the network has other classes.
    """
    if not dataset.has_boxes:
        raise ValueError(f"{dataset.name} has no boxes; the box study needs them")
    check_classes(classifier, dataset)
    options = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    chosen = distinct(dataset, indices)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(chosen), batch_size):
        samples = [dataset[i] for i in chosen[start : start + batch_size]]
        rows += _rows(classifier, [s for s in samples if len(s.boxes)], options)
    if not rows:
        raise ValueError(f"none of the {len(chosen)} images of {dataset.name} has a box")
    frame = pd.DataFrame(rows)
    frame.insert(0, "dataset", dataset.name)
    frame.insert(1, "network", classifier.name)
    return frame


def check_classes(classifier: Classifier, dataset: Dataset) -> None:
    """Raise ValueError unless the network knows the classes of a dataset."""
    if not knows_classes(classifier, dataset):
        raise ValueError(
            f"{classifier.name} does not know the classes of {dataset.name}; this study needs a "
            "network that was trained on them"
        )


def distinct(dataset: Dataset, indices: Iterable[int] | None) -> list[int]:
    """Return indices once each, in their order; those of the whole dataset for None."""
    return list(dict.fromkeys(range(len(dataset)) if indices is None else indices))


def check_study(frame: pd.DataFrame) -> None:
    """Raise ValueError unless the rows of a box study hold each image of one dataset once."""
    if len(names := frame["dataset"].unique()) > 1:
        raise ValueError(f"rows of {', '.join(names)} are joined; make a table of one dataset")
    doubled = frame[frame.duplicated(["network", "image", "method", "mask"])]
    if len(doubled):
        row = doubled.iloc[0]
        raise ValueError(
            f"image {row['image']} of {row['network']} is there twice for {row['method']}; join "
            "studies of different networks or images only"
        )


def _rows(
    classifier: Classifier, samples: Sequence[Sample], options: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of one batch."""
    if not samples:
        return []
    for sample in samples:
        if sample.target is None:
            raise ValueError(f"image {sample.id} has no true class; the box study needs it")
    x = torch.stack([s.image for s in samples])  # (N, 3, H, W)
    c = torch.tensor([s.target for s in samples])
    B = torch.stack([box_mask(s.boxes, x.shape[2:]) for s in samples])  # (N, 1, H, W)
    masks = {(BOX, "B"): B, (BOX, "I∖B"): 1 - B}
    for method, own in options.items():
        S = explain(method, classifier, x, c, progress=False, warn=False, **own)
        masks |= {(method, m): s for m, s in zip(MASKS, (S, S * B, S * (1 - B)), strict=True)}
    p = probability(classifier, x, c)
    rows = []
    for (method, name), mask in masks.items():
        o = probability(classifier, x * mask, c)
        for i, sample in enumerate(samples):
            on, off = mass_shares(mask[i], sample.extra.get("masks"))
            row = {"image": sample.id, "method": method, "mask": name, "p": p[i], "o": o[i]}
            rows.append(row | {"object": on, "environment": off})
    return rows


def probability(classifier: Classifier, images: Tensor, targets: Tensor) -> list[float]:
    """Return the probability of each image's target."""
    return classifier.probabilities(images).gather(1, targets[:, None])[:, 0].tolist()


def mass_shares(mask: Tensor, objects: Tensor | None) -> tuple[float, float]:
    """Return the shares of the sum of a mask `(1, H, W)` on objects `(M, H, W)` and elsewhere."""
    if objects is None:
        return float("nan"), float("nan")
    mass = mask[0].double()
    on = objects.any(0)
    total = float(mass.sum()) or 1.0
    return float(mass[on].sum()) / total, float(mass[~on].sum()) / total


def box_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return Table 5: AD, AG and AI (percent) for each network, method and mask.

    Args:
        frame: What `box_study` returned, or several of them joined, of other networks or images.

    Returns:
        Columns network, method, mask, AD, AG, AI; for each of the three `AD ±`, …, the standard
        error over images (NaN for a single one), `AD low` and `AD high`, the 95 % interval of
        `evaluation/intervals.py`; n, the number of images.

    Raises:
        ValueError: If the frame holds several datasets, or an image twice.
    """
    groups = _measured(frame).groupby(["network", "method", "mask"], sort=False)[list(METRICS)]
    table = groups.mean().join(groups.sem().add_suffix(" ±"))
    for end, column in enumerate((" low", " high")):
        ends = groups.agg(lambda v, end=end: interval(torch.tensor(v.to_numpy()), LIMITS)[end])
        table = table.join(ends.add_suffix(column))
    table = table[[f"{name}{of}" for name in METRICS for of in ("", " ±", " low", " high")]]
    return table.assign(n=groups.size()).reset_index()


def box_or_complement(frame: pd.DataFrame) -> pd.DataFrame:
    """Return AD when only the boxes are kept, and when everything else is kept.

    Args:
        frame: What `box_study` returned, or several of them joined.

    Returns:
        A row for each network: network; inside and outside, AD with the masks B and I∖B; sure,
        whether the 95 % interval of their difference, paired by image, excludes 0.
    """
    box = _measured(frame[frame["method"] == BOX])
    drops = box.pivot(index=["network", "image"], columns="mask", values="AD")
    found = pd.DataFrame({"inside": drops["B"], "outside": drops["I∖B"]})
    networks = found.groupby("network")
    table = networks.mean()
    table["sure"] = [_surely_differ(drops) for _, drops in networks]
    return table.loc[box["network"].unique()].reset_index()


def _surely_differ(drops: pd.DataFrame) -> bool:
    inside, outside = (torch.tensor(drops[name].to_numpy()) for name in ("inside", "outside"))
    return surely_better(inside, outside) or surely_better(outside, inside)


def _measured(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a box study with AD, AG and AI of each, in percent."""
    check_study(frame)
    p, o = (torch.tensor(frame[name].to_numpy()) for name in ("p", "o"))
    return frame.assign(**{name: 100 * metric(p, o).numpy() for name, metric in METRICS.items()})
