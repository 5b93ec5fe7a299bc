"""How well maps agree with what a network relies on, measured by counterfactual twins.

The embedded scenes have counterfactual twins. With p the probability of the true class for a scene,
p_swapped for the same objects in another environment and p_empty for the same environment without
the objects, the network's reliance is

    on the object            p − p_empty         the drop without the objects
    on the environment       p − p_swapped       the drop in another environment
    balance                  p_swapped − p_empty

The balance is the first minus the second, so p cancels: it runs from −1 (the environment alone
decides) to 1 (the object alone decides). It is 0 for an image whose class the network gives no
probability in any version.

The claim of a map S about the same image is read in two ways:

| claim | object | environment | balance |
|---|---|---|---|
| `mass` | share of ΣS on the objects' visible pixels | share elsewhere | their difference |
| `probability` | probability under B∩S | under S∖B | their difference |

A method is truthful if its claims correlate with the reliance: `agreement` is Spearman's rank
correlation over images. Fake-CAM, whose map is the whole image, is the control: its mass is the
object's area, its probabilities those of B and I∖B. A correlation that Fake-CAM reaches, too, does
not depend on the content of a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ..datasets import Scenes
from ..network import Classifier
from ..registry import check_seed
from .boxes import BOX, check_classes, check_study, distinct, probability

QUANTITIES = ("object", "environment", "balance")
CLAIMS = ("mass", "probability")
FEWEST = 6  # images: with fewer, nearly all resamples have a correlation of 1 or an undefined one
ALL = "all networks"
CONTROL = "fake-cam"


def reliance(
    classifier: Classifier,
    scenes: Scenes,
    *,
    indices: Iterable[int] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Measure what a network relies on, by the counterfactual twins of the scenes.

    Args:
        classifier: A network that knows the classes of the scenes.
        scenes: The scenes themselves, not a twin.
        indices: Of the images, each used once. Default: all.
        batch_size: Images at a time.

    Returns:
        A row for each image: network, image (its id), home (whether the environment is the
        class's home), p, swapped, empty (the true class's probabilities), object, environment,
        balance (see the module).

    Raises:
        ValueError: If the network has other classes.
    """
    check_classes(classifier, scenes)
    chosen = distinct(scenes, indices)
    samples = [scenes[i] for i in chosen]
    c = torch.tensor([s.target for s in samples])
    views = {"p": scenes, "swapped": scenes.twin("swapped"), "empty": scenes.twin("empty")}
    p: dict[str, list[float]] = {name: [] for name in views}
    for start in range(0, len(chosen), batch_size):
        part = slice(start, start + batch_size)
        for name, view in views.items():
            p[name] += probability(classifier, view.batch(chosen[part])[0], c[part])
    about = {"image": [s.id for s in samples], "home": [s.extra["home"] for s in samples]}
    frame = pd.DataFrame({"network": classifier.name, **about, **p})
    frame["object"] = frame["p"] - frame["empty"]
    frame["environment"] = frame["p"] - frame["swapped"]
    frame["balance"] = frame["object"] - frame["environment"]
    return frame


