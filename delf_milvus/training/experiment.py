"""What every training command shares: its folder, its log, its checkpoint.

A checkpoint is one safetensors file (tensors by name, progress as JSON in the metadata), written beside the old one
and moved over it, so that a killed run always finds a whole one.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Experiment:
    """A folder with `config.json`, `metrics.jsonl` (appended) and `checkpoint.safetensors`.

    `config` is a dataclass of plain values; it is written once, at the start of a run.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._checkpoint = folder / "checkpoint.safetensors"
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")

    def log(self, **values: float | int | str) -> None:
        """Append one line to the metrics, with the time of day."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **values})
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(line + "\n")

    def save_checkpoint(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        partial = self._checkpoint.with_suffix(".partial")
        save_file(
            {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
            partial,
            {"progress": json.dumps(progress)},
        )
        partial.replace(self._checkpoint)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the progress of the last checkpoint, or None in a new folder."""
        if not self._checkpoint.is_file():
            return None
        with safe_open(self._checkpoint, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118


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
