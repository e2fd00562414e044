"""The reductions: of the descriptors that selection keeps, by PCA (paper, section 4.2; reference: no whitening) or by
the autoencoder of DELG (`autoencoder`), and of the global descriptors, by whitened PCA or as fine-tuning learnt it
(`heads`).

The descriptors come from the whole pyramid with the selection in use, since those are the ones that will be stored.
Global descriptors are whitened: what most photos have in common, sky or an object in the middle, would fill them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from delf_milvus.errors import ImageError, InputError, ModelError, UsageError, one_line
from delf_milvus.imaging.decode import decode
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.spec import Selection
from delf_milvus.settings import DecodeSettings, ExtractSettings
from delf_milvus.training import autoencoder
from delf_milvus.training.data import unlabelled_photos
from delf_milvus.training.experiment import Experiment
from delf_milvus.training.export import earlier, export, names, save_unreduced, with_stage
from delf_milvus.training.processes import started
from delf_milvus.training.watching import tell

Say = Callable[[str], None]
Method = Literal["pca", "autoencoder"]


@dataclass(frozen=True)
class ReductionConfig:
    """How to fit the reduction and export the model.

    data: folders of photos, searched recursively, or CSV files of Google Landmarks; exclude: names of folders, or
    landmark ids, that are left out.
    init: weight file with a trunk, and attention where `selection` asks for it.
    features: descriptors taken of each photo; photos: most photos used, evenly spread over the sorted paths.
    global_dim: length of the global descriptor; 0: the model has none. keep_global: keep the global reduction of
    `init`, whatever its length, and fit none.
    method: how the reduction of the descriptors is fitted; epochs, seed: of the autoencoder.
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
    keep_global: bool = False
    method: Method = "pca"
    epochs: int = 20
    seed: int = 0


def fit_reduction(config: ReductionConfig, say: Say = print, *, command: str | None = None) -> Path:
    """Fit the reduction; returns the finished model: fp16 weights, ready for `--model`. command: for the model card.

    Photos that cannot be read are left out, and told. Raises InputError for data that cannot be read or is too little,
    ModelError for a weight file that does not fit, and UsageError for more components than there are channels.
    """
    if started() > 1:
        raise UsageError("A reduction is fitted by one process; run it without torchrun.")
    spec, tensors = weights.initial(config.init)
    channels = spec.trunk.channels
    fitted_dim = 0 if config.keep_global else config.global_dim
    photos = _require(config, spec.attention_channels > 0, spec.global_dim if _has_global(tensors) else 0, channels)
    experiment = Experiment(config)
    kept = {name: tensor for name, tensor in tensors.items() if "reduction." not in name}
    if config.keep_global:
        kept |= {name: tensor for name, tensor in tensors.items() if name.startswith("global_reduction.")}
    unreduced = config.out / "unreduced.safetensors"
    save_unreduced(unreduced, tensors, replace(spec, selection=config.selection))
    found = _describe(photos, unreduced, config, say)
    unreduced.unlink()
    local, whole = found.local, found.whole
    if fitted_dim >= whole.count:
        raise InputError(_too_few(whole.count, fitted_dim))
    if config.dim >= local.count:
        raise InputError(
            f"{found.photos} photos have {local.count} descriptors, too few for {config.dim} components; give --data "
            "more photos, or a smaller --dim."
        )
    mean, projection, explained = local.components(config.dim)
    if config.method == "autoencoder":
        say(f"for comparison: {config.dim} principal components keep {explained:.1%}")
        descriptors = torch.cat(found.descriptors)
        mean, projection, explained = autoencoder.fit(
            descriptors, config.dim, config.epochs, config.seed, say, partial(experiment.log, stage="autoencoder")
        )
    explained = round(explained, 4)
    experiment.log(stage="reduction", photos=found.photos, descriptors=local.count, explained_variance=explained)
    say(f"{local.count} descriptors of {found.photos} photos: {config.dim} components keep {explained:.1%}")
    record: dict[str, Any] = {
        "data": names(config.data),
        "photos": found.photos,
        "initial weights": config.init.name,
        "method": config.method,
        "selection": config.selection,
        "dim": config.dim,
        "descriptors": local.count,
        "explained variance": explained,
    }
    kept |= {"reduction.mean": mean, "reduction.projection": projection}
    if fitted_dim:
        mean, projection, explained = whole.components(fitted_dim, whitened=True)
        experiment.log(stage="global reduction", photos=whole.count, explained_variance=round(explained, 4))
        say(f"{whole.count} global descriptors: {fitted_dim} components keep {explained:.1%}")
        kept |= {"global_reduction.mean": mean, "global_reduction.projection": projection}
        record["global descriptor"] = f"{fitted_dim} whitened components, which keep {explained:.1%}"
    elif config.keep_global:
        record["global descriptor"] = f"{spec.global_dim} components, as in the initial weights"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in kept.values()):
        raise ModelError("The descriptors have too little variance to fit a reduction; give --data more photos.")
    if command:
        record["command"] = command
    path = config.out / "model.safetensors"
    whole_dim = spec.global_dim if config.keep_global else fitted_dim
    final = replace(spec, selection=config.selection, dim=config.dim, global_dim=whole_dim)
    export(path, kept, final, with_stage(earlier(config.init), "reduction", record), half=True)
    # The file is loaded once, so that one that cannot be used fails here.
    weights.load(path)
    return path


