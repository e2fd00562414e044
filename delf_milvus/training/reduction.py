"""The reduction: PCA of the descriptors that selection keeps (paper, section 4.2; reference: no whitening).

The descriptors come from the whole pyramid with the selection in use, since those are the ones that will be stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from delf_milvus.errors import InputError, ModelError
from delf_milvus.imaging.decode import decode
from delf_milvus.ingestion.scan import scan
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.spec import Selection
from delf_milvus.settings import DecodeSettings, ExtractSettings
from delf_milvus.training.experiment import Experiment

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReductionConfig:
    """How to fit the reduction and export the model.

    data: folders of photos, searched recursively; exclude: names of folders that are left out.
    init: weight file with a trunk, and attention where `selection` asks for it.
    features: descriptors taken of each photo; photos: most photos used, evenly spread over the sorted paths.
    """

    data: tuple[Path, ...]
    out: Path
    init: Path
    exclude: tuple[str, ...] = ()
    selection: Selection = "attention"
    dim: int = 40
    features: int = 200
    photos: int = 1000


def fit_reduction(config: ReductionConfig, say: Say = print) -> Path:
    """Fit the reduction; returns the finished model: fp16 weights, ready for `--model`.

    Raises InputError for data that cannot be read, ModelError for a weight file that does not fit.
    """
    spec, tensors = weights.initial(config.init)
    experiment = Experiment(config)
    if config.selection == "attention" and not spec.attention_channels:
        raise ModelError(f"{config.init} has no attention head; give --selection norm, or train attention first.")
    channels = spec.trunk.channels
    excluded = set(config.exclude)
    photos = [photo for root in config.data for photo in scan([root]).photos if not excluded & set(photo.path.parts)]
    if not photos:
        raise InputError("There are no photos to fit the reduction on; give --data a folder of photos.")
    step = max(1, len(photos) / config.photos)
    photos = [photos[int(i * step)] for i in range(min(len(photos), config.photos))]

    # Identity as the projection: the extractor then yields the L2-normalised descriptors of full length.
    full = replace(spec, selection=config.selection, dim=channels)
    identity = {"reduction.mean": torch.zeros(channels), "reduction.projection": torch.eye(channels)}
    unreduced = config.out / "unreduced.safetensors"
    weights.save(unreduced, tensors | identity, full)
    extractor = Extractor(unreduced, ExtractSettings())
    total = torch.zeros(channels, dtype=torch.float64)
    products = torch.zeros(channels, channels, dtype=torch.float64)
    count = 0
    for number, photo in enumerate(photos, 1):
        pixels = decode(photo.path, DecodeSettings())
        descriptors = torch.from_numpy(extractor.extract(pixels, config.features).descriptors)
        total += descriptors.sum(0, dtype=torch.float64)
        products += (descriptors.T @ descriptors).double()
        count += len(descriptors)
        if number % 200 == 0:
            say(f"{number} of {len(photos)} photos")
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    projection = vectors.flip(1)[:, : config.dim].T
    # An eigenvector's sign is arbitrary; fixed so that two fits of the same data give the same file.
    signs = torch.sign(projection.gather(1, projection.abs().argmax(1, keepdim=True)))
    explained = float(values.flip(0)[: config.dim].sum() / values.sum())
    experiment.log(stage="reduction", photos=len(photos), descriptors=count, explained_variance=round(explained, 4))
    say(f"{count} descriptors of {len(photos)} photos; {config.dim} dimensions keep {explained:.1%} of the variance")
    reduction = {"reduction.mean": mean.float(), "reduction.projection": (projection * signs).float()}
    path = config.out / "model.safetensors"
    final = replace(spec, selection=config.selection, dim=config.dim)
    weights.save(path, tensors | reduction, final, half=True)
    unreduced.unlink()
    # The file is loaded once, so that a fit that cannot be used fails here.
    if not np.isfinite(weights.load(path).reduction.projection.numpy()).all():
        raise ModelError("The descriptors have too little variance to fit a reduction; give --data more photos.")
    return path
