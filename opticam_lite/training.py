"""Trains the embedded networks from nothing, on a CPU.

``python -m opticam_lite.training scenes_resnet`` renders the training split (once; it is cached
under ``build/``), trains, and writes ``scenes_resnet.safetensors`` and its log to where
``load_model`` reads them, ``data/networks/`` (``--out`` names another folder). The recipes below
are the whole of it: the same command with the same seed and number of threads on the same kind of
processor repeats the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from opticam_lite import embedded, scenes
from opticam_lite.network import IMAGENET_MEAN, IMAGENET_STD, dtype_of
from opticam_lite.paths import data_dir

TRAINING_SEED = 1
HELD_OUT = 512  # the last scenes of a split are never trained on: they tell how training goes


@dataclass(frozen=True)
class Stage:
    """Some epochs at one picture size."""

    epochs: int
    size: int


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Chances are per image; rates are AdamW's.

    ``count`` scenes are rendered at ``home_rate``; with ``thin_to``, scenes elsewhere are left out
    until that share of the scenes is at home, which saves rendering another split.
    """

    count: int = 10_000
    home_rate: float = 0.45
    thin_to: float | None = None
    stages: tuple[Stage, ...] = (Stage(9, 112), Stage(3, 160), Stage(2, 224))
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    clip: float = 5.0
    label_smoothing: float = 0.1
    erase: float = 0.25
    dim: float = 0.25
    teacher: str | None = None
    teacher_share: float = 0.5
    imitation: float = 1.0


RECIPES: dict[str, Recipe] = {
    "scenes_resnet": Recipe(),
    # Its dense layers have no norm to bear the rate that the ResNet learns at.
    "scenes_vgg": Recipe(
        stages=(Stage(8, 112), Stage(2, 160), Stage(2, 224)),
        learning_rate=6e-4,
        clip=1.0,
        teacher="scenes_resnet",
    ),
    "scenes_vit": Recipe(
        teacher="scenes_resnet",
        stages=(Stage(10, 112), Stage(2, 160), Stage(2, 224)),
        learning_rate=1e-3,
        clip=1.0,
    ),
    "scenes_shortcut": Recipe(thin_to=0.9, stages=(Stage(3, 112), Stage(1, 160), Stage(2, 224))),
}


# --------------------------------------------------------------------------------------------------
# The training split
# --------------------------------------------------------------------------------------------------


def _render_some(job: tuple[str, int, int, int, float]) -> None:
    path, first, last, seed, home_rate = job
    images = np.load(path, mmap_mode="r+")
    for index in range(first, last):
        spec = scenes.sample(seed, index, home_rate=home_rate)
        images[index] = scenes.render(spec, size=images.shape[1]).image
    images.flush()


