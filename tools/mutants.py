"""Do the tests bite? `python tools/mutants.py [MODULE …]` breaks the code and asks who notices.

Cosmic-ray's operators break masking, metrics and methods in one place at a time (a mutant: + for −,
a number one larger, a decorator removed, …), in a copy of the clone, and each mutant meets the test
files of its module. Left out are mutants that change only annotations, docstrings or the words of
an error, and those of which Python itself warns (`is "range"`). Results are kept: another call goes
on where the last one stopped, and a mutant is run again only if its module has changed, or with
--again if it has survived.

To import PyTorch and to collect the tests for each of several thousand mutants would take hours. So
the packages are imported once, the tests are collected once a module, and each mutant runs in a
fork, where the changed function gets its new code; a mutant that changes what runs on import gets a
fork before that import. For Linux and macOS; `pip install cosmic-ray` first.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import importlib
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
ROOMS = ("masking.py", "metrics", "methods")
# Tests that know a module beside its own file, tests/ROOM/test_MODULE.py.
SHARED = {
    "metrics": ("metrics/test_registry.py",),
    "methods": ("methods/test_options.py::test_facts",),
}
LIMITS = "methods/test_options.py::test_limits"
SAMPLES = (
    "methods/test_samples.py::test_chunks_do_not_matter_and_seeds_do",
    "methods/test_samples.py::test_passes_are_those_of_the_quick_network",
)
MORE = {
    "methods/__init__.py": ("methods/test_explain.py", "methods/test_options.py"),
    "methods/ablation_cam.py": ("methods/test_chunks.py", LIMITS),
    "methods/attention.py": ("methods/test_rollout.py", "methods/test_raw_attention.py"),
    "methods/extremal_perturbation.py": (LIMITS,),
    "methods/gradient_shap.py": (*SAMPLES, LIMITS),
    "methods/lime.py": (*SAMPLES, LIMITS),
    "methods/opti_cam.py": (LIMITS,),
    "methods/opti_cam_fast.py": (LIMITS,),
    "methods/registry.py": ("methods/test_search.py", "methods/test_explain.py"),
    "methods/score_cam.py": ("methods/test_chunks.py", LIMITS),
    "methods/search.py": ("methods/test_opti_cam.py", "methods/test_opti_cam_fast.py"),
}
# What the tests import, except for this package.
PRELOADED = (
    *("torch", "torchvision.ops", "torchvision.transforms.v2", "torchvision.datasets", "timm"),
    *("numpy", "pandas", "scipy.ndimage", "matplotlib.pyplot", "tqdm.auto", "hypothesis"),
    *("captum.attr", "lime.lime_image", "skimage.segmentation", "pytorch_grad_cam", "quantus"),
)


def what_runs(source: str) -> str:
    """The code without annotations, names of types, docstrings and the words of errors."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
        elif isinstance(node, ast.Assign):
            names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            if names & {"Sequence", "Callable"}:
                node.value = ast.Constant(None)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


def mutants_of(source: str, most: int | None = None) -> list[str]:
    """The whole source of each mutant that differs in what runs, in random order."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    places, nodes = [], list(ast_nodes(get_ast(source)))
    for operator in map(get_operator, operator_names()):
        if not operator.arguments():  # else they are names of variables, to be given by hand
            n = sum(1 for node in nodes for _ in operator().mutation_positions(node))
            places += [(operator, occurrence) for occurrence in range(n)]
    random.Random(0).shuffle(places)
    found = {what_runs(source): source}
    for operator, occurrence in places:
        if most is not None and len(found) > most:
            break
        mutant = mutate_code(source, operator(), occurrence)
        with contextlib.suppress(SyntaxError, SyntaxWarning), warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(mutant, "", "exec")
            found.setdefault(what_runs(mutant), mutant)
    return list(found.values())[1:]


def is_function(code: CodeType) -> bool:
    """Not a class, and not a comprehension, which runs at once."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and code.co_name[1:] not in {
        "genexpr>", "listcomp>", "setcomp>", "dictcomp>",
    }  # fmt: skip


def on_import(code: CodeType) -> tuple:
    """What runs when a module is imported: all but its functions."""
    parts = [
        c if not isinstance(c, CodeType) else None if is_function(c) else on_import(c)
        for c in code.co_consts
    ]
    return code.co_code, code.co_names, repr(parts)


