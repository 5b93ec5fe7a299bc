"""Trains the embedded networks from random weights, on a CPU.

``python -m opticam_lite.making.training scenes_resnet`` renders the training split (once; it is
cached under ``build/``), trains, and writes ``scenes_resnet.safetensors`` and its log to where
``load_model`` reads them, ``data/networks/`` (``--out`` names another folder). The recipes below
hold all settings: the same command with the same seed and number of threads on the same kind of
processor repeats the run. ``scenes_random_labels`` needs no training split: it memorises the
evaluation scenes with permuted labels (the paper's Appendix G).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from .. import scene_networks
from ..datasets.scenes import CLASSES
from ..network import IMAGENET_MEAN, IMAGENET_STD, dtype_of
from ..paths import data_dir
from .rendering import SIZE
from .training_images import augment, halved, permuted_scenes, plain, thinned, training_split

HELD_OUT = 512  # the last scenes of a split, which measure progress and are not trained on


@dataclass(frozen=True)
class Stage:
    """Some epochs at one image size."""

    epochs: int
    size: int


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Of ``count`` scenes, rendered at ``home_rate``, those that `thinned` keeps are used (so that no
    other split has to be rendered). ``erase`` and ``dim`` are explained in `augment`,
    ``teacher_share`` and ``imitation`` in `Objective`; ``learning_rate`` and ``weight_decay`` are
    AdamW's, and gradients are clipped to the norm ``clip``. With ``memorise`` the images are the
    evaluation scenes, without augmentation, and their labels are permuted.
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
    memorise: bool = False


RECIPES: dict[str, Recipe] = {
    "scenes_resnet": Recipe(),
    # Its dense layers have no norm layers and diverge at the learning rate of the ResNet.
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
    "scenes_random_labels": Recipe(
        memorise=True, count=256, stages=(Stage(12, 112), Stage(20, 224)), batch_size=32
    ),
}


class Objective(nn.Module):
    """The loss of a network: cross-entropy, or a mixture of it and distillation from a teacher.

    The teacher is a trained ResNet. The Kullback-Leibler divergence from its probabilities has the
    weight ``teacher_share`` in the loss, cross-entropy the rest. A transformer also predicts the
    teacher's standardised feature maps from its patch tokens, by a linear layer that is discarded
    after training; the mean squared error has the weight ``imitation``. This gives every patch its
    own target, so that a few thousand images are enough for a small transformer.
    """

    LAYERS = (3, 4)
    SIZE = 160  # the teacher sees images at least as large

    def __init__(self, network: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.guess = None
        if teacher is not None and isinstance(network, VisionTransformer):
            channels = [teacher.feature_info[k]["num_chs"] for k in self.LAYERS]
            self.guess = nn.Linear(network.embed_dim, sum(channels))

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the network for a normalised batch, and the loss."""
        features = self.network.forward_features(images)
        logits = self.network.forward_head(features)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        if self.teacher is None:
            return logits, loss
        with torch.no_grad():
            if images.shape[-1] < self.SIZE:
                images = _resized(images, (self.SIZE, self.SIZE))
            final, maps = self.teacher.forward_intermediates(images, indices=list(self.LAYERS))
            taught = self.teacher.forward_head(final).float().log_softmax(1)
        own = logits.float().log_softmax(1)
        divergence = F.kl_div(own, taught, log_target=True, reduction="batchmean")
        distilled = self.recipe.teacher_share * divergence
        if self.guess is not None:
            side = self.network.patch_embed.grid_size
            answer = torch.cat([_resized(m.float(), side) for m in maps], dim=1)
            mean, std = answer.mean((0, 2, 3), keepdim=True), answer.std((0, 2, 3), keepdim=True)
            answer = ((answer - mean) / (std + 1e-3)).flatten(2).transpose(1, 2)
            guess = self.guess(features[:, -side[0] * side[1] :]).float()
            distilled = distilled + self.recipe.imitation * F.mse_loss(guess, answer)
        return logits, distilled + (1 - self.recipe.teacher_share) * loss


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


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
    A recipe that memorises is measured on the images that it is trained on.
    ``teacher`` is a trained ResNet, see `Objective`. ``log`` is a CSV file that gets a row per
    epoch. Returns the network in evaluation mode and the log's rows. The global random state is
    left as found. Raises ``ValueError`` if no image is left to train on.
    """
    kept = np.arange(len(images)) if kept is None else kept
    count = len(kept) - held_out
    if count < 1:
        raise ValueError(f"held_out is {held_out}, which leaves none of {len(kept)} images")
    batches = max(count // recipe.batch_size, 1)
    sizes = [stage.size for stage in recipe.stages for _ in range(stage.epochs)]
    total_steps = batches * len(sizes)
    low = dtype_of("auto", torch.device("cpu")) == torch.bfloat16
    # Epochs at half the size or less use images that were halved once.
    small = halved(images) if images.shape[1] >= 2 * min(sizes) else images
    rows: list[dict[str, float]] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        generator = torch.Generator().manual_seed(seed)
        network = scene_networks.build(name).to(memory_format=torch.channels_last)
        objective = Objective(network, recipe, teacher)
        optimizer = torch.optim.AdamW(
            param_groups_weight_decay(objective, recipe.weight_decay), recipe.learning_rate
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps, pct_start=0.15, cycle_momentum=False
        )
        for epoch, size in enumerate(sizes, start=1):
            network.train()
            _resize(network, size, optimizer)
            begun, losses, right = time.perf_counter(), 0.0, 0
            source = small if images.shape[1] >= 2 * size else images
            order = torch.randperm(count, generator=generator).numpy()
            for b in range(batches):
                chosen = np.sort(kept[order[b * recipe.batch_size : (b + 1) * recipe.batch_size]])
                batch, target = torch.from_numpy(source[chosen]), torch.from_numpy(labels[chosen])
                if recipe.memorise:
                    batch = plain(batch, size)
                else:
                    batch = augment(
                        batch, size, erase=recipe.erase, dim=recipe.dim, generator=generator
                    )
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    logits, loss = objective(_standardised(batch), target)
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
            of, measured = ("known", kept) if recipe.memorise else ("held_out", kept[count:])
            if len(measured):
                target = torch.from_numpy(labels[measured])
                shown = torch.from_numpy(np.array(images[measured]))
                probabilities = _predict(network, shown, size)
                hit = probabilities.argmax(1) == target
                row[f"{of}_top1"] = round(100 * float(hit.float().mean()), 2)
                p = probabilities.gather(1, target[:, None])
                row[f"{of}_probability"] = round(float(p.mean()), 4)
            rows.append(row)
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(log, index=False, lineterminator="\n")
        _resize(network, SIZE, optimizer)
    return network.eval().to(memory_format=torch.contiguous_format), rows


def _standardised(images: Tensor) -> Tensor:
    images = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    return images.contiguous(memory_format=torch.channels_last)


def _resize(network: nn.Module, size: int, optimizer: torch.optim.Optimizer) -> None:
    """Resample a transformer's position embeddings for another image size, in place."""
    if not isinstance(network, VisionTransformer) or network.patch_embed.img_size[0] == size:
        return
    old = network.pos_embed
    network.set_input_size(img_size=size)
    for group in optimizer.param_groups:
        group["params"] = [network.pos_embed if p is old else p for p in group["params"]]


