"""Measure AG against network passes of opti-cam-fast and opti-cam; renews docs/opti_cam_fast.*.

    python docs/opti_cam_fast.py scenes_resnet:64 scenes_vgg:64 scenes_vit:64
    python docs/opti_cam_fast.py squeezenet1_0:48:CHECKPOINT:LAYER:IMAGES:LABELS  # adds to it
    python docs/opti_cam_fast.py --defaults scenes_resnet:64 …  # both at their defaults

Arguments: a network and the number of images, drawn at random with seed 0 (0 for all).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import opticam_lite as ol
from opticam_lite.evaluation import choose
from opticam_lite.evaluation.intervals import interval

HERE = Path(__file__).parent
PASSES = (3, 5, 8, 10, 12, 15, 20, 30)
ITERATIONS = (5, 10, 20, 30, 50, 75, 100)


def measure(name: str, count: int, *where: str) -> dict[str, Any]:
    """AD, AG, AI of both methods at each number of passes; always in float32."""
    classifier, dataset = load(name, *where)
    indices = choose(len(dataset), count or None, seed=0)
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    before = []
    for start in range(0, len(indices), 8):
        images, targets = dataset.batch(indices[start : start + 8])
        candidates = {}
        for passes in PASSES:
            candidates["opti-cam-fast", passes] = ol.explain(
                "opti-cam-fast", classifier, images, targets, passes=passes, progress=False
            )
        for iterations, masks in opti_cam(classifier, images, targets).items():
            candidates["opti-cam", iterations] = masks
        for key, masks in candidates.items():
            p, o = ol.masked_probabilities(classifier, images, masks, targets)
            found.setdefault(key, []).append(o)
        before.append(p)
    p = torch.cat(before)
    rows = []
    for (method, passes), parts in found.items():
        o = torch.cat(parts)
        rows.append(
            {
                "method": method,
                "passes": passes,
                "AD": ol.metrics.average_drop(p, o),
                "AG": ol.metrics.average_gain(p, o),
                "AI": ol.metrics.average_increase(p, o),
            }
        )
    return {"network": name, "layer": classifier.layer, "images": len(p), "rows": rows}


def at_defaults(name: str, count: int, *where: str) -> dict[str, Any]:
    """AD, AG, AI of both methods with 95 % intervals, and how alike the maps of an image are."""
    classifier, dataset = load(name, *where)
    seen: dict[str, list[torch.Tensor]] = {"opti-cam": [], "opti-cam-fast": [], "p": [], "r": []}
    indices = choose(len(dataset), count or None, seed=0)
    for start in range(0, len(indices), 8):
        images, targets = dataset.batch(indices[start : start + 8])
        masks = []
        for method in ("opti-cam", "opti-cam-fast"):
            masks.append(ol.explain(method, classifier, images, targets, progress=False))
            p, o = ol.masked_probabilities(classifier, images, masks[-1], targets)
            seen[method].append(o)
        seen["p"].append(p)
        a, b = (m.flatten(1) - m.mean((1, 2, 3))[:, None] for m in masks)
        seen["r"].append((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
    found = {key: torch.cat(parts) for key, parts in seen.items()}
    metrics = {"AD": ol.metrics.drop, "AG": ol.metrics.gain, "AI": ol.metrics.increase}
    rows = {}
    for method in ("opti-cam", "opti-cam-fast"):
        values = {m: 100 * f(found["p"], found[method]) for m, f in metrics.items()}
        rows[method] = {m: [float(v.mean()), *interval(v, (0, 100))] for m, v in values.items()}
    alike = found["r"].nanquantile(torch.tensor([0.5, 0.25, 0.75])).tolist()
    return {"network": name, "images": len(found["p"]), "rows": rows, "correlation": alike}


def load(name: str, *where: str) -> tuple[ol.Classifier, ol.Dataset]:
    """The network and its images."""
    if not where:
        return ol.load_model(name), ol.load_dataset("scenes")
    checkpoint, layer, images, labels = where
    classifier = ol.load_model(name, checkpoint=checkpoint, layer=layer)
    return classifier, ol.load_dataset(images, labels=labels, classifier=classifier)


def opti_cam(
    classifier: ol.Classifier, images: torch.Tensor, targets: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The masks of one run of 100 iterations as they stood at some of them."""
    kept: dict[int, torch.Tensor] = {}
    best: dict[str, torch.Tensor] = {}

    def keep(step: ol.methods.Step) -> None:
        F, S = step.objective, step.saliency
        better = best.get("F", torch.full_like(F, -torch.inf)) < F
        best["F"] = F.where(better, best.get("F", F))
        best["S"] = S.where(better[:, None, None, None], best.get("S", S))
        if step.index in ITERATIONS:
            kept[step.index] = step.to_masks(best["S"])

    kept[100] = ol.explain(
        "opti-cam", classifier, images, targets, callback=keep, tolerance=0, progress=False
    )
    return dict(sorted(kept.items()))


