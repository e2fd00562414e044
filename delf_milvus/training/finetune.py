"""Stage one: fine-tune every layer of the trunk by classification with image-level labels (paper, section 4.2).

The classifier reads the spatial mean of the map that descriptors are taken from, or, with `head` "arcface", a whitened
global descriptor of it (`heads`). BatchNorm keeps ImageNet's running statistics and trains its scale and shift: a batch
of a few dozen photos estimates statistics badly, and descriptors are compared between photos that were never in one
batch. The exported trunk is an exponential moving average of the weights, mixed with the initial ones in the proportion
`keep_initial` (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022): what the small set teaches is
added to what ImageNet taught.

Processes that `torchrun` starts share each batch (`processes`). The photos of a batch and what is drawn of them do not
depend on their number. What does: the mean and deviation that the softmax head standardises by are those of a process's
share on CPUs, and of the whole batch on GPUs; the ArcFace head has none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from delf_milvus.errors import UsageError
from delf_milvus.model import weights
from delf_milvus.model.spec import ModelSpec
from delf_milvus.model.trunk import Trunk
from delf_milvus.settings import Precision
from delf_milvus.training import data
from delf_milvus.training.data import (
    Batches,
    LabelledPhotos,
    PhotoDataset,
    batches,
    in_order_of,
)
from delf_milvus.training.experiment import (
    prefixed,
    silent,
    unprefixed,
)
from delf_milvus.training.heads import ArcFaceHead, SoftmaxHead
from delf_milvus.training.precision import Arithmetic
from delf_milvus.training.processes import Processes, processes
from delf_milvus.training.retrieval import Keep, Validation
from delf_milvus.training.stage import Epoch, Stage
from delf_milvus.training.vision import transforms
from delf_milvus.training.watching import tell

Say = Callable[[str], None]
Head = Literal["softmax", "arcface"]


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    data: folders of class folders; exclude: class folders that are left out; init: initial weights.
    batch: photos of a step, of all processes together.
    load: shortest side, in pixels, at which photos are kept; crop: side of the random crops.
    learning_rate: of the trunk; head_learning_rate, arcface_learning_rate: of the new classifier. Cosine decay after
        one tenth of an epoch of warm-up.
    label_smoothing: of the softmax head.
    clip: largest norm of the trunk's gradient.
    keep_initial: share of the initial weights in the exported trunk, 0 to 1.
    head: "softmax", or "arcface" with the length of its global descriptor, its margin in radians, and the first value
        of its scale.
    precision: arithmetic of the network.
    validate, validate_queries: photos and queries of the validation by retrieval, where there is one; keep: the weights
        that are exported, those of the last epoch or those that it found best.
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
    arcface_learning_rate: float = 0.001
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    clip: float = 5.0
    ema_decay: float = 0.995
    keep_initial: float = 0.0
    validate_every: int = 12
    seed: int = 0
    head: Head = "softmax"
    global_dim: int = 128
    margin: float = 0.1
    scale: float = 45.25
    precision: Precision = "auto"
    validate: Path | None = None
    validate_queries: int = 100
    keep: Keep = "last"


class Classifier(nn.Module):
    """A trunk and a head on its features; returns logits and those of the loss, (N, classes) each."""

    def __init__(self, trunk: Trunk, head: SoftmaxHead | ArcFaceHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, features = self.trunk(pixels)
        # In bf16 a cosine has three digits, which the head's scale would enlarge.
        with torch.autocast(pixels.device.type, enabled=False):
            logits: tuple[Tensor, Tensor] = self.head(features.float(), labels)
        return logits

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


SEEN = 2000
"""Photos at most that the ArcFace head begins with."""


def finetune(
    config: FinetuneConfig,
    say: Say = print,
    *,
    validation: Validation | None = None,
    command: str | None = None,
) -> Path:
    """Fine-tune, resuming from the checkpoint in `config.out` where there is one; returns the trunk's weight file.

    validation: judges the weights before the first epoch and after each. command: for the model card.

    With the ArcFace head the file has the learnt whitening as its `global_reduction`, unless `keep_initial` made
    another trunk than it was learnt with.

    Raises InputError for data that cannot be read or is too little, ModelError for initial weights that do not fit, and
    UsageError for a checkpoint of another configuration, or values that make no sense together.
    """
    with processes() as here:
        return _Run(config, say if here.first else silent, validation, here).train(command)


class _Run(Stage):
    """One process's part of a run."""

    name = "finetune"
    file = "trunk.safetensors"

    def __init__(self, config: FinetuneConfig, say: Say, validation: Validation | None, here: Processes) -> None:
        self.config = config
        initial = weights.initial_trunk(config.init)
        channels = initial.spec.channels
        if config.head == "arcface" and config.global_dim > channels:
            raise UsageError(f"{config.init} has {channels} channels; give --global-dim {channels} or less.")
        super().__init__(config, say, validation, here)
        classes = len(self.photos.classes)
        self.loader, self.checks = _loaders(config, self.training, self.checked, self.share, here)
        self.before = {name: value.clone() for name, value in initial.state_dict().items()}
        self.spec = ModelSpec(trunk=initial.spec, selection="norm", attention_channels=0)
        head: SoftmaxHead | ArcFaceHead = SoftmaxHead(channels, classes)
        if config.head == "arcface":
            head = ArcFaceHead(channels, classes, config.global_dim, config.margin, config.scale)
        self.network = Classifier(initial, head).to(here.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        if isinstance(head, ArcFaceHead) and self.saved is None:
            head.begin(*_seen(self.network.trunk, config, self.training, self.arithmetic))
        self.network.head = here.synchronised(self.network.head)  # type: ignore[assignment] # but for its BatchNorm
        ema = get_ema_multi_avg_fn(config.ema_decay)
        self.average = AveragedModel(self.network, multi_avg_fn=ema, use_buffers=True)
        self.optimizer = _optimizer(config, self.network)
        self.schedule = _Schedule(self.optimizer, config.epochs * len(self.loader), max(1, len(self.loader) // 10))
        self._resume()
        self.schedule.step = self.epoch * len(self.loader)
        self.trained = here.trained(self.network)

    def exported(self) -> dict[str, Tensor]:
        """The average, mixed with the initial weights."""
        after = unprefixed("module.trunk", self.average.state_dict())
        share = self.config.keep_initial
        mixed = {
            name: torch.lerp(value.cpu(), self.before[name], share) if value.is_floating_point() else value
            for name, value in after.items()
        }
        whole = prefixed("trunk", mixed)
        # A whitening fits the trunk that it was learnt with, and no mixture.
        if isinstance(head := self.average.module.head, ArcFaceHead) and not share:
            mean, projection = head.reduction()
            whole |= {"global_reduction.mean": mean.cpu(), "global_reduction.projection": projection.cpu()}
        return whole

    def _modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "average": self.average}

    def _train_epoch(self) -> Epoch:
        here, steps = self.here, len(self.loader)
        started = time.monotonic()
        total, right = self._pass()
        loss, answers = here.total([total / steps / here.count, float(right)])
        seconds = time.monotonic() - started
        correct, asked = here.total(_correct(self.average.module, self.checks, self.arithmetic))
        return Epoch(loss, answers, steps * self.config.batch, correct, asked, seconds)

    def _pass(self) -> tuple[float, int]:
        """Sum of the steps' losses and right answers of one pass over this process's photos."""
        self.network.train()
        smoothing = self.config.label_smoothing if self.config.head == "softmax" else 0.0
        criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        clipped = list(self.network.trunk.parameters())
        total, right = 0.0, 0
        for pixels, labels in in_order_of(self.epoch, self.loader):
            self.schedule.advance()
            pixels = pixels.to(self.here.device, memory_format=torch.channels_last).float()
            labels = labels.to(self.here.device)
            with self.arithmetic.autocast():
                logits, penalised = self.trained(pixels, labels)
            loss = criterion(penalised.float(), labels)
            self.arithmetic.step(loss, self.optimizer, clipped, self.config.clip)
            self.average.update_parameters(self.network)
            total += loss.item()
            right += int((logits.argmax(1) == labels).sum())
            seen, all_steps = self.schedule.step * self.config.batch, self.schedule.steps * self.config.batch
            tell(self.say, "finetune", seen, all_steps)
            if self.schedule.step % 20 == 0:
                self.say(f"step {self.schedule.step}/{self.schedule.steps} loss {loss.item():.3f}")
        return total, right

    def _recipe(self) -> dict[str, Any]:
        config = self.config
        recipe: dict[str, Any] = {"crop": config.crop, "keep initial": config.keep_initial, "head": config.head}
        if config.head == "arcface":
            recipe |= {"dim": config.global_dim, "margin": config.margin}
        return recipe


def _loaders(
    config: FinetuneConfig, training: LabelledPhotos, checked: LabelledPhotos, share: int, here: Processes
) -> tuple[Batches, Batches]:
    """This process's batches of random crops to train on, and of central crops to validate with."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(config.crop, scale=(0.3, 1.0), antialias=True),
            transforms.ColorJitter(0.3, 0.3, 0.2),
        ]
    )
    centre = _centre(config)
    most = data.MOST_IN_MEMORY // here.count
    drawn = PhotoDataset(training, config.load, augment, seed=config.seed, most=most)
    mine = Subset(PhotoDataset(checked, config.load, centre), range(here.rank, len(checked.paths), here.count))
    return batches(drawn, share, config.seed, here), DataLoader(mine, share)


def _centre(config: FinetuneConfig) -> Callable[[Tensor], Tensor]:
    return transforms.Compose(  # type: ignore[no-any-return] # without types
        [transforms.Resize(config.load, antialias=True), transforms.CenterCrop(config.crop)]
    )


@torch.inference_mode()
def _seen(
    trunk: Trunk, config: FinetuneConfig, photos: LabelledPhotos, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Pooled vectors (N, C) and labels (N,) of at most `SEEN` photos, evenly spread, the same in every process."""
    count = min(SEEN, len(photos.paths))
    rows = [number * len(photos.paths) // count for number in range(count)]
    some = LabelledPhotos([photos.paths[i] for i in rows], [photos.labels[i] for i in rows], photos.classes)
    trunk.eval()
    vectors: list[Tensor] = []
    for pixels, _ in DataLoader(PhotoDataset(some, config.load, _centre(config), most=0), 16):
        with arithmetic.autocast():
            _, features = trunk(pixels.to(arithmetic.device, memory_format=torch.channels_last).float())
        vectors.append(ArcFaceHead.pooled(features.float()))
    return torch.cat(vectors), torch.tensor(some.labels, device=arithmetic.device)


def _optimizer(config: FinetuneConfig, network: Classifier) -> torch.optim.Optimizer:
    decayed = [p for p in network.trunk.parameters() if p.ndim > 1]
    undecayed = [p for p in network.trunk.parameters() if p.ndim <= 1]
    head = config.head_learning_rate if config.head == "softmax" else config.arcface_learning_rate
    return torch.optim.SGD(
        [
            {"params": decayed, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": undecayed, "lr": config.learning_rate, "weight_decay": 0.0},
            {"params": network.head.parameters(), "lr": head},
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


@torch.inference_mode()
def _correct(network: nn.Module, loader: Batches, arithmetic: Arithmetic) -> tuple[float, float]:
    """Right answers, and photos asked."""
    network.eval()
    right = seen = 0
    for pixels, labels in loader:
        pixels = pixels.to(arithmetic.device, memory_format=torch.channels_last).float()
        with arithmetic.autocast():
            logits, _ = network(pixels)
        right += int((logits.argmax(1).cpu() == labels).sum())
        seen += len(labels)
    return float(right), float(seen)