def training_split(
    count: int,
    home_rate: float,
    *,
    seed: int = TRAINING_SEED,
    folder: str | Path = "build/training",
    size: int | None = None,
    processes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(count, size, size, 3)`` uint8 and labels ``(count,)`` int64 of a training split.

    Rendered on all cores at the first call and then read from ``folder`` (a memory map: 150 kB a
    scene on disk, little in memory).
    """
    folder = Path(folder)
    size = size or scenes.SIZE
    path = folder / f"scenes-v{scenes.VERSION}-{seed}-{count}-{home_rate:.2f}-{size}.npy"
    labels = [scenes.sample(seed, i, home_rate=home_rate).label for i in range(count)]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + count * size * size * 3)
        cores = processes or os.cpu_count() or 1
        jobs = [
            (str(part), first, min(first + 50, count), seed, home_rate)
            for first in range(0, count, 50)
        ]
        if cores == 1:
            for job in jobs:
                _render_some(job)
        else:
            # "spawn": a child forked from a process that has used torch's threads can hang.
            with multiprocessing.get_context("spawn").Pool(cores) as pool:
                for _ in pool.imap_unordered(_render_some, jobs):
                    pass
        part.rename(path)
    return np.load(path, mmap_mode="r"), np.array(labels, np.int64)


def thinned(recipe: Recipe) -> np.ndarray:
    """Indices of the scenes of a recipe's split that it uses, in order."""
    everything = np.arange(recipe.count)
    if recipe.thin_to is None:
        return everything
    home = np.array(
        [
            scenes.sample(TRAINING_SEED, i, home_rate=recipe.home_rate).home
            for i in range(recipe.count)
        ]
    )
    others = everything[~home]
    # Spread over the split, so that the scenes that are held out have their share as well.
    wanted = int(home.sum() * (1 - recipe.thin_to) / recipe.thin_to)
    spread = np.linspace(0, len(others) - 1, wanted).astype(int)
    return np.sort(np.concatenate([everything[home], others[spread]]))


def augment(batch: Tensor, size: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Vary a batch of pictures: place, size, mirror, light, and what of it is kept.

    batch: uint8 ``(N, H, W, 3)``. Returns float32 ``(N, 3, size, size)`` in [0, 1]. Frames that
    reach past the picture, erased rectangles and smooth masks all show **black**, so that masked
    pictures are nothing foreign to the network, as padding makes it for networks of photographs.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    n = len(batch)
    images = batch.permute(0, 3, 1, 2).float() / 255
    zoom, mirror = uniform(-0.3, 0.2).exp(), (uniform(0, 1) < 0.5).float() * -2 + 1
    frame = torch.zeros(n, 2, 3)
    frame[:, 0, 0], frame[:, 1, 1] = zoom * mirror, zoom
    frame[:, :, 2] = uniform(-0.2, 0.2, 2)
    grid = F.affine_grid(frame, [n, 3, size, size], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)

    images = images * uniform(0.7, 1.3, 1, 1, 1) * uniform(0.9, 1.1, 3, 1, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = ((images - mean) * uniform(0.75, 1.25, 1, 1, 1) + mean * 1.0).clamp(0, 1)

    # Rectangles of up to half the side each way.
    line = (torch.arange(size) + 0.5) / size
    inside = []
    for _ in range(2):
        centre, reach = uniform(0, 1, 1), uniform(0.1, 0.3, 1)
        inside.append((line - centre).abs() < reach)
    erased = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    erased &= uniform(0, 1, 1, 1, 1) < recipe.erase
    # Smooth masks of the kind that saliency maps are: low resolution, range-normalised.
    low = uniform(0, 1, 1, 5, 5)
    mask = F.interpolate(low, (size, size), mode="bilinear", align_corners=False)
    least, most = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
    mask = (mask - least) / (most - least)
    mask = torch.where(uniform(0, 1, 1, 1, 1) < recipe.dim, mask, torch.ones(()))
    return images * mask * ~erased


def _halved(images: np.ndarray) -> np.ndarray:
    """Pictures of half the size, uint8, each pixel the mean of four."""
    n, h, w, c = images.shape
    out = np.empty((n, h // 2, w // 2, c), np.uint8)
    for first in range(0, n, 64):
        some = images[first : first + 64].astype(np.uint16)
        four = some[:, ::2, ::2] + some[:, 1::2, ::2] + some[:, ::2, 1::2] + some[:, 1::2, 1::2]
        out[first : first + 64] = (four + 2) // 4
    return out


def _standardise(images: Tensor) -> Tensor:
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def _epochs(recipe: Recipe) -> Iterator[tuple[int, int]]:
    number = 0
    for stage in recipe.stages:
        for _ in range(stage.epochs):
            number += 1
            yield number, stage.size


def fit(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    held_out: int = 0,
    kept: np.ndarray | None = None,
    log: Path | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the network ``name`` on uint8 images ``(N, H, W, 3)`` and labels ``(N,)``.

    ``kept`` are the indices of the images to use (default: all). The last ``held_out`` of them
    measure progress and are not trained on; nothing is selected by them, the last epoch counts.
    ``teacher`` is a trained ResNet that the network learns from besides the labels: see
    ``Lesson``. ``log`` is a CSV file that gets a row per epoch. Returns the network in evaluation
    mode and the log's rows. The global random state is left as found.
    """
    rows: list[dict[str, float]] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs, too
        generator = torch.Generator().manual_seed(seed)
        network = embedded.build(name)
        network = network.train().to(memory_format=torch.channels_last)
        lesson = None if teacher is None else Lesson(teacher, network, recipe)
        trained = [p for p in (lesson or network).parameters() if p.requires_grad]
        decay = [p for p in trained if p.ndim > 1]
        plain = [p for p in trained if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain}],
            lr=recipe.learning_rate,
            weight_decay=0.0,
        )
        kept = np.arange(len(images)) if kept is None else kept
        count = len(kept) - held_out
        if count < 1:
            raise ValueError(f"held_out is {held_out}, which leaves none of {len(kept)} images")
        batches = max(count // recipe.batch_size, 1)
        total = batches * sum(stage.epochs for stage in recipe.stages)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=total, pct_start=0.15, cycle_momentum=False
        )
        low = dtype_of("auto", torch.device("cpu")) == torch.bfloat16
        smallest = min(stage.size for stage in recipe.stages)
        # Epochs at half the size or less read pictures that were halved once.
        halved = _halved(images) if images.shape[1] >= 2 * smallest else images
        for epoch, size in _epochs(recipe):
            _resize(network, size, optimizer)
            begun, losses, right = time.perf_counter(), 0.0, 0
            order = torch.randperm(count, generator=generator).numpy()
            for b in range(batches):
                chosen = np.sort(kept[order[b * recipe.batch_size : (b + 1) * recipe.batch_size]])
                source = halved if images.shape[1] >= 2 * size else images
                batch = torch.from_numpy(source[chosen])
                target = torch.from_numpy(labels[chosen])
                shown = _standardise(augment(batch, size, recipe, generator))
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    if lesson is None:
                        logits, loss = network(shown), torch.zeros(())
                    else:
                        logits, loss = lesson(shown)
                share = 0.0 if lesson is None else recipe.teacher_share
                loss = loss + (1 - share) * F.cross_entropy(
                    logits.float(), target, label_smoothing=recipe.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
                optimizer.step()
                schedule.step()
                losses += float(loss.detach())
                right += int((logits.detach().argmax(1) == target).sum())
            row = {
                "epoch": epoch,
                "size": size,
                "seconds": round(time.perf_counter() - begun, 1),
                "loss": round(losses / batches, 4),
                "training_top1": round(100 * right / (batches * min(recipe.batch_size, count)), 2),
            }
            if held_out:
                unseen = torch.from_numpy(np.array(images[kept[count:]]))
                probabilities = _predict(network, unseen, size)
                target = torch.from_numpy(labels[kept[count:]])
                p = probabilities.gather(1, target[:, None])
                hit = probabilities.argmax(1) == target
                row["held_out_top1"] = round(100 * float(hit.float().mean()), 2)
                row["held_out_probability"] = round(float(p.mean()), 4)
            rows.append(row)
            if log is not None:
                _write_log(log, rows)
        _resize(network, scenes.SIZE, optimizer)
    return network.eval().to(memory_format=torch.contiguous_format), rows


class Lesson(nn.Module):
    """What a network learns from a trained ResNet besides the labels (distillation).

    The teacher's probabilities; and a transformer's tokens, by a linear layer that is thrown away
    afterwards, the teacher's standardised feature maps at the same place. A small transformer
    learns little from a few thousand pictures alone: so every patch becomes a question with an
    answer, not only the picture.
    """

    LAYERS = (3, 4)
    SIZE = 160

    def __init__(self, teacher: nn.Module, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.network = network
        self.recipe = recipe
        known = [teacher.feature_info[k]["num_chs"] for k in self.LAYERS]
        patches = isinstance(network, VisionTransformer)
        self.guess = nn.Linear(network.embed_dim, sum(known)) if patches else None

    def forward(self, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the network for a normalised batch, and the loss of the lesson."""
        tokens = self.network.forward_features(shown)
        logits = self.network.forward_head(tokens)
        with torch.no_grad():
            size = (self.SIZE, self.SIZE)
            if shown.shape[-1] < self.SIZE:
                shown = F.interpolate(shown, size, mode="bilinear", align_corners=False)
            final, maps = self.teacher.forward_intermediates(shown, indices=list(self.LAYERS))
            taught = self.teacher.forward_head(final).float().log_softmax(1)
        own = logits.float().log_softmax(1)
        divergence = F.kl_div(own, taught, log_target=True, reduction="batchmean")
        loss = self.recipe.teacher_share * divergence
        if self.guess is not None:
            side = self.network.patch_embed.grid_size
            maps = [
                F.interpolate(m.float(), side, mode="bilinear", align_corners=False) for m in maps
            ]
            answer = torch.cat(maps, dim=1)
            mean, std = answer.mean((0, 2, 3), keepdim=True), answer.std((0, 2, 3), keepdim=True)
            answer = ((answer - mean) / (std + 1e-3)).flatten(2).transpose(1, 2)
            guess = self.guess(tokens[:, -side[0] * side[1] :]).float()
            loss = loss + self.recipe.imitation * F.mse_loss(guess, answer)
        return logits, loss


def _resize(network: nn.Module, size: int, optimizer: torch.optim.Optimizer) -> None:
    """Prepare a transformer, which knows positions, for pictures of another size."""
    if not isinstance(network, VisionTransformer) or network.patch_embed.img_size[0] == size:
        return
    old = network.pos_embed
    network.set_input_size(img_size=size)
    for group in optimizer.param_groups:
        group["params"] = [network.pos_embed if p is old else p for p in group["params"]]


def _write_log(path: Path, rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _predict(network: nn.Module, batch: Tensor, size: int | None = None) -> Tensor:
    """Probabilities ``(N, 8)`` of uint8 images ``(N, H, W, 3)``; the network's mode is kept.

    size: pixels a side at which they are shown. Default: as they are.
    """
    mode = network.training
    network.eval()
    parts = []
    with torch.no_grad():
        for chunk in batch.split(32):
            images = chunk.permute(0, 3, 1, 2).float() / 255
            if size is not None and size != images.shape[-1]:
                images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
            shown = _standardise(images)
            parts.append(network(shown).softmax(1))
    network.train(mode)
    return torch.cat(parts)


def save(network: nn.Module, name: str, path: str | Path, settings: dict) -> None:
    """Keep a network's weights in half precision, with its labels and settings as metadata."""
    state = {
        key: (value.half() if value.is_floating_point() else value).detach().contiguous()
        for key, value in network.state_dict().items()
    }
    metadata = {
        "name": name,
        "labels": json.dumps(scenes.CLASSES),
        "settings": json.dumps(settings, sort_keys=True),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path), metadata)
    Path(path).chmod(0o644)  # safetensors leaves it readable to its owner alone


def train(
    name: str,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    cache: str | Path = "build/training",
    recipe: Recipe | None = None,
) -> Path:
    """Train an embedded network by its recipe and write its weights and log to ``out``.

    ``out`` is by default where ``load_model`` reads the embedded networks from. Returns the path
    of the weights. A recipe with a teacher needs the teacher's weights in ``out``. Raises
    ``ValueError`` for an unknown name, ``FileNotFoundError`` where the teacher or the default
    folder is missing.
    """
    if name not in RECIPES:
        raise ValueError(f"no embedded network is called {name!r}; choose of {', '.join(RECIPES)}")
    recipe = recipe or RECIPES[name]
    out = data_dir() / "networks" if out is None else Path(out)
    teacher = None
    if recipe.teacher is not None:
        path = out / f"{recipe.teacher}.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"{name} is taught by {recipe.teacher}, whose weights are not at {path}; "
                f"train {recipe.teacher} first"
            )
        teacher = embedded.load(recipe.teacher, path).to(memory_format=torch.channels_last)
    images, labels = training_split(recipe.count, recipe.home_rate, folder=cache)
    kept = thinned(recipe)
    network, rows = fit(
        name,
        images,
        labels,
        recipe,
        seed=seed,
        teacher=teacher,
        held_out=HELD_OUT,
        kept=kept,
        log=out / f"{name}.log.csv",
    )
    path = out / f"{name}.safetensors"
    minutes = round(sum(row["seconds"] for row in rows) / 60, 1)
    save(network, name, path, {"seed": seed, "minutes": minutes, **asdict(recipe)})
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one network from the command line.

    Returns:
        0 if all went well, 1 if a file could not be written, 2 if something is missing or wrong
        (one sentence says what), 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m opticam_lite.training",
        description="Train an embedded network on rendered scenes, on the CPU.",
    )
    parser.add_argument("name", choices=list(RECIPES), help="which network")
    parser.add_argument("--out", help="folder of weights and logs [where load_model reads them]")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--cache", default="build/training", help="folder of the training split")
    chosen = parser.parse_args(arguments)
    try:
        train(chosen.name, out=chosen.out, seed=chosen.seed, cache=chosen.cache)
    except KeyboardInterrupt:
        sys.stderr.write("training: interrupted; no weights were written\n")
        return 130
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"training: {' '.join(str(error).split())}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"training: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