def draw(results: list[dict[str, Any]]) -> Figure:
    """AG against passes, a panel a network."""
    figure = Figure(figsize=(3.2 * len(results), 3.2), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for ax, result in zip(axes, results, strict=True):
        for method, marker, colour in (
            ("opti-cam-fast", "o", "#0072b2"),
            ("opti-cam", "s", "#d55e00"),
        ):
            rows = sorted(
                (r for r in result["rows"] if r["method"] == method), key=lambda r: r["passes"]
            )
            ax.plot(
                [r["passes"] for r in rows], [r["AG"] for r in rows],
                marker=marker, color=colour, label=method, markersize=4,
            )  # fmt: skip
        ax.axhline(rows[-1]["AG"], color=colour, linestyle=":", linewidth=1)
        ax.axvline(20, color="0.7", linestyle=":", linewidth=1)
        ax.set_xscale("log")
        ax.set_xticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"])
        ax.minorticks_off()
        ax.set_title(f"{result['network']}, {result['images']} images", fontsize=9)
        ax.set_xlabel("network passes")
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("average gain AG, % ↑")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def table(results: list[dict[str, Any]]) -> str:
    """AD / AG of every method and number of passes, a column a network, in Markdown."""
    cells = {
        (r["method"], r["passes"], result["network"]): f"{r['AD']:.2f} / {r['AG']:.1f}"
        for result in results
        for r in result["rows"]
    }
    names = [f"{r['network']} ({r['images']})" for r in results]
    lines = [f"| method | passes | {' | '.join(names)} |", "|---|---" + "|---" * len(names) + "|"]
    for method, passes in dict.fromkeys(key[:2] for key in cells):
        values = [cells.get((method, passes, r["network"]), "") for r in results]
        lines.append(f"| `{method}` | {passes} | {' | '.join(values)} |")
    return "\n".join(lines)


def table_of_defaults(results: list[dict[str, Any]]) -> str:
    """A row a network and method, in Markdown."""
    lines = ["| network (images) | method | AD | AG | AI | r with `opti-cam` |", "|---" * 6 + "|"]
    for result in results:
        for method, figures in result["rows"].items():
            cells = [f"{v:.2f} [{a:.1f}, {b:.1f}]" for v, a, b in figures.values()]
            r = (
                ""
                if method == "opti-cam"
                else "{:.2f} ({:.2f} to {:.2f})".format(*result["correlation"])
            )
            name = f"{result['network']} ({result['images']})"
            lines.append(f"| {name} | `{method}` | {' | '.join(cells)} | {r} |")
    return "\n".join(lines)


def main(networks: list[str]) -> None:
    """Measure the networks given, keep the results of others, draw all."""
    defaults = networks[:1] == ["--defaults"]
    of = measure if not defaults else at_defaults
    file = HERE / "opti_cam_fast.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    results = known["defaults" if defaults else "passes"]
    for text in networks[defaults:]:
        name, count, *where = text.split(":")
        results[:] = [r for r in results if r["network"] != name] + [of(name, int(count), *where)]
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    draw(known["passes"]).savefig(HERE / "opti_cam_fast.png", dpi=110)
    page = HERE / "opti_cam_fast.md"
    text = page.read_text(encoding="utf-8")
    tables = {"passes": table(known["passes"]), "defaults": table_of_defaults(known["defaults"])}
    for name, shown in tables.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->\n")
        text = f"{head}{begin}{shown}\n{end}{tail}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
