"""The set-up: what make installs, and when. Packages are stand-ins, folders are the indexes."""

from __future__ import annotations

import functools
import http.server
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-test.lock")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(lock: str) -> list[str]:
    """The lock's lines without comments: `name==version` or `name==version ; marker`."""
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.lstrip().startswith("#")]


def names(requirements: list[str]) -> set[str]:
    """The names of the packages."""
    return {re.match(r"[\w.-]+", line).group() for line in requirements}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_packages_and_nothing_else(lock):
    pinned = re.compile(r"^[a-z0-9._-]+==[0-9][\w.]*( ; .+)?$")
    assert [line for line in pins(lock) if not pinned.match(line)] == []
    assert "://" not in (ROOT / lock).read_text(encoding="utf-8")
    # They would be installed beside PyTorch's CPU build, too.
    assert [line for line in pins(lock) if re.match("nvidia|cuda|triton", line)] == []


def test_what_only_tests_need_is_not_in_the_lock_of_reports_and_lessons():
    extras = PROJECT["optional-dependencies"]
    small, large = (names(pins(lock)) for lock in LOCKS)
    assert names([*PROJECT["dependencies"], *extras["lab"], *extras["build"]]) <= small
    rest = names([*extras["ray"], *extras["test"]]) - {"opticam-lite"}
    assert rest <= large
    assert rest & small == set()
    assert set(pins(LOCKS[0])) <= set(pins(LOCKS[1]))


def test_every_place_that_names_the_versions_of_python_names_the_same():
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "- python>=3.11,<3.15\n" in conda
    assert "- -r requirements.lock" in conda
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "(3, 11) <= sys.version_info < (3, 15)" in makefile
    assert "needs Python 3.11 to 3.14" in makefile


PLATFORMS = ["x86_64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc"]
# They exist as sources only, which are Python alone.
SOURCES = {"grad-cam", "lime"}


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_locks_can_be_installed_everywhere(tmp_path, version, platform):
    """`pip install --dry-run --platform` would judge the markers by this machine: uv does not."""
    lock = tmp_path / "requirements.lock"
    lock.write_text("\n".join(line for line in pins(LOCKS[1]) if not names([line]) & SOURCES))
    asked = ["--dry-run", "--only-binary", ":all:", "--target", tmp_path / "none", "-r", lock]
    wanted = ["--python-version", version, "--python-platform", platform]
    shown = subprocess.run(
        # Without this project's configuration, which leaves CUDA out.
        [sys.executable, "-m", "uv", "pip", "install", "--no-config", *wanted, *asked],
        env=os.environ
        | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},  # the oldest that PyTorch is built for
        capture_output=True,
        text=True,
    )
    if re.search("Failed to fetch|error sending request|client error", shown.stderr):
        pytest.skip(f"no package index can be asked here: {shown.stderr.strip()[-300:]}")
    assert shown.returncode == 0, shown.stderr
    assert ("nvidia-cublas" in shown.stderr) == ("linux" in platform)


def make(*arguments: str, cwd: Path = ROOT, **given: str) -> subprocess.CompletedProcess[str]:
    # Tests are themselves started by make, whose flags and settings would be handed on.
    mine = ("MAKE", "MFLAGS", "OMP_", "PIP_", "TORCH", "PYTHONPATH", "VIRTUAL_ENV")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(mine)} | given
    return subprocess.run(["make", *arguments], cwd=cwd, env=clean, capture_output=True, text=True)


def test_make_hands_parameters_to_the_report_as_they_are():
    shown = make("-n", "report", "MODEL=resnet50", 'IMAGES=my "best" photos', "TORCH=cpu")
    assert shown.returncode == 0
    last = shown.stdout.strip().splitlines()[-1]
    # The values travel in the environment, where no shell takes them apart.
    assert last.endswith('-m opticam_lite.reports IMAGES="$IMAGES" MODEL="$MODEL"')


def test_make_lets_threads_wait_so_in_lessons_that_import_pytorch_first():
    assert "OMP_WAIT_POLICY = passive" in make("-np", "lab").stdout


