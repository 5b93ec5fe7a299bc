"""Editions of the course, made from the lessons: `make course` writes them to build/course.

    notebooks/NN_*.ipynb ──▶ student/    no solutions, no outputs; stubs say what is missing
                        ├──▶ solutions/  executed, without stubs
                        └──▶ nbgrader/   source/ as nbgrader takes it, and its configuration

A lesson marks its cells by tags: `exercise` (the task, markdown), `stub` (what a student
completes), `solution` (code, and an answer in words as markdown), `check` (`ol.check("02.1", …)`).
REPO (such as github.com/someone/course) adds launch links and a first cell that sets up there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from opticam_lite.checks import EXERCISES

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "notebooks"
OUT = ROOT / "build" / "course"
TAGS = ("exercise", "stub", "solution", "check")
EDITIONS = ("student", "solutions", "nbgrader")
SOURCE = "opticam_lite_source"  # in an edition's metadata: a digest of the lesson
SCHEMA = 3  # of nbgrader's metadata
WORDS_POINTS = 1  # for an answer in words, which a person marks

CONFIGURATION = '''"""nbgrader's configuration of this course."""

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "opticam_lite"
c.ClearSolutions.code_stub = {"python": "# Your code here."}
c.ClearSolutions.text_stub = "Your answer here."
# A notebook that never ends is stopped at a cell, and the next one is marked.
c.ExecutePreprocessor.timeout = 120
c.ExecutePreprocessor.interrupt_on_timeout = True
c.ExecutePreprocessor.raise_on_iopub_timeout = False
c.LimitOutput.max_lines = 500
'''


class CourseError(ValueError):
    """A lesson from which no edition can be made; the message says why."""


@dataclass
class Task:
    """An exercise of a lesson, as its cells.

    Attributes:
        name: Lesson and number, such as `"02.1"`.
        answer: Name of the variable or function that is checked, as an expression.
        points: One a star.
        cells: Tag → the cells.
    """

    name: str
    answer: str
    points: int
    cells: dict[str, list[NotebookNode]] = field(default_factory=dict)


def tag_of(cell: NotebookNode) -> str | None:
    """Return the tag that says what a cell is in an exercise, or None.

    Raises:
        CourseError: If it has two of them.
    """
    own = [tag for tag in cell.metadata.get("tags", []) if tag in TAGS]
    if len(own) > 1:
        raise CourseError(f"cell {cell.id} has the tags {' and '.join(own)}; give it one of them")
    return own[0] if own else None


def tasks(notebook: NotebookNode) -> list[Task]:
    """Return the exercises of a lesson, in their order.

    Raises:
        CourseError: If one has no task, stub, solution or check, or its check is no `ol.check`.
    """
    found: list[Task] = []
    cells: dict[str, list[NotebookNode]] = {}
    for cell in notebook.cells:
        tag = tag_of(cell)
        if tag is None:
            continue
        cells.setdefault(tag, []).append(cell)
        if tag == "check":
            name, answer = _checked(cell)
            if missing := [t for t in TAGS if t not in cells]:
                raise CourseError(f"exercise {name} has no cell tagged {' or '.join(missing)}")
            stars = cells["exercise"][-1].source.count("★")
            found.append(Task(name, answer, max(1, stars), cells))
            cells = {}
    if cells:
        raise CourseError(f"the cells tagged {', '.join(cells)} at the end have no check cell")
    return found


def _checked(cell: NotebookNode) -> tuple[str, str]:
    """Return the name of the exercise and the expression that a check cell hands in."""
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("check"):
            name, answer = node.args
            return ast.literal_eval(name), ast.unparse(answer)
    raise CourseError(f"the cell {cell.id} is tagged check and does not call ol.check")


def student(notebook: NotebookNode) -> NotebookNode:
    """Return a lesson without solutions and outputs, with a folded hint below each task."""
    made = copy.deepcopy(notebook)
    last = {task.cells["exercise"][-1].id: task.name for task in tasks(made)}
    cells: list[NotebookNode] = []
    for cell in made.cells:
        if tag_of(cell) != "solution":
            cells.append(_cleared(cell))
        if cell.id in last:
            hint = EXERCISES[last[cell.id]].hint
            text = f"<details><summary>Hint</summary>\n\n{hint}\n</details>"
            cells.append(new_markdown_cell(text, id=f"hint-{last[cell.id].replace('.', '-')}"))
    made.cells = cells
    return made


def solutions(notebook: NotebookNode) -> NotebookNode:
    """Return a lesson without stubs, to be executed."""
    made = copy.deepcopy(notebook)
    made.cells = [cell for cell in made.cells if tag_of(cell) != "stub"]
    return made


def nbgrader(notebook: NotebookNode) -> NotebookNode:
    """Return a lesson as nbgrader's source: solutions between its marks, tests locked."""
    made = copy.deepcopy(notebook)
    given = {id_: task for task in tasks(made) for id_ in _ids(task)}
    cells: list[NotebookNode] = []
    for cell in made.cells:
        tag, task = tag_of(cell), given.get(cell.id)
        if task is None or tag is None:
            cells.append(_cleared(cell))
        elif tag == "exercise":
            cells.append(_locked(_cleared(cell), f"task-{cell.id}"))
        elif tag == "check":
            cells += _of_task(task)
    made.cells = cells
    return made


def _ids(task: Task) -> Iterator[str]:
    return (cell.id for cells in task.cells.values() for cell in cells)


def _of_task(task: Task) -> list[NotebookNode]:
    """Return the cells of an exercise that a student fills, and those that mark it."""
    stub = "\n\n".join(cell.source for cell in task.cells["stub"])
    code = [cell.source for cell in task.cells["solution"] if cell.cell_type == "code"]
    words = [cell.source for cell in task.cells["solution"] if cell.cell_type == "markdown"]
    solution = "\n\n".join(code)
    answer = new_code_cell(f"{stub}\n\n\n### BEGIN SOLUTION\n{solution}\n### END SOLUTION")
    slug = task.name.replace(".", "-")
    found = [_marked(answer, f"answer-{slug}", solution=True)]
    test = new_code_cell(
        f"# Exercise {task.name}: {task.points} point{'s' * (task.points > 1)}\n"
        "from opticam_lite.checks import examine\n\n"
        f'result = examine("{task.name}", {task.answer})\n'
        'assert result.right, f"{result.symptom}. {result.hint}"'
    )
    found.append(_marked(test, f"test-{slug}", grade=True, locked=True, points=task.points))
    if words:
        text = new_markdown_cell("\n\n".join(words))
        found.append(_marked(text, f"words-{slug}", grade=True, solution=True, points=WORDS_POINTS))
    for cell, kind in zip(found, ("answer", "test", "words"), strict=False):
        cell.id = f"{kind}-{slug}"
    return found


def _marked(
    cell: NotebookNode,
    grade_id: str,
    *,
    grade: bool = False,
    solution: bool = False,
    locked: bool = False,
    points: int | None = None,
) -> NotebookNode:
    cell.metadata["nbgrader"] = {
        "schema_version": SCHEMA,
        "cell_type": cell.cell_type,
        "grade_id": grade_id,
        "grade": grade,
        "solution": solution,
        "locked": locked,
        "task": False,
    } | ({"points": points} if grade else {})
    return cell


def _locked(cell: NotebookNode, grade_id: str) -> NotebookNode:
    """Return a cell that nbgrader restores where a student has changed it."""
    return _marked(cell, grade_id, locked=True)


def _cleared(cell: NotebookNode) -> NotebookNode:
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
    cell.metadata.pop("tags", None) if tag_of(cell) is None else None
    return cell


def launched(notebook: NotebookNode, repo: str, path: str) -> NotebookNode:
    """Return a notebook that begins with launch links and a cell that sets up there.

    Args:
        notebook: An edition.
        repo: `owner/name` on GitHub.
        path: Of the notebook in the repository.
    """
    at = f"{repo}/blob/main/{path}"
    links = new_markdown_cell(
        f"[Colab](https://colab.research.google.com/github/{at}) · "
        f"[Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{at}) · "
        f"[Binder](https://mybinder.org/v2/gh/{repo}/main?labpath={path})",
        id="launch",
    )
    set_up = new_code_cell(
        "# Sets up the course where it isn't installed, such as on Colab and Kaggle.\n"
        "import importlib.util\n\n"
        'if importlib.util.find_spec("opticam_lite") is None:\n'
        f"    %pip install --quiet git+https://github.com/{repo}",
        id="set-up",
    )
    made = copy.deepcopy(notebook)
    made.cells = [links, set_up, *made.cells]
    return made


def github(repo: str) -> str:
    """Return `owner/name` of an address on GitHub; `""` stays `""`.

    >>> github("https://github.com/someone/course.git")
    'someone/course'

    Raises:
        CourseError: If it is no such address.
    """
    if not repo:
        return ""
    match = re.fullmatch(r"(?:https?://)?(?:github\.com/)?([\w.-]+/[\w.-]+?)(?:\.git)?/?", repo)
    if match is None:
        raise CourseError(f"REPO is {repo!r}; a repository on GitHub is needed, such as owner/name")
    return match[1]


def digest(lesson: Path) -> str:
    """Return a digest of a lesson and of this program, by which an edition knows what it is of."""
    parts = (lesson.read_bytes(), Path(__file__).read_bytes())
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def place(edition: str, lesson: Path, out: Path) -> Path:
    """Return where a lesson's edition is written."""
    if edition == "nbgrader":
        return out / edition / "source" / lesson.stem / lesson.name
    return out / edition / lesson.name


def outdated(out: Path, editions: tuple[str, ...] = EDITIONS) -> list[str]:
    """Return the editions that are missing, or not of the lessons as they are now."""
    found = []
    for lesson in lessons():
        for edition in editions:
            path = place(edition, lesson, out)
            held = nbformat.read(path, 4).metadata.get(SOURCE) if path.is_file() else None
            if held != digest(lesson):
                found.append(str(path))
    return found


def lessons() -> list[Path]:
    """Return the lessons, in their order."""
    return sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))


def make(out: Path, repo: str = "", editions: tuple[str, ...] = EDITIONS) -> None:
    """Write editions of all lessons.

    Raises:
        CourseError: For a lesson from which none can be made; what was there stays.
    """
    slug = github(repo)
    read = {lesson: nbformat.read(lesson, 4) for lesson in lessons()}
    for lesson, notebook in read.items():
        try:
            tasks(notebook)
        except CourseError as error:
            raise CourseError(f"{lesson.name}: {error}") from error
    for lesson, notebook in read.items():
        for edition in editions:
            made = {"student": student, "solutions": solutions, "nbgrader": nbgrader}[edition](
                notebook
            )
            path = place(edition, lesson, out)
            if edition == "student" and slug:
                made = launched(made, slug, f"student/{lesson.name}")
            if edition == "solutions":
                print(f"executing {lesson.name}", flush=True)
                _execute(made)
            made.metadata[SOURCE] = digest(lesson)
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(made, path)
    if "nbgrader" in editions:
        (out / "nbgrader" / "nbgrader_config.py").write_text(CONFIGURATION, encoding="utf-8")


def _execute(notebook: NotebookNode) -> None:
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(LESSONS))
    notebook.metadata.pop("widgets", None)


def main(arguments: list[str] | None = None) -> int:
    """Write the editions, or say which are outdated.

    Returns:
        0; 1 if an edition is outdated; 2 if none can be made.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repo", default="", help="owner/name on GitHub, for launch links")
    parser.add_argument("--editions", nargs="+", choices=EDITIONS, default=list(EDITIONS))
    parser.add_argument("--check", action="store_true", help="only say which are outdated")
    given = parser.parse_args(arguments)
    editions = tuple(given.editions)
    if given.check:
        old = outdated(given.out, editions)
        for path in old:
            print(f"{path} is missing or not of the lesson as it is now; run make course")
        return 1 if old else 0
    try:
        make(given.out, given.repo, editions)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    for edition in editions:
        print(given.out / edition)
    return 0


if __name__ == "__main__":
    sys.exit(main())
