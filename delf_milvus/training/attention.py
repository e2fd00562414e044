"""Stage two: train the attention head on the frozen trunk (paper, section 4.2).

Photos are rescaled at random, their frozen feature maps are computed once and kept on disk, and the head learns to
weight cells so that the weighted mean of the L2-normalised features classifies the photo.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from delf_milvus.features import file_digest
from delf_milvus.model import weights
from delf_milvus.model.delf import AttentionHead, Delf
from delf_milvus.model.runtime import prepare, resolve_dtype
from delf_milvus.model.spec import ModelSpec
from delf_milvus.model.trunk import Trunk
from delf_milvus.training.data import LabelledPhotos, labelled_photos, read_rgb, require_batch, split
from delf_milvus.training.experiment import Experiment, optimizer_tensors, prefixed, restore_optimizer, unprefixed
from delf_milvus.training.watching import tell

Say = Callable[[str], None]


@dataclass(frozen=True)
class AttentionConfig:
    """How to train attention.

    init: weight file whose trunk is used. longest: pixels of a photo's longest side before rescaling.
    views: randomly rescaled copies of each photo; scales: range of the rescaling, drawn uniformly in its logarithm.
    """

    data: tuple[Path, ...]
    out: Path
    init: Path
    exclude: tuple[str, ...] = ()
    epochs: int = 12
    batch: int = 32
    longest: int = 480
    views: int = 3
    scales: tuple[float, float] = (0.4, 1.25)
    hidden: int = 512
    learning_rate: float = 0.001
    weight_decay: float = 1e-4
    validate_every: int = 12
    seed: int = 0


class AttentionPooling(nn.Module):
    """The head, and a classifier on the attention-weighted mean of L2-normalised features.

    Takes the cells of all photos of a batch, (R, C), and the number of the photo that each belongs to, (R,); returns
    logits (photos, classes). Cells are not padded to one size: the head's BatchNorm sees real cells only.
    """

    def __init__(self, channels: int, hidden: int, classes: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.head = AttentionHead(channels, hidden, epsilon)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, cells: Tensor, photo: Tensor, photos: int) -> Tensor:
        # (R, C) seen as (1, C, R, 1) is channels last: the 1x1 convolutions run as matrix products.
        scores = self.head(cells.T[None, :, :, None]).reshape(-1)
        # The mean of normalised cells is one product with a matrix of a row a photo, and copies no cell.
        weights = scores.new_zeros(photos, len(cells))
        weights[photo, torch.arange(len(cells), device=cells.device)] = scores / cells.float().norm(dim=1).clamp_min(
            1e-6
        )
        pooled = (weights @ cells).float() / scores.new_zeros(photos).index_add(0, photo, scores).clamp_min(1e-6)[
            :, None
        ]
        # A pooled unit vector has entries near 1 / sqrt(C): scaled so that the classifier's rate fits.
        logits: Tensor = self.classifier(pooled * math.sqrt(cells.shape[1]))
        return logits


def train_attention(config: AttentionConfig, say: Say = print) -> Path:
    """Train the head; returns a weight file with trunk and attention (no reduction yet).

    Raises InputError for data that cannot be read or is too little, ModelError for a weight file that does not fit, and
    UsageError for a checkpoint of another configuration.
    """
    torch.manual_seed(config.seed)
    spec, tensors = weights.initial(config.init)
    initial = weights.initial_trunk(config.init)
    experiment = Experiment(config)
    photos = labelled_photos(config.data, config.exclude)
    training, validation = split(photos, config.validate_every)
    require_batch(config.data, training, config.batch, config.views)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = _FeatureCache(config, training, config.views, config.out / "training.f16", initial, say)
    checks = _FeatureCache(config, validation, 1, config.out / "validation.f16", initial, say)

    epsilon = spec.trunk.epsilon
    pooling = AttentionPooling(spec.trunk.channels, config.hidden, len(photos.classes), epsilon).to(device)
    optimizer = torch.optim.AdamW(pooling.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps_an_epoch = len(cache) // config.batch
    steps = config.epochs * steps_an_epoch
    step = first_epoch = 0
    if (saved := experiment.load_checkpoint()) is not None:
        state, progress = saved
        pooling.load_state_dict(unprefixed("pooling", state))
        restore_optimizer(optimizer, state)
        step, first_epoch = progress["step"], progress["epoch"]
    for epoch in range(first_epoch, config.epochs):
        pooling.train()
        started, total, right = time.monotonic(), 0.0, 0
        shuffled = torch.randperm(len(cache), generator=torch.Generator().manual_seed(config.seed + epoch))
        for start in range(0, steps_an_epoch * config.batch, config.batch):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            cells, photo, labels = cache.batch(shuffled[start : start + config.batch].tolist(), device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = pooling(cells, photo, len(labels))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            total += loss.item()
            right += int((logits.argmax(1) == labels).sum())
            tell(say, "attention", step * config.batch, steps * config.batch)
        accuracy = _accuracy(pooling, checks, config.batch, device)
        seen = steps_an_epoch * config.batch
        experiment.log(
            stage="attention",
            epoch=epoch + 1,
            loss=round(total / steps_an_epoch, 4),
            training_accuracy=round(right / seen, 4),
            validation_accuracy=round(accuracy, 4),
            photos_per_second=round(seen / (time.monotonic() - started), 1),
        )
        say(f"epoch {epoch + 1}: loss {total / steps_an_epoch:.3f}, validation accuracy {accuracy:.3f}")
        experiment.save_checkpoint(
            prefixed("pooling", pooling.state_dict()) | optimizer_tensors(optimizer), {"step": step, "epoch": epoch + 1}
        )
    trunk = {name: tensor for name, tensor in tensors.items() if name.startswith("trunk.")}
    path = config.out / "attention.safetensors"
    final = replace(spec, selection="attention", attention_channels=config.hidden)
    weights.save(path, trunk | prefixed("attention", pooling.head.state_dict()), final)
    return path


class _FeatureCache:
    """Frozen feature maps of rescaled photos, fp16, in one flat file beside the JSON list of its contents.

    The list names what the maps were made from, and maps of anything else are computed again. It is removed first and
    written last, so that a killed run leaves no list of a file that is not whole.
    """

    def __init__(
        self,
        config: AttentionConfig,
        photos: LabelledPhotos,
        views: int,
        path: Path,
        initial: Trunk,
        say: Say,
    ) -> None:
        self._channels = initial.spec.channels
        contents = path.with_suffix(".json")
        sources = _sources(config, photos, views)
        values = _contents(contents)
        if values.get("sources") != sources or not path.is_file():
            contents.unlink(missing_ok=True)
            network = Delf(ModelSpec(trunk=initial.spec, selection="norm", attention_channels=0))
            network.trunk = initial
            starts, labels = self._compute(config, photos, views, path, network, say)
            values = {"sources": sources, "starts": starts, "labels": labels}
            contents.write_text(json.dumps(values))
        self._starts: list[int] = values["starts"]
        self._labels: list[int] = values["labels"]
        self._cells = np.memmap(path, np.float16, "r", shape=(self._starts[-1], self._channels))

    @torch.inference_mode()
    def _compute(
        self, config: AttentionConfig, photos: LabelledPhotos, views: int, path: Path, network: Delf, say: Say
    ) -> tuple[list[int], list[int]]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trunk = prepare(network, device, resolve_dtype("auto", device)).trunk
        starts, labels = [0], []
        generator = np.random.default_rng(config.seed)
        low, high = np.log(config.scales)
        with path.open("wb") as stream:
            for view in range(views):
                for photo, label in zip(photos.paths, photos.labels, strict=True):
                    scale = float(np.exp(generator.uniform(low, high)))
                    pixels = read_rgb(photo, longest=config.longest)[None].float().to(device)
                    size = [max(trunk.spec.stride, round(side * scale)) for side in pixels.shape[2:]]
                    pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
                    _, features = trunk(pixels.contiguous(memory_format=torch.channels_last))
                    cells = features[0].permute(1, 2, 0).reshape(-1, self._channels).half().cpu().numpy()
                    cells.tofile(stream)
                    starts.append(starts[-1] + len(cells))
                    labels.append(label)
                    tell(say, path.stem, len(labels), views * len(photos.paths))
                say(f"{path.name}: view {view + 1} of {views} computed")
        return starts, labels

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, items: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the items (R, C), bf16; the item that each cell belongs to (R,); labels (items,)."""
        maps = [torch.from_numpy(self._cells[self._starts[i] : self._starts[i + 1]].copy()) for i in items]
        lengths = torch.tensor([len(m) for m in maps])
        photo = torch.repeat_interleave(torch.arange(len(items)), lengths)
        labels = torch.tensor([self._labels[i] for i in items])
        return torch.cat(maps).to(device).bfloat16(), photo.to(device), labels.to(device)


def _sources(config: AttentionConfig, photos: LabelledPhotos, views: int) -> dict[str, Any]:
    """What feature maps are made from, as JSON values: another value of any means other maps."""
    digest = hashlib.sha256()
    for path, label in zip(photos.paths, photos.labels, strict=True):
        status = path.stat()
        digest.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, label]).encode())
    return {
        "init": file_digest(config.init),
        "photos": digest.hexdigest(),
        "views": views,
        "scales": list(config.scales),
        "longest": config.longest,
        "seed": config.seed,
    }


def _contents(path: Path) -> dict[str, Any]:
    """The list of a cache's contents; empty where there is none, or one that a killed run cut short."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@torch.inference_mode()
def _accuracy(pooling: AttentionPooling, cache: _FeatureCache, batch: int, device: torch.device) -> float:
    pooling.eval()
    right = 0
    for start in range(0, len(cache), batch):
        cells, photo, labels = cache.batch(list(range(start, min(start + batch, len(cache)))), device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            right += int((pooling(cells, photo, len(labels)).argmax(1) == labels).sum())
    return right / max(1, len(cache))
