"""Tries one small network of every timm module and torchvision family; writes docs/networks.md.

    python tools/sweep.py                    # what is missing, one network after the other
    python tools/sweep.py --again timm/coat_tiny swin_t
    python tools/sweep.py --write            # the page from what there is

Weights are random: nothing is downloaded. Each network has a process of its own, with limits of
processor time and memory; its result is a line of build/sweep.jsonl, of which the last counts.
Where torchcam can be imported (`pip install --no-deps torchcam`), it gets the popular ones, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import signal
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
import torch
import torchvision
from torch import Tensor, nn

import opticam_lite as ol

RESULTS, SMALLEST = Path("build/sweep.jsonl"), Path("build/sweep_smallest.json")
PAGE = Path("docs/networks.md")
POPULAR = [
    "alexnet", "vgg16", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "googlenet", "inception_v3", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet1_0",
    "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
    "swin_t", "vit_b_16",
]  # fmt: skip
# Besides the smallest of each module: what stands for a family of its own, or once went wrong.
ALSO = [
    "efficientnet_v2_s", "regnet_x_400mf", "resnet18", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "timm/coat_tiny", "timm/crossvit_9_dagger_240", "timm/deepseek_vit_412m",
    "timm/deit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224",
    "timm/eva02_tiny_patch14_224", "timm/flexivit_small", "timm/gmlp_ti16_224",
    "timm/maxvit_pico_rw_256", "timm/mixer_s32_224", "timm/mobilenetv4_hybrid_medium",
    "timm/mvitv2_small_cls", "timm/poolformer_s12", "timm/qwen3_vit_88m", "timm/resnet50",
    "timm/resnet50_clip", "timm/resnetv2_50x1_bit", "timm/test_vit",
    "timm/vit_relpos_base_patch16_cls_224", "timm/vit_small_patch16_dinov3",
    "timm/tnt_s_patch16_224",
]  # fmt: skip
ATTENTION = ("raw-attention", "rollout", "tibav")
TEXT = """\
# Which networks work

`python tools/sweep.py` wrote this: one network at least, mostly the smallest, of each of timm's
{modules} modules and torchvision's {families} families (timm {timm}, torchvision {torchvision},
torch {torch}), with random weights, on one thread.

**{loaded} of {n} load, {good} of {n} ({share:.1%}) work with a sensible layer if none is named.**
{exact} are cut exactly: at the default layer and three others, `head(split(x))` equals the network
to the last bit. The largest difference of all is {most:.1g}.

*Sensible* means: the maps depend on the image, and the logits on the maps; at least half of the
modules with weights have run before (*depth*); and for one of four classes Grad-CAM of a textured
image is not flat.

## Beside other packages

Grad-CAM with no layer named by hand gives something sensible here for {ours} of {popular} popular
networks, with torchcam {torchcam} for {theirs}, and with grad-cam {gradcam} for none: there,
`target_layers` has no default.

| network | here | torchcam |
|---|---|---|
{peers}

## What does not work

{wrong}

## All networks

*Attention*: raw attention, rollout and TIBAV, or why not; – for a network that is none of timm's
VisionTransformer, Eva, Beit and VisionTransformerRelPos and torchvision's VisionTransformer.
*s*: seconds to load, cut and explain.

| network | default layer | maps | depth | difference | Grad-CAM | s | attention |
|---|---|---|---|---|---|---|---|
{rows}
"""


def by_module(names: list[str], entry: Any) -> list[list[str]]:
    """Names grouped by the module that defines them, without those for timm's own tests."""
    found = defaultdict(list)
    for name in names:
        if not name.startswith("test_"):
            found[entry(name).__module__].append(name)
    return list(found.values())


def modules_of_timm() -> list[list[str]]:
    """The networks of each module of timm."""
    return by_module(timm.list_models(), timm.models.model_entrypoint)


def families_of_torchvision() -> list[list[str]]:
    """The classification networks of each family of torchvision."""
    models = torchvision.models
    return by_module(models.list_models(module=models), models.get_model_builder)


def smallest() -> list[str]:
    """The network of fewest parameters of each module; one without a classifier only if need be."""
    known = json.loads(SMALLEST.read_text()) if SMALLEST.exists() else {}
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__}"
    if versions not in known:
        print("looking for the smallest network of each module: some minutes, once", flush=True)
        known[versions] = [
            *(f"timm/{min(names, key=size_in_timm)}" for names in modules_of_timm()),
            *(min(names, key=size_in_torchvision) for names in families_of_torchvision()),
        ]
        SMALLEST.parent.mkdir(exist_ok=True)
        SMALLEST.write_text(json.dumps(known))
    return known[versions]


