"""Studies that go beyond one table: what boxes are worth, and which maps tell the truth.

*The box study* (paper, section 5.4, Table 5) asks whether the object is what the network needs.
With B the union of the true boxes as a mask, I the whole image and S a map, the image is masked by
B, by I∖B, and for each method by S, B∩S = S ⊙ B and S∖B = S ⊙ (1 − B).

*The truth* is known for the embedded scenes alone, by their counterfactual twins. With p the
probability of the true class c for a scene, p_swapped for the same objects in another environment
and p_empty for the same environment without the objects, the network's reliance is

    on the object            p − p_empty         what is lost with the objects
    on the environment       p − p_swapped       what is lost with the environment
    balance                  p_swapped − p_empty

The balance is the first minus the second, so p cancels: it runs from −1 (the place alone decides)
to 1 (the object alone decides). An image that the network does not believe in at all has balance 0.

*The claim* of a map S about the same image is read in two ways:

| claim | object | environment | balance |
|---|---|---|---|
| `mass` | share of ΣS on the objects' visible pixels | share elsewhere | their difference |
| `probability` | probability under B∩S | under S∖B | their difference |

A method tells the truth if its claims rise and fall with the reliance: `agreement` is Spearman's
rank correlation over images. Fake-CAM, whose map is the whole image, is the control: its mass is
the object's area, its probabilities those of B and I∖B. What it reaches, a method reaches without
having looked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from .datasets import Dataset, Sample, Scenes, knows_classes, load_dataset
from .evaluation import choose
from .methods import METHODS, applicable, explain
from .metrics import drop, gain, increase
from .models import load_model
from .network import Classifier
from .registry import names_in

BOX = "box"  # stands for a method where the mask is B or I∖B and needs none
MASKS = ("S", "B∩S", "S∖B")
QUANTITIES = ("object", "environment", "balance")
CLAIMS = ("mass", "probability")
FEWEST = 6  # images: of fewer, resamples have nearly all a correlation of 1 or none
ALL = "all networks"


@dataclass(frozen=True)
class Study:
    """Networks and images with boxes, checked.

    Attributes:
        classifiers: The networks.
        datasets: The images as each of them takes them.
        indices: The images to measure.
        methods: For each network the methods that apply to it, with their options.
        left_out: For each network name → reason of the methods that don't.
    """

    classifiers: list[Classifier]
    datasets: list[Dataset]
    indices: list[int]
    methods: list[dict[str, dict[str, Any]]]
    left_out: dict[str, dict[str, str]]

    @property
    def twins(self) -> bool:
        """Whether the images have counterfactual twins, so that the truth can be measured."""
        return all(d.name == "scenes" and isinstance(d, Scenes) for d in self.datasets)


def prepare(
    *,
    models: str = "scenes_resnet, scenes_vgg, scenes_vit, scenes_shortcut",
    images: str = "scenes",
    methods: str = "grad-cam, layer-cam, opti-cam-fast, fake-cam",
    limit: int = 8,
    seed: int = 0,
    iterations: int = 20,
    draws: int = 1000,
    device: str = "auto",
) -> Study:
    """Check the parameters of the report on boxes and load what they name.

    Args:
        models: Names of networks, separated by commas; one with weights of your own is
            `name:file` and is called as the file is, without its ending.
        images: What `load_dataset` takes; it must have boxes and the networks' own classes.
        methods: Names separated by commas. Where one does not apply to a network it is left out.
        limit: Measure at most this many images.
        seed: Of their draw, and of the bootstrap.
        iterations: Of Opti-CAM.
        draws: Of the bootstrap.
        device: See `load_model`.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: The first thing that is wrong.
    """
    for name, number in {"limit": limit, "iterations": iterations, "draws": draws}.items():
        if number < 1:
            raise ValueError(f"{name.upper()} is {number}; it must be at least 1")
    named = models.split(",") if ":" in models else names_in(models)  # files may have spaces
    lists = {"MODELS": [m.strip() for m in named if m.strip()], "METHODS": names_in(methods)}
    for what, given in lists.items():
        if not given:
            raise ValueError(f"{what} names none; separate names by commas")
    for name in lists["METHODS"]:
        METHODS[name]  # an unknown name raises the error that lists the close ones
    classifiers = [_loaded(named, device) for named in lists["MODELS"]]
    names = [classifier.name for classifier in classifiers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"MODELS has two networks called {twice[0]!r}; leave one out, or rename its file"
        )
    datasets = [load_dataset(images, classifier=classifier) for classifier in classifiers]
    wanted, left_out = [], {}
    for classifier, dataset in zip(classifiers, datasets, strict=True):
        if not dataset.has_boxes:
            raise ValueError(f"IMAGES is {images!r}, which has no boxes; this report needs them")
        _check_classes(classifier, dataset)
        reasons = applicable(classifier)
        fit = [name for name in lists["METHODS"] if reasons[name] is None]
        if not fit:
            raise ValueError(f"no method of METHODS can explain {classifier.name}")
        options: dict[str, dict[str, Any]] = {"opti-cam": {"iterations": iterations}}
        wanted.append({name: options.get(name, {}) for name in fit})
        left_out[classifier.name] = {
            name: reason for name in lists["METHODS"] if (reason := reasons[name]) is not None
        }
    indices = choose(min(map(len, datasets)), limit, seed)
    return Study(classifiers, datasets, indices, wanted, left_out)


# --------------------------------------------------------------------------------- the box study


def box_mask(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Return B, the union of boxes `(M, 4)`, as a mask `(1, H, W)` of zeros and ones.

    Boxes are x0, y0, x1, y1 in pixels, right and bottom exclusive.
    """
    B = torch.zeros(1, *size)
    for x0, y0, x1, y1 in boxes.tolist():
        B[:, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = 1
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
        indices: Of the images, each taken once. Default: all. Images without a box are left out.
        batch_size: Images at a time.

    Returns:
        A row for each image, method and mask: dataset, network, image (its id), method, mask (one
        of `MASKS`; `B` and `I∖B` for the method `box`), p and o (the true class's probability
        before and after masking), object and environment (the shares of the mask's sum on the
        objects' visible pixels and elsewhere: both 0 for a mask of zeros, NaN where the dataset
        does not know these pixels).

    Raises:
        ValueError: If there are no boxes or no true classes, or the network has other classes.
    """
    if not dataset.has_boxes:
        raise ValueError(f"{dataset.name} has no boxes; the box study needs them")
    _check_classes(classifier, dataset)
    options = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    chosen = _chosen(dataset, indices)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(chosen), batch_size):
        samples = [dataset[i] for i in chosen[start : start + batch_size]]
        rows += _measure(classifier, [s for s in samples if len(s.boxes)], options)
    if not rows:
        raise ValueError(f"none of the {len(chosen)} images of {dataset.name} has a box")
    frame = pd.DataFrame(rows)
    frame.insert(0, "dataset", dataset.name)
    frame.insert(1, "network", classifier.name)
    return frame


def _loaded(named: str, device: str) -> Classifier:
    name, given, checkpoint = (part.strip() for part in named.partition(":"))
    if not given:
        return load_model(name, device=device)
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"MODELS has the file {checkpoint!r}, and there is no such file")
    classifier = load_model(name, checkpoint=path, device=device)
    classifier.name = path.stem
    return classifier


def _check_classes(classifier: Classifier, dataset: Dataset) -> None:
    if not knows_classes(classifier, dataset):
        raise ValueError(
            f"{classifier.name} does not know the classes of {dataset.name}; this study needs a "
            "network that was trained on them"
        )


def _chosen(dataset: Dataset, indices: Iterable[int] | None) -> list[int]:
    return list(dict.fromkeys(range(len(dataset)) if indices is None else indices))


def _check_study(frame: pd.DataFrame) -> None:
    """Raise ValueError unless a frame holds each image of one dataset once."""
    if len(names := frame["dataset"].unique()) > 1:
        raise ValueError(f"rows of {', '.join(names)} are joined; make a table of one dataset")
    doubled = frame.duplicated(["network", "image", "method", "mask"])
    if doubled.any():
        row = frame[doubled].iloc[0]
        raise ValueError(
            f"image {row['image']} of {row['network']} is there twice for {row['method']}; join "
            "studies of different networks or images only"
        )


def _measure(
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
        S = explain(method, classifier, x, c, progress=False, **own)
        masks |= {(method, m): s for m, s in zip(MASKS, (S, S * B, S * (1 - B)), strict=True)}
    p = _probability(classifier, x, c)
    rows = []
    for (method, name), mask in masks.items():
        o = _probability(classifier, x * mask, c)
        for i, sample in enumerate(samples):
            shares = _shares(mask[i], sample.extra.get("masks"))
            row = {"image": sample.id, "method": method, "mask": name, "p": p[i], "o": o[i]}
            rows.append({**row, **dict(zip(QUANTITIES[:2], shares, strict=True))})
    return rows


def _probability(classifier: Classifier, images: Tensor, c: Tensor) -> list[float]:
    return classifier.probabilities(images).gather(1, c[:, None])[:, 0].tolist()


def _shares(mask: Tensor, objects: Tensor | None) -> tuple[float, float]:
    """Return the shares of a mask's sum on the objects `(M, H, W)` and elsewhere."""
    if objects is None:
        return float("nan"), float("nan")
    on = objects.any(0)
    total = float(mask.double().sum()) or 1.0
    inside = float(mask[0].double()[on].sum()) / total
    return inside, float(mask[0].double()[~on].sum()) / total


def box_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return Table 5: AD, AG and AI (percent) for each network, method and mask.

    Args:
        frame: What `box_study` returned, or several of them joined, of other networks or images.

    Returns:
        Columns network, method, mask, AD, AG, AI; `AD ±`, `AG ±`, `AI ±`, the standard errors over
        images (NaN for a single one); n, the number of images.

    Raises:
        ValueError: If the frame holds several datasets, or an image twice.
    """
    _check_study(frame)
    p, o = (torch.tensor(frame[name].to_numpy()) for name in ("p", "o"))
    metrics = {"AD": drop, "AG": gain, "AI": increase}
    values = {name: 100 * metric(p, o).numpy() for name, metric in metrics.items()}
    keys = ["network", "method", "mask"]
    groups = frame.assign(**values).groupby(keys, sort=False)[list(values)]
    table = groups.mean().join(groups.sem().add_suffix(" ±"))
    table = table[[column for name in values for column in (name, f"{name} ±")]]
    return table.assign(n=groups.size()).reset_index()


# ------------------------------------------------------------------------- the truth and the maps


def box_or_complement(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what keeping the boxes alone costs, and what keeping everything else costs.

    Args:
        frame: What `box_study` returned, or several of them joined.

    Returns:
        A row for each network: network; inside and outside, AD with the masks B and I∖B; `±`, the
        standard error of their difference, which is that of the images' own differences, as both
        were measured on the same ones.
    """
    _check_study(frame)
    rows = []
    for network, group in frame[frame["method"] == BOX].groupby("network", sort=False):
        o = group.pivot(index="image", columns="mask", values="o")
        p = torch.tensor(group[group["mask"] == "B"].set_index("image")["p"][o.index].to_numpy())
        inside, outside = (100 * drop(p, torch.tensor(o[m].to_numpy())) for m in ("B", "I∖B"))
        error = (inside - outside).std() / len(p) ** 0.5 if len(p) > 1 else torch.tensor(torch.nan)
        row = {"inside": inside.mean(), "outside": outside.mean(), "±": error}
        rows.append({"network": network, **{name: float(value) for name, value in row.items()}})
    return pd.DataFrame(rows)


def reliance(
    classifier: Classifier,
    scenes: Scenes,
    *,
    indices: Iterable[int] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Measure by the counterfactual twins what a network relies on.

    Args:
        classifier: A network that knows the classes of the scenes.
        scenes: The scenes themselves, not a twin.
        indices: Of the images, each taken once. Default: all.
        batch_size: Images at a time.

    Returns:
        A row for each image: network, image (its id), home (whether the environment is the
        class's home), p, swapped, empty (the true class's probabilities), object, environment,
        balance (see the module).

    Raises:
        ValueError: If the network has other classes.
    """
    _check_classes(classifier, scenes)
    chosen = _chosen(scenes, indices)
    samples = [scenes[i] for i in chosen]
    c = torch.tensor([s.target for s in samples])
    views = {"p": scenes, "swapped": scenes.twin("swapped"), "empty": scenes.twin("empty")}
    p: dict[str, list[float]] = {name: [] for name in views}
    for start in range(0, len(chosen), batch_size):
        part = slice(start, start + batch_size)
        for name, view in views.items():
            p[name] += _probability(classifier, view.batch(chosen[part])[0], c[part])
    about = {"image": [s.id for s in samples], "home": [s.extra["home"] for s in samples]}
    frame = pd.DataFrame({"network": classifier.name, **about, **p})
    frame["object"] = frame["p"] - frame["empty"]
    frame["environment"] = frame["p"] - frame["swapped"]
    frame["balance"] = frame["object"] - frame["environment"]
    return frame


def claims(frame: pd.DataFrame) -> pd.DataFrame:
    """Read from a box study what each map says the network relies on.

    Args:
        frame: What `box_study` returned for data whose objects' pixels are known.

    Returns:
        A row for each network, image, method and claim (`CLAIMS`): object, environment, balance.
    """
    _check_study(frame)
    keys = ["network", "image", "method"]
    maps = frame[frame["method"] != BOX]
    whole = maps[maps["mask"] == "S"]
    mass = whole[[*keys, "object", "environment"]].assign(claim="mass")
    o = maps.pivot(index=keys, columns="mask", values="o").reset_index()
    probability = o.rename(columns={"B∩S": "object", "S∖B": "environment"})
    probability = whole[keys].merge(probability, on=keys).assign(claim="probability")
    found = pd.concat([mass, probability], ignore_index=True)
    found["balance"] = found["object"] - found["environment"]
    return found[[*keys, "claim", *QUANTITIES]]


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last axis; NaN where one side is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 10.0, 30.0])).round(3).item()
    0.866
    """
    x, y = (stats.rankdata(v, axis=-1) for v in (x, y))  # equal values share the mean rank
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(scale > 0, scale, np.nan)


def agreement(
    truth: pd.DataFrame, claimed: pd.DataFrame, *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Correlate what maps say with what is true, over images (Spearman's ρ).

    Intervals are percentile bootstraps of 95 %: scenes are drawn with replacement, the same ones
    for every network and method, so that differences between methods are paired. They tell how
    far ρ depends on the scenes that were met; they know nothing of other networks.

    Args:
        truth: What `reliance` returned, for one network or several joined.
        claimed: What `claims` returned for the same networks and images.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        A row for each network, quantity (`QUANTITIES`), claim (`CLAIMS`) and method: rho, low,
        high; behind, behind_low, behind_high, the ρ of the best method in this group minus this
        one's, so that an interval from below 0 on is within the noise (it is too kind to the best,
        which was chosen on the same images); n, the number of image × network pairs. With several
        networks the group `ALL` pools them; methods that can't explain each of them are absent
        from it.

    Raises:
        ValueError: If the two do not hold the same networks and images.
    """
    measured = [set(zip(f["network"], f["image"], strict=True)) for f in (truth, claimed)]
    if measured[0] != measured[1]:
        network, image = min(measured[0] ^ measured[1])
        raise ValueError(
            f"image {image} of {network} is in one of truth and claims only; measure both on the "
            "same networks and images"
        )
    networks = list(dict.fromkeys(truth["network"]))
    images = list(dict.fromkeys(truth["image"]))
    generator = np.random.default_rng(seed)
    resamples = generator.integers(len(images), size=(draws, len(images)))
    groups = {name: [name] for name in networks}
    if len(networks) > 1:
        groups[ALL] = networks
    rows = []
    for group, members in groups.items():
        for quantity in QUANTITIES:
            t = _matrix(truth, quantity, members, images)
            for claim in CLAIMS:
                told = claimed[claimed["claim"] == claim]
                about = {"network": group, "quantity": quantity, "claim": claim}
                rows += [
                    about | row for row in _compare(t, told, quantity, members, images, resamples)
                ]
    return pd.DataFrame(rows)


def _matrix(
    frame: pd.DataFrame, quantity: str, networks: Sequence[str], images: Sequence[str]
) -> np.ndarray:
    """Return a quantity as `(networks, images)`."""
    table = frame.pivot(index="network", columns="image", values=quantity)
    table = table.reindex(index=networks, columns=images)
    if table.isna().any(axis=None):
        raise ValueError(
            f"{quantity} is not known for every network and image; truth and claims must be "
            "measured on the same images, and claims on images whose objects' pixels are known"
        )
    return table.to_numpy()


def _compare(
    t: np.ndarray,
    told: pd.DataFrame,
    quantity: str,
    networks: Sequence[str],
    images: Sequence[str],
    resamples: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the methods' rows of one group; `t` is the truth `(networks, images)`."""

    def drawn(values: np.ndarray) -> np.ndarray:
        # (networks, draws, images) → (draws, networks · images)
        return np.moveaxis(values[:, resamples], 0, 1).reshape(len(resamples), -1)

    rho, redrawn = {}, {}
    truth = drawn(t)
    for method, rows in told[told["network"].isin(networks)].groupby("method", sort=False):
        if rows["network"].nunique() < len(networks):
            continue
        s = _matrix(rows, quantity, networks, images)
        rho[method] = float(spearman(t.reshape(-1), s.reshape(-1)))
        redrawn[method] = spearman(truth, drawn(s))
    if not rho:
        return []
    best = max(rho, key=lambda m: -np.inf if np.isnan(rho[m]) else rho[m])
    rows = []
    for method, r in rho.items():
        low, high = _interval(redrawn[method], len(images))
        behind_low, behind_high = _interval(redrawn[best] - redrawn[method], len(images))
        row = {"method": method, "rho": r, "low": low, "high": high, "behind": rho[best] - r}
        row |= {"behind_low": behind_low, "behind_high": behind_high, "n": t.size}
        rows.append(row)
    return rows


def _interval(values: np.ndarray, images: int) -> tuple[float, float]:
    """Return where 95 % of the resamples lie; NaN if that would only seem to be known."""
    defined = values[~np.isnan(values)]
    if images < FEWEST or len(defined) < 0.95 * len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def verdict(agreed: pd.DataFrame, claim: str, *, control: str = "fake-cam") -> dict[str, Any]:
    """Say which method's balance follows the truth best, and how surely.

    Args:
        agreed: What `agreement` returned, of one group (one network, or `ALL`).
        claim: One of `CLAIMS`.
        control: The method that has not looked.

    Returns:
        best (None if no ρ is defined); rho, low, high of it (NaN of too few images); true: whether
        its interval is above 0; within_noise: the other methods whose distance to it may be 0, or
        is not known; beats_control: whether
        the control is measured and not among those (None if it was not measured or is the best).
    """
    rows = agreed[(agreed["quantity"] == "balance") & (agreed["claim"] == claim)]
    rows = rows[rows["rho"].notna()].sort_values("rho", ascending=False, kind="stable")
    if not len(rows):
        return {"best": None}
    first, others = rows.iloc[0], rows.iloc[1:]
    near = others.loc[~(others["behind_low"] > 0), "method"].tolist()  # or not known
    beats = None if control not in set(others["method"]) else control not in near
    figures = {name: float(first[name]) for name in ("rho", "low", "high")}
    certain = {"true": figures["low"] > 0, "within_noise": near, "beats_control": beats}
    return {"best": first["method"], **figures, **certain, "n": int(first["n"])}


def in_words(verdict: Mapping[str, Any]) -> str:
    """Return what `verdict` found as sentences in Markdown."""
    if verdict["best"] is None:
        return "no correlation is defined."
    best, rho = f"**{METHODS[verdict['best']].title}**", f"ρ = {verdict['rho']:.2f}"
    about = f"n = {verdict['n']}"
    few = np.isnan(verdict["low"])
    if not few:
        about = f"{verdict['low']:.2f} to {verdict['high']:.2f}, {about}"
    unsure = "; these are too few images to say how surely." if few else ""
    if verdict["rho"] <= 0:
        return f"no method follows the truth; the highest is {best}, {rho} ({about}){unsure or '.'}"
    text = f"{best} follows the truth best, {rho} ({about})"
    if few:
        return text + unsure
    text += "." if verdict["true"] else ", which may well be 0: none is shown to tell the truth."
    near = ", ".join(METHODS[name].title for name in verdict["within_noise"])
    text += f" Within the noise of it: {near}." if near else " Every other is surely behind."
    if verdict["beats_control"] is False or verdict["best"] == "fake-cam":
        text += " The map is not shown to add anything to the control."
    return text