@pytest.mark.parametrize("version", ["(3, 10, 9)", "(3, 15, 0, 'alpha', 1)"])
def test_make_says_when_python_is_none_that_the_locks_have(clone, version):
    other = clone / "otherpython"
    other.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = {version}; $2"\n'
    )
    other.chmod(0o755)
    shown = make("report", f"PYTHON={other}", cwd=clone)
    assert shown.returncode != 0
    assert f"needs Python 3.11 to 3.14, but '{other}' is another version or missing" in shown.stderr
    assert not (clone / ".venv").exists()


def write_wheel(folder: Path, name: str, version: str = "1.0") -> str:
    """An empty package."""
    wheel, info = f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / wheel, "w") as file:
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return wheel


BACKEND = f"""
import zipfile
from pathlib import Path
{inspect.getsource(write_wheel)}
def build_editable(folder, settings=None, metadata=None):
    return write_wheel(Path(folder), "opticam_lite")
"""


@pytest.fixture
def clone(tmp_path):
    """A clone with two packages beside PyTorch, and a report that says so when it runs."""
    folder = tmp_path / "clone"
    (folder / "opticam_lite").mkdir(parents=True)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "tools/set_up.py", folder / "tools")
    (folder / "opticam_lite/reports.py").write_text("print('report')")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    lock = "torch==2.14.1\ntorchvision==0.29.2\nmatplotlib==1.0\n"
    (folder / "requirements.lock").write_text(lock)
    (folder / "requirements-test.lock").write_text(lock + "pytest==1.0\n")
    return folder


