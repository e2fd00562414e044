"""Stage two: train the attention head on the frozen trunk (paper, section 4.2).

Photos are rescaled at random, their frozen feature maps are computed once and kept on disk, and the head learns to
weight cells so that the weighted mean of the L2-normalised features classifies the photo.

The paper cuts the middle square out of a photo, resizes it to 900 pixels, crops 720 at random and rescales the crop by
a random factor of at most 1, anew at each step: `crop` 720 and `scales` up to 1, with as many `views` as there is disk
for. The defaults differ: the whole photo, of a longest side of 480 pixels, rescaled by 0.4 to 1.25. They are meant for
photos of some 500 pixels and for CPUs, where the trunk costs most by far and cannot be run for each step.

Processes that `torchrun` starts compute the maps of their share of the photos each, and share each batch.
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

from delf_milvus.errors import UsageError
from delf_milvus.features import file_digest
from delf_milvus.model import weights
from delf_milvus.model.delf import AttentionHead, Delf
from delf_milvus.model.runtime import prepare, resolve_dtype
from delf_milvus.model.spec import ModelSpec
from delf_milvus.model.trunk import Trunk
from delf_milvus.settings import Precision
from delf_milvus.training.data import (
    LabelledPhotos,
    read_rgb,
)
from delf_milvus.training.experiment import (
    prefixed,
    silent,
)
from delf_milvus.training.precision import Arithmetic
from delf_milvus.training.processes import Processes, processes
from delf_milvus.training.retrieval import Keep, Validation
from delf_milvus.training.stage import Epoch, Stage
from delf_milvus.training.watching import tell

Say = Callable[[str], None]


@dataclass(frozen=True)
class AttentionConfig:
    """How to train attention.

    init: weight file whose trunk is used. longest: pixels of a photo's longest side before rescaling. crop: pixels of
    the side of random crops of the photo's middle square, resized to 5/4 of that; 0: the whole photo.
    views: randomly rescaled copies of each photo; scales: range of the rescaling, drawn uniformly in its logarithm.
    batch: views of a step, of all processes together.
    precision, validate, validate_queries, keep: as of `FinetuneConfig`.
    """

    data: tuple[Path, ...]
    out: Path
    init: Path
    exclude: tuple[str, ...] = ()
    epochs: int = 12
    batch: int = 32
    longest: int = 480
    crop: int = 0
    views: int = 3
    scales: tuple[float, float] = (0.4, 1.25)
    hidden: int = 512
    learning_rate: float = 0.001
    weight_decay: float = 1e-4
    validate_every: int = 12
    seed: int = 0
    precision: Precision = "auto"
    validate: Path | None = None
    validate_queries: int = 100
    keep: Keep = "last"


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


def train_attention(
    config: AttentionConfig,
    say: Say = print,
    *,
    validation: Validation | None = None,
    command: str | None = None,
) -> Path:
    """Train the head; returns a weight file with trunk and attention (no reduction yet).

    validation, command: as of `finetune`. A global reduction of the initial file is kept: the trunk is the same.

    Raises InputError for data that cannot be read or is too little, ModelError for a weight file that does not fit, and
    UsageError for a checkpoint of another configuration, or values that make no sense together.
    """
    with processes() as here:
        return _Run(config, say if here.first else silent, validation, here).train(command)


class _Run(Stage):
    """One process's part of a run; feature maps are computed when it is made."""

    name = "attention"
    file = "attention.safetensors"

    def __init__(self, config: AttentionConfig, say: Say, validation: Validation | None, here: Processes) -> None:
        self.config = config
        if not 0 < config.scales[0] <= config.scales[1]:
            raise UsageError(
                "The least scale is above 0 and at most the largest; check --least-scale and --most-scale."
            )
        spec, tensors = weights.initial(config.init)
        initial = weights.initial_trunk(config.init)
        super().__init__(config, say, validation, here, config.views)
        self.cache = _FeatureCache(config, self.training, config.views, "training", initial, here, say)
        self.checks = _FeatureCache(config, self.checked, 1, "validation", initial, here, say)
        # The trunk stays, and so what reduces the global descriptors of its maps.
        kept = ("trunk.", "global_reduction.")
        self.tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}
        whole = spec.global_dim if "global_reduction.mean" in self.tensors else 0
        self.spec = replace(spec, selection="attention", attention_channels=config.hidden, global_dim=whole)
        classes = len(self.photos.classes)
        pooling = AttentionPooling(spec.trunk.channels, config.hidden, classes, spec.trunk.epsilon).to(here.device)
        pooling.head = here.synchronised(pooling.head)  # type: ignore[assignment] # the same but for its BatchNorm
        self.pooling = pooling
        self.optimizer = torch.optim.AdamW(pooling.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        self._resume()
        self.trained = here.trained(pooling)

    def exported(self) -> dict[str, Tensor]:
        return self.tensors | prefixed("attention", self.pooling.head.state_dict())

    def _modules(self) -> dict[str, nn.Module]:
        return {"pooling": self.pooling}

    def _train_epoch(self) -> Epoch:
        config, here = self.config, self.here
        steps = len(self.cache) // config.batch
        seen = steps * config.batch
        shuffled = torch.randperm(len(self.cache), generator=torch.Generator().manual_seed(config.seed + self.epoch))
        started, total, right = time.monotonic(), 0.0, 0
        self.pooling.train()
        for step, start in enumerate(range(0, seen, config.batch), self.epoch * steps):
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / (config.epochs * steps)))
            mine = shuffled[start + here.rank : start + config.batch : here.count].tolist()
            cells, photo, labels = self.cache.batch(mine, here.device, self.arithmetic.dtype)
            with self.arithmetic.autocast():
                logits = self.trained(cells, photo, len(labels))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            self.arithmetic.step(loss, self.optimizer)
            total += loss.item()
            right += int((logits.argmax(1) == labels).sum())
            tell(self.say, "attention", (step + 1) * config.batch, config.epochs * seen)
        loss_sum, answers = here.total([total / here.count, float(right)])
        seconds = time.monotonic() - started
        correct, asked = here.total(_correct(self.pooling, self.checks, self.share, self.arithmetic, here))
        return Epoch(loss_sum / steps, answers, seen, correct, asked, seconds)

    def _recipe(self) -> dict[str, Any]:
        config = self.config
        shown = {"crop": config.crop} if config.crop else {"longest side": config.longest}
        return {"views": config.views, "scales": list(config.scales), **shown}


