"""Measure methods from the command line.

python -m opticam_lite evaluate --model resnet50 --data imagenet:PATH --methods all --out FOLDER
python -m opticam_lite evaluate --model resnet50 --data imagenet:PATH --study table6 --out FOLDER
python -m opticam_lite summarize FOLDER
python -m opticam_lite finetune --model resnet50 --data chest-xray:PATH --out weights.safetensors
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .datasets import load_dataset, of_known_classes
from .evaluation import evaluate, read, summarize
from .evaluation.run import lacks
from .evaluation.summary import in_words
from .evaluation.variants import variants
from .making.finetuning import Schedule, finetune
from .methods import METHODS, applicable
from .metrics import METRICS
from .models import check_model_name, load_model
from .paths import given_path
from .registry import check_seed, names_in, unknown_name
from .stopping import stoppable
from .studies.findings import VERDICTS
from .studies.paper import STUDIES
from .studies.paper import study as variants_of
from .text import plain

MOST_TOLD = 20  # errors


def parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    whole = argparse.ArgumentParser(
        prog="python -m opticam_lite", description="Measure saliency methods."
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    measure = commands.add_parser(
        "evaluate",
        help="measure methods on a dataset",
        description="Measure methods on a dataset. Called again, it computes only what is missing.",
    )
    add = measure.add_argument
    add("--model", required=True, help="name of a network, such as resnet50")
    add("--data", required=True, help="scenes, a folder, or a form such as imagenet:PATH")
    add("--out", required=True, type=_path, help="folder for the rows")
    add("--methods", nargs="+", help="names, or all that apply [all]")
    add("--study", help=f"a TOML file of variants, or one of {', '.join(STUDIES)}")
    add("--metrics", nargs="+", default=["AD,AG,AI"], help="names, or all that apply [AD AG AI]")
    add("--layer", help="where the network is cut [see load_model]")
    add("--checkpoint", type=_path, help="file of weights")
    add("--weights", default="hub", help="hub or random, without a checkpoint [hub]")
    add("--activation", default="softmax", help="sigmoid for several labels an image [softmax]")
    add("--labels", type=_path, help="CSV of true classes, for a folder of photographs")
    add("--limit", type=int, help="measure this many images, drawn at random [all]")
    add("--seed", type=int, default=0, help="of draws and metrics, 0 to 2**63 - 1 [0]")
    add("--batch-size", type=int, default=8, help="images at a time [8]")
    add("--device", default="auto", help="auto, cpu, cuda, … [auto]")
    add("--engine", default="local", help="local or ray [local]")
    add("--workers", type=int, help="threads that decode images [1 on a CPU, 4 on a GPU]")
    add("--num-gpus", type=float, help="GPUs of each Ray process")
    add("--processes", type=int, help="number of Ray processes [as many as fit]")
    add(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="option of a method, such as opti-cam.iterations=50; may be repeated",
    )
    add("--quiet", action="store_true", help="show no progress")
    table = commands.add_parser("summarize", help="show the table of results")
    table.add_argument("out", nargs="+", type=_path, help="folders that evaluate wrote")
    table.add_argument("--methods", nargs="+", help="names of those to show [all]")
    table.add_argument(
        "--all-images",
        action="store_true",
        help="average each method over its own images, not over those that all have",
    )
    table.add_argument("--csv", type=_path, help="write the table to this file, too")
    train = commands.add_parser(
        "finetune",
        help="fine-tune a network for other classes",
        description="Fine-tune a network: the last layer, then all (the paper's Appendix E.2). "
        "Called again after an interruption, it goes on.",
    )
    add = train.add_argument
    add("--model", required=True, help="name of a network, such as resnet50")
    add("--data", required=True, help="chest-xray:PATH, kvasir:PATH or folders:PATH")
    add("--out", required=True, type=_path, help="file of weights to write, .safetensors")
    add("--checkpoint", type=_path, help="file of weights to start from")
    add("--weights", default="hub", help="hub or random, without a checkpoint [hub]")
    add("--device", default="auto", help="auto, cpu, cuda, … [auto]")
    for of in fields(Schedule):
        name, kind = f"--{of.name.replace('_', '-')}", type(of.default)
        add(name, type=kind, default=of.default, help=f"{of.metadata['help']} [{of.default}]")
    return whole


def _path(text: str) -> Path:
    try:
        return given_path(text)
    except ValueError as error:
        # Of a ValueError argparse would show the usage, and not what is wrong.
        raise FileNotFoundError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 for success, 1 if results could not be written, 2 if an argument is wrong (one sentence
        says what), 130 if it was interrupted, 143 if it was terminated (the same call resumes).
    """
    try:
        with stoppable(), warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_: _tell(str(message))
            given = parser().parse_args(arguments)
            if given.command == "finetune":
                _finetune(given)
                return 0
            methods = _evaluate(given) if given.command == "evaluate" else given.methods
            common = given.command == "evaluate" or not given.all_images
            table = summarize(given.out, errors=True, methods=methods, common=common)
            if given.command == "summarize" and given.csv is not None:
                table.to_csv(given.csv)
            lines = in_words(table).to_string().split("\n")
            if getattr(given, "study", None) in STUDIES:
                rows = read(given.out)
                found = STUDIES[given.study].findings(rows[rows["method"].isin(methods)])
                lines += [f"{VERDICTS[f.verdict]}: {f.claim} ({f.figures})" for f in found]
            sys.stdout.write("".join(f"{plain(line)}\n" for line in lines))
    except KeyboardInterrupt as stop:
        _tell("interrupted; the same call goes on where it stopped")
        return getattr(stop, "code", 130)
    except (FileNotFoundError, ConnectionError, ImportError, TypeError, ValueError) as error:
        _tell("; ".join([str(error), *getattr(error, "__notes__", [])]))
        return 2
    except OSError as error:
        _tell(str(error))
        return 1
    return 0