def changed(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The functions that differ."""
    for a, b in zip(old.co_consts, new.co_consts, strict=True):
        if isinstance(a, CodeType) and a != b:
            yield from [(a, b)] if is_function(a) else changed(a, b)


def succeeds(do: Callable[[], int], limit: int = 0) -> bool:
    """Whether a function returns 0 in a fork, before a limit in seconds."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    code = 1
    with contextlib.suppress(BaseException):
        signal.alarm(limit)  # ends the process
        with contextlib.suppress(OSError, ValueError):  # not on macOS
            resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
        code = int(do())
    os._exit(code)


def run_pytest(tests: list[str], *plugins: object) -> int:
    """Collect tests of the copy and run them until one fails."""
    os.chdir(TREE)
    sys.path.insert(0, str(TREE))
    quiet = ["-o", "addopts=", "-x", "-p", "no:terminal", "-p", "no:cacheprovider"]
    hypothesis = ["-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0"]
    hypothesis += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # it is imported already
    return pytest.main([*quiet, *hypothesis, *tests], plugins)


class EachMutant:
    """A plugin of pytest that runs the collected tests once for each mutant, in a fork."""

    def __init__(self, file: Path, source: str, record: Callable[[str, bool], None]) -> None:
        self.file, self.source, self.record = file, source, record
        self.mutants: dict[str, str] = {}

    def split(self, mutants: dict[str, str]) -> dict[str, str]:
        """Take the mutants that differ inside of functions, return the rest."""
        code = compile(self.source, self.file, "exec")
        for key, mutant in mutants.items():
            if on_import(compile(mutant, self.file, "exec")) == on_import(code):
                self.mutants[key] = mutant
        return {key: mutants[key] for key in mutants.keys() - self.mutants.keys()}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the place of pytest's own loop."""
        begin = time.monotonic()
        if not succeeds(lambda: self.run(session, self.source), 900):
            session.testsfailed = 1
            return True
        limit = 20 + round(4 * (time.monotonic() - begin))
        for key, mutant in self.mutants.items():
            self.record(key, not succeeds(lambda m=mutant: self.run(session, m), limit))
        return True

    def run(self, session: pytest.Session, mutant: str) -> int:
        """Run the tests on a mutant until one fails."""
        codes = (compile(source, self.file, "exec") for source in (self.source, mutant))
        new = dict(changed(*codes))
        for f in gc.get_objects():
            if type(f) is FunctionType and f.__code__.co_filename == str(self.file):
                f.__code__ = new.get(f.__code__, f.__code__)
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return 1
        return 0


def judge(name: str, most: int | None, again: bool) -> tuple[int, list[str]]:
    """Run the mutants without a result: how many there are in all, and those that survive."""
    file = TREE / "opticam_lite" / name
    source = file.read_text(encoding="utf-8")
    kept = BUILD / f"{name.replace('/', '.')}.jsonl"
    kept.touch()
    room, module = Path(name).parent.as_posix(), Path(name).stem
    own = f"{room}/test_{module}.py"
    named = dict.fromkeys((own, *SHARED.get(room, ()), *MORE.get(name, ())))
    tests = [f"tests/{test}" for test in named]
    tests = [test for test in tests if (TREE / test.split("::")[0]).exists()]
    chosen = {hashlib.sha1(m.encode()).hexdigest(): m for m in mutants_of(source, most)}

    def results() -> dict[str, bool]:
        return dict(map(json.loads, kept.read_text(encoding="utf-8").splitlines()))

    def record(key: str, noticed: bool) -> None:
        with kept.open("a", encoding="utf-8") as log:
            log.write(json.dumps([key, noticed]) + "\n")

    known = results()
    waiting = {k: m for k, m in chosen.items() if k not in known or (again and not known[k])}
    in_functions = EachMutant(file, source, record)
    on_import = in_functions.split(waiting)
    if waiting and not succeeds(lambda: run_pytest(tests, in_functions)):
        sys.exit(f"{name}: {' '.join(tests)} fail on the code as it is")
    sys.dont_write_bytecode = True  # a stale one would hide a mutant
    for key, mutant in on_import.items():
        file.write_text(mutant, encoding="utf-8")
        record(key, not succeeds(lambda: run_pytest(tests), 300))
    shutil.copy2(ROOT / "opticam_lite" / name, file)
    sys.dont_write_bytecode = False
    known = results()
    return len(chosen), [difference(source, m) for k, m in chosen.items() if not known[k]]


def difference(source: str, mutant: str) -> str:
    """The lines that differ, after their number."""
    lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def main() -> None:
    """Copy the clone, judge the modules one by one, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=ROOMS, help="such as methods/cam.py, metrics")
    parser.add_argument("--most", type=int, help="of each module, drawn at random (default: all)")
    parser.add_argument("--again", action="store_true", help="run survivors again")
    chosen = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    os.environ["PYTEST_XDIST_WORKER"] = "mutants"  # one thread: others don't outlive a fork
    with warnings.catch_warnings(action="ignore"):  # what they warn of on import is theirs
        for package in PRELOADED:
            importlib.import_module(package)
    shutil.rmtree(TREE, ignore_errors=True)
    for part in ("opticam_lite", "tests", "data", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        TREE.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, TREE / part)
    package, total, survived = TREE / "opticam_lite", 0, 0
    paths = [package / room for room in chosen.modules]
    for file in [file for p in paths for file in ([p] if p.is_file() else sorted(p.glob("*.py")))]:
        name = file.relative_to(package).as_posix()
        n, survivors = judge(name, chosen.most, chosen.again)
        total, survived = total + n, survived + len(survivors)
        heading = f"{name}: {n - len(survivors)} of {n} mutants noticed"
        print(heading, *survivors, sep="\n", flush=True)
    print(f"{total - survived} of {total} mutants noticed")


if __name__ == "__main__":
    main()
