"""What the stages of training share: a run over labelled photos, judged by retrieval, resumed and exported.

A stage says what it trains (`_train_epoch`), what a checkpoint of it needs, and what is exported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from delf_milvus.model.spec import ModelSpec
from delf_milvus.settings import Precision
from delf_milvus.training.data import labelled_photos, require_batch, require_readable, split
from delf_milvus.training.experiment import Experiment, optimizer_tensors, prefixed, restore_optimizer, told
from delf_milvus.training.export import earlier, export, names, with_stage
from delf_milvus.training.precision import Arithmetic
from delf_milvus.training.processes import Processes
from delf_milvus.training.retrieval import Judged, Keep, Validation, require_apart

Say = Callable[[str], None]


class StageConfig(Protocol):
    """What the configuration of every stage has."""

    @property
    def data(self) -> tuple[Path, ...]: ...
    @property
    def out(self) -> Path: ...
    @property
    def init(self) -> Path: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def validate_every(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def keep(self) -> Keep: ...
    @property
    def seed(self) -> int: ...


class Epoch(NamedTuple):
    """One pass over the photos, all processes together: mean loss, right answers of how many, the same of the photos
    that validate, and how long the pass took."""

    loss: float
    right: float
    seen: int
    correct: float
    asked: float
    seconds: float


class Stage(ABC):
    """One process's part of a run: everything is checked and loaded when it is made, and trained by `train`.

    name: of the stage in metrics and model cards; file: that it exports. A subclass ends its `__init__` with `_resume`.
    """

    name: str
    file: str
    spec: ModelSpec
    optimizer: torch.optim.Optimizer

    def __init__(
        self, config: StageConfig, say: Say, validation: Validation | None, here: Processes, views: int = 1
    ) -> None:
        """views: of each photo in an epoch."""
        torch.manual_seed(config.seed)
        self._config, self.say, self.here, self._validation = config, say, here, validation
        self.share = here.share(config.batch)
        self.photos = labelled_photos(config.data, config.exclude)
        self.training, self.checked = split(self.photos, config.validate_every)
        require_batch(config.data, self.training, config.batch, views)
        require_apart(validation, self.photos, config.keep)
        require_readable(self.photos)
        self.arithmetic = Arithmetic(config.precision, here.device)
        environment = {"device": here.device.type, "processes": here.count, "precision": str(self.arithmetic.dtype)}
        self.experiment = Experiment(config, writes=here.first, environment=environment)
        here.wait()
        say(
            f"{len(self.training.paths)} photos to train on, {len(self.checked.paths)} to validate, "
            f"{len(self.photos.classes)} classes"
        )
        self.saved = self.experiment.load_checkpoint()
        self.epoch, self.figures = 0, dict[str, float]()

    def _resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if self.saved is not None:
            tensors, progress = self.saved
            self.experiment.restore(self._modules(), tensors)
            restore_optimizer(self.optimizer, tensors)
            self.arithmetic.restore(progress["arithmetic"])
            self.epoch, self.figures = progress["epoch"], progress["figures"]
            self.say(f"resuming after epoch {self.epoch}")
        self.judged = Judged(self.experiment, self._validation, resumed=self.saved is not None)
        self.saved = None

    def train(self, command: str | None) -> Path:
        """Train the epochs that are missing, and export; returns the weight file. command: for the model card."""
        if self.epoch == 0 and (start := self.judged.judge(0, self.spec, self.exported)):
            self.experiment.log(stage=self.name, epoch=0, **start)
            self.say(f"before training: {told(start)}")
        while self.epoch < self._config.epochs:
            self._end_epoch(self._train_epoch())
            tensors = optimizer_tensors(self.optimizer)
            for name, module in self._modules().items():
                tensors |= prefixed(name, module.state_dict())
            progress = {"epoch": self.epoch, "figures": self.figures, "arithmetic": self.arithmetic.state()}
            self.experiment.save_checkpoint(tensors, progress)
            self.here.wait()
        path = self._config.out / self.file
        if self.here.first:
            self._export(path, command)
        self.here.wait()
        return path

    def _end_epoch(self, epoch: Epoch) -> None:
        self.epoch += 1
        self.figures = {
            "loss": round(epoch.loss, 4),
            "training_accuracy": round(epoch.right / epoch.seen, 4),
            "validation_accuracy": round(epoch.correct / max(1, epoch.asked), 4),
            **self.judged.judge(self.epoch, self.spec, self.exported),
        }
        rate = round(epoch.seen / epoch.seconds, 1)
        self.experiment.log(stage=self.name, epoch=self.epoch, **self.figures, photos_per_second=rate)
        self.say(f"epoch {self.epoch}: {told(self.figures)}, {epoch.seconds:.0f} s")

    def _export(self, path: Path, command: str | None) -> None:
        config = self._config
        tensors, kept = self.judged.kept(config.keep, self.exported())
        if kept:
            self.say(f"kept: {told(kept['kept'])}")
        recipe = {"epochs": config.epochs, "batch": config.batch, "learning rate": config.learning_rate}
        recipe |= self._recipe() | self.arithmetic.recipe() | {"processes": self.here.count, "seed": config.seed}
        record = {
            "data": names(config.data),
            "classes": len(self.photos.classes),
            "photos": len(self.training.paths),
            "initial weights": config.init.name,
            "recipe": recipe,
            "last epoch": self.figures,
            **kept,
        }
        if command:
            record["command"] = command
        whole = len(tensors["global_reduction.projection"]) if "global_reduction.projection" in tensors else 0
        spec = replace(self.spec, global_dim=whole)
        export(path, tensors, spec, with_stage(earlier(config.init), self.name, record))

    @abstractmethod
    def _train_epoch(self) -> Epoch:
        """Train for the epoch of number `epoch`, from 0."""

    @abstractmethod
    def _modules(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint holds, by the name of its tensors there."""

    @abstractmethod
    def exported(self) -> dict[str, Tensor]:
        """The tensors to export."""

    @abstractmethod
    def _recipe(self) -> dict[str, Any]:
        """What the model card says of this stage beyond epochs, batch and learning rate."""
