"""The feature files that an extraction writes: one a photo, or one in all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from delf_milvus.errors import DelfMilvusError, InputError, UsageError, one_line
from delf_milvus.featurefiles import delf, hloc, npz
from delf_milvus.featurefiles.arrays import LocalFeatures
from delf_milvus.featurefiles.formats import MANY, SUFFIX_OF, Format
from delf_milvus.features import Features, Fingerprint


class FeatureFolder:
    """Writes the features of photos by their ids: `id.npz` or `id.delf` in a folder, or groups of one `.h5` file.

    out: the folder; for hloc also the file itself, which is `features.h5` in a folder. fingerprint: of the model, which
    is kept in the files (not in `.delf`, which has no place for it). writer: which of several at a time this is;
    an `.h5` file has one, so each gets its own, `features.WRITER.h5`.
    """

    def __init__(self, out: Path, format: Format, fingerprint: Fingerprint, writer: str = "") -> None:
        self._format = format
        self._extractor = fingerprint.to_json()
        self._stride = fingerprint.stride
        self._out = out
        if format == "hloc" and out.suffix.lower() not in MANY:
            self._out = out / f"features{SUFFIX_OF[format]}"
        if format == "hloc" and writer:
            self._out = self._out.with_suffix(f".{writer}{self._out.suffix}")
        self._names: set[str] | None = None

    def path_of(self, image_id: str) -> Path:
        """The file that a photo's features are in."""
        return self._out if self._format == "hloc" else self._out / f"{image_id}{SUFFIX_OF[self._format]}"

    def has(self, image_id: str) -> bool:
        """Whether a photo's features are there; a damaged file of one photo counts as none.

        Raises UsageError where they are of another model or preset, InputError for a damaged `.h5` file.
        """
        path = self.path_of(image_id)
        if self._format == "hloc":
            return image_id in self._known()
        if not path.is_file():
            return False
        try:
            made_by = npz.read(path).extractor if self._format == "npz" else self._extractor
        except DelfMilvusError:
            return False
        self._check(path, made_by)
        return True

    def write(self, image_id: str, features: Features) -> None:
        """Write a photo's features. Raises InputError where that is impossible."""
        path = self.path_of(image_id)
        found = LocalFeatures.of(features, self._extractor)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._format == "hloc":
                self._known().add(image_id)
                hloc.write(path, image_id, found, _uncertainty(features, self._stride))
            else:
                (npz if self._format == "npz" else delf).write(path, found)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{one_line(path)} cannot be written: {one_line(reason)}.") from error

    def _known(self) -> set[str]:
        if self._names is None:
            self._names = set()
            if self._out.exists():
                self._names = set(hloc.names(self._out))
                if self._names:
                    self._check(self._out, hloc.extractor_of(self._out))
        return self._names

    def _check(self, path: Path, made_by: str) -> None:
        if made_by != self._extractor:
            raise UsageError(
                f"{one_line(path)} holds features of another model or preset; give --out another place, or remove it."
            )


def _uncertainty(features: Features, stride: int) -> float:
    """Standard deviation of a place that is known to a cell of the network's grid, mean of the features, pixels."""
    if not len(features):
        return 1.0
    return float(stride * np.mean(features.scales, dtype=np.float64) / math.sqrt(12))
