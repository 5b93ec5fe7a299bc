"""Tries one small variant of every timm module and torchvision family: writes docs/networks.md.

    python tools/sweep.py                   # what is missing, one network after the other
    python tools/sweep.py --again coat_tiny timm/tnt_s_patch16_224
    python tools/sweep.py --write           # docs/networks.md from what there is

Weights are random, so nothing is downloaded. Each network runs in a process of its own, which may
use --seconds of the processor and --memory; its result is a line of build/sweep.jsonl, of which
the last counts. Interrupt it whenever you like. Where torchcam (0.5.0) or grad-cam can be
imported, the popular networks are given to them, too, as to us: with no layer named by hand.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import time
import warnings
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
import torchvision
from torch import Tensor, nn

import opticam_lite as ol

RESULTS, SMALLEST = Path("build/sweep.jsonl"), Path("build/sweep_smallest.json")
PAGE = Path("docs/networks.md")
POPULAR = (
    "alexnet", "vgg16", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "googlenet", "inception_v3", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet1_0",
    "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
    "swin_t", "vit_b_16",
)  # fmt: skip
# Besides the smallest of each module: what stands for a family of its own, or once went wrong.
ALSO = (
    "efficientnet_v2_s", "regnet_x_400mf", "resnet18", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "timm/coat_tiny", "timm/crossvit_9_dagger_240", "timm/deepseek_vit_412m",
    "timm/deit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224",
    "timm/eva02_tiny_patch14_224", "timm/flexivit_small", "timm/gmlp_ti16_224",
    "timm/maxvit_pico_rw_256", "timm/mixer_s32_224", "timm/mobilenetv4_hybrid_medium",
    "timm/mvitv2_small_cls", "timm/poolformer_s12", "timm/qwen3_vit_88m", "timm/resnet50",
    "timm/resnet50_clip", "timm/resnetv2_50x1_bit", "timm/test_vit",
    "timm/vit_relpos_base_patch16_cls_224", "timm/vit_small_patch16_dinov3",
    "timm/vit_tiny_patch16_224",
)  # fmt: skip
ATTENTION = ("raw-attention", "rollout", "tibav")
HOW = """\
Written by `python tools/sweep.py`: timm {timm}, torchvision {torchvision}, torch {torch}, random weights,
one network of each of timm's {modules} modules and torchvision's {families} families at least, mostly the
smallest.

- **{loaded} of {n} load, {good} of {n} ({share:.1%}) work with a sensible layer.**
- {exact} are cut exactly: `head(split(x))` differs from the untouched network by 0.0, at the default layer
  and at three others. The largest difference is {most:.1g}, where a layer's memory layout differs.

*Sensible*: maps of more than one cell that depend on the image and on which the logits depend, behind half of
the modules that have weights, and a Grad-CAM that is not flat (on a textured image, for one of four classes).
"""
PEERED = """\
Grad-CAM with nothing but the network and an image, on {n} popular networks of torchvision: sensible here on
{ours}, with torchcam {torchcam_version} on {torchcam}, and with the grad-cam package {gradcam} on none, because there
`target_layers` must be given. Given a layer, both explain these networks, too, but for transformers, whose tokens
need a `reshape_transform` there.
"""
TABLE = """\
*Depth* is the share of the modules with weights that have run, *attention* the methods that explain attention
(see below), *s* the seconds to load, cut and explain on one thread.

| network | default layer | maps | depth | difference | Grad-CAM | attention | s |
|---|---|---|---|---|---|---|---|"""


def modules_of_timm() -> dict[str, list[str]]:
    """Module of timm → its networks, without those that are for timm's own tests."""
    found = defaultdict(list)
    for name in timm.list_models():
        found[timm.models.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    return {m: [n for n in names if not n.startswith("test_")] for m, names in found.items()}


def families_of_torchvision() -> dict[str, list[str]]:
    """Module of torchvision → its classification networks."""
    found = defaultdict(list)
    for name in torchvision.models.list_models(module=torchvision.models):
        found[torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]].append(name)
    return found


def smallest() -> list[str]:
    """The smallest network of each module, by parameters; those with a classifier before others."""
    known = json.loads(SMALLEST.read_text()) if SMALLEST.exists() else {}
    version = f"timm {timm.__version__}, torchvision {torchvision.__version__}"
    if version not in known:
        print("looking for the smallest network of each module, once: some minutes", flush=True)
        known[version] = [
            *(f"timm/{min(names, key=size_in_timm)}" for names in modules_of_timm().values()),
            *(min(names, key=size_in_torchvision) for names in families_of_torchvision().values()),
        ]
        SMALLEST.parent.mkdir(exist_ok=True)
        SMALLEST.write_text(json.dumps(known))
    return known[version]


def size_in_timm(name: str) -> tuple[bool, int]:
    """Sort key: whether a network has no classifier, and its number of parameters."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = timm.create_model(name)
    return headless(name), sum(p.numel() for p in network.parameters())


def size_in_torchvision(name: str) -> int:
    """Sort key: the number of parameters."""
    return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]


def headless(name: str) -> bool:
    """Whether timm has a network without a classifier."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.num_classes == 0