def claims(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the claims of each map about the network's reliance, from a box study.

    Args:
        frame: What `box_study` returned for data whose objects' pixels are known.

    Returns:
        A row for each network, image, method and claim (`CLAIMS`): object, environment, balance.
    """
    check_study(frame)
    keys = ["network", "image", "method"]
    maps = frame[frame["method"] != BOX]
    mass = maps.loc[maps["mask"] == "S", [*keys, "object", "environment"]].assign(claim="mass")
    masked = maps.pivot(index=keys, columns="mask", values="o").reset_index()
    masked = masked.rename(columns={"B∩S": "object", "S∖B": "environment"})
    masked = mass[keys].merge(masked, on=keys).assign(claim="probability")  # in the order of mass
    found = pd.concat([mass, masked], ignore_index=True)
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
    """Correlate the claims of maps with the network's reliance, over images (Spearman's ρ).

    Intervals are percentile bootstraps of 95 %: scenes are drawn with replacement, the same ones
    for every network and method, so that differences between methods are paired. They estimate the
    spread of ρ over scenes, not over networks.

    Args:
        truth: What `reliance` returned, for one network or several joined.
        claimed: What `claims` returned for the same networks and images.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        A row for each network, quantity (`QUANTITIES`), claim (`CLAIMS`) and method: rho, low,
        high; behind, behind_low, behind_high, the ρ of the best method in this group minus this
        one's, so that an interval that begins below 0 is within the noise (it favours the best,
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
    networks, images = (list(dict.fromkeys(truth[column])) for column in ("network", "image"))
    groups = {name: [name] for name in networks}
    if len(networks) > 1:
        groups[ALL] = networks
    random = np.random.default_rng(check_seed(seed))
    resamples = random.integers(len(images), size=(draws, len(images)))
    rows = []
    for (group, members), quantity, claim in product(groups.items(), QUANTITIES, CLAIMS):
        told = claimed[(claimed["claim"] == claim) & claimed["network"].isin(members)]
        t = _matrix(truth, quantity, members, images)
        rho, redrawn = {}, {}
        for method, own in told.groupby("method", sort=False):
            if own["network"].nunique() == len(members):
                s = _matrix(own, quantity, members, images)
                rho[method] = float(spearman(t.reshape(-1), s.reshape(-1)))
                redrawn[method] = spearman(_resampled(t, resamples), _resampled(s, resamples))
        best = max(rho, key=lambda m: np.nan_to_num(rho[m], nan=-np.inf), default=None)
        for method, r in rho.items():
            row = {"network": group, "quantity": quantity, "claim": claim, "method": method}
            row |= {"rho": r, **_interval("", redrawn[method], len(images))}
            behind = redrawn[best] - redrawn[method]
            row |= {"behind": rho[best] - r, **_interval("behind_", behind, len(images))}
            rows.append(row | {"n": t.size})
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


def _resampled(values: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """Draw images of `(networks, images)` by `(draws, images)`: `(draws, networks · images)`."""
    return np.moveaxis(values[:, resamples], 0, 1).reshape(len(resamples), -1)


def _interval(name: str, values: np.ndarray, images: int) -> dict[str, float]:
    """Return where 95 % of the resamples lie; NaN if images or defined resamples are too few."""
    defined = values[~np.isnan(values)]
    low, high = float("nan"), float("nan")
    if images >= FEWEST and len(defined) >= 0.95 * len(values):
        low, high = np.percentile(defined, [2.5, 97.5]).tolist()
    return {f"{name}low": low, f"{name}high": high}


def verdict(agreed: pd.DataFrame, claim: str) -> dict[str, Any]:
    """Find the method whose balance correlates best with the reliance, and how certain that is.

    Args:
        agreed: What `agreement` returned, of one group (one network, or `ALL`).
        claim: One of `CLAIMS`.

    Returns:
        best (None if no ρ is defined); rho, low, high of it (NaN for too few images); true: whether
        its interval is above 0; within_noise: the other methods whose distance to it may be 0, or
        is not known; beats_control: whether `CONTROL` was measured and is not among those (None if
        it was not measured or is the best); n, the number of image × network pairs.
    """
    rows = agreed[(agreed["quantity"] == "balance") & (agreed["claim"] == claim)]
    rows = rows[rows["rho"].notna()].sort_values("rho", ascending=False, kind="stable")
    if not len(rows):
        return {"best": None}
    first, others = rows.iloc[0], rows.iloc[1:]
    near = others.loc[~(others["behind_low"] > 0), "method"].tolist()  # or not known
    beats = CONTROL not in near if CONTROL in set(others["method"]) else None
    figures = {name: float(first[name]) for name in ("rho", "low", "high")}
    certain = {"true": figures["low"] > 0, "within_noise": near, "beats_control": beats}
    return {"best": first["method"], **figures, **certain, "n": int(first["n"])}
