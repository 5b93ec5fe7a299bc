"""Fills .venv for make: `python tools/set_up.py LOCK`. Needs only Python, its venv and its pip.

On Linux the ordinary build of PyTorch, PyPI's, brings 5 GB of CUDA. PyTorch's own index has builds
for the CPU alone. TORCH chooses: cpu, cuda, or auto (the default), which takes CUDA if nvidia-smi
finds a card. TORCH_INDEX names another index of CPU builds, such as a mirror. On macOS and Windows
the ordinary build is the CPU build.
"""

from __future__ import annotations

import http.client
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
LOG = VENV / "set_up.log"
INDEX = os.environ.get("TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"
# GB to download, GB on the disk: what each lock adds to the one before, and what CUDA adds.
SIZES = {"requirements.lock": (0.5, 1.8), "requirements-test.lock": (0.3, 0.9)}
CUDA = (2.8, 4.8)


def has_card() -> bool:
    """Whether nvidia-smi finds a card; under WSL it lies outside the usual path."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/lib/wsl/lib"
    program = shutil.which("nvidia-smi", path=path)
    return bool(program) and subprocess.run([program, "-L"], capture_output=True).returncode == 0


def unfit(torch: str) -> str:
    """Why the index can't give the CPU build of this version of PyTorch; empty if it can."""
    try:
        with urllib.request.urlopen(f"{INDEX}/torch/", timeout=5) as page:
            names = urllib.parse.unquote(page.read().decode())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{INDEX} can't be reached ({getattr(error, 'reason', error)})"
    return "" if f"torch-{torch}+cpu-" in names else f"{INDEX} has no torch {torch}"


def pip(*arguments: str | Path) -> None:
    """Install; what pip says goes to a file, and is shown only if pip fails."""
    command = [PYTHON, "-m", "pip", "install", "--progress-bar=off", "--disable-pip-version-check"]
    with LOG.open("a") as log:
        done = subprocess.run([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line for line in LOG.read_text().splitlines() if "' is ignored" not in line]
        sys.exit("\n".join([*said[-20:], f"pip could not install everything: see {LOG}"]))


def main(lock: str) -> None:
    """Install the lock's packages, then this clone itself, into .venv."""
    start = time.monotonic()
    choice = os.environ.get("TORCH") or "auto"
    if choice not in ("auto", "cpu", "cuda"):
        sys.exit(f"TORCH is '{choice}', but must be auto, cpu or cuda")
    # Even if the locks agree: in such an environment lessons import the other clone's code.
    if VENV.is_symlink():
        sys.exit(
            f"'.venv' is a link to {VENV.resolve()}, which another clone may use, so nothing is "
            "installed into it: remove the link (rm .venv) and call make again"
        )
    if (sys.platform, platform.machine()) == ("darwin", "x86_64"):
        sys.exit(
            "PyTorch has no builds for Intel Macs any more, and this Python is built for Intel: "
            "on Apple silicon take a Python built for arm64, make PYTHON=/path/to/python3.12"
        )
    # The stamp of make is written last: without it .venv is missing, or was not completed.
    complete = (VENV / ".ready").exists()
    pins = dict(re.findall(r"^(torch|torchvision)==([\w.]+)", Path(lock).read_text(), re.MULTILINE))
    builds = VENV.glob(f"lib/python*/site-packages/torch-{pins['torch']}[+.]*")
    choose = sys.platform == "linux" and not (complete and any(builds))

    cuda = choose and (choice == "cuda" or (choice == "auto" and has_card()))
    if choose and not cuda and (reason := unfit(pins["torch"])):
        print("The ordinary build of PyTorch is installed, not the CPU build:", reason)
        cuda = True
    download, disk = (a + cuda * b for a, b in zip(SIZES[lock], CUDA, strict=True))
    build = f", PyTorch {'with CUDA' if cuda else 'for the CPU'}" if choose else ""
    print(
        f"Setting up .venv from {lock}{build}: "
        f"up to {download:.1f} GB to download, {disk:.1f} GB on the disk",
        flush=True,
    )

    if not complete and subprocess.run([sys.executable, "-m", "venv", "--clear", VENV]).returncode:
        sys.exit("'python3 -m venv' failed: on Debian and Ubuntu, install python3-venv first")
    LOG.write_text("")
    if choose and not cuda:
        pip("--no-deps", "--index-url", INDEX, *(f"{name}=={pins[name]}+cpu" for name in pins))
    pip("-r", lock)
    pip("--no-deps", "--no-build-isolation", "-e", ".")
    size = sum(path.lstat().st_size for path in VENV.rglob("*")) / 1e9
    print(f"Set up in {time.monotonic() - start:.0f} s: .venv has {size:.1f} GB")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("Stopped: the same command starts the set-up again")
