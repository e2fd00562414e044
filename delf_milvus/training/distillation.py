"""A small, quick model that gives the features of a large one: pruned, then distilled on unlabelled photos.

The small network keeps the channels of the large one's last map, and with them its reductions: both give descriptors
of one space. It learns in two phases:
  - piece by piece: every unit (or, where a stage is narrower, every few) gets the large network's map in front of it
    and learns to give the one behind it (Hinton et al., "Distilling the knowledge in a neural network", 2015; Romero
    et al., "FitNets", ICLR 2015). Short pieces learn quickly, all in one pass;
  - as a whole: the last map, the reduced descriptors and the attention scores; the half of a photo's cells that the
    large network attends to most count for seven eighths, since of the others few are ever stored.
Scores are compared by their logarithms: a few are a hundred times the mean, and would be all that is learnt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from delf_milvus.errors import ModelError, UsageError
from delf_milvus.model import weights
from delf_milvus.model.delf import Delf
from delf_milvus.model.runtime import prepare
from delf_milvus.model.trunk import Trunk
from delf_milvus.settings import Precision
from delf_milvus.training.data import (
    Batches,
    LabelledPhotos,
    PhotoDataset,
    batches,
    in_order_of,
    require_batch,
    require_readable,
    split,
    unlabelled_photos,
)
from delf_milvus.training.experiment import Experiment, optimizer_tensors, prefixed, restore_optimizer
from delf_milvus.training.export import earlier, export, names, with_stage
from delf_milvus.training.precision import Arithmetic
from delf_milvus.training.processes import Processes, started
from delf_milvus.training.pruning import Shape, pruned, sources
from delf_milvus.training.vision import transforms
from delf_milvus.training.watching import tell

Say = Callable[[str], None]


@dataclass(frozen=True)
class DistillationConfig:
    """How to distil.

    data: folders of photos, searched recursively, or CSV files of Google Landmarks; exclude: names of folders, or
        landmark ids, that are left out.
    init: the large model, a finished weight file of the pre-activation layout with attention.
    units, widths, outputs, hidden: size of the small network, see `pruning.Shape`.
    epochs: in all; piecewise: those of them, at the start, in which the pieces learn by themselves.
    load: shortest side, in pixels, at which photos are kept; crop: side of the random crops.
    learning_rate: highest of the pieces, whole_rate: of the whole network; each rises and falls once.
    precision: arithmetic of both networks while they learn.
    """

    data: tuple[Path, ...]
    out: Path
    init: Path
    exclude: tuple[str, ...] = ()
    units: tuple[int, ...] = (2, 3, 5)
    widths: tuple[int, ...] = (32, 64, 128)
    outputs: tuple[int, ...] = (128, 512, 1024)
    hidden: int = 256
    epochs: int = 5
    piecewise: int = 2
    batch: int = 16
    load: int = 300
    crop: int = 224
    learning_rate: float = 0.001
    whole_rate: float = 0.0001
    weight_decay: float = 1e-4
    validate_every: int = 24
    seed: int = 0
    precision: Precision = "auto"


@dataclass(frozen=True)
class Piece:
    """Units of the small network, and after which of the large network's units the map lies that they learn to give.

    own: units of the small trunk, counted through all stages; before, after: the large network's maps in front of and
    behind them, 0 the stem's and i that of unit i - 1.
    """

    own: range
    before: int
    after: int


def pieces(small: Trunk, large: Trunk) -> list[Piece]:
    """The pieces that are learnt by themselves: they end wherever both networks' maps have as many channels."""
    found: list[Piece] = []
    begun = before = own_seen = large_seen = 0
    for own, theirs, channels, large_channels in zip(
        small.spec.units, large.spec.units, small.spec.stage_channels, large.spec.stage_channels, strict=True
    ):
        for number, stands_for in enumerate(sources(own, theirs)):
            unit, after = own_seen + number, large_seen + stands_for.stop
            if channels == large_channels:
                found.append(Piece(range(begun, unit + 1), before, after))
                begun, before = unit + 1, after
        own_seen += own
        large_seen += theirs
    return found


