"""The evaluation split: which scenes it has, and how they are written.

``python -m opticam_lite.making.scenes data/scenes`` writes it again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..datasets.scenes import CLASSES, ENVIRONMENTS, HOME
from .rendering import SIZE, VERSION, render
from .sampling import Draw, SceneSpec, sample

EVALUATION_SEED = 2
EVALUATION_COUNT = 256
MASK_COLOURS = [0, 0, 0, 230, 159, 0, 86, 180, 233, 0, 158, 115]  # RGB of nothing and 3 instances


def evaluation_spec(number: int) -> tuple[SceneSpec, str]:
    """Scene ``number`` of the evaluation split, and the environment of its swapped twin.

    Classes take turns; eight scenes at home, then eight elsewhere, and so on. The swapped twin is
    neither in the scene's own environment nor at home.
    """
    label = number % len(CLASSES)
    at_home = number // len(CLASSES) % 2 == 0
    spec = sample(EVALUATION_SEED, number, home_rate=1.0 if at_home else 0.0, label=label)
    others = [e for e in ENVIRONMENTS if e not in (spec.environment, HOME[CLASSES[label]])]
    return spec, Draw(EVALUATION_SEED + 1, number).choice(others)


def _write_scene(number: int, folder: Path) -> dict[str, Any]:
    """Write the images of a scene and return its annotations."""
    spec, elsewhere = evaluation_spec(number)
    scene = render(spec)
    images = {
        "images": scene.image,
        "swapped": render(spec, environment=elsewhere).image,
        "empty": render(spec, objects=False).image,
    }
    for part, image in images.items():
        path = folder / part / f"{number:04d}.jpg"
        Image.fromarray(image).save(path, quality=85, subsampling=0, optimize=True)
    instances = np.zeros((SIZE, SIZE), np.uint8)
    for k, mask in enumerate(scene.masks, start=1):
        instances[mask] = k
    picture = Image.fromarray(instances).convert("P")
    picture.putpalette(MASK_COLOURS)
    picture.save(folder / "masks" / f"{number:04d}.png", optimize=True)
    return {
        "id": f"{number:04d}",
        "image": f"images/{number:04d}.jpg",
        "mask": f"masks/{number:04d}.png",
        "label": spec.label,
        "class": CLASSES[spec.label],
        "environment": spec.environment,
        "home": spec.home,
        "boxes": scene.boxes.tolist(),
        "seed": EVALUATION_SEED,
        "index": number,
        "twins": {
            "swapped": {"image": f"swapped/{number:04d}.jpg", "environment": elsewhere},
            "empty": {"image": f"empty/{number:04d}.jpg", "environment": spec.environment},
        },
        "patterns": [o.pattern for o in spec.objects],
        "clutter": [o.shape for o in spec.clutter],
        "light": [round(v, 3) for v in spec.light],
        "pitch": round(spec.pitch, 3),
    }


def write_evaluation(folder: str | Path, count: int = EVALUATION_COUNT) -> None:
    """Write the evaluation split, with its twins, masks and annotations, to ``folder``."""
    folder = Path(folder)
    for part in ("images", "swapped", "empty", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    entries = [_write_scene(number, folder) for number in range(count)]
    head = {
        "version": VERSION,
        "size": [SIZE, SIZE],
        "seed": EVALUATION_SEED,
        "classes": CLASSES,
        "environments": ENVIRONMENTS,
        "home": HOME,
    }
    # One line for each scene.
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    text = json.dumps(head, indent=1)[:-2] + ',\n "scenes": [\n' + lines + "\n ]\n}\n"
    (folder / "annotations.json").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write the evaluation split to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m opticam_lite.making.scenes",
        description="Write the evaluation split of scenes.",
    )
    parser.add_argument("folder", help="where to, for example data/scenes")
    parser.add_argument("--count", type=int, default=EVALUATION_COUNT, help="number of scenes")
    chosen = parser.parse_args(arguments)
    write_evaluation(chosen.folder, chosen.count)


if __name__ == "__main__":
    main()