def _finetune(given: argparse.Namespace) -> None:
    schedule = Schedule(**{of.name: getattr(given, of.name) for of in fields(Schedule)})
    how = {name: getattr(given, name) for name in ("checkpoint", "weights", "device")}
    check_model_name(given.model)
    finetune(given.model, given.data, given.out, schedule, tell=_tell, **how)
    sys.stdout.write(f"{plain(str(given.out))}\n")


def _evaluate(given: argparse.Namespace) -> list[str]:
    """Measure what the command line asks for, and return its labels."""
    # The cheap checks come first: loading a network may take a while.
    check_model_name(given.model)
    named = given.study in STUDIES
    if given.methods and given.study and not named:
        raise ValueError("--methods and --study are both given; a file names its methods")
    methods = names_in(" ".join(given.methods or ["all"]))
    metrics = names_in(" ".join(given.metrics))
    for registry, names in ((METHODS, methods), (METRICS, metrics)):
        for name in names:
            if name != "all":
                registry[name]  # an unknown name raises the error that lists the close ones
    options = parse_options(given.option)
    study = read_study(given.study) if given.study and not named else None
    check_seed(given.seed)
    if not given_path(given.data, "--data").exists():
        load_dataset(given.data)  # loads the scenes, or raises an error that says what is missing
    for what, path in {"checkpoint": given.checkpoint, "labels": given.labels}.items():
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"--{what} is {str(path)!r}, and there is no such file")
    network = ("checkpoint", "layer", "device", "weights", "activation")
    classifier = load_model(given.model, **{name: getattr(given, name) for name in network})
    dataset = load_dataset(given.data, labels=given.labels, classifier=classifier)
    dataset = of_known_classes(classifier, dataset)
    if named:
        chosen = [] if "all" in methods else methods
        iterations = options.get("opti-cam", {}).pop("iterations", None)
        study = variants_of(given.study, classifier, chosen, iterations)
    elif study is None and "all" in methods:
        methods = _that_apply(applicable(classifier))
    if "all" in metrics:
        metrics = _that_apply({name: lacks(dataset, name) for name in METRICS})
    how = ("limit", "seed", "batch_size", "out", "engine", "workers", "num_gpus", "processes")
    evaluate(
        classifier,
        dataset,
        methods if study is None else with_options(study, options),
        metrics,
        options=options if study is None else None,
        progress=not given.quiet,
        collect=False,
        **{name: getattr(given, name) for name in how},
    )
    labels = methods if study is None else list(study)
    _tell_errors(given.out, labels)
    return labels


def read_study(name: str) -> dict[str, dict[str, Any]]:
    """Return label → variant of a TOML file with a table for each variant.

    Raises:
        ValueError: If there is no such file, or it is no TOML of tables.
    """
    path = given_path(name, "--study")
    if not path.is_file():
        raise ValueError(f"{unknown_name('study', name, STUDIES)} Nor is there such a file.")
    try:
        study = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--study is {name!r}, which is no TOML: {error}") from error
    variants(study)  # raises an error for the first that is wrong
    return study


def with_options(
    study: Mapping[str, Mapping[str, Any]], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the variants of a study with options of methods, which take precedence.

    >>> with_options({"mask": {"method": "opti-cam"}}, {"opti-cam": {"iterations": 50}})
    {'mask': {'method': 'opti-cam', 'iterations': 50}}
    """
    methods = {label: spec.get("method", label) for label, spec in study.items()}
    for method, own in options.items():
        if own and method not in methods.values():
            raise ValueError(f"options are given for {method}, which the study does not measure")
    return {label: {**spec, **options.get(methods[label], {})} for label, spec in study.items()}


def _tell_errors(out: Path, methods: Sequence[str]) -> None:
    """Name the images that could not be measured, and those on which a method failed."""
    rows = read(out, ["image"]).dropna(subset="error")
    known = rows[rows["method"].isna() | rows["method"].isin(methods)]
    of = (f" of {name}" if isinstance(name, str) else "" for name in known["method"])
    named = zip(known["image"], of, known["error"], strict=True)
    told = [f"{image} is left out{method}: {error}" for image, method, error in named]
    for text in told[:MOST_TOLD]:
        _tell(text)
    if len(told) > MOST_TOLD:
        _tell(f"{len(told) - MOST_TOLD} more are left out; the rows in {out} have their errors")


def _that_apply(reasons: dict[str, str | None]) -> list[str]:
    """Return the names without a reason against them, and print the reasons of the others."""
    for name, reason in reasons.items():
        if reason is not None:
            _tell(f"{name} is left out: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def parse_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Turn `method.name=value` texts into the options that `evaluate` takes.

    >>> parse_options(["opti-cam.iterations=50", "opti-cam.objective=diff"])
    {'opti-cam': {'iterations': 50, 'objective': 'diff'}}

    Raises:
        ValueError, TypeError: For another form, or an unknown method or option.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        method, dot, rest = text.partition(".")
        name, equals, value = rest.partition("=")
        if not (dot and equals and name):
            raise ValueError(
                f"--option {text!r} is not METHOD.NAME=VALUE, such as opti-cam.iterations=50"
            )
        METHODS[method].check_options([name])
        try:
            options.setdefault(method, {})[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):  # a word without quotes is a string
            options.setdefault(method, {})[name] = value
    return options


def _tell(text: str) -> None:
    sys.stderr.write(f"opticam_lite: {plain(' '.join(text.split()))}\n")


if __name__ == "__main__":
    sys.exit(main())
