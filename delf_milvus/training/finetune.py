"""Stage one: fine-tune every layer of the trunk by classification with image-level labels (paper, section 4.2).

The classifier reads the spatial mean of the map that descriptors are taken from. BatchNorm keeps ImageNet's running
statistics and trains its scale and shift: a batch of a few dozen photos estimates statistics badly, and descriptors
are compared between photos that were never in one batch. The exported trunk is an exponential moving average of the
weights, mixed with the initial ones in the proportion `keep_initial` (Wortsman et al., "Robust fine-tuning of
zero-shot models", CVPR 2022): what the small set teaches is added to what ImageNet taught.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from delf_milvus.model import weights
from delf_milvus.model.spec import ModelSpec
from delf_milvus.model.trunk import Trunk
from delf_milvus.training.data import LabelledPhotos, PhotoDataset, labelled_photos, require_batch, split
from delf_milvus.training.experiment import Experiment, optimizer_tensors, prefixed, restore_optimizer, unprefixed
from delf_milvus.training.vision import transforms
from delf_milvus.training.watching import tell

Say = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    data: folders of class folders; exclude: class folders that are left out; init: initial weights.
    load: shortest side, in pixels, at which photos are kept; crop: side of the random crops.
    learning_rate: of the trunk; head_learning_rate: of the new classifier. Cosine decay after one tenth of an epoch of
        warm-up.
    clip: largest norm of the trunk's gradient.
    keep_initial: share of the initial weights in the exported trunk, 0 to 1.
    """

    data: tuple[Path, ...]
    out: Path
    init: Path
    exclude: tuple[str, ...] = ()
    epochs: int = 8
    batch: int = 32
    load: int = 250
    crop: int = 224
    learning_rate: float = 0.001
    head_learning_rate: float = 0.05
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    clip: float = 5.0
    ema_decay: float = 0.995
    keep_initial: float = 0.0
    validate_every: int = 12
    seed: int = 0


