"""The reductions: PCA of the descriptors that selection keeps (paper, section 4.2; reference: no whitening), and
whitened PCA of the global descriptors.

The descriptors come from the whole pyramid with the selection in use, since those are the ones that will be stored.
Global descriptors are whitened: what most photos have in common, sky or an object in the middle, would fill them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from delf_milvus.errors import InputError, ModelError
from delf_milvus.imaging.decode import decode
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.spec import Selection
from delf_milvus.settings import DecodeSettings, ExtractSettings
from delf_milvus.training.data import unlabelled_photos
from delf_milvus.training.experiment import Experiment
from delf_milvus.training.watching import tell

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReductionConfig:
    """How to fit the reduction and export the model.

    data: folders of photos, searched recursively, or CSV files of Google Landmarks; exclude: names of folders, or
    landmark ids, that are left out.
    init: weight file with a trunk, and attention where `selection` asks for it.
    features: descriptors taken of each photo; photos: most photos used, evenly spread over the sorted paths.
    global_dim: length of the global descriptor; 0: the model has none.
    """

    data: tuple[Path, ...]
    out: Path
    init: Path
    exclude: tuple[str, ...] = ()
    selection: Selection = "attention"
    dim: int = 40
    features: int = 200
    photos: int = 1000
    global_dim: int = 128


def fit_reduction(config: ReductionConfig, say: Say = print) -> Path:
    """Fit the reduction; returns the finished model: fp16 weights, ready for `--model`.

    Raises InputError for data that cannot be read, ModelError for a weight file that does not fit.
    """
    spec, tensors = weights.initial(config.init)
    experiment = Experiment(config)
    if config.selection == "attention" and not spec.attention_channels:
        raise ModelError(f"{config.init} has no attention head; give --selection norm, or train attention first.")
    channels = spec.trunk.channels
    photos = unlabelled_photos(config.data, config.exclude)
    step = max(1, len(photos) / config.photos)
    photos = [photos[int(i * step)] for i in range(min(len(photos), config.photos))]

    # Identity as the projection: the extractor then yields the L2-normalised descriptors of full length.
    full = replace(spec, selection=config.selection, dim=channels, global_dim=channels)
    identity = {
        f"{prefix}reduction.{name}": tensor
        for prefix in ("", "global_")
        for name, tensor in (("mean", torch.zeros(channels)), ("projection", torch.eye(channels)))
    }
    unreduced = config.out / "unreduced.safetensors"
    kept = {name: tensor for name, tensor in tensors.items() if "reduction." not in name}
    weights.save(unreduced, kept | identity, full)
    extractor = Extractor(unreduced, ExtractSettings())
    local, whole = _Moments(channels), _Moments(channels)
    for number, photo in enumerate(photos, 1):
        pixels = decode(photo, DecodeSettings())
        features = extractor.extract(pixels, config.features)
        local.add(torch.from_numpy(features.descriptors))
        whole.add(torch.from_numpy(features.global_descriptor.reshape(-1, channels)))
        tell(say, "reduction", number, len(photos))
        if number % 200 == 0:
            say(f"{number} of {len(photos)} photos")
    if config.global_dim >= whole.count:
        raise InputError(
            f"{whole.count} photos are too few for global descriptors of {config.global_dim} components; give --data "
            "more photos, or a smaller --global-dim."
        )
    mean, projection, explained = local.components(config.dim)
    experiment.log(
        stage="reduction", photos=len(photos), descriptors=local.count, explained_variance=round(explained, 4)
    )
    say(f"{local.count} descriptors of {len(photos)} photos: {config.dim} components keep {explained:.1%}")
    reductions = {"reduction.mean": mean, "reduction.projection": projection}
    if config.global_dim:
        mean, projection, explained = whole.components(config.global_dim, whitened=True)
        experiment.log(stage="global reduction", photos=whole.count, explained_variance=round(explained, 4))
        say(f"{whole.count} global descriptors: {config.global_dim} components keep {explained:.1%}")
        reductions |= {"global_reduction.mean": mean, "global_reduction.projection": projection}
    path = config.out / "model.safetensors"
    final = replace(spec, selection=config.selection, dim=config.dim, global_dim=config.global_dim)
    weights.save(path, kept | reductions, final, half=True)
    unreduced.unlink()
    # The file is loaded once, so that a fit that cannot be used fails here.
    if not np.isfinite(weights.load(path).reduction.projection.numpy()).all():
        raise ModelError("The descriptors have too little variance to fit a reduction; give --data more photos.")
    return path


class _Moments:
    """Sums over vectors of so many components, from which their principal components follow."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._total = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, vectors: torch.Tensor) -> None:
        """Vectors (N, C)."""
        self._total += vectors.sum(0, dtype=torch.float64)
        self._products += (vectors.T @ vectors).double()
        self.count += len(vectors)

    def components(self, dim: int, *, whitened: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Mean (C,), projection (dim, C) onto the first components, and the share of the variance that they keep.

        whitened: each component divided by its standard deviation.
        """
        mean = self._total / self.count
        covariance = self._products / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values, projection = values.flip(0), vectors.flip(1)[:, :dim].T
        # An eigenvector's sign is arbitrary; fixed so that two fits of the same data give the same file.
        projection = projection * torch.sign(projection.gather(1, projection.abs().argmax(1, keepdim=True)))
        if whitened:
            projection = projection / values[:dim, None].clamp(min=1e-12).sqrt()
        return mean.float(), projection.float(), float(values[:dim].sum() / values.sum())