@pytest.fixture
def served(tmp_path):
    """(folder, its address as an index)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def indexes(served):
    """What make is given: an index like PyPI, and one of CPU builds (the folder `cpu`)."""
    folder, address = served
    for name, version in [("torch", "2.14.1"), ("torchvision", "0.29.2")]:
        write_wheel(folder / "pypi" / name, name, version)
        write_wheel(folder / "cpu" / name, name, version + "+cpu")
    for name in ("matplotlib", "pytest"):
        write_wheel(folder / "pypi" / name, name)
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{address}/pypi",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
        "TORCH_INDEX": f"{address}/cpu",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def installed(clone: Path) -> set[str]:
    """Name-version of each package of the environment, without pip and the clone itself."""
    found = {path.stem for path in clone.glob(".venv/lib/*/*/*.dist-info")}
    return {name for name in found if not name.startswith(("pip-", "setuptools-", "opticam_lite-"))}


@pytest.mark.slow
def test_each_call_installs_what_it_needs_once(clone, indexes):
    given = [f"PYTHON={sys.executable}", "TORCH=cpu"]
    # No index: pip's own words are shown, and the next call starts again.
    offline = indexes | {"PIP_INDEX_URL": "http://127.0.0.1:1"}
    shown = make("report", *given, cwd=clone, **offline)
    assert shown.returncode != 0
    assert "No matching distribution found for matplotlib==1.0" in shown.stderr
    assert "see .venv/set_up.log" in shown.stderr

    shown = make("report", *given, cwd=clone, **indexes)
    assert (shown.returncode, shown.stderr) == (0, "")
    first, second, report = shown.stdout.splitlines()
    sizes = r"up to \d\.\d GB to download, \d\.\d GB on the disk"
    assert re.fullmatch(
        rf"Setting up \.venv from requirements\.lock, PyTorch for the CPU: {sizes}", first
    )
    assert re.fullmatch(r"Set up in \d+ s: \.venv has \d\.\d GB", second)
    assert report == "report"
    small = {"torch-2.14.1+cpu", "torchvision-0.29.2+cpu", "matplotlib-1.0"}
    assert installed(clone) == small

    # Tests bring theirs, and keep the build of PyTorch, whatever TORCH says now.
    stamp = ".venv/.ready-test"
    shown = make(stamp, given[0], "TORCH=cuda", cwd=clone, **indexes)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.match(rf"Setting up \.venv from requirements-test\.lock: {sizes}\n", shown.stdout)
    assert installed(clone) == small | {"pytest-1.0"}

    # From now on nothing is asked: there is no index.
    for target, said in [("report", "report\n"), (stamp, f"make: '{stamp}' is up to date.\n")]:
        shown = make(target, *given, cwd=clone, **offline)
        assert (shown.returncode, shown.stdout, shown.stderr) == (0, said, "")


CPU = {"torch-2.14.1+cpu", "torchvision-0.29.2+cpu"}
ORDINARY = {"torch-2.14.1", "torchvision-0.29.2"}
two_builds = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds")


@pytest.mark.slow
@two_builds
@pytest.mark.parametrize(
    ("torch", "card", "build"),
    [
        ("auto", "none", CPU),
        ("auto", "one", ORDINARY),
        ("cpu", "one", CPU),
        ("cuda", "none", ORDINARY),
    ],
)
def test_a_machine_without_a_card_gets_the_cpu_build(clone, indexes, torch, card, build):
    program = clone / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntest {card} = one\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    given = [f"PYTHON={sys.executable}", f"TORCH={torch}"]
    shown = make("report", *given, cwd=clone, **indexes, PATH=path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert len(shown.stdout.splitlines()) == 3
    assert installed(clone) == build | {"matplotlib-1.0"}


@pytest.mark.slow
@two_builds
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("http://127.0.0.1:1", r"can't be reached \(.*refused\)"),
        ("{}/nothing", r"can't be reached \(File not found\)"),
        ("{}/pypi", "has no torch 2.14.1"),
        ("no address", r"can't be reached \(unknown url type.*\)"),
    ],
)
def test_without_cpu_builds_one_line_says_so_and_the_ordinary_build_comes(
    clone, indexes, where, reason
):
    indexes["TORCH_INDEX"] = where.format(indexes["TORCH_INDEX"].removesuffix("/cpu"))
    shown = make("report", f"PYTHON={sys.executable}", "TORCH=cpu", cwd=clone, **indexes)
    assert (shown.returncode, shown.stderr) == (0, "")
    told, setting_up, *_ = shown.stdout.splitlines()
    expected = "The ordinary build of PyTorch is installed, not the CPU build: "
    assert re.fullmatch(f"{expected}{re.escape(indexes['TORCH_INDEX'])} {reason}", told)
    assert "PyTorch with CUDA" in setting_up
    assert installed(clone) == ORDINARY | {"matplotlib-1.0"}


def test_another_value_of_torch_is_refused(clone):
    shown = make("report", f"PYTHON={sys.executable}", "TORCH=gpu", cwd=clone)
    assert shown.returncode != 0
    assert shown.stderr.startswith("TORCH is 'gpu', but must be auto, cpu or cuda\n")
    assert not (clone / ".venv").exists()


def test_an_intel_mac_is_told_that_pytorch_has_no_build_for_it(clone):
    pretend = (
        "import platform, runpy, sys, urllib.request; sys.platform = 'darwin';"
        "platform.machine = lambda: 'x86_64'; sys.argv = ['', 'requirements.lock'];"
        "runpy.run_path('tools/set_up.py', run_name='__main__')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", pretend], cwd=clone, capture_output=True, text=True
    )
    assert shown.returncode == 1
    assert shown.stderr.startswith("PyTorch has no builds for Intel Macs any more")
    assert not (clone / ".venv").exists()


def test_nothing_is_installed_into_the_environment_of_another_clone(clone, tmp_path):
    other = tmp_path / "other" / ".venv"
    other.mkdir(parents=True)
    (other / ".ready").touch()
    os.utime(other / ".ready", (0, 0))
    (clone / ".venv").symlink_to(other)
    shown = make("report", f"PYTHON={sys.executable}", cwd=clone)
    assert shown.returncode != 0
    assert f"'.venv' is a link to {other}, which another clone may use" in shown.stderr
    assert [path.name for path in other.iterdir()] == [".ready"]
