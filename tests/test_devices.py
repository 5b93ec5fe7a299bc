"""All that on_device.py asks of every GPU of this machine, and of a pretended one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

DEVICES = ["pretend:0", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_serves_like_the_cpu(device: str) -> None:
    """In a process of its own, for PyTorch does not forget a pretended device."""
    file = Path(__file__).with_name("on_device.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env={**os.environ, "OPTICAM_DEVICE": device},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
