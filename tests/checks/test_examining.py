"""What is told of any wrong answer, whatever the exercise; and that nothing stays changed."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import opticam_lite as ol
from opticam_lite.checks import Exercise, Wrong
from opticam_lite.checks.examining import judge
from opticam_lite.checks.inputs import smooth, tiny

# The mean brightness of each image, as a mask: with a range, and one row an image.
EXERCISE = Exercise(
    asks="a function (images, scale) that returns masks",
    reference=lambda images, scale: scale * images.mean(dim=1, keepdim=True),
    inputs=lambda seed: (smooth(seed, 3, 3, 8, 6), 0.5),
    wrong=(Wrong("only red is used", "All three colours.", lambda x, scale: scale * x[:, :1]),),
    hint="the hint",
    more="another hint",
    batched=(0,),
    within=(0, 1),
)
calls = []


def right(images, scale):
    return scale * images.mean(dim=1, keepdim=True)


def unfinished(images, scale):
    raise NotImplementedError("the mean of the colours")


def failing(images, scale):
    return images.mean(dim=1) / missing_name  # noqa: F821


def changing(images, scale):
    images *= scale
    return images.mean(dim=1, keepdim=True)


def endless(images, scale):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


def normalised_over_the_batch(images, scale):
    mean = images.mean(dim=1, keepdim=True)
    return (mean - mean.min()) / (mean.max() - mean.min())


def remembering(images, scale):
    calls.append(1)
    return right(images, scale) * (1 - 0.001 * len(calls))


SYMPTOMS = {
    "nothing is handed in yet": [None, ..., {"AD": ...}],
    "nothing is handed in yet: the mean of the colours": [unfinished],
    "this is a Tensor, not a function": [torch.zeros(3)],
    "the function takes the arguments (images)": [lambda images: images],
    "the function did not end within 0.5 seconds and was stopped": [endless],
    "the function changes what it is given": [changing],
    "the function returns nothing": [lambda images, scale: None],
    "the result is a str; a tensor (3, 1, 8, 6): that is needed": [lambda images, scale: "mask"],
    "the result is a ndarray; a tensor (3, 1, 8, 6): that is needed": [
        lambda images, scale: right(images, scale).numpy()
    ],
    "some values are NaN or infinite": [lambda images, scale: right(images, scale) / 0],
    "the result has the shape (3, 8, 6); (3, 1, 8, 6) is needed": [
        lambda images, scale: right(images, scale)[:, 0]
    ],
    "the result is of dtype bool; float32 is needed": [
        lambda images, scale: right(images, scale) > 0.2
    ],
    "some values lie outside 0 to 1": [lambda images, scale: right(images, scale) - 0.7],
    "the result is the same for all inputs": [lambda images, scale: torch.ones(3, 1, 8, 6)],
    "the same input gives another result each time": [
        lambda images, scale: torch.rand_like(images[:, :1]),
        remembering,
    ],
    "the result of an image depends on the other images of the batch": [normalised_over_the_batch],
    "only red is used": [lambda images, scale: images[:, :1] * scale],
    "the result is 2 times what it should be": [lambda images, scale: 2 * right(images, scale)],
    "the result is off by 0.1 throughout": [lambda images, scale: right(images, scale) + 0.1],
    "it runs, and the result has the right form, but other values": [
        lambda images, scale: right(images, scale) ** 2
    ],
}


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_of_any_exercise(symptom):
    for answer in SYMPTOMS[symptom]:
        result = judge(EXERCISE, answer, seconds=0.5 if answer is endless else 10)
        assert not result.right
        assert result.symptom == symptom
        assert result.more == "another hint"


def test_what_has_no_name_gets_the_hint_of_the_exercise():
    result = judge(EXERCISE, lambda images, scale: right(images, scale) ** 2)
    assert result.hint == "the hint"


def test_it_may_be_right_for_some_inputs_only():
    brightest = max(float(EXERCISE.inputs(seed)[0].mean()) for seed in range(3))

    def half_right(images, scale):
        dark = images.mean() < brightest - 1e-6
        return right(images, scale) if dark else images[:, :1] ** 3

    alone = replace(EXERCISE, batched=())
    assert judge(alone, half_right).symptom == "it is right for 2 of 3 fresh inputs only"


def test_an_exception_is_told_with_its_line():
    result = judge(EXERCISE, failing)
    line = failing.__code__.co_firstlineno + 1
    assert f"NameError, in line {line} of failing: return images.mean(dim=1)" in result.symptom
    assert "missing_name" in result.symptom


def test_a_right_answer_may_be_of_another_precision_and_have_a_graph():
    assert judge(EXERCISE, lambda images, scale: right(images, scale).double()).right
    weight = torch.ones(1, requires_grad=True)
    assert judge(EXERCISE, lambda images, scale: weight * right(images, scale)).right


def test_a_changed_network_is_told():
    def training(classifier, images):
        classifier.network.train()
        return classifier.logits(images)

    exercise = Exercise(
        asks="…", reference=lambda net, x: net.logits(x), wrong=(), hint="", more="",
        inputs=lambda seed: (tiny(seed), smooth(seed, 2, 3, 32, 32)),
    )  # fmt: skip
    assert judge(exercise, training).symptom == "the function changes what it is given"
    assert judge(exercise, lambda net, x: net.logits(x)).right


def test_the_global_state_is_left_as_found(capsys):
    def careless(images, scale):
        print("printed")  # noqa: T201
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        torch.set_default_dtype(torch.float64)
        return right(images, scale)

    threads = torch.get_num_threads()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    assert judge(EXERCISE, careless).right
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads
    assert capsys.readouterr().out == ""


def test_check_prints_and_has_another_hint_at_the_third_try(capsys):
    def wrong(p, targets):
        return int(p[range(len(p)), targets].argmax())

    assert ol.check("00.1", wrong) is None
    first = capsys.readouterr().out
    assert first.startswith("✗ 00.1: this is the image with the surest target.\n  Hint: Smallest")
    ol.check("00.1", wrong)
    assert capsys.readouterr().out == first
    ol.check("00.1", wrong)
    third = capsys.readouterr().out
    assert third.startswith(first)
    assert third.count("Hint:") == 2
    ol.check("00.1", lambda p, targets: int(p[range(len(p)), targets].argmin()))
    assert capsys.readouterr().out == "✓ 00.1\n"
    ol.check("00.1", wrong)  # counted from the start again
    assert capsys.readouterr().out == first


def test_an_unknown_exercise_is_told():
    with pytest.raises(ValueError, match=r"unknown exercise '02\.9'"):
        ol.check("02.9", None)
