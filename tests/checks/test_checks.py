"""Each exercise accepts right answers and tells each wrong one by its own symptom."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import opticam_lite as ol
from opticam_lite.checks import EXERCISES, examine
from opticam_lite.checks.examining import all_inputs, answers, matching
from opticam_lite.checks.running import undisturbed
from opticam_lite.checks.values import tensors
from opticam_lite.studies import sanity


def apart(classifier, images):
    result = []
    for image in images.split(1):
        best = classifier.logits(image)[0].topk(2).indices.tolist()
        one, other = (ol.explain("grad-cam", classifier, image, [c], warn=False) for c in best)
        result.append(float(np.abs(one.numpy() - other.numpy()).mean()))
    return result


def weights_by_the_chain_rule(classifier, images, c):
    A, rest = classifier.split(images)
    A = A.detach().requires_grad_()
    y = classifier.head(A, rest)
    p = y.detach().softmax(1)
    g = torch.stack(
        [torch.autograd.grad(y[:, d].sum(), A, retain_graph=True)[0] for d in range(y.shape[1])], 1
    ).mean((3, 4))  # (N, C, K)
    rows = torch.arange(len(c))
    return p[rows, c][:, None] * (g[rows, c] - (p[:, :, None] * g).sum(1))


def shared_by_slices(g):
    mean = sum(g[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    return mean.repeat_interleave(2, 2).repeat_interleave(2, 3)


def least_sure(p, targets):
    best, smallest = 0, 2.0
    for i, c in enumerate(targets.tolist()):
        if p[i, c] < smallest:
            best, smallest = i, float(p[i, c])
    return best


def inside(boxes, margin, size):
    y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    found = [
        (x >= x0 - margin) & (x < x1 + margin) & (y >= y0 - margin) & (y < y1 + margin)
        for x0, y0, x1, y1 in boxes
    ]
    return torch.stack(found).any(0)[None, None].float()


def minded(classifier, other, images, targets):
    values = [
        stats.spearmanr(
            *(
                ol.explain("grad-cam", f, x, [c], warn=False).flatten().numpy()
                for f in (classifier, other)
            )
        ).statistic
        for x, c in zip(images.split(1), targets.tolist(), strict=True)
    ]
    return sum(values) / len(values)


def likeness(first, second):
    pairs = zip(first.flatten(1).numpy(), second.flatten(1).numpy(), strict=True)
    return [np.corrcoef(a, b)[0, 1] for a, b in pairs]


def brightness(mask, boxes):
    y, x = torch.meshgrid(*map(torch.arange, mask.shape), indexing="ij")
    weights = [
        ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).double() for x0, y0, x1, y1 in boxes.tolist()
    ]
    return [float((mask * w).sum() / w.sum() * mask.numel() / mask.sum()) for w in weights]


def channel_images(classifier, x):
    for A in classifier.features(x)[0]:
        S = ol.upsample(A[None, None], x.shape[2:])
        yield x * (S - S.min()) / (S.max() - S.min() if S.max() > S.min() else 1)


def through_the_winner(classifier, x, c):
    return max(channel_images(classifier, x), key=lambda seen: classifier.logits(seen)[0, c].item())


def weights_of_probabilities(classifier, x, c):
    e = [classifier.probabilities(s)[0, c].exp() for s in channel_images(classifier, x)]
    return [float(q / sum(e)) for q in e]


def some_weights(u, A, M):
    kept = sorted(range(len(u)), key=lambda k: -A[k].var())[:M]
    e = [float(u[k].exp()) if k in kept else 0.0 for k in range(len(u))]
    return np.array(e) / sum(e)


def enough(objectives):
    counts = []
    for curve in objectives.T.tolist():
        line = curve[0] + 0.9 * (max(curve) - curve[0])
        counts.append(1 + next(i for i, value in enumerate(curve) if value >= line))
    return counts


def library_diff(classifier, x, c, iterations):
    steps = []
    options = {"objective": "diff", "precision": "float32", "iterations": iterations}
    ol.explain("opti-cam", classifier, x, [c], callback=steps.append, **options)
    return torch.cat([step.objective for step in steps])


def mask_of_heaviest(w, A, m, size):
    values, places = w.topk(m)
    S = sum(float(v) * A[:, [k]] for v, k in zip(values, places.tolist(), strict=True))
    return ol.to_masks(3 * S, size)


def total_drop(p, o):
    lost = [max(a - b, 0.0) for a, b in zip(p.tolist(), o.tolist(), strict=True)]
    return 100 * sum(lost) / sum(p.tolist())


def bootstrap_of_numpy(first, second):
    rng, n = np.random.default_rng(7), len(first)
    means = []
    for _ in range(2000):
        drawn = rng.integers(n, size=n)
        means.append(first.numpy()[drawn].mean() - second.numpy()[drawn].mean())
    return np.percentile(means, [2.5, 97.5])


def hide_middle(size):
    def make(images):
        y, x = torch.meshgrid(*map(torch.arange, images.shape[2:]), indexing="ij")
        far = [(2 * v - (n - 1)).abs() <= size - 1 for v, n in ((y, y.shape[0]), (x, x.shape[1]))]
        return 1 - (far[0] & far[1]).float().expand(len(images), 1, *y.shape)

    return make


def narrow_border(images):
    masks = np.full((len(images), 1, *images.shape[2:]), 0.85, np.float32)
    masks[..., :8, :] = masks[..., -8:, :] = masks[..., :, :8] = masks[..., :, -8:] = 0
    return torch.from_numpy(masks)


def own_shares(attention):
    """The row of the class token alone, from the last block back to the first, for each depth."""
    shares = []
    for depth in range(1, len(attention) + 1):
        row = F.one_hot(torch.tensor(0), attention[0].shape[-1]).float()[None]
        for P in reversed(attention[:depth]):
            row = 0.5 * (row + torch.einsum("ni,nhij->nj", row.expand(len(P), -1), P) / P.shape[1])
        shares.append(float(row[:, 0].mean()))
    return shares


def brightened(classifier, images, masks, targets, gamma):
    bright = (gamma * masks.clamp(min=1e-12).log()).exp()
    p = classifier.probabilities(images).gather(1, targets[:, None])
    o = classifier.probabilities(images * bright).gather(1, targets[:, None])
    drop, gain = ((p - o) / p).relu().mean(), ((o - p) / (1 - p)).relu().mean()
    return {"AD": 100 * drop, "AG": 100 * gain}


# A right answer that is written in another way than the reference.
OTHERWISE = {
    "00.1": least_sure,
    "00.2": inside,
    "00.3": likeness,
    "01.1": brightness,
    "01.2": lambda masks, on: torch.stack(
        [m[o].sum() / m.sum() for m, o in zip(masks, on, strict=True)]
    ),
    "01.3": lambda W: W - W[:1],  # any row that is moved by v will do
    "02.1": apart,
    "02.2": weights_by_the_chain_rule,
    "02.3": shared_by_slices,
    "03.1": through_the_winner,
    "03.2": weights_of_probabilities,
    "03.3": some_weights,
    "04.1": enough,
    "04.2": library_diff,
    "04.3": mask_of_heaviest,
    "05.1": (37.5, 12.5, 25),
    "05.2": total_drop,
    "05.3": bootstrap_of_numpy,
    "06.1": hide_middle,
    "06.2": narrow_border,
    "06.3": lambda classifier, images, masks, targets: masks.std(dim=(2, 3)).mean(),
    "07.1": lambda P, h, w: P.split([1, h * w], dim=3)[1][:, :, 0].view(*P.shape[:2], h, w),
    "07.2": own_shares,
    "07.3": brightened,
    "08.1": lambda a, b: float(
        np.corrcoef(*(stats.rankdata(np.abs(x.numpy()).ravel()) for x in (a, b)))[0, 1]
    ),
    "08.2": minded,
    "08.3": lambda classifier, images, targets: torch.cat(
        [
            sanity.edges(x) * ol.explain("grad-cam", classifier, x, [c], warn=False)
            for x, c in zip(images.split(1), targets.tolist(), strict=True)
        ]
    ),
}
WRONG = [(name, i) for name, exercise in EXERCISES.items() for i in range(len(exercise.wrong))]


def test_each_exercise_is_answered_in_another_way_and_has_five_symptoms():
    assert set(OTHERWISE) == set(EXERCISES)
    for name, exercise in EXERCISES.items():
        symptoms = [fault.symptom for fault in (*exercise.wrong, *exercise.demands)]
        assert len(exercise.wrong) >= 5, name
        assert len(set(symptoms)) == len(symptoms), name


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_are_accepted(name):
    for answer in (EXERCISES[name].reference, OTHERWISE[name]):
        start = time.process_time()
        result = examine(name, answer)
        assert result.right, result.symptom
        assert time.process_time() - start < 2


@pytest.mark.parametrize(("name", "i"), WRONG)
def test_a_wrong_answer_is_told_by_its_own_symptom(name, i):
    exercise = EXERCISES[name]
    wrong = exercise.wrong[i]
    start = time.process_time()
    result = examine(name, wrong.answer)
    assert time.process_time() - start < 2
    assert not result.right
    assert result.symptom == wrong.symptom
    assert result.hint == wrong.hint
    assert result.more == exercise.more
    with undisturbed():  # the inputs tell it from all others
        inputs = all_inputs(exercise)
        given = [*map(tensors, answers(exercise, wrong.answer, inputs))]
        assert list(matching(exercise, inputs, given)) == [wrong]


# Breaks a demand without being one of the named wrong answers.
BREAKS = {
    ("01.3", 0): lambda W: W - W.mean() * W.mean(dim=0),
    ("01.3", 1): lambda W: (W - W.mean(dim=0)) ** 3,
    ("06.2", 0): lambda images: 0.9 + 0.1 * images[:, 1:2],
    ("06.2", 1): lambda images: torch.full_like(images[:, :1], 0.3),
    ("06.2", 2): lambda images: torch.full_like(images[:, :1], 0.98),
    ("06.3", 0): lambda net, images, masks, targets: (masks.amin(dim=(1, 2, 3)) == 0).sum(),
    ("06.3", 1): lambda net, images, masks, targets: (masks[:, :, 99, 99] < 0.95).sum() + 1e-9,
}


def test_each_demand_is_broken_by_an_answer_without_a_name():
    demands = {(n, i) for n, e in EXERCISES.items() for i in range(len(e.demands))}
    assert set(BREAKS) == demands
    for (name, i), answer in BREAKS.items():
        assert examine(name, answer).symptom == EXERCISES[name].demands[i].symptom, (name, i)