class Classifier(nn.Module):
    """A trunk and a linear layer on the standardised spatial mean of its features; logits (N, classes).

    The means of a ReLU map are small and unlike in size from channel to channel: without standardising them
    the layer would need a learning rate of its own for each.
    """

    def __init__(self, trunk: Trunk, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.standardise = nn.BatchNorm1d(trunk.spec.channels, affine=False)
        self.linear = nn.Linear(trunk.spec.channels, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        _, features = self.trunk(pixels)
        logits: Tensor = self.linear(self.standardise(features.float().mean(dim=(2, 3))))
        return logits

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


Batches = DataLoader[tuple[Tensor, int]]


def finetune(config: FinetuneConfig, say: Say = print) -> Path:
    """Fine-tune, resuming from the checkpoint in `config.out` where there is one; returns the trunk's weight file.

    Raises InputError for data that cannot be read or is too little, ModelError for initial weights that do not fit, and
    UsageError for a checkpoint of another configuration.
    """
    torch.manual_seed(config.seed)
    initial = weights.initial_trunk(config.init)
    experiment = Experiment(config)
    photos = labelled_photos(config.data, config.exclude)
    shuffled = torch.Generator().manual_seed(config.seed)
    loader, checks = _loaders(config, photos, shuffled, say)
    before = {name: value.clone() for name, value in initial.state_dict().items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Classifier(initial, len(photos.classes)).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    optimizer = _optimizer(config, network)
    schedule = _Schedule(optimizer, config.epochs * len(loader), max(1, len(loader) // 10))
    first_epoch = 0
    if (saved := experiment.load_checkpoint()) is not None:
        tensors, progress = saved
        network.load_state_dict(unprefixed("network", tensors))
        average.load_state_dict(unprefixed("average", tensors))
        restore_optimizer(optimizer, tensors)
        schedule.step, first_epoch = progress["step"], progress["epoch"]
        shuffled.manual_seed(config.seed + first_epoch)
        say(f"resuming after epoch {first_epoch}")

    for epoch in range(first_epoch, config.epochs):
        started = time.monotonic()
        loss, right = _train_epoch(config, network, average, optimizer, schedule, loader, say)
        seconds = time.monotonic() - started
        accuracy = _accuracy(average.module, checks, device)
        experiment.log(
            stage="finetune",
            epoch=epoch + 1,
            loss=round(loss, 4),
            training_accuracy=round(right, 4),
            validation_accuracy=round(accuracy, 4),
            photos_per_second=round(len(loader) * config.batch / seconds, 1),
        )
        say(f"epoch {epoch + 1}: loss {loss:.3f}, validation accuracy {accuracy:.3f}, {seconds:.0f} s")
        experiment.save_checkpoint(
            prefixed("network", network.state_dict())
            | prefixed("average", average.state_dict())
            | optimizer_tensors(optimizer),
            {"step": schedule.step, "epoch": epoch + 1},
        )
    after = unprefixed("module.trunk", average.state_dict())
    mixed = {
        name: torch.lerp(value.cpu(), before[name], config.keep_initial) if value.is_floating_point() else value
        for name, value in after.items()
    }
    path = config.out / "trunk.safetensors"
    weights.save(path, prefixed("trunk", mixed), ModelSpec(trunk=initial.spec, selection="norm", attention_channels=0))
    return path


def _loaders(
    config: FinetuneConfig, photos: LabelledPhotos, shuffled: torch.Generator, say: Say
) -> tuple[Batches, Batches]:
    """Batches of random crops to train on, and of central crops to validate with."""
    training, validation = split(photos, config.validate_every)
    require_batch(config.data, training, config.batch)
    say(f"{len(training.paths)} photos to train on, {len(validation.paths)} to validate, {len(photos.classes)} classes")
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(config.crop, scale=(0.3, 1.0), antialias=True),
            transforms.ColorJitter(0.3, 0.3, 0.2),
        ]
    )
    centre = transforms.Compose([transforms.Resize(config.load, antialias=True), transforms.CenterCrop(config.crop)])
    loader = DataLoader(
        PhotoDataset(training, config.load, augment),
        config.batch,
        shuffle=True,
        generator=shuffled,
        drop_last=True,
        num_workers=1,
        persistent_workers=True,
    )
    return loader, DataLoader(PhotoDataset(validation, config.load, centre), config.batch)


def _optimizer(config: FinetuneConfig, network: Classifier) -> torch.optim.Optimizer:
    decayed = [p for p in network.trunk.parameters() if p.ndim > 1]
    undecayed = [p for p in network.trunk.parameters() if p.ndim <= 1]
    return torch.optim.SGD(
        [
            {"params": decayed, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": undecayed, "lr": config.learning_rate, "weight_decay": 0.0},
            {"params": network.linear.parameters(), "lr": config.head_learning_rate},
        ],
        momentum=0.9,
        nesterov=True,
    )


class _Schedule:
    """Linear warm-up, then half a cosine down to zero."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warm_up: int) -> None:
        self._optimizer, self._warm_up = optimizer, warm_up
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self.steps, self.step = steps, 0

    def advance(self) -> None:
        """Set the rates of the next step."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        factor = min(1.0, (self.step + 1) / self._warm_up) * cosine
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.step += 1


def _train_epoch(
    config: FinetuneConfig,
    network: Classifier,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    schedule: _Schedule,
    loader: Batches,
    say: Say,
) -> tuple[float, float]:
    """Mean loss and accuracy of one pass over the photos."""
    network.train()
    device = network.linear.weight.device
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    total, right = 0.0, 0
    for pixels, labels in loader:
        schedule.advance()
        pixels = pixels.to(device, memory_format=torch.channels_last).float()
        labels = labels.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = network(pixels)
        loss = criterion(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.trunk.parameters(), config.clip)
        optimizer.step()
        average.update_parameters(network)
        total += loss.item()
        right += int((logits.argmax(1) == labels).sum())
        tell(say, "finetune", schedule.step * config.batch, schedule.steps * config.batch)
        if schedule.step % 20 == 0:
            say(f"step {schedule.step}/{schedule.steps} loss {loss.item():.3f}")
    return total / len(loader), right / (len(loader) * config.batch)


@torch.inference_mode()
def _accuracy(network: nn.Module, loader: Batches, device: torch.device) -> float:
    network.eval()
    right = seen = 0
    for pixels, labels in loader:
        pixels = pixels.to(device, memory_format=torch.channels_last).float()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = network(pixels)
        right += int((logits.argmax(1).cpu() == labels).sum())
        seen += len(labels)
    return right / max(1, seen)
