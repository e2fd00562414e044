"""What classifies while the trunk is fine-tuned: a linear layer (DELF), or ArcFace on a global descriptor (DELG).

Both take the trunk's map of features, (N, C, H, W) fp32 and never negative, and the labels (N,), and return the logits
(N, classes), and those that the loss is computed from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GEM_POWER = 3.0
"""Fixed, as in DELG, and the power that a photo's global descriptor is pooled with when it is extracted."""


_LEAST_DEVIATION = 0.03
"""Of an axis of the first whitening, relative to the largest."""


class SoftmaxHead(nn.Module):
    """A linear layer on the standardised spatial mean of the features.

    The means of a ReLU map are small and unlike in size from channel to channel: without standardising them the layer
    would need a learning rate of its own for each.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(channels, affine=False)
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.linear(self.standardise(features.mean(dim=(2, 3))))
        return logits, logits


class ArcFaceHead(nn.Module):
    """Generalised mean, L2, a fully connected layer that whitens, L2, and the cosine to a vector of each class.

    The logits are the cosines times a learnt scale. For the loss the angle to the photo's own class is enlarged by
    `margin` radians, so that descriptors of one class lie closer together than a boundary needs.

    dim: length of the global descriptor. scale: its first value, sqrt(2048) in DELG.

    Source: Cao, Araujo and Sim, "Unifying Deep Local and Global Features for Image Search", ECCV 2020, section 3.2;
    Deng et al., "ArcFace", CVPR 2019. DELG whitens the generalised mean as it is; here it has unit length before, as
    what is extracted has, which leaves the layer a mean and a projection (`reduction`).
    """

    def __init__(self, channels: int, classes: int, dim: int, margin: float = 0.1, scale: float = 45.25) -> None:
        super().__init__()
        self.whiten = nn.Linear(channels, dim)
        nn.init.orthogonal_(self.whiten.weight)
        nn.init.zeros_(self.whiten.bias)
        self.classes = nn.Parameter(nn.functional.normalize(torch.randn(classes, dim), dim=1))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.margin = margin

    @staticmethod
    def pooled(features: Tensor) -> Tensor:
        """Generalised means of unit length, (N, C)."""
        means = features.clamp(min=1e-6).pow(GEM_POWER).mean(dim=(2, 3)).pow(1 / GEM_POWER)
        return nn.functional.normalize(means, dim=1)

    def descriptors(self, features: Tensor) -> Tensor:
        """Global descriptors of unit length, (N, dim)."""
        return nn.functional.normalize(self.whiten(self.pooled(features)), dim=1)

    @torch.no_grad()
    def begin(self, pooled: Tensor, labels: Tensor) -> None:
        """Begin with what the trunk says of photos before training: the whitening is their whitened principal
        components, a class the mean of its descriptors; a class without a photo among them stays random.

        Pooled vectors of different photos are nearly parallel. From random layers all cosines would be alike, and the
        large scale would make of what is left of them steps that lead nowhere.

        pooled: (N, C). labels: (N,). Source of the class vectors: Qi et al., "Low-shot learning with imprinted
        weights", CVPR 2018.
        """
        mean = pooled.mean(0)
        _, deviations, axes = torch.linalg.svd((pooled - mean).double(), full_matrices=False)
        count = min(len(axes), len(self.whiten.weight))
        # Axes along which these photos hardly differ would hold noise alone.
        lengths = deviations[:count].clamp(min=max(float(deviations[0]) * _LEAST_DEVIATION, 1e-12))
        weight = axes[:count] / lengths[:, None]
        self.whiten.weight[:count] = (weight / weight.norm(dim=1).mean()).to(self.whiten.weight)
        self.whiten.bias.copy_(-self.whiten.weight @ mean)
        descriptors = nn.functional.normalize(self.whiten(pooled), dim=1)
        sums = torch.zeros_like(self.classes).index_add_(0, labels, descriptors)
        seen = labels.unique()
        self.classes[seen] = nn.functional.normalize(sums[seen], dim=1)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        cosines = self.descriptors(features) @ nn.functional.normalize(self.classes, dim=1).T
        logits = self.scale * cosines
        if labels is None:
            return logits, logits
        own = nn.functional.one_hot(labels, cosines.shape[1]).bool()
        return logits, self.scale * torch.where(own, self.penalised(cosines), cosines)

    def penalised(self, cosines: Tensor) -> Tensor:
        """cos(angle + margin); beyond the angle where that would rise again, a line below the cosine."""
        sines = (1 - cosines.square()).clamp(min=1e-9).sqrt()
        turned = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        return torch.where(cosines > -math.cos(self.margin), turned, cosines - self.margin * math.sin(self.margin))

    @torch.no_grad()
    def reduction(self) -> tuple[Tensor, Tensor]:
        """The whitening as a weight file's `global_reduction`: mean (C,) and projection (dim, C).

        W x + b is W (x - mean) for the mean -pinv(W) b; such a mean exists where W has dim independent rows.
        """
        weight, bias = self.whiten.weight.double(), self.whiten.bias.double()
        return (-torch.linalg.pinv(weight) @ bias).float(), weight.float()
