"""What every training command shares: its folder, its log, its checkpoint.

A folder holds one run. To resume it is to give the configuration and the initial weights that it began with: another
number of epochs continues it, and the folder may have moved; all else would make one log of two different runs.

A checkpoint is one safetensors file (tensors by name, progress as JSON in the metadata), written beside the old one
and moved over it, so that a killed run always finds a whole one.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from delf_milvus.errors import InputError, UsageError, one_line
from delf_milvus.features import file_digest

MAY_CHANGE = frozenset({"epochs", "out", "keep"})
"""Fields of a configuration that a resumed run may have otherwise."""


class Experiment:
    """A folder with `config.json`, `environment.json` (what computes), `metrics.jsonl` (appended),
    `checkpoint.safetensors`, and where TensorBoard is installed its curves in `tensorboard/`.

    `config` is a dataclass of plain values with the fields `init`, an existing weight file, and `out`, the folder.
    It is written at the start, with the digest of that file; a run that resumes changes `MAY_CHANGE` in it alone.
    writes: False in a process that only takes part: it reads the checkpoint and writes nothing.

    Raises UsageError where the folder has a checkpoint of another configuration, InputError where it cannot be written.
    """

    def __init__(self, config: Any, *, writes: bool = True, environment: dict[str, Any] | None = None) -> None:
        self.folder: Path = config.out
        self.writes = writes
        self._checkpoint = self.folder / "checkpoint.safetensors"
        if not writes:
            return
        written = self.folder / "config.json"
        text = json.dumps({**asdict(config), "init_digest": file_digest(config.init)}, indent=2, default=str) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._checkpoint.is_file():
                self._refuse_another(written, json.loads(text))
            _replace(written, text)
            software = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.platform()}
            _replace(self.folder / "environment.json", json.dumps(software | (environment or {}), indent=2) + "\n")
        except OSError as error:
            reason = error.strerror or "input/output error"
            raise InputError(f"{one_line(self.folder)} cannot hold the run: {reason}; give --out a folder.") from error

    def _refuse_another(self, written: Path, values: dict[str, Any]) -> None:
        try:
            before: dict[str, Any] = json.loads(written.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.folder} has a checkpoint but no readable config.json; give --out a new folder."
            ) from error
        names = [*values, *(name for name in before if name not in values)]
        for name in names:
            if name not in MAY_CHANGE and (name not in before or name not in values or before[name] != values[name]):
                raise UsageError(
                    f"{self.folder} holds a run with another {name}; "
                    "give --out a new folder, or the values that the run began with."
                )

    def log(self, **values: float | int | str) -> None:
        """Append one line to the metrics, with the time of day. `stage` names the curves, `epoch` is their step."""
        if not self.writes:
            return
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **values})
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(line + "\n")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with SummaryWriter(str(self.folder / "tensorboard")) as curves:
            for name, value in values.items():
                if name not in ("stage", "epoch"):
                    curves.add_scalar(f"{values.get('stage', 'run')}/{name}", value, values.get("epoch", 0))

    def save_checkpoint(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        if not self.writes:
            return
        partial = self._checkpoint.with_suffix(".partial")
        save_file(
            {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
            partial,
            {"progress": json.dumps(progress)},
        )
        partial.replace(self._checkpoint)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the progress of the last checkpoint, or None in a new folder.

        Raises UsageError where it is damaged.
        """
        if not self._checkpoint.is_file():
            return None
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise UsageError(
                f"{one_line(self._checkpoint)} is damaged; remove it to begin again, or give --out a new folder."
            ) from error

    def restore(self, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
        """Fill modules, by their prefix, from the tensors of a checkpoint.

        Raises UsageError where they have other shapes: the photos have become others since.
        """
        try:
            for name, module in modules.items():
                module.load_state_dict(unprefixed(name, tensors))
        except RuntimeError as error:
            raise UsageError(
                f"{one_line(self.folder)} holds a run with other classes; give --out a new folder, or the photos that "
                "the run began with."
            ) from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def silent(_: str) -> None:
    """What a process that does not write has to say."""


def told(figures: Mapping[str, float]) -> str:
    """Figures as words, on one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict under `prefix`."""
    return {f"{prefix}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`."""
    start = prefix + "."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, by parameter number and name."""
    return {
        f"optimizer.{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in unprefixed("optimizer", tensors).items():
        number, field = name.split(".", 1)
        state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
