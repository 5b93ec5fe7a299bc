"""Editions of the course: nothing of a solution in a student's, marks that nbgrader understands."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from opticam_lite.checks import EXERCISES

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    """The program, which lies outside of the package."""
    spec = importlib.util.spec_from_file_location("course", ROOT / "tools" / "course.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["course"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


course = load()
LESSONS = {lesson.stem: nbformat.read(lesson, 4) for lesson in course.lessons()}
WITH_TASKS = {name: notebook for name, notebook in LESSONS.items() if course.tasks(notebook)}


def cell(tag: str, source: str, **metadata: object) -> NotebookNode:
    make = new_code_cell if tag in ("stub", "check") or "=" in source else new_markdown_cell
    return make(source, metadata={"tags": [tag], **metadata})


def lesson(*cells: NotebookNode) -> NotebookNode:
    return new_notebook(cells=[new_code_cell("import opticam_lite as ol", outputs=[]), *cells])


WHOLE = [
    cell("exercise", "### ★★ 1. Do it"),
    cell("stub", "def f(x):\n    raise NotImplementedError('twice x')"),
    cell("solution", "f = lambda x: 2 * x"),
    cell("solution", "Because two is twice one"),
    cell("check", "ol.check('02.1', f)"),
]


@pytest.mark.parametrize("name", LESSONS)
def test_every_exercise_of_a_lesson_has_its_cells(name: str) -> None:
    found = course.tasks(LESSONS[name])
    number = name[:2]
    assert [task.name for task in found] == sorted(e for e in EXERCISES if e.startswith(number))
    for task in found:
        assert 1 <= task.points <= 3


@pytest.mark.parametrize("name", WITH_TASKS)
def test_a_students_edition_has_no_solution_and_no_output(name: str) -> None:
    made = course.student(LESSONS[name])
    nbformat.validate(made)
    whole = "\n".join(c.source for c in made.cells)
    for task in course.tasks(LESSONS[name]):
        for solution in task.cells["solution"]:
            assert solution.source not in whole
        assert all(stub.source in whole for stub in task.cells["stub"])
        assert EXERCISES[task.name].hint in whole
        assert f'"{task.name}"' in whole
    code = [c for c in made.cells if c.cell_type == "code"]
    assert not any(c.outputs for c in code)
    assert all(c.execution_count is None for c in code)
    assert len({c.id for c in made.cells}) == len(made.cells)
    stubs = [stub for task in course.tasks(LESSONS[name]) for stub in task.cells["stub"]]
    assert all("raise" in s.source or "..." in s.source for s in stubs)


@pytest.mark.parametrize("name", WITH_TASKS)
def test_nbgraders_source_has_its_metadata(name: str) -> None:
    made = course.nbgrader(LESSONS[name])
    nbformat.validate(made)
    marked = [c.metadata.nbgrader | {"source": c.source} for c in made.cells
              if "nbgrader" in c.metadata]  # fmt: skip
    assert len({m["grade_id"] for m in marked}) == len(marked)
    for task in course.tasks(LESSONS[name]):
        slug = task.name.replace(".", "-")
        by_id = {m["grade_id"]: m for m in marked}
        answer, test = by_id[f"answer-{slug}"], by_id[f"test-{slug}"]
        assert answer["solution"]
        assert not answer["grade"]
        before, _, rest = answer["source"].partition("### BEGIN SOLUTION")
        assert "raise" in before or "..." in before
        assert rest.endswith("### END SOLUTION")
        assert test["grade"]
        assert test["locked"]
        assert test["points"] == task.points
        words = [c for c in task.cells["solution"] if c.cell_type == "markdown"]
        assert (f"words-{slug}" in by_id) == bool(words)
    assert {m["schema_version"] for m in marked} == {3}


def test_solutions_have_no_stubs() -> None:
    made = course.solutions(lesson(*WHOLE))
    assert [course.tag_of(c) for c in made.cells] == [
        None, "exercise", "solution", "solution", "check"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (WHOLE[1:], "exercise 02.1 has no cell tagged exercise"),
        ([*WHOLE[:2], WHOLE[4]], "exercise 02.1 has no cell tagged solution"),
        (WHOLE[:4], "the cells tagged exercise, stub, solution at the end have no check cell"),
        ([*WHOLE[:4], cell("check", "print(1)")], "does not call ol.check"),
        ([new_markdown_cell("x", metadata={"tags": ["stub", "check"]})], "the tags stub and check"),
    ],
)
def test_a_lesson_that_can_not_be_cut_is_told(cells: list[NotebookNode], message: str) -> None:
    with pytest.raises(course.CourseError, match=message):
        course.tasks(lesson(*cells))


def test_editions_know_of_which_lesson_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lessons = tmp_path / "notebooks"
    lessons.mkdir()
    path = lessons / "02_it.ipynb"
    nbformat.write(lesson(*WHOLE), path)
    monkeypatch.setattr(course, "LESSONS", lessons)
    given = ["--out", str(tmp_path / "course"), "--editions", "student", "nbgrader"]
    assert course.main([*given, "--check"]) == 1
    assert course.main(given) == 0
    assert course.main([*given, "--check"]) == 0
    capsys.readouterr()
    nbformat.write(lesson(new_markdown_cell("new"), *WHOLE), path)
    assert course.main([*given, "--check"]) == 1
    assert capsys.readouterr().out.count("not of the lesson as it is now; run make course") == 2
    before = (tmp_path / "course" / "student" / "02_it.ipynb").read_text()
    nbformat.write(lesson(*WHOLE[:4]), path)
    assert course.main(given) == 2
    assert "02_it.ipynb: the cells tagged" in capsys.readouterr().err
    assert (tmp_path / "course" / "student" / "02_it.ipynb").read_text() == before


@pytest.mark.parametrize(
    ("given", "slug"),
    [
        ("someone/course", "someone/course"),
        ("github.com/someone/course", "someone/course"),
        ("https://github.com/someone/course.git", "someone/course"),
        ("", ""),
    ],
)
def test_addresses_of_a_repository(given: str, slug: str) -> None:
    assert course.github(given) == slug


def test_launch_links_only_where_an_address_is_known() -> None:
    with pytest.raises(course.CourseError, match="REPO is 'my course'; a repository on GitHub"):
        course.github("my course")
    made = course.launched(course.student(lesson(*WHOLE)), "someone/course", "student/02_it.ipynb")
    links, set_up, *rest = made.cells
    assert len(re.findall(r"\(https://[^)]+someone/course[^)]*\)", links.source)) == 3
    assert "git+https://github.com/someone/course" in set_up.source
    assert len(rest) == len(course.student(lesson(*WHOLE)).cells)
    nbformat.validate(made)