def _predict(network: nn.Module, batch: Tensor, size: int) -> Tensor:
    """Probabilities ``(N, 8)`` of uint8 images ``(N, H, W, 3)`` at a size, in evaluation mode."""
    network.eval()
    parts = []
    with torch.no_grad():
        for chunk in batch.split(32):
            parts.append(network(_standardised(plain(chunk, size))).softmax(1))
    return torch.cat(parts)


def save(network: nn.Module, name: str, path: str | Path, settings: dict) -> None:
    """Write a network's weights in half precision, with its labels and settings as metadata."""
    state = {
        key: (value.half() if value.is_floating_point() else value).detach().contiguous()
        for key, value in network.state_dict().items()
    }
    metadata = {
        "name": name,
        "labels": json.dumps(CLASSES),
        "settings": json.dumps(settings, sort_keys=True),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path), metadata)
    Path(path).chmod(0o644)  # safetensors makes it readable by its owner only


def train(
    name: str,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    cache: str | Path = "build/training",
) -> Path:
    """Train an embedded network by its recipe and write its weights and log to ``out``.

    ``out`` is by default where ``load_model`` reads the embedded networks from. Returns the path
    of the weights. A recipe with a teacher needs the teacher's weights in ``out``. Raises
    ``ValueError`` for an unknown name, or if labels that are to be memorised are not all known at
    the end, ``FileNotFoundError`` where the teacher or the default folder is missing.
    """
    if name not in RECIPES:
        raise ValueError(f"no embedded network is called {name!r}; choose of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    out = data_dir() / "networks" if out is None else Path(out)
    teacher = None
    if recipe.teacher is not None:
        path = out / f"{recipe.teacher}.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"{name} is taught by {recipe.teacher}, whose weights are not at {path}; "
                f"train {recipe.teacher} first"
            )
        teacher = scene_networks.load(recipe.teacher, path).to(memory_format=torch.channels_last)
    if recipe.memorise:
        images, labels = permuted_scenes(seed)
    else:
        images, labels = training_split(recipe.count, recipe.home_rate, folder=cache)
    network, rows = fit(
        name,
        images,
        labels,
        recipe,
        seed=seed,
        teacher=teacher,
        held_out=0 if recipe.memorise else HELD_OUT,
        kept=None if recipe.memorise else thinned(recipe.count, recipe.home_rate, recipe.thin_to),
        log=out / f"{name}.log.csv",
    )
    if recipe.memorise and (known := rows[-1]["known_top1"]) < 100:
        raise ValueError(
            f"{name} knows {known} % of its labels, and it must know all; add epochs to its recipe"
        )
    path = out / f"{name}.safetensors"
    minutes = round(sum(row["seconds"] for row in rows) / 60, 1)
    save(network, name, path, {"seed": seed, "minutes": minutes, **asdict(recipe)})
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one network from the command line.

    Returns:
        0 for success, 1 if a file could not be written, 2 if something is missing or wrong (one
        sentence says what), 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m opticam_lite.making.training",
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