def size_in_timm(name: str) -> tuple[bool, int]:
    """Sort key: whether a network has no classifier, and its number of parameters."""
    with torch.device("meta"):
        return headless(name), sum(p.numel() for p in timm.create_model(name).parameters())


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
    try:
        return ol.load_model(name, weights="random", device="cpu")
    except ValueError as error:
        if "has no classifier" not in str(error):
            raise
    bare = name.removeprefix("timm/")
    network = timm.create_model(bare, num_classes=10)
    size = timm.data.resolve_data_config(model=network)["input_size"][1:]
    return ol.Classifier(network, size=size, device="cpu", name=bare)


@torch.no_grad()
def stirred(classifier: ol.Classifier) -> ol.Classifier:
    """Let no branch be silent: some gains, biases and heads are 0, or nearly, before training."""
    network, random = copy.deepcopy(classifier.network), torch.Generator().manual_seed(1)
    for p in network.parameters():
        if p.numel() > 1 and p.is_floating_point() and p.max() - p.min() < 1e-3:
            p += 0.1 * torch.randn(p.shape, generator=random)
    network.train().eval()  # biases that are kept from the run before are made anew
    return classifier.with_network(network)


@torch.no_grad()
def depths(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Module → share of the modules with weights that have run when it returns, in [0, 1]."""
    ran, seen = set(), {}

    def note(module: nn.Module, _i: Any, _o: Any, name: str) -> None:
        if next(module.parameters(recurse=False), None) is not None:
            ran.add(name)
        seen[name] = len(ran)

    hooks = [m.register_forward_hook(partial(note, name=n)) for n, m in network.named_modules()]
    network(x)
    for hook in hooks:
        hook.remove()
    for name, count in list(seen.items()):  # a list of modules is never called itself
        while name := name.rpartition(".")[0]:
            seen[name] = max(count, seen.get(name, 0))
    return {name: round(count / len(ran), 3) for name, count in seen.items()}


def look(name: str) -> dict[str, Any]:
    """Try a network: what the page says of it."""
    classifier = stirred(load(name))
    random = torch.Generator().manual_seed(0)
    coarse, fine = (torch.rand(2, 3, *size, generator=random) for size in ((7, 7), classifier.size))
    images = 0.7 * nn.functional.interpolate(coarse, classifier.size, mode="bilinear") + 0.3 * fine
    x = classifier.normalised(images)
    deep, layers = depths(classifier.network, x), classifier.layers
    with torch.no_grad():
        y, maps = classifier.logits(images), classifier.features(images)
        halves = map(classifier.at, {classifier.layer, *layers[:: max(1, len(layers) // 3)]})
        difference = max(float((c.head(*c.split(images)) - y).abs().max()) for c in halves)
    # Before training a map may be negative everywhere, and be cut off, for one class or another.
    classes = y[0].argsort()[[0, 1, -2, -1]].tolist()
    reasons = ol.methods.applicable(classifier)
    row = {
        "layer": classifier.layer,
        "shape": classifier.layer_shape(),
        "depth": deep.get(classifier.layer, 0.0),
        "reads": classifier.reads_maps,
        "same": torch.equal(maps[0], maps[1]),
        "flat": not any(ol.explain("grad-cam", classifier, images[:1], c).any() for c in classes),
        "difference": difference,
        "attention": {method: reasons[method] for method in ATTENTION},
        "seconds": resource.getrusage(resource.RUSAGE_SELF).ru_utime,
    }
    if name in POPULAR and find_spec("torchcam") is not None:
        row["torchcam"] = torchcam(classifier.network.requires_grad_(), x[:1], classes, deep)
    return row


def torchcam(network: nn.Module, x: Tensor, classes: list[int], deep: dict[str, float]) -> Any:
    """The layer that torchcam chooses, its depth and whether its maps are flat; or the error."""
    from torchcam.methods import GradCAM

    try:
        cam = GradCAM(network, input_shape=tuple(x.shape[1:]))
        maps = [cam(c, network(x))[0] for c in classes]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:150]}
    flat = all(bool(m.isnan().any()) or float(m.max() - m.min()) < 1e-6 for m in maps)
    return {"layer": cam.target_names[0], "depth": deep.get(cam.target_names[0], 0), "flat": flat}


def try_one(name: str, seconds: int, memory: float) -> dict[str, Any]:
    """Run `look` in a process of its own and within limits; return its row or what went wrong."""
    result, sent = Pipe(duplex=False)
    # A fork has all imported already, which takes as long as many a network.
    child = get_context("fork").Process(target=_child, args=(name, seconds, memory, sent))
    child.start()
    sent.close()
    try:
        row = result.recv()
    except EOFError:
        child.join()
        late = child.exitcode == -signal.SIGXCPU
        row = {"error": f"more than {seconds} s" if late else f"killed ({child.exitcode})"}
    child.join()
    return {"network": name, **row}


def _child(name: str, seconds: int, memory: float, sent: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    try:
        sent.send(look(name))
    except Exception as error:
        short = "allocate memory" in str(error) or isinstance(error, MemoryError)
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        sent.send({"error": f"more than {memory:g} GB" if short else said})


# ------------------------------------------------------------------------------------- the page


def fault(row: dict[str, Any]) -> str:
    """Why a network, or torchcam for it, gives nothing sensible; empty if it does."""
    if "error" in row:
        return row["error"]
    reasons = {
        f"`head(split(x))` differs by {row.get('difference', 0):.1g}": row.get("difference", 0)
        > 1e-4,
        "the maps are the same for two images": row.get("same"),
        "the logits do not depend on the maps": not row.get("reads", True),
        f"{row['layer']} is early ({row['depth']:.0%})": row["depth"] < 0.5,
        "Grad-CAM is flat": row["flat"],
    }
    return "; ".join(reason for reason, true in reasons.items() if true)


def write(rows: list[dict[str, Any]]) -> None:
    """Write docs/networks.md."""
    wrong = {row["network"]: fault(row) for row in rows if fault(row)}
    loaded = sorted((row for row in rows if "error" not in row), key=lambda row: row["network"])
    popular = [row for row in rows if row["network"] in POPULAR]
    theirs = [row.get("torchcam", {"error": "not tried"}) for row in popular]
    peers = [
        f"| {row['network']} | {fault(row) or row['layer']} | {fault(their) or their['layer']} |"
        for row, their in zip(popular, theirs, strict=True)
    ]
    table = []
    for row in loaded:
        k, h, w = row["shape"]
        whys = [f"{m}: {why}" for m, why in row["attention"].items() if why]
        if len(set(row["attention"].values())) == 1:
            whys = [row["attention"]["rollout"] or "yes"]
            whys = ["–" if "and attention is read from" in why else why for why in whys]
        table.append(
            f"| {row['network']} | `{row['layer']}` | {k}×{h}×{w} | {row['depth']:.0%} | "
            f"{row['difference']:.1g} | {'flat' if row['flat'] else 'yes'} | "
            f"{row['seconds']:.0f} | {'; '.join(whys)} |"
        )
    text = TEXT.format(
        modules=len(modules_of_timm()), families=len(families_of_torchvision()),
        timm=timm.__version__, torchvision=torchvision.__version__, torch=torch.__version__,
        n=len(rows), loaded=len(loaded), good=len(rows) - len(wrong),
        share=1 - len(wrong) / len(rows), exact=sum(not row["difference"] for row in loaded),
        most=max((row["difference"] for row in loaded), default=0.0), popular=len(popular),
        ours=sum(not fault(row) for row in popular), theirs=sum(not fault(row) for row in theirs),
        torchcam=version("torchcam") if find_spec("torchcam") else "", gradcam=version("grad-cam"),
        peers="\n".join(peers), rows="\n".join(table),
        wrong="\n".join(f"- {name}: {why}." for name, why in wrong.items()) or "Nothing.",
    )  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(rows)} networks, {1 - len(wrong) / len(rows):.1%} work")


def known() -> dict[str, dict[str, Any]]:
    """The last result of each network."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["network"]: row for row in map(json.loads, lines)}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", nargs="+", default=[], metavar="NETWORK")
    parser.add_argument("--write", action="store_true", help="run nothing, write the page alone")
    parser.add_argument("--seconds", type=int, default=180, help="of the processor, for each")
    parser.add_argument("--memory", type=float, default=8, help="GB for each")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process of several threads can't be forked safely
    names = list(dict.fromkeys([*POPULAR, *ALSO, *smallest(), *given.again]))
    done = known()
    for name in [] if given.write else names:
        if name not in done or name in given.again:
            row = try_one(name, given.seconds, given.memory)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {fault(row) or row['layer']}", flush=True)
    rows = [row for name, row in known().items() if name in names]
    if not rows:
        parser.error("no network has been tried yet; leave out --write")
    write(rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
