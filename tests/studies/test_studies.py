"""Boxes as masks, reliance by twins, and what maps claim, against plain loops and hand figures."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_classifier, make_images
from scipy.stats import spearmanr

import opticam_lite as ol
from opticam_lite.datasets import Dataset, Sample, Scenes
from opticam_lite.reports import Boxes
from opticam_lite.reports.boxes import have_twins, in_words
from opticam_lite.studies.boxes import (
    BOX,
    box_mask,
    box_or_complement,
    box_study,
    box_table,
    mass_shares,
)
from opticam_lite.studies.truth import (
    ALL,
    CLAIMS,
    FEWEST,
    QUANTITIES,
    agreement,
    claims,
    reliance,
    spearman,
    verdict,
)

BOXES = [
    torch.tensor([[2, 3, 9, 11]]),
    torch.tensor([[0, 0, 6, 32], [4, 20, 32, 40]]),  # they overlap, one reaches beyond the image
    torch.zeros(0, 4, dtype=torch.int64),
]


class Boxed(Dataset):
    """Three images with hand-made boxes; objects are every second pixel column of them."""

    name, has_boxes = "boxed", True

    def __init__(self, known: bool = True, targets: tuple[int | None, ...] = (0, 3, 1)) -> None:
        self.images, self.known, self.targets = make_images(), known, targets

    def __len__(self) -> int:
        return 3

    def sample(self, index: int) -> Sample:
        objects = torch.stack([slow_union(b[None], 32, 32)[0] > 0 for b in BOXES[index]] or [])
        objects[:, :, ::2] = False
        extra = {"masks": objects} if self.known else {}
        return Sample(f"i{index}", self.images[index], self.targets[index], BOXES[index], extra)


def slow_union(boxes, height, width):
    B = torch.zeros(1, height, width)
    for y in range(height):
        for x in range(width):
            for x0, y0, x1, y1 in boxes.tolist():
                if x0 <= x < x1 and y0 <= y < y1:
                    B[0, y, x] = 1
    return B


@pytest.fixture(scope="module")
def network():
    return make_classifier("cnn")


@pytest.mark.parametrize("boxes", [*BOXES, torch.tensor([[-4, -2, 3, 5], [-9, 1, -2, 4]])])
def test_box_mask_is_the_union_of_the_boxes(boxes):
    assert torch.equal(box_mask(boxes, (32, 32)), slow_union(boxes, 32, 32))


def test_box_study_against_plain_loops(network):
    data = Boxed()
    # The third image has no box and no objects.
    data.sample = lambda i: Boxed.sample(data, i) if i < 2 else without_box(data)
    methods = {"grad-cam": {}, "opti-cam": {"iterations": 2}}
    frame = box_study(network, data, methods, batch_size=2)
    assert len(frame) == 2 * (2 + 2 * 3)
    assert set(frame["dataset"]) == {"boxed"}
    for i in range(2):
        sample = data[i]
        x, c = sample.image[None], torch.tensor([sample.target])
        B = slow_union(sample.boxes, 32, 32)[None]
        expected = {("box", "B"): B, ("box", "I∖B"): 1 - B}
        for method, options in methods.items():
            S = ol.explain(method, network, x, c, **options)
            inside, outside = S.clone(), S.clone()
            inside[B == 0] = 0
            outside[B == 1] = 0
            expected |= {(method, "S"): S, (method, "B∩S"): inside, (method, "S∖B"): outside}
        rows = frame[frame["image"] == sample.id].set_index(["method", "mask"])
        assert list(rows.index) == list(expected)
        for key, mask in expected.items():
            p, o = (network.logits(v).softmax(1)[0, sample.target].item() for v in (x, x * mask))
            on = sum(
                mask[0, 0, a, b].item()
                for a in range(32)
                for b in range(32)
                if any(one[a, b] for one in sample.extra["masks"])
            )
            total = mask.sum().item()
            found = rows.loc[key]
            assert found["p"] == pytest.approx(p, abs=1e-5)
            assert found["o"] == pytest.approx(o, abs=1e-4)
            assert found["object"] == pytest.approx(on / total, abs=1e-4)
            assert found["environment"] == pytest.approx(1 - on / total, abs=1e-4)


def without_box(data):
    return Sample("i2", data.images[2], 1, BOXES[2])


def test_pixels_that_nobody_knows_have_no_share_and_no_mass_is_nowhere(network):
    frame = box_study(network, Boxed(known=False), ["grad-cam"], indices=[0])
    assert frame[["object", "environment"]].isna().all(axis=None)
    objects = torch.ones(1, 32, 32, dtype=torch.bool)
    assert mass_shares(torch.zeros(1, 32, 32), objects) == (0, 0)


def test_box_table_by_hand():
    about = {"dataset": "d", "network": "n", "method": "m", "mask": "S"}
    frame = pd.DataFrame({**about, "image": ["a", "b"], "p": [0.5, 0.8], "o": [0.25, 0.9]})
    row = box_table(frame).iloc[0]
    assert row[["AD", "AG", "AI"]].tolist() == pytest.approx([25, 25, 50])
    # Drops of 50 and 0 percent: a deviation of 50/√2, over √2 images.
    assert row["AD ±"] == pytest.approx(25)
    assert row["n"] == 2
    # One drop of 50 % and one of 0, of images that could have 0 to 100.
    assert row[["AI low", "AI high"]].tolist() == pytest.approx([1.3, 98.7], abs=0.5)
    assert math.isnan(box_table(frame[:1]).iloc[0]["AD ±"])


def test_box_or_complement_by_hand():
    box = pd.DataFrame(
        {
            "dataset": "d",
            "network": "n",
            "method": BOX,
            "image": ["b", "b", "a", "a"],
            "mask": ["B", "I∖B", "I∖B", "B"],
            "p": [0.5, 0.5, 0.8, 0.8],
            "o": [0.25, 0.5, 0.2, 0.8],
        }
    )
    frame = pd.concat([box, box[::2].assign(method="cam", mask="S", o=0.0)])
    row = box_or_complement(frame).iloc[0]
    assert row[["inside", "outside"]].tolist() == pytest.approx([25, 37.5])
    assert not row["sure"]
    many = [box[:2].assign(image=f"{i}", o=[0.25, 0.5 - i / 100]) for i in range(6)]
    assert box_or_complement(pd.concat(many)).iloc[0]["sure"]
    assert not box_or_complement(pd.concat(many[:5])).iloc[0]["sure"]  # five are too few


def test_box_study_says_what_is_missing(network):
    with pytest.raises(ValueError, match="images has no boxes"):
        box_study(network, ol.datasets.Images(make_images(), [0, 1, 2]), ["cam"])
    with pytest.raises(ValueError, match="i0 has no true class"):
        box_study(network, Boxed(targets=(None, 3, 1)), ["cam"], indices=[0])
    bare = Boxed()
    bare.sample = lambda _: without_box(bare)
    with pytest.raises(ValueError, match="none of the 2 images of boxed has a box"):
        box_study(network, bare, ["cam"], indices=[0, 2])


def test_reliance_by_hand():
    scenes = ol.load_dataset("scenes")
    classifier = ol.load_model("scenes_shortcut", device="cpu")
    indices = [3, 0, 40]
    frame = reliance(classifier, scenes, indices=indices, batch_size=2)
    assert frame["image"].tolist() == [scenes.id(i) for i in indices]
    for row, i in zip(frame.to_dict("records"), indices, strict=True):
        p = [
            classifier.probabilities(Scenes(twin)[i].image[None])[0, scenes[i].target].item()
            for twin in (None, "swapped", "empty")
        ]
        assert [row["p"], row["swapped"], row["empty"]] == pytest.approx(p, abs=1e-5)
        assert row["object"] == pytest.approx(p[0] - p[2], abs=1e-5)
        assert row["environment"] == pytest.approx(p[0] - p[1], abs=1e-5)
        assert row["balance"] == pytest.approx(p[1] - p[2], abs=1e-5)
        assert row["home"] == scenes[i].extra["home"]


def test_studies_need_a_network_that_knows_the_classes(network):
    scenes = ol.load_dataset("scenes")
    with pytest.raises(ValueError, match="does not know the classes of scenes"):
        reliance(network, scenes, indices=[0])
    with pytest.raises(ValueError, match="does not know the classes of scenes"):
        box_study(network, scenes, ["fake-cam"], indices=[0])


def test_claims_by_hand():
    about = {"dataset": "d", "network": "n", "p": 0.5}
    frame = pd.DataFrame(
        [
            about | {"image": image, "method": method, "mask": mask, "o": o, "object": s}
            for image, method, mask, o, s in [
                ("a", "box", "B", 0.9, 1.0),
                ("a", "m", "S", 0.6, 0.25),
                ("a", "m", "B∩S", 0.7, 1.0),
                ("a", "m", "S∖B", 0.1, 0.0),
                ("b", "m", "S", 0.6, 0.5),
                ("b", "m", "B∩S", 0.2, 1.0),
                ("b", "m", "S∖B", 0.5, 0.0),
            ]
        ]
    )
    frame["environment"] = 1 - frame["object"]
    found = claims(frame).set_index(["claim", "image"])
    expected = {
        ("mass", "a"): [0.25, 0.75, -0.5],
        ("mass", "b"): [0.5, 0.5, 0.0],
        ("probability", "a"): [0.7, 0.1, 0.6],
        ("probability", "b"): [0.2, 0.5, -0.3],
    }
    assert len(found) == len(expected)
    for key, values in expected.items():
        assert found.loc[key, list(QUANTITIES)].tolist() == pytest.approx(values)


def test_spearman_is_scipys_and_nan_for_a_constant():
    generator = np.random.default_rng(0)
    x, y = generator.integers(5, size=(2, 7, 12))  # with ties
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert spearman(x, y) == pytest.approx(expected)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def made_up(networks=("u", "v"), n=40):
    """A truth, and claims of a method that tells it, one that is noise and one of one network."""
    generator = np.random.default_rng(1)
    truth, told = [], []
    for network in networks:
        for i in range(n):
            object_, environment = generator.random(2)
            key = {"network": network, "image": f"i{i}"}
            values = {"object": object_, "environment": environment}
            truth.append(key | values | {"balance": object_ - environment})
            noise = generator.random(3)
            for claim in CLAIMS:
                row = key | {"claim": claim}
                true = {q: truth[-1][q] + 0.2 * e for q, e in zip(QUANTITIES, noise, strict=True)}
                told.append(row | {"method": "honest"} | true)
                told.append(row | {"method": "fake-cam"} | dict.fromkeys(QUANTITIES, noise[0]))
                if network == networks[0]:
                    told.append(row | {"method": "one"} | true)
    return pd.DataFrame(truth), pd.DataFrame(told)


def test_agreement_against_a_loop_over_draws():
    truth, told = made_up()
    found = agreement(truth, told, draws=50, seed=3)
    assert found.equals(agreement(truth, told, draws=50, seed=3))
    resamples = np.random.default_rng(3).integers(40, size=(50, 40))
    for group, members in {"u": ["u"], ALL: ["u", "v"]}.items():
        rhos = {}
        for method in ("honest", "fake-cam"):
            rows = told[(told["method"] == method) & (told["claim"] == "mass")]

            def pair(draw, rows=rows, members=members):
                t = [truth[truth["network"] == m]["balance"].to_numpy()[draw] for m in members]
                s = [rows[rows["network"] == m]["balance"].to_numpy()[draw] for m in members]
                return spearmanr(np.concatenate(t), np.concatenate(s)).statistic

            rhos[method] = pair(np.arange(40)), np.array([pair(draw) for draw in resamples])
        key = ["network", "quantity", "claim", "method"]
        for method, (rho, draws) in rhos.items():
            row = found.set_index(key).loc[(group, "balance", "mass", method)]
            behind = rhos["honest"][1] - draws
            assert row["rho"] == pytest.approx(rho)
            assert row[["low", "high"]].tolist() == pytest.approx(np.percentile(draws, [2.5, 97.5]))
            assert row["behind"] == pytest.approx(rhos["honest"][0] - rho)
            assert row[["behind_low", "behind_high"]].tolist() == pytest.approx(
                np.percentile(behind, [2.5, 97.5])
            )
            assert row["n"] == 40 * len(members)
    pooled = found[found["network"] == ALL]
    assert set(pooled["method"]) == {"honest", "fake-cam"}  # "one" explains one network only
    assert set(found[found["network"] == "u"]["method"]) == {"honest", "fake-cam", "one"}


def test_agreement_refuses_images_without_a_claim():
    truth, told = made_up(n=5)
    with pytest.raises(ValueError, match="image i2 of u is in one of truth and claims only"):
        agreement(truth, told[told["image"] != "i2"])
    with pytest.raises(ValueError, match="of v is in one of truth and claims only"):
        agreement(truth[truth["network"] == "u"], told)
    unknown = told.assign(object=told["object"].where(told["image"] != "i2"))
    with pytest.raises(ValueError, match="object is not known for every network and image"):
        agreement(truth, unknown)


def test_studies_of_the_same_image_are_not_averaged(network):
    data = Boxed()
    frame = box_study(network, data, ["fake-cam"], indices=[0, 0, 1])
    assert frame["image"].unique().tolist() == ["i0", "i1"]
    assert box_table(frame)["n"].eq(2).all()
    for joined, message in [
        (pd.concat([frame, frame]), "image i0 of Sequential is there twice for box"),
        (pd.concat([frame, frame.assign(dataset="other")]), "rows of boxed, other are joined"),
    ]:
        for study in (box_table, box_or_complement, claims):
            with pytest.raises(ValueError, match=message):
                study(joined)


def test_one_network_is_not_pooled():
    truth, told = made_up(networks=("u",), n=8)
    assert set(agreement(truth, told, draws=5)["network"]) == {"u"}


def test_verdict():
    truth, told = made_up()
    found = agreement(truth, told, draws=200)
    pooled = verdict(found[found["network"] == ALL], "mass")
    assert (pooled["best"], pooled["true"], pooled["beats_control"]) == ("honest", True, True)
    assert pooled["within_noise"] == []
    assert pooled["n"] == 80
    # Of two methods with the same map neither is better.
    own = verdict(found[found["network"] == "u"], "mass")
    assert own["within_noise"] == ["one"]
    control = found[found["method"] == "fake-cam"]
    assert verdict(control[control["network"] == "u"], "mass")["beats_control"] is None
    assert verdict(found.assign(rho=np.nan), "mass") == {"best": None}


def test_few_images_say_nothing_surely():
    truth, told = made_up(networks=("u",), n=FEWEST - 1)
    found = agreement(truth, told, draws=200)
    assert found[["low", "high", "behind_low", "behind_high"]].isna().all(axis=None)
    said = verdict(found, "mass")
    assert (said["true"], said["beats_control"]) == (False, False)
    assert "fake-cam" in said["within_noise"]
    truth, told = made_up(networks=("u",), n=FEWEST)
    honest = agreement(truth, told, draws=200).query("method == 'honest'")
    assert honest[["low", "high"]].notna().all(axis=None)
    told.loc[told["image"] != "i0", "balance"] = 0.0  # a third of the resamples has no i0
    lone = agreement(truth, told, draws=200).query("quantity == 'balance'")
    assert lone["rho"].notna().all()
    assert lone["low"].isna().all()


def test_a_verdict_in_words():
    found = {"best": "grad-cam", "rho": 0.5, "low": 0.2, "high": 0.7, "true": True, "n": 40}
    found |= {"within_noise": ["layer-cam"], "beats_control": True}
    said = in_words(found)
    assert said.startswith("**Grad-CAM** follows the truth best, ρ = 0.50 (0.20 to 0.70, n = 40).")
    assert said.endswith("Within the noise of it: Layer-CAM.")
    unsure = in_words(found | {"low": -0.1, "true": False, "beats_control": False})
    assert "may well be 0" in unsure
    assert unsure.endswith("add anything to the control.")
    few = {"low": math.nan, "high": math.nan}
    assert "too few images" in in_words(found | few)
    # Who runs against the truth does not follow it, however few or many the images.
    assert in_words(found | {"rho": -0.5} | few) == (
        "no method follows the truth; the highest is **Grad-CAM**, ρ = -0.50 (n = 40); these are "
        "too few images to say how surely."
    )
    against = in_words(found | {"rho": -0.5, "low": -0.7, "high": -0.2})
    assert against.endswith("ρ = -0.50 (-0.70 to -0.20, n = 40).")
    assert in_words({"best": None}) == "no correlation is defined."


def test_prepare_leaves_out_what_does_not_apply():
    subjects = Boxes(
        models="scenes_resnet scenes_vit", methods="cam, opti-cam", limit=3, iterations=7
    ).prepare()
    options = {"opti-cam": {"iterations": 7}}
    assert [subject.methods for subject in subjects] == [{"cam": {}, **options}, options]
    assert [list(subject.left_out) for subject in subjects] == [[], ["cam"]]
    assert subjects[0].indices == subjects[1].indices
    assert len(subjects[0].indices) == 3
    assert have_twins(subjects)
    swapped = Boxes(models="scenes_vgg", images="scenes-swapped", methods="grad-cam")
    assert not have_twins(swapped.prepare())


def test_prepare_takes_weights_of_ones_own(tmp_path):
    own = tmp_path / "my own.pt"
    network = ol.load_model("scenes_vgg").network
    with torch.no_grad():
        network.get_parameter("features.0.weight").mul_(0.5)
    torch.save(network.state_dict(), own)
    subjects = Boxes(models=f"scenes_vgg, scenes_vgg:{own}", methods="grad-cam", limit=1).prepare()
    classifiers = [subject.classifier for subject in subjects]
    assert [c.name for c in classifiers] == ["scenes_vgg", "my own"]
    theirs, ours = (c.network.get_parameter("features.0.weight") for c in classifiers)
    assert torch.equal(ours, 0.5 * theirs)
    with pytest.raises(ValueError, match="MODELS has two networks called 'my own'"):
        Boxes(models=f"scenes_vgg:{own}, scenes_vgg : {own}").prepare()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Boxes(models="scenes_vgg:gone.pt").prepare()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": 0}, "LIMIT is 0"),
        ({"models": " ,"}, "MODELS names none"),
        ({"methods": ","}, "METHODS names none"),
        ({"methods": "gradcam"}, "did you mean 'grad-cam'"),
        ({"images": "scenes-empty"}, "has no boxes"),
        ({"models": "scenes_vit", "methods": "cam"}, "no method of METHODS can explain scenes_vit"),
    ],
)
def test_prepare_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        Boxes(**{"models": "scenes_resnet"} | wrong).prepare()


def test_intervals_are_drawn_and_told():
    picture = ol.plots.intervals(
        {"a": {"u": (0.5, 0.25, 0.75), "v": (0, -1, 1)}, "b": {"v": (0.1, 0.0, 0.2)}}, title="T"
    )
    (ax,) = picture.figure.axes
    points = np.concatenate([drawn.get_offsets() for drawn in ax.collections[1::2]])
    assert points[:, 0].tolist() == [0.5, 0, 0.1]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["u", "v"]
    assert picture.alt == (
        "T. a: u 0.50 (0.25 to 0.75), v 0.00 (-1.00 to 1.00); b: v 0.10 (0.00 to 0.20)."
    )
