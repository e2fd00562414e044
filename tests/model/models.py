"""A tiny network for tests: real layers, random weights, milliseconds a photo."""

from __future__ import annotations

from pathlib import Path

import torch

from delf_milvus.model import weights
from delf_milvus.model.delf import Delf
from delf_milvus.model.spec import ModelSpec, TrunkSpec

TINY = ModelSpec(
    trunk=TrunkSpec(layout="v2", units=(1, 1, 1), widths=(8, 8, 16)),
    selection="attention",
    dim=16,
    attention_channels=8,
    global_dim=8,
)


def tiny_network(seed: int = 0, spec: ModelSpec = TINY) -> Delf:
    torch.manual_seed(seed)
    network = Delf(spec)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.nn.init.orthogonal_(network.reduction.projection)
    if network.global_reduction is not None:
        torch.nn.init.orthogonal_(network.global_reduction.projection)
    return network.eval()


def write_tiny_model(path: Path, seed: int = 0) -> Path:
    weights.save(path, dict(tiny_network(seed).state_dict()), TINY)
    return path
