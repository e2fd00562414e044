"""The DELF network: trunk, attention head, reduction, and the reduction of the global descriptor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from delf_milvus.model.spec import ModelSpec, Selection
from delf_milvus.model.trunk import Trunk


class AttentionHead(nn.Module):
    """1x1 convolution, BatchNorm, ReLU, 1x1 convolution, softplus (paper, section 4.2).

    Takes the un-normalised feature map (N, C, H, W), returns positive scores (N, 1, H, W).
    """

    def __init__(self, channels: int, hidden: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden, epsilon)
        self.conv2 = nn.Conv2d(hidden, 1, 1)

    def hidden(self, features: Tensor) -> Tensor:
        """The hidden layer, (N, hidden, H, W)."""
        return torch.relu_(self.bn(self.conv1(features)))

    def score(self, hidden: Tensor) -> Tensor:
        """The scores of a hidden layer, (N, 1, H, W) fp32."""
        # In bf16 neighbouring cells would often get the same score, and their order would be chance.
        return nn.functional.softplus(self.conv2(hidden.to(self.conv2.weight.dtype)).float())

    def forward(self, features: Tensor) -> Tensor:
        return self.score(self.hidden(features))


class Reduction(nn.Module):
    """L2, subtract mean, project, L2: the post-processing of every descriptor, local or global, always in fp32.

    Takes (N, C) descriptors, returns (N, dim).
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("projection", torch.zeros(dim, channels))

    def forward(self, descriptors: Tensor) -> Tensor:
        x = nn.functional.normalize(descriptors.float(), dim=1)
        return nn.functional.normalize((x - self.mean) @ self.projection.T, dim=1)


def pooled(levels: Sequence[Tensor], power: float = 3.0) -> Tensor:
    """One vector of unit length, (..., C), of a photo's maps: generalised mean over the cells, then the mean over
    levels.

    levels: the map of each pyramid level, (..., n, C), never negative. Each level counts as much as the others.
    Source: Radenovic et al., Fine-tuning CNN image retrieval with no human annotation, TPAMI 2018.
    """
    means = [cells.float().clamp(min=1e-6).pow(power).mean(dim=-2).pow(1 / power) for cells in levels]
    total = torch.stack([nn.functional.normalize(mean, dim=-1) for mean in means]).sum(dim=0)
    return nn.functional.normalize(total, dim=-1)


class Delf(nn.Module):
    """Trunk, attention head (where the specification has one), reduction, and that of the global descriptor (where the
    specification has one).

    `forward` takes RGB in [0, 255], (N, 3, H, W), and returns (features (N, C, h, w), scores (N, 1, h, w)).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.trunk.channels
        self.trunk = Trunk(spec.trunk)
        self.attention: AttentionHead | None = None
        if spec.attention_channels:
            self.attention = AttentionHead(channels, spec.attention_channels, spec.trunk.epsilon)
        self.reduction = Reduction(channels, spec.dim)
        self.global_reduction = Reduction(channels, spec.global_dim) if spec.global_dim else None

    def forward(self, pixels: Tensor, selection: Selection | None = None) -> tuple[Tensor, Tensor]:
        raw, features = self.trunk(pixels)
        if (selection or self.spec.selection) == "norm" or self.attention is None:
            # bf16 has 8 bits of mantissa: a norm over 1024 channels is summed in fp32.
            return features, torch.linalg.vector_norm(raw.float(), dim=1, keepdim=True)
        return features, self.attention(features)