def distill(config: DistillationConfig, say: Say = print, *, command: str | None = None) -> Path:
    """Distil, resuming from the checkpoint in `config.out` where there is one; returns the small model's weight file.

    command: for the model card.

    Raises InputError for data that cannot be read or is too little, ModelError for a large model that does not fit,
    UsageError for a shape that is not smaller and for a checkpoint of another configuration.
    """
    if started() > 1:
        raise UsageError("A model is distilled by one process; run it without torchrun.")
    torch.manual_seed(config.seed)
    teacher = weights.load(config.init)
    if teacher.spec.trunk.layout != "v2" or teacher.attention is None:
        raise ModelError(f"{config.init} is no model of the layout v2 with attention; only such are distilled.")
    try:
        small = pruned(teacher, Shape(config.units, config.widths, config.outputs, config.hidden))
    except ValueError as error:
        raise UsageError(f"The small network does not fit into {config.init}: {error}.") from error
    arithmetic = Arithmetic(config.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    environment = {"device": arithmetic.device.type, "precision": str(arithmetic.dtype)}
    experiment = Experiment(config, environment=environment)
    paths = unlabelled_photos(config.data, config.exclude)
    training, validation = split(LabelledPhotos(paths, [0] * len(paths), [""]), config.validate_every)
    require_batch(config.data, training, config.batch)
    require_readable(training)
    say(f"{len(training.paths)} photos to learn from, {len(validation.paths)} to validate")
    loader, checks = _loaders(config, training, validation, Processes(arithmetic.device))
    for network in (teacher, small):
        network.to(arithmetic.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(small.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    first_epoch, likeness = 0, dict[str, float]()
    if (saved := experiment.load_checkpoint()) is not None:
        tensors, progress = saved
        experiment.restore({"network": small}, tensors)
        restore_optimizer(optimizer, tensors)
        arithmetic.restore(progress["arithmetic"])
        first_epoch, likeness = progress["epoch"], progress["likeness"]
        say(f"resuming after epoch {first_epoch}")
    for epoch in range(first_epoch, config.epochs):
        begun = time.monotonic()
        if epoch == config.piecewise:
            # Steps scaled by the small gradients of the pieces would throw the whole network far off.
            optimizer.state.clear()
        loss = _epoch(config, teacher, small, optimizer, arithmetic, in_order_of(epoch, loader), epoch, say)
        likeness = _likeness(teacher, small, checks)
        seconds = time.monotonic() - begun
        experiment.log(
            stage="distillation",
            epoch=epoch + 1,
            loss=round(loss, 4),
            **likeness,
            photos_per_second=round(len(loader) * config.batch / seconds, 1),
        )
        told = ", ".join(f"{name} {value}" for name, value in likeness.items())
        say(f"epoch {epoch + 1}: loss {loss:.4f}, {told}, {seconds:.0f} s")
        experiment.save_checkpoint(
            prefixed("network", small.state_dict()) | optimizer_tensors(optimizer),
            {"epoch": epoch + 1, "likeness": likeness, "arithmetic": arithmetic.state()},
        )
    record = {
        "data": names(config.data),
        "photos": len(training.paths),
        "large model": config.init.name,
        "dim": small.spec.dim,
        "recipe": {
            "epochs": config.epochs,
            "piecewise": config.piecewise,
            "batch": config.batch,
            "learning rates": [config.learning_rate, config.whole_rate],
            "seed": config.seed,
        }
        | arithmetic.recipe(),
        "last epoch": likeness,
    }
    if command:
        record["command"] = command
    tensors, records = dict(small.state_dict()), with_stage(earlier(config.init), "distill", record)
    return export(config.out / "model.safetensors", tensors, small.spec, records, half=True)


def _epoch(
    config: DistillationConfig,
    teacher: Delf,
    small: Delf,
    optimizer: torch.optim.Optimizer,
    arithmetic: Arithmetic,
    loader: Batches,
    epoch: int,
    say: Say,
) -> float:
    """One pass over the photos, of the phase that `epoch` (from 0) belongs to; the mean loss."""
    by_pieces = epoch < config.piecewise
    first, last = (0, config.piecewise) if by_pieces else (config.piecewise, config.epochs)
    losses, highest = (_piecewise_losses, config.learning_rate) if by_pieces else (_whole_losses, config.whole_rate)
    total = 0.0
    for number, loss in enumerate(losses(teacher, small, loader, arithmetic)):
        done = (epoch - first + number / len(loader)) / (last - first)
        rate = highest * min(1.0, done * 20 + 0.05) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        arithmetic.step(loss, optimizer, list(small.parameters()), 5.0)
        total += loss.item()
        tell(say, f"epoch {epoch + 1}", number + 1, len(loader), "batches")
        if number % 50 == 0:
            say(f"epoch {epoch + 1}, batch {number} of {len(loader)}: loss {loss.item():.4f}")
    return total / len(loader)


def _loaders(
    config: DistillationConfig, training: LabelledPhotos, validation: LabelledPhotos, here: Processes
) -> tuple[Batches, Batches]:
    """Batches of random crops to learn from, and of central crops to validate with."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(config.crop, scale=(0.15, 1.0), antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.2),
        ]
    )
    centre = transforms.Compose([transforms.Resize(config.load, antialias=True), transforms.CenterCrop(config.crop)])
    drawn = PhotoDataset(training, config.load, augment, seed=config.seed)
    checks = DataLoader(PhotoDataset(validation, config.load, centre), config.batch)
    return batches(drawn, config.batch, config.seed, here), checks


def _units(trunk: Trunk) -> list[nn.Module]:
    return [unit for stage in trunk.stages for unit in stage.children()]


def _stem(trunk: Trunk, pixels: Tensor) -> Tensor:
    x = trunk.input_bn((pixels - trunk.mean) / trunk.std)
    stem: Tensor = trunk.pool(torch.relu_(trunk.bn1(trunk.conv1(x))))
    return stem


def _pixels(loader: Batches, device: torch.device) -> Iterator[Tensor]:
    for pixels, _ in loader:
        yield pixels.to(device, memory_format=torch.channels_last, non_blocking=True).float()


def _piecewise_losses(teacher: Delf, small: Delf, loader: Batches, arithmetic: Arithmetic) -> Iterator[Tensor]:
    """The mean of the pieces' relative squared errors, and of the attention head's, for each batch.

    BatchNorm takes its statistics from the batch, and remembers them: fewer channels sum up to other ones.
    """
    assert teacher.attention is not None
    assert small.attention is not None
    assert teacher.trunk.final_bn is not None
    small.train()
    lessons = pieces(small.trunk, teacher.trunk)
    units, large_units = _units(small.trunk), _units(teacher.trunk)
    for pixels in _pixels(loader, arithmetic.device):
        with torch.no_grad(), arithmetic.autocast():
            maps = [_stem(teacher.trunk, pixels)]
            for unit in large_units:
                maps.append(unit(maps[-1]))
            features = torch.relu(teacher.trunk.final_bn(maps[-1]))
            scores = teacher.attention(features)
        losses = []
        with arithmetic.autocast():
            own_scores = small.attention(features)
            for piece in lessons:
                x = _stem(small.trunk, pixels) if piece.before == 0 else maps[piece.before]
                for number in piece.own:
                    x = units[number](x)
                losses.append(_relative(x.float(), maps[piece.after].float()))
        losses.append(_relative(_log(own_scores), _log(scores)))
        yield torch.stack(losses).mean()


def _whole_losses(teacher: Delf, small: Delf, loader: Batches, arithmetic: Arithmetic) -> Iterator[Tensor]:
    """What the maps, descriptors and scores of both networks differ by, for each batch.

    BatchNorm keeps its statistics.
    """
    small.eval()
    large = prepare(teacher, arithmetic.device, arithmetic.dtype)
    for pixels in _pixels(loader, arithmetic.device):
        with torch.no_grad():
            features, scores = large(pixels, "attention")
            each = scores.flatten(1)
            attended = each >= each.median(dim=1, keepdim=True).values
            weight = torch.where(attended, 1.75, 0.25).flatten()
            wanted = teacher.reduction(_cells(features))
        with arithmetic.autocast():
            own, own_scores = small(pixels, "attention")
        cells, targets = _cells(own).float(), _cells(features).float()
        error = (cells - targets).square().sum(dim=1) / targets.square().sum(dim=1).mean()
        angle = 1 - (small.reduction(cells) * wanted).sum(dim=1)
        yield (weight * (error + 2 * angle)).mean() + _relative(_log(own_scores), _log(scores))


def _cells(maps: Tensor) -> Tensor:
    """(N, C, h, w) as (N h w, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _log(scores: Tensor) -> Tensor:
    return scores.clamp_min(1e-6).log()


def _relative(value: Tensor, wanted: Tensor) -> Tensor:
    """Squared error as a share of the variance."""
    return (value - wanted).square().mean() / (wanted - wanted.mean()).square().mean().clamp_min(1e-9)


@torch.inference_mode()
def _likeness(teacher: Delf, small: Delf, loader: Batches) -> dict[str, float]:
    """Of the quarter of the cells that the large network attends to most, in each photo: the mean cosine of both
    networks' reduced descriptors, and the share that the small one attends to most as well."""
    small.eval()
    cosine: list[Tensor] = []
    shared: list[Tensor] = []
    for pixels in _pixels(loader, small.reduction.mean.device):
        features, scores = teacher(pixels, "attention")
        own, own_scores = small(pixels, "attention")
        for f, s, g, t in zip(features, scores, own, own_scores, strict=True):
            count = s.numel() // 4
            best = s.flatten().topk(count).indices
            own_best = t.flatten().topk(count).indices
            pair = [net.reduction(m.flatten(1).T[best]) for net, m in ((teacher, f), (small, g))]
            cosine.append((pair[0] * pair[1]).sum(dim=1).mean())
            shared.append(torch.isin(best, own_best).float().mean())
    return {
        "cosine": round(float(torch.stack(cosine).mean()), 4) if cosine else 0.0,
        "shared_keypoints": round(float(torch.stack(shared).mean()), 4) if shared else 0.0,
    }
