"""What holds for every file of the repository."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import opticam_lite as ol
from opticam_lite.checks import EXERCISES, examine

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]
PARTS = ("exercise", "stub", "solution", "check")
KEPT = {"keep_output", "nbval-check-output"}
# Folders that exist on one machine only, written so that this line does not contain them.
MACHINE_PATH = re.compile(r"(?<![\w.~$}*)-])/(?:home|Users|root|opt|work|tmp|mnt)/\w")


def files() -> list[Path]:
    """The files that git has, or would take up."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    """Path → content of every file that is text."""
    found = {}
    for path in files():
        data = path.read_bytes()
        if b"\0" not in data:
            found[str(path.relative_to(ROOT))] = data.decode("utf-8")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_state_and_only_the_outputs_that_are_compared(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tags = set(cell.metadata.get("tags", []))
        assert not tags & KEPT or tags >= KEPT, f"{cell.id}: one of {sorted(KEPT)} is missing"
        if tags >= KEPT:
            assert cell.outputs, f"{cell.id} keeps an output and has none"
            # nbval compares nothing where there is no execution count.
            assert cell.execution_count is not None, f"{cell.id} has no execution count"
            assert len(str(cell.outputs)) < 4000, f"{cell.id} keeps too long an output"
        else:
            assert not cell.outputs, f"{cell.id} holds an output: make format"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_lesson_has_results_that_are_compared(path):
    cells = nbformat.read(path, as_version=4).cells
    assert any(set(cell.metadata.get("tags", [])) >= KEPT for cell in cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_exercise_has_a_text_a_stub_a_solution_and_a_check_in_this_order(path):
    """These tags are what editions of the course are made of."""
    lesson, parts = path.stem[:2], []
    exercises = [name for name in EXERCISES if name.startswith(lesson)]
    for cell in nbformat.read(path, as_version=4).cells:
        (tag,) = {*cell.metadata.get("tags", [])} & {*PARTS} or {None}
        if cell.id.startswith("exercise"):
            assert tag is not None, f"{cell.id} has none of the tags {PARTS}"
        if tag is not None and tag not in parts[-1:]:
            parts.append(tag)
        if tag == "stub":
            assert "NotImplementedError" in cell.source or "..." in cell.source, cell.id
        if tag == "check":
            assert cell.source.startswith(f'ol.check("{exercises.pop(0)}", '), cell.id
            assert "".join(o["text"] for o in cell.outputs).startswith("✓"), cell.id
            assert parts[-4:] == list(PARTS), cell.id
    assert not exercises


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_stub_is_told_to_be_one(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if "stub" in cell.metadata.get("tags", []):
            number, handed_in = cell.id.split("-")[1], {"torch": torch}
            for node in ast.parse(cell.source).body:  # what else it says needs the lesson
                if isinstance(node, ast.FunctionDef) or "..." in ast.unparse(node):
                    exec(ast.unparse(node), handed_in)
            result = examine(f"{path.stem[:2]}.{number}", [*handed_in.values()][-1])
            assert result.symptom.startswith("nothing is handed in yet"), (cell.id, result)


def samples(path: Path) -> dict[str, list[int]]:
    """Expression → indices of each choice of scenes in a lesson, as in `dataset.batch(…)`."""
    names, found = {"dataset": ol.load_dataset("scenes")}, {}
    for cell in nbformat.read(path, as_version=4).cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            match node:
                case ast.Assign(targets=[ast.Name(id="step")], value=value):
                    names["step"] = eval(ast.unparse(value), names)
                case ast.Call(func=ast.Attribute(attr="batch"), args=[chosen]):
                    known = {n.id for n in ast.walk(chosen) if isinstance(n, ast.Name)}
                    if known <= {*names, "range", "len", "min", "max"}:
                        found[ast.unparse(chosen)] = list(eval(ast.unparse(chosen), names))
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_images_that_a_lesson_takes_are_of_many_classes(path):
    """The classes of the scenes take turns: a stride that is a multiple of 8 finds one of them."""
    scenes, taken = ol.load_dataset("scenes"), samples(path)
    assert taken
    for chosen, indices in taken.items():
        classes = {scenes[i].target for i in indices}
        assert len(classes) == min(len(indices), len(scenes.labels)), f"{chosen}: {classes}"


def test_nothing_names_a_path_of_one_machine():
    found = [
        f"{name}: {line.strip()[:120]}"
        for name, text in texts().items()
        for line in text.splitlines()
        if len(line) < 5000 and MACHINE_PATH.search(line)
    ]
    assert found == []


def test_files_are_small_enough_to_clone():
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in files()}
    assert {str(p): s for p, s in sizes.items() if s > 5e6} == {}
    assert sum(s for p, s in sizes.items() if p.parts[0] == "data") <= 30e6


@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [({}, "passive", "0"), ({"OMP_WAIT_POLICY": "active"}, "active", "30000000000")],
)
def test_threads_that_wait_leave_the_processor_to_others(given, policy, spins):
    """Unless the user wants it otherwise; and it is said before PyTorch comes, which reads it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    shown = subprocess.run(
        [sys.executable, "-c", "import opticam_lite, os; print(os.environ['OMP_WAIT_POLICY'])"],
        env=clean | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == policy
    if sys.platform == "linux":  # elsewhere PyTorch's OpenMP has no such word
        assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr
