"""The renderer: same seed same pixels, truth that matches the picture, twins that are twins."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opticam_lite.datasets.scenes import CLASSES, ENVIRONMENTS, HOME
from opticam_lite.making import scenes
from opticam_lite.making.rendering import Scene, render
from opticam_lite.making.sampling import sample

STORED = Path(__file__).parents[2] / "data" / "scenes"
ENTRIES = json.loads((STORED / "annotations.json").read_text(encoding="utf-8"))["scenes"]
# Eight scenes that show every class once, three of them with several objects.
CHOSEN = (0, 9, 18, 27, 36, 45, 54, 63)
PINNED_SPEC = (4, "gravel", 3, 0)
PINNED_PITCH = 0.3034424679248233
PINNED_MEANS = [191.90, 85.61, 111.06, 132.83, 83.11, 156.31, 159.38, 156.45]
PINNED_AREAS = [1464, 2606, 3597, 3382, 5486, 4290, 4978, 4583]


@lru_cache(maxsize=32)
def rendered(number: int, kind: str = "image") -> Scene:
    spec, elsewhere = scenes.evaluation_spec(number)
    return render(
        spec,
        environment=elsewhere if kind == "swapped" else None,
        objects=kind != "empty",
    )


def stored(number: int, kind: str = "image") -> np.ndarray:
    entry = ENTRIES[number]
    file = entry["image"] if kind == "image" else entry["twins"][kind]["image"]
    return np.asarray(Image.open(STORED / file).convert("RGB")).astype(int)


def test_specs_repeat_and_differ() -> None:
    assert sample(7, 3) == sample(7, 3)
    assert sample(7, 3) != sample(7, 4)
    assert sample(7, 3) != sample(8, 3)


def test_a_spec_is_pinned() -> None:
    """The stream of random numbers may not shift: every stored scene would be another one."""
    spec = sample(1, 0)
    assert (spec.label, spec.environment, len(spec.objects), len(spec.clutter)) == PINNED_SPEC
    assert spec.pitch == pytest.approx(PINNED_PITCH, abs=1e-12)


def test_pixels_repeat_in_another_process() -> None:
    here = render(sample(11, 5), size=96).image
    code = (
        "import hashlib; from opticam_lite.making import rendering, sampling; "
        "image = rendering.render(sampling.sample(11, 5), size=96).image; "
        "print(hashlib.sha256(image.tobytes()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert there == hashlib.sha256(here.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["image", "swapped", "empty"])
@pytest.mark.parametrize("number", CHOSEN)
def test_stored_scenes_are_what_is_rendered(number: int, kind: str) -> None:
    """Within the loss of JPEG: another scene differs by 20 and more."""
    difference = np.abs(stored(number, kind) - rendered(number, kind).image)
    assert difference.mean() < 6
    other = np.abs(stored((number + 8) % len(ENTRIES), kind) - rendered(number, kind).image)
    assert other.mean() > 2 * difference.mean() + 5


def test_statistics_are_pinned() -> None:
    """Drift of the renderer is noticed, whichever part of it drifts."""
    found = [float(rendered(number).image.mean()) for number in CHOSEN]
    assert found == pytest.approx(PINNED_MEANS, abs=0.25)
    areas = [int(rendered(number).masks.sum()) for number in CHOSEN]
    assert areas == pytest.approx(PINNED_AREAS, rel=0.01)


@pytest.mark.parametrize("number", CHOSEN)
def test_annotations_match_the_rendering(number: int) -> None:
    entry, scene = ENTRIES[number], rendered(number)
    spec, elsewhere = scenes.evaluation_spec(number)
    assert entry["label"] == spec.label == CLASSES.index(entry["class"])
    assert (entry["environment"], entry["home"]) == (spec.environment, spec.home)
    assert entry["twins"]["swapped"]["environment"] == elsewhere
    assert np.abs(np.array(entry["boxes"]) - scene.boxes).max() <= 1
    numbers = np.asarray(Image.open(STORED / entry["mask"]))
    for k, mask in enumerate(scene.masks, start=1):
        wrong = (numbers == k) != mask
        assert wrong.sum() <= 0.01 * mask.sum()


@pytest.mark.parametrize("number", CHOSEN)
def test_boxes_are_the_bounds_of_the_masks(number: int) -> None:
    scene = rendered(number)
    assert len(scene.boxes) == len(scene.masks) >= 1
    assert (scene.masks.sum(axis=0) <= 1).all(), "an object's visible pixels belong to it alone"
    for box, mask in zip(scene.boxes, scene.masks, strict=True):
        x0, y0, x1, y1 = box
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any()
        assert mask[y1 - 1].any()
        assert mask[:, x0].any()
        assert mask[:, x1 - 1].any()


@pytest.mark.parametrize("number", CHOSEN)
def test_swapped_twin_changes_the_environment_alone(number: int) -> None:
    original, twin = rendered(number), rendered(number, "swapped")
    spec, elsewhere = scenes.evaluation_spec(number)
    assert elsewhere not in (spec.environment, HOME[CLASSES[spec.label]])
    np.testing.assert_array_equal(original.masks, twin.masks)
    change = np.abs(original.image.astype(int) - twin.image).max(axis=2)
    inner = _eroded(original.masks.any(axis=0))
    assert inner.sum() > 100
    # Gaps narrower than a pixel let a little of the environment through inside a mask, too.
    assert (change[inner] > 0).mean() < 0.05, "an object's pixels stay, its edges apart"
    assert change[~original.masks.any(axis=0)].mean() > 10


@pytest.mark.parametrize("number", CHOSEN)
def test_empty_twin_lacks_the_objects_and_their_shadows_alone(number: int) -> None:
    original, twin = rendered(number), rendered(number, "empty")
    assert len(twin.boxes) == len(twin.masks) == 0
    change = np.abs(original.image.astype(int) - twin.image).max(axis=2)
    # Two mushrooms of a meadow's colours may hide well; most of the pixels differ all the same.
    assert (change[original.masks.any(axis=0)] > 0).mean() > 0.9
    assert (change == 0).mean() > 0.3, "far from the objects nothing changes"


def _eroded(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def test_evaluation_split_is_balanced() -> None:
    assert len(ENTRIES) == scenes.EVALUATION_COUNT == 256
    for label, name in enumerate(CLASSES):
        mine = [e for e in ENTRIES if e["label"] == label]
        assert len(mine) == 32
        assert sum(e["home"] for e in mine) == 16
        for e in mine:
            assert e["home"] == (e["environment"] == HOME[name])
            assert e["twins"]["swapped"]["environment"] not in (
                e["environment"],
                HOME[name],
            )
    elsewhere = {e["environment"] for e in ENTRIES if not e["home"]}
    assert elsewhere == set(ENVIRONMENTS)
    assert {len(e["boxes"]) for e in ENTRIES} == {1, 2, 3}


def test_every_stored_object_can_be_seen() -> None:
    for entry in ENTRIES:
        numbers = np.asarray(Image.open(STORED / entry["mask"]))
        areas = np.bincount(numbers.ravel(), minlength=4)[1:]
        assert areas.max() >= 400, entry["id"]
        assert (areas > 0).sum() == len(entry["boxes"])


def test_data_stays_small() -> None:
    files = [f for f in STORED.parent.rglob("*") if f.is_file()]
    assert len(files) > 1000
    assert sum(f.stat().st_size for f in files) <= 30e6


def test_home_rate_is_the_share_at_home() -> None:
    for rate in (0.0, 0.45, 1.0):
        specs = [sample(3, i, home_rate=rate) for i in range(600)]
        assert np.mean([s.home for s in specs]) == pytest.approx(rate, abs=0.06)
    labels = np.bincount([s.label for s in specs], minlength=8)
    assert labels.min() > 40, "classes are drawn evenly"


def test_colours_and_materials_do_not_know_the_class() -> None:
    """The same index with another label is painted alike, and stands in the same light."""
    one, two = sample(4, 2, label=0), sample(4, 2, label=5)
    assert one.light == two.light
    assert one.clutter == two.clutter
    for a, b in zip(one.objects, two.objects, strict=True):
        assert (a.colours, a.pattern, a.x, a.z, a.scale) == (
            b.colours,
            b.pattern,
            b.x,
            b.z,
            b.scale,
        )


def test_homes_are_one_to_one() -> None:
    assert len(CLASSES) == len(set(HOME.values())) == 8


@pytest.mark.parametrize("label", range(8))
def test_every_class_has_its_own_outline(label: int) -> None:
    """Alone, close, seen from the side: no two classes share more than 85 % of their outlines."""
    outlines = [_outline(k) for k in range(8)]
    for other in range(8):
        if other != label:
            a, b = outlines[label], outlines[other]
            assert (a & b).sum() < 0.85 * (a | b).sum()


@lru_cache(maxsize=8)
def _outline(label: int) -> np.ndarray:
    spec = sample(6, 1, label=label)
    thing = replace(spec.objects[0], x=0.0, z=0.0, scale=1.4, yaw=0.4, proportions=(0.5, 0.5, 0.5))
    spec = replace(spec, objects=(thing,), clutter=(), pitch=0.3, distance=5.0, roll=0.0)
    return render(spec, size=96).masks[0]


def test_light_falls_from_where_it_comes() -> None:
    """A ball is brighter on the side of the light, and its shadow lies on the other side."""
    spec = sample(6, 1)
    ball = replace(
        spec.objects[0],
        shape="sphere",
        x=0.0,
        z=0.0,
        scale=1.5,
        colours=((0.6, 0.6, 0.6),) * 3,
        pattern="plain",
    )
    for side in (-1.0, 1.0):
        lit = replace(
            spec, objects=(ball,), clutter=(), light=(side * 0.8, 0.6, 0.0), roll=0.0, pitch=0.4
        )
        scene = render(lit, environment="sand", size=96)
        bare = render(lit, environment="sand", objects=False, size=96)
        grey, mask = scene.image.mean(axis=2), scene.masks[0]
        x = np.arange(96)[None, :] * np.ones((96, 1))
        middle = x[mask].mean()
        right = grey[mask & (x > middle)].mean()
        left = grey[mask & (x < middle)].mean()
        assert (right - left) * side > 20
        darker = ((bare.image.mean(axis=2) - grey) > 20) & ~mask
        assert darker.sum() > 50
        assert (x[darker].mean() - middle) * side < -5


def test_sizes_other_than_the_usual() -> None:
    scene = render(sample(1, 1), size=64)
    assert scene.image.shape == (64, 64, 3)
    assert scene.masks.shape[1:] == (64, 64)
    large = render(sample(1, 1), size=128)
    shrunk = large.image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - scene.image).mean() < 8, "the same picture, only smaller"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"home_rate": 1.5}, "home_rate is 1.5"), ({"label": 8}, "label is 8")],
)
def test_impossible_specifications_get_a_clear_error(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(0, 0, **arguments)


def test_an_unknown_environment_gets_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"unknown environment 'snaw'; did you mean 'snow'"):
        render(sample(0, 0), environment="snaw")


def test_command_writes_the_split_again(tmp_path: Path) -> None:
    scenes.main([str(tmp_path), "--count", "2"])
    document = json.loads((tmp_path / "annotations.json").read_text(encoding="utf-8"))
    assert document["classes"] == list(CLASSES)
    assert document["home"] == HOME
    assert [e["id"] for e in document["scenes"]] == ["0000", "0001"]
    for mine, kept in zip(document["scenes"], ENTRIES, strict=False):
        assert mine == kept
        for file in (mine["image"], mine["mask"], *(t["image"] for t in mine["twins"].values())):
            with Image.open(tmp_path / file) as picture:
                assert picture.size == (224, 224)