class _FeatureCache:
    """Frozen feature maps of rescaled photos, fp16, in one flat file a process beside the JSON list of its contents.

    Item `view * photos + photo` lies in the file of the process that computed it, that of its photo's number modulo the
    processes. The list names what the maps were made from, and maps of anything else are computed again. It is removed
    first and written last, so that a killed run leaves no list of a file that is not whole.
    """

    def __init__(
        self,
        config: AttentionConfig,
        photos: LabelledPhotos,
        views: int,
        name: str,
        initial: Trunk,
        here: Processes,
        say: Say,
    ) -> None:
        self._channels = initial.spec.channels
        self._labels = photos.labels
        self._views = views

        def part(rank: int) -> Path:
            return config.out / (f"{name}.f16" if here.count == 1 else f"{name}.{rank}.f16")

        sources = _sources(config, photos, views, here.count)
        path = part(here.rank)
        contents = path.with_suffix(".json")
        if _contents(contents).get("sources") != sources or not path.is_file():
            contents.unlink(missing_ok=True)
            network = Delf(ModelSpec(trunk=initial.spec, selection="norm", attention_channels=0))
            network.trunk = initial
            own = range(here.rank, len(photos.paths), here.count)
            starts = self._compute(config, photos, own, path, network, here, say)
            contents.write_text(json.dumps({"sources": sources, "starts": starts}))
        here.wait()
        self._parts: list[tuple[list[int], np.memmap[Any, np.dtype[np.float16]] | None]] = []
        for rank in range(here.count):
            starts = _contents(part(rank).with_suffix(".json"))["starts"]
            shape = (starts[-1], self._channels)
            self._parts.append((starts, np.memmap(part(rank), np.float16, "r", shape=shape) if starts[-1] else None))

    @torch.inference_mode()
    def _compute(
        self,
        config: AttentionConfig,
        photos: LabelledPhotos,
        own: range,
        path: Path,
        network: Delf,
        here: Processes,
        say: Say,
    ) -> list[int]:
        trunk = prepare(network, here.device, resolve_dtype("auto", here.device)).trunk
        starts = [0]
        with path.open("wb") as stream:
            for view in range(self._views):
                for number in own:
                    random = np.random.default_rng([config.seed, view, number])
                    pixels = _view(photos.paths[number], config, trunk.spec.stride, random)
                    pixels = pixels.to(here.device).contiguous(memory_format=torch.channels_last)
                    _, features = trunk(pixels)
                    cells = features[0].permute(1, 2, 0).reshape(-1, self._channels).half().cpu().numpy()
                    cells.tofile(stream)
                    starts.append(starts[-1] + len(cells))
                    tell(say, path.stem, len(starts) - 1, self._views * len(own))
                say(f"{path.name}: view {view + 1} of {self._views} computed")
        return starts

    def __len__(self) -> int:
        return self._views * len(self._labels)

    def batch(self, items: list[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the items (R, C); the item that each cell belongs to (R,); labels (items,)."""
        maps = [self._map(item) for item in items]
        lengths = torch.tensor([len(m) for m in maps])
        photo = torch.repeat_interleave(torch.arange(len(items)), lengths)
        labels = torch.tensor([self._labels[item % len(self._labels)] for item in items])
        return torch.cat(maps).to(device).to(dtype), photo.to(device), labels.to(device)

    def _map(self, item: int) -> Tensor:
        view, number = divmod(item, len(self._labels))
        rank, row = number % len(self._parts), number // len(self._parts)
        starts, cells = self._parts[rank]
        assert cells is not None, "a part with items has cells"
        row += view * len(range(rank, len(self._labels), len(self._parts)))
        return torch.from_numpy(cells[starts[row] : starts[row + 1]].copy())


def _view(path: Path, config: AttentionConfig, least: int, random: np.random.Generator) -> Tensor:
    """A photo as it is shown to the trunk, (1, 3, H, W) fp32: cropped where `crop` says so, and rescaled at random.

    least: pixels that a side has at least.
    """
    low, high = np.log(config.scales)
    scale = float(np.exp(random.uniform(low, high)))
    if config.crop:
        middle = round(config.crop * 5 / 4)
        pixels = read_rgb(path, shortest=middle)[None].float()
        height, width = pixels.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, :, top : top + side, left : left + side]
        if side != middle:
            pixels = nn.functional.interpolate(pixels, [middle, middle], mode="bilinear", antialias=True)
        top, left = random.integers(0, middle - config.crop + 1, 2).tolist()
        pixels = pixels[:, :, top : top + config.crop, left : left + config.crop]
    else:
        pixels = read_rgb(path, longest=config.longest)[None].float()
    size = [max(least, round(side * scale)) for side in pixels.shape[2:]]
    return nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)


def _sources(config: AttentionConfig, photos: LabelledPhotos, views: int, parts: int) -> dict[str, Any]:
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
        "crop": config.crop,
        "seed": config.seed,
        "parts": parts,
    }


def _contents(path: Path) -> dict[str, Any]:
    """The list of a cache's contents; empty where there is none, or one that a killed run cut short."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@torch.inference_mode()
def _correct(
    pooling: AttentionPooling, cache: _FeatureCache, batch: int, arithmetic: Arithmetic, here: Processes
) -> tuple[float, float]:
    """Right answers to this process's share of the views, and their number."""
    pooling.eval()
    own = range(here.rank, len(cache), here.count)
    right = 0
    for start in range(0, len(own), batch):
        cells, photo, labels = cache.batch(list(own[start : start + batch]), arithmetic.device, arithmetic.dtype)
        with arithmetic.autocast():
            right += int((pooling(cells, photo, len(labels)).argmax(1) == labels).sum())
    return float(right), float(len(own))