# ------------------------------------------------------------------- one network, in its process


def load(name: str) -> ol.Classifier:
    """Load a network; one that timm has without a classifier is given one of ten classes."""
    bare = name.removeprefix("timm/")
    if bare == name or not headless(bare):
        return ol.load_model(name, weights="random", device="cpu")
    network = timm.create_model(bare, num_classes=10)
    size = timm.data.resolve_data_config(model=network)["input_size"][1:]
    return ol.Classifier(network, size=size, device="cpu", name=bare)


def images_of(size: tuple[int, int], n: int = 2) -> Tensor:
    """Images `(n, 3, *size)` with a coarse and a fine texture."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 7, 7, generator=random)
    fine = torch.rand(n, 3, *size, generator=random)
    return 0.7 * nn.functional.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


@torch.no_grad()
def stir(network: nn.Module) -> None:
    """Let no branch be silent: some gains, biases and heads are 0, or nearly, before training."""
    random = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if p.numel() > 1 and p.is_floating_point() and p.aminmax().max - p.aminmax().min < 1e-3:
            p += 0.1 * torch.randn(p.shape, generator=random)


def depths(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Module → share of the modules with weights that have run when it returns, in [0, 1]."""
    ran, seen = set(), {}

    def note(module: nn.Module, _i: Any, _o: Any, name: str) -> None:
        if next(module.parameters(recurse=False), None) is not None:
            ran.add(name)
        seen[name] = len(ran)

    hooks = [m.register_forward_hook(partial(note, name=n)) for n, m in network.named_modules()]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    for name, count in list(seen.items()):  # a list of modules is never called itself
        while name := name.rpartition(".")[0]:
            seen[name] = max(count, seen.get(name, 0))
    return {name: count / len(ran) for name, count in seen.items()}