@dataclass
class _Described:
    """What the photos gave: moments of their local and global descriptors, the local ones themselves, (N, C) fp16 a
    photo, where they are needed, and the number of photos that could be read."""

    local: Moments
    whole: Moments
    descriptors: list[torch.Tensor]
    photos: int = 0


def _describe(photos: list[Path], model: Path, config: ReductionConfig, say: Say) -> _Described:
    extractor = Extractor(model, ExtractSettings())
    channels = extractor.fingerprint.dim
    found = _Described(Moments(channels), Moments(channels), [])
    for number, photo in enumerate(photos, 1):
        try:
            pixels = decode(photo, DecodeSettings())
        except ImageError as error:
            say(f"left out: {one_line(error)}")
            continue
        features = extractor.extract(pixels, config.features)
        descriptors = torch.from_numpy(features.descriptors)
        found.local.add(descriptors)
        found.whole.add(torch.from_numpy(features.global_descriptor.reshape(-1, channels)))
        if config.method == "autoencoder":
            found.descriptors.append(descriptors.half())
        found.photos += 1
        tell(say, "reduction", number, len(photos))
        if number % 200 == 0:
            say(f"{number} of {len(photos)} photos")
    return found


def _has_global(tensors: dict[str, torch.Tensor]) -> bool:
    return "global_reduction.mean" in tensors


def _too_few(photos: int, dim: int) -> str:
    return (
        f"{photos} photos are too few for global descriptors of {dim} components; give --data more photos, or a "
        "smaller --global-dim."
    )


def _require(config: ReductionConfig, attention: bool, global_dim: int, channels: int) -> list[Path]:
    """The photos to fit to; raises what `fit_reduction` says, before anything is computed or written.

    attention, global_dim, channels: what the initial weights have.
    """
    if config.selection == "attention" and not attention:
        raise ModelError(f"{config.init} has no attention head; give --selection norm, or train attention first.")
    if config.keep_global and not global_dim:
        raise ModelError(
            f"{config.init} has no global reduction to keep; train finetune --global-head arcface first, or leave out "
            "--keep-global."
        )
    fitted = 0 if config.keep_global else config.global_dim
    for option, dim in (("--dim", config.dim), ("--global-dim", fitted)):
        if dim > channels:
            raise UsageError(f"{config.init} has {channels} channels; give {option} {channels} or less.")
    photos = unlabelled_photos(config.data, config.exclude)
    step = max(1, len(photos) / config.photos)
    photos = [photos[int(i * step)] for i in range(min(len(photos), config.photos))]
    if fitted >= len(photos):
        raise InputError(_too_few(len(photos), fitted))
    return photos


class Moments:
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
