"""Validation by what a model is for: how well do the weights of the moment find photos again?

How that is measured is handed in (`Validation`): searching is no business of training. After each epoch, and before the
first, the weights are written as a file that gives descriptors of full length, and judged by it. The best ones are
kept in `best.safetensors`, whose notes say of which epoch they are and what they reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.model import weights
from delf_milvus.model.spec import ModelSpec, read_header
from delf_milvus.training.data import LabelledPhotos
from delf_milvus.training.experiment import Experiment
from delf_milvus.training.export import save_unreduced

Keep = Literal["last", "best"]

FIGURE = "retrieval_map"
"""The figure that the best weights are chosen by: mean average precision of the local features."""


class Validation(Protocol):
    """Judges a weight file by retrieval. photos: what it judges with, as resolved paths, which training leaves out."""

    @property
    def photos(self) -> frozenset[Path]:
        """Resolved paths."""

    def __call__(self, model: Path) -> Mapping[str, float]:
        """Figures of a weight file, `FIGURE` among them."""


def require_apart(validation: Validation | None, photos: LabelledPhotos, keep: Keep) -> None:
    """Raise UsageError for --keep best without validation, InputError for photos that would train and validate."""
    if validation is None:
        if keep == "best":
            raise UsageError("--keep best chooses by validation; give --validate a folder of photos.")
        return
    both = next((path for path in photos.paths if path.resolve() in validation.photos), None)
    if both is not None:
        raise InputError(
            f"{one_line(both)} would train and validate; give --validate other photos, or --exclude their folders."
        )


class Judged:
    """The judgements of one run: figures by epoch, and the best weights so far."""

    def __init__(self, experiment: Experiment, validation: Validation | None, *, resumed: bool) -> None:
        self._experiment, self._validation = experiment, validation
        self._best = experiment.folder / "best.safetensors"
        if experiment.writes and not resumed:
            self._best.unlink(missing_ok=True)

    def judge(self, epoch: int, spec: ModelSpec, tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, float]:
        """The figures of the weights after an epoch (0: before the first); empty where nothing judges.

        Processes that do not write return at once with none.
        """
        if self._validation is None or not self._experiment.writes:
            return {}
        moment = self._experiment.folder / "moment.safetensors"
        own = dict(tensors())
        save_unreduced(moment, own, spec, keep_global=True)
        figures = {name: round(float(value), 4) for name, value in self._validation(moment).items()}
        moment.unlink()
        best = self.best
        if best is None or figures[FIGURE] > best[FIGURE]:
            weights.save(self._best, own, spec, notes={"epoch": epoch, **figures})
        return figures

    @property
    def best(self) -> dict[str, Any] | None:
        """Epoch and figures of the best weights so far."""
        return read_header(self._best)[1] if self._best.is_file() else None

    def kept(self, keep: Keep, last: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights to export, and what their record says of them."""
        best = self.best
        if keep == "last" or best is None:
            return dict(last), {}
        _, tensors, _ = weights.read(self._best)
        return tensors, {"kept": {"epoch": best["epoch"], FIGURE: best[FIGURE]}}
