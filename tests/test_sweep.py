"""A sample of the networks that tools/sweep.py tries, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUICK = {
    "squeezenet1_1": ("features.12", (512, 13, 13)),
    "mobilenet_v3_small": ("features.12", (576, 7, 7)),
    "timm/starnet_s050": ("norm", (128, 7, 7)),
    "timm/edgenext_xx_small": ("stages.3", (168, 8, 8)),
    "timm/test_vit": ("blocks.5.norm1", (64, 10, 10)),
    "timm/regnetx_002": ("s4", (368, 7, 7)),
}
SLOW = {
    "maxvit_t": ("blocks.3", (512, 7, 7)),
    "swin_t": ("permute", (768, 7, 7)),
    "timm/coat_tiny": ("parallel_blocks.5.norm14", (152, 7, 7)),
    "timm/resnet50_clip": ("stages.3", (2048, 7, 7)),
    "timm/tnt_s_patch16_224": ("blocks.11.norm_out", (384, 14, 14)),
    "timm/xcit_nano_12_p8_224": ("cls_attn_blocks.1.norm1", (128, 28, 28)),
}


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "tools" / "sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_network_works_with_nothing_named_by_hand(sweep: ModuleType, name: str) -> None:
    row = sweep.look(name)
    assert sweep.fault(row) == ""
    assert row["difference"] == 0
    assert (row["layer"], row["shape"]) == (QUICK | SLOW)[name]


def row_of(name: str) -> dict[str, Any]:
    reasons = {"raw-attention": "it is small", "rollout": "it is small", "tibav": "it is small"}
    good = {"depth": 0.9, "reads": True, "same": False, "flat": False, "difference": 0.0}
    return {"layer": name + ".4", "shape": [8, 7, 7], "attention": reasons, "seconds": 1.2} | good


def test_a_sweep_is_resumed_and_written(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def try_one(name: str, seconds: int, memory: float) -> dict[str, Any]:
        tried.append(name)
        if name == "b" and tried.count("b") == 1:
            return {"network": name, "error": "more than 90 s"}
        return {"network": name, **row_of(name)}

    for name, value in {
        "RESULTS": tmp_path / "rows", "PAGE": tmp_path / "page", "POPULAR": ["a"], "ALSO": ["b"],
        "smallest": lambda: ["a", "c"], "try_one": try_one,
    }.items():  # fmt: skip
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(sweep.torch, "set_num_threads", lambda n: None)
    sweep.main([])
    assert tried == ["a", "b", "c"]
    page = (tmp_path / "page").read_text(encoding="utf-8")
    assert "**2 of 3 load, 2 of 3 (66.7%) work" in page
    assert "- b: more than 90 s." in page
    assert "| c | `c.4` | 8×7×7 | 90% | 0 | yes | 1 | it is small |" in page
    sweep.main(["--again", "b"])
    assert tried == ["a", "b", "c", "b"]
    assert "3 of 3 (100.0%) work" in (tmp_path / "page").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["network"] for row in rows] == tried


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"difference": 0.1}, "`head(split(x))` differs by 0.1"),
        ({"same": True}, "the maps are the same for two images"),
        ({"reads": False}, "the logits do not depend on the maps"),
        ({"depth": 0.41}, "a.4 is early (41%)"),
        ({"flat": True}, "Grad-CAM is flat"),
    ],
)
def test_what_is_not_sensible(sweep: ModuleType, change: dict[str, Any], reason: str) -> None:
    assert sweep.fault(row_of("a")) == ""
    assert sweep.fault(row_of("a") | change) == reason


@pytest.mark.slow
def test_a_network_beyond_the_limits_is_one_row() -> None:
    script = (
        "import sweep; print(sweep.try_one('resnet50', 1, 64)['error'], "
        "sweep.try_one('alexnet', 60, 0.3)['error'], sep='|')"
    )
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import torch; torch.set_num_threads(1); " + script],
        cwd=ROOT / "tools", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.split("|")[0] == "more than 1 s"
    assert said.split("|")[1].strip() == "more than 0.3 GB"
