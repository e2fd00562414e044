"""The reduction as DELG learns it: the bottleneck of an autoencoder.

A linear layer to `dim` components, a linear layer back and a ReLU, trained by the mean squared error of the
reconstruction (Cao, Araujo and Sim, ECCV 2020, section 3.3: 1x1 convolutions on the map, together with attention; here
on the descriptors that selection keeps, of a frozen trunk). The encoder is linear, so a weight file holds it as any
other reduction: mean and projection, then L2.

The error does not change where any invertible matrix is put behind the encoder and its inverse before the decoder, but
distances between codes do. The one is chosen with which they are the distances between what the decoder makes of them,
before its ReLU: with orthonormal columns of the decoder, as those of PCA are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Say = Callable[[str], None]

BATCH = 1024
"""Descriptors of a step at most; fewer where they would make fewer than 50 steps an epoch."""

LEARNING_RATE = 0.002


class Fit(NamedTuple):
    """mean (C,) and projection (dim, C) of the encoder; explained: 1 - error / variance, as a PCA keeps of it."""

    mean: Tensor
    projection: Tensor
    explained: float


class Autoencoder(nn.Module):
    """Takes centred and scaled descriptors (N, C), returns their reconstructions (N, C), never negative."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(channels, dim, bias=False)
        self.decoder = nn.Linear(dim, channels)

    def forward(self, descriptors: Tensor) -> Tensor:
        return torch.relu(self.decoder(self.encoder(descriptors)))


def fit(
    descriptors: Tensor,
    dim: int,
    epochs: int,
    seed: int = 0,
    say: Say = print,
    log: Callable[..., None] | None = None,
) -> Fit:
    """Fit an autoencoder to L2-normalised descriptors (N, C) that are never negative, as those behind a ReLU are.

    log: called with the epoch, its mean loss and the share of the variance that it explains.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = descriptors.shape[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mean = descriptors.mean(0, dtype=torch.float32)
    variance = float(sum((part.float() - mean).square().sum() for part in descriptors.split(BATCH)))
    # Entries of unit variance: the loss is then the share of the variance that is lost.
    unit = math.sqrt(descriptors.numel() / max(variance, 1e-12))
    network = Autoencoder(channels, dim)
    with torch.no_grad():
        network.encoder.weight.copy_(_orthonormal(dim, channels, generator))
        network.decoder.weight.copy_(network.encoder.weight.T)
        network.decoder.bias.copy_(mean * unit)
    network.to(device)
    mean = mean.to(device)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    size = max(64, min(BATCH, len(descriptors) // 50))
    steps = epochs * math.ceil(len(descriptors) / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(1, epochs + 1):
        error = 0.0
        for rows in torch.randperm(len(descriptors), generator=generator).split(size):
            batch = descriptors[rows].to(device).float()
            loss = nn.functional.mse_loss(network((batch - mean) * unit), batch * unit)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            error += loss.item() * len(rows)
        lost = error / len(descriptors)
        if log is not None:
            log(epoch=epoch, loss=round(lost, 6), explained_variance=round(1 - lost, 4))
        say(f"autoencoder, epoch {epoch}: the reconstruction keeps {1 - lost:.1%} of the variance")
    with torch.no_grad():
        error = 0.0
        for part in descriptors.split(BATCH):
            batch = part.to(device).float()
            error += float((network((batch - mean) * unit) - batch * unit).square().sum())
        _, upper = torch.linalg.qr(network.decoder.weight.double().cpu())
        projection = (upper @ network.encoder.weight.double().cpu()).float()
    return Fit(mean.cpu(), projection, 1 - error / descriptors.numel())


def _orthonormal(dim: int, channels: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows, (dim, channels)."""
    columns: Tensor = torch.linalg.qr(torch.randn(channels, dim, generator=generator))[0]
    return columns.T