def look(name: str) -> dict[str, Any]:
    """Try a network: what docs/networks.md says of it."""
    start = time.process_time()
    classifier = load(name)
    row: dict[str, Any] = {"loads": round(time.process_time() - start, 1)}
    stir(classifier.network)
    images = images_of(classifier.size)
    x = classifier.normalised(images)
    deep = depths(classifier.network, x)
    row |= {"layer": classifier.layer, "shape": classifier.layer_shape()}
    row |= {"depth": round(deep.get(classifier.layer, 0), 3), "reads": classifier.reads_maps}
    row["layers"] = [
        (layer, *classifier.layer_shape(layer), round(deep.get(layer, 0), 3))
        for layer in classifier.layers
    ]
    some = {layer for layer, *_ in row["layers"][:: max(1, len(row["layers"]) // 3)]}
    with torch.no_grad():
        y = classifier.logits(images)
        cuts = [classifier.at(layer) for layer in {classifier.layer, *some}]
        row["difference"] = max(float((c.head(*c.split(images)) - y).abs().max()) for c in cuts)
        maps = classifier.features(images)
    row["same"] = torch.equal(maps[0], maps[1])
    # Before training a map may be negative everywhere, and be cut off, for one class or another.
    classes = y[0].argsort()[[0, 1, -2, -1]].tolist()
    row["flat"] = not any(ol.explain("grad-cam", classifier, images[:1], c).any() for c in classes)
    reasons = ol.methods.applicable(classifier)
    row["attention"] = {method: reasons[method] for method in ATTENTION}
    row["seconds"] = round(time.process_time() - start, 1)
    if name in POPULAR:
        row["torchcam"] = _torchcam(classifier.network.requires_grad_(), x[:1], classes, deep)
    return row


def _torchcam(network: nn.Module, x: Tensor, classes: list[int], deep: dict[str, float]) -> Any:
    """The layer that torchcam chooses and whether its maps are flat, or its error."""
    if find_spec("torchcam") is None:
        return None
    from torchcam.methods import GradCAM

    try:
        cam = GradCAM(network, input_shape=tuple(x.shape[1:]))
        (layer,) = cam.target_names
        maps = [cam(c, network(x))[0] for c in classes]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:150]}
    flat = all(bool(m.isnan().any()) or float(m.max() - m.min()) < 1e-6 for m in maps)
    return {"layer": layer, "depth": round(deep.get(layer, 0), 3), "flat": flat}


# --------------------------------------------------------------------------------- all networks


def try_one(name: str, seconds: int, memory: float) -> dict[str, Any]:
    """Run `look` in a process of its own and within limits; return its row or what went wrong."""
    row, sent = Pipe(duplex=False)
    # A fork has all imported already, which takes as long as many a network.
    child = get_context("fork").Process(target=_child, args=(name, seconds, memory, sent))
    child.start()
    sent.close()
    try:
        result = row.recv()
    except EOFError:
        child.join()
        late = child.exitcode == -signal.SIGXCPU
        result = {"error": f"more than {seconds} s" if late else f"killed ({child.exitcode})"}
    child.join()
    return {"network": name, **result}


def _child(name: str, seconds: int, memory: float, sent: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    try:
        sent.send(look(name))
    except Exception as error:
        short = "allocate memory" in str(error) or isinstance(error, MemoryError)
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        sent.send({"error": f"more than {memory:g} GB" if short else said})


def rows() -> dict[str, dict[str, Any]]:
    """The last result of each network."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["network"]: row for row in map(json.loads, lines)}


def fault(row: dict[str, Any]) -> str:
    """Why a network does not work with a sensible layer; empty if it does."""
    if "error" in row:
        return row["error"]
    reasons = {
        f"head(split(x)) differs by {row['difference']:.1g}": row["difference"] > 1e-4,
        "its maps are the same for two images": row["same"],
        "the logits do not depend on its maps": not row["reads"],
        f"the layer is early ({row['depth']:.0%} of the weighted modules)": row["depth"] < 0.5,
        "its Grad-CAM is flat": row["flat"],
    }
    return "; ".join(reason for reason, true in reasons.items() if true)


def peer(row: dict[str, Any]) -> tuple[bool, str]:
    """Whether torchcam's layer and maps are sensible, and in words."""
    found = row.get("torchcam")
    if found is None:
        return False, "not run"
    if "error" in found:
        return False, found["error"].replace("|", "\\|")
    good = not found["flat"] and found["depth"] >= 0.5
    return good, f"`{found['layer']}`" + ", early" * (found["depth"] < 0.5) + ", flat" * found[
        "flat"
    ]


def write(names: list[str]) -> None:
    """Write docs/networks.md."""
    known = rows()
    got = [known[name] for name in names if name in known]
    wrong = {row["network"]: fault(row) for row in got if fault(row)}
    loaded = [row for row in got if "error" not in row]
    share = (len(got) - len(wrong)) / max(1, len(got))
    popular = [known[name] for name in POPULAR if name in known]
    ours, torchcam = (
        sum(ok) for ok in ([not fault(r) for r in popular], [peer(r)[0] for r in popular])
    )
    lines = [
        "# Which networks work",
        "",
        HOW.format(
            timm=timm.__version__, torchvision=torchvision.__version__, torch=torch.__version__,
            modules=len(modules_of_timm()), families=len(families_of_torchvision()),
            n=len(got), loaded=len(loaded), good=len(got) - len(wrong), share=share,
            exact=sum(row["difference"] == 0 for row in loaded),
            most=max(row["difference"] for row in loaded),
        ),
        "## No layer named by hand",
        "",
        PEERED.format(
            n=len(popular), ours=ours, torchcam=torchcam, torchcam_version=version("torchcam"),
            gradcam=version("grad-cam"),
        ),
        "| network | here | torchcam |",
        "|---|---|---|",
    ]  # fmt: skip
    for row in popular:
        lines.append(f"| {row['network']} | `{row.get('layer')}` | {peer(row)[1]} |")
    lines += ["", "## What does not work", ""]
    lines += [f"- **{name}**: {reason}." for name, reason in wrong.items()] or ["Nothing."]
    lines += ["", "## All networks", "", TABLE]
    for row in sorted(loaded, key=lambda row: row["network"]):
        k, h, w = row["shape"]
        able = [method for method, why in row["attention"].items() if why is None]
        lines.append(
            f"| {row['network']} | `{row['layer']}` | {k}×{h}×{w} | {row['depth']:.0%} | "
            f"{row['difference']:.1g} | {'yes' if not row['flat'] else 'flat'} | "
            f"{'all' if len(able) == 3 else ', '.join(able) or '-'} | {row['seconds']:.0f} |"
        )
    whys = defaultdict(list)
    for row in loaded:
        reasons = defaultdict(list)
        for method, why in row["attention"].items():
            reasons[why].append(method)
        for why, methods in reasons.items():
            if why is not None:
                whys[", ".join(methods), why].append(row["network"])
    lines += ["", "## Why an attention method can't explain a network", ""]
    for (methods, why), whom in whys.items():
        lines.append(f"- {methods}: {why} ({', '.join(whom)}).")
    PAGE.write_text("\n".join(lines) + "\n")
    print(
        f"{PAGE}: {len(got)} of {len(names)} networks, {len(wrong)} with a fault ({share:.1%} work)"
    )


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", nargs="+", default=[], metavar="NETWORK")
    parser.add_argument("--write", action="store_true", help="run nothing, write the page alone")
    parser.add_argument("--seconds", type=int, default=90, help="of the processor, for each")
    parser.add_argument("--memory", type=float, default=8, help="GB for each")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process of several threads can't be forked safely
    names = list(dict.fromkeys([*POPULAR, *ALSO, *smallest()]))
    done = {} if given.write else rows()
    for name in [] if given.write else names:
        if name not in done or name in given.again:
            row = try_one(name, given.seconds, given.memory)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {fault(row) or row['layer']}", flush=True)
    write(names)


if __name__ == "__main__":
    main()
