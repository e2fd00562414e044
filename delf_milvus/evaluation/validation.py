"""Validation of training by retrieval, in memory: how well do weights find the photos of a folder again?

Photos lie in folders, one a thing or place; some of them are queries, and every other photo of the folder is right. A
query's own photo is in the collection and counts neither way. Local features are ranked as a search ranks them, without
the global descriptor's say, and global descriptors by their cosine, so that the two are seen apart.

Weights that have no reduction yet are judged with one of the validation's own photos: the first components of their
descriptors, and the global descriptors centred. Figures of one folder, queries and settings compare with each other,
not with those of `eval`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from delf_milvus.errors import InputError, one_line
from delf_milvus.evaluation.dataset import evenly
from delf_milvus.evaluation.folders import FoldersConfig, folders_set
from delf_milvus.evaluation.memory import MemoryCollection
from delf_milvus.evaluation.metrics import average_precision
from delf_milvus.features import Features
from delf_milvus.imaging.decode import decode
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.spec import read_header
from delf_milvus.retrieval.search import Timings, judge_candidates
from delf_milvus.settings import Settings
from delf_milvus.training.export import IDENTITY
from delf_milvus.training.reduction import Moments

MOST_PHOTOS = 2000
"""Photos of a validation folder at most: it is judged after every epoch."""

DIM = 40
"""Components that local descriptors are reduced to where the weights have no reduction."""

_FITTED = 100
"""Photos, evenly spread, that the components are fitted to: at full length, descriptors of more would fill memory."""

Floats = npt.NDArray[np.float64]


class RetrievalValidation:
    """Judges weight files by the photos of a folder; the network runs, and the search is made, as the settings say.

    queries: of them at most, evenly spread. photos: the resolved paths of all photos that take part.

    Raises InputError for a folder with more than `MOST_PHOTOS` photos, without two photos of one thing, or with a file
    that cannot be read.
    """

    def __init__(self, folder: Path, queries: int, settings: Settings) -> None:
        data = folders_set(FoldersConfig(folder))
        if data.failures:
            raise InputError(f"{one_line(data.failures[0].path)} cannot be read; mend it, or leave it out.")
        if len(data.photos) > MOST_PHOTOS:
            raise InputError(
                f"{one_line(folder)} has {len(data.photos)} photos, and is searched after every epoch; give --validate "
                f"a folder of {MOST_PHOTOS} at most."
            )
        self._queries = evenly(data.queries, queries)
        self._paths = {photo.image_id: photo.path for photo in data.photos}
        self._settings = settings
        self.photos = frozenset(path.resolve() for path in self._paths.values())

    def __call__(self, model: Path) -> dict[str, float]:
        """Mean average precision of the local features, `retrieval_map`, and of the global descriptors,
        `retrieval_map_global`, of a weight file that has one.

        Raises ImageError for a photo that cannot be decoded, ModelError for a weight file that cannot be used.
        """
        precisions = self.precisions(model)
        return {name: float(values.mean()) for name, values in precisions.items()}

    def precisions(self, model: Path) -> dict[str, Floats]:
        """The average precision of each query, (Q,), by figure."""
        features = self._extracted(model)
        names = list(features)
        plan = self._settings.extract.plan
        local = MemoryCollection(names, [one.top(plan.stored_features) for one in features.values()], exact=True)
        search = self._settings.search.model_copy(update={"global_weight": 0.0})
        found: dict[str, list[float]] = {"retrieval_map": []}
        vectors = [one.global_descriptor for one in features.values()]
        whole = np.array(vectors) if all(map(len, vectors)) else None
        if whole is not None:
            found["retrieval_map_global"] = []
        for query in self._queries:
            own = features[query.name]
            judged = judge_candidates(own.top(plan.query_features), local, search, self._settings.verify, Timings())
            ranking = [candidate.image_id for candidate in judged.candidates]
            ranking += [names[number] for number in judged.rest.tolist()]
            truth = query.truth
            found["retrieval_map"].append(average_precision(ranking, truth.relevant, truth.junk))
            if whole is not None:
                order = np.argsort(-(whole @ own.global_descriptor), kind="stable")
                ranking = [names[number] for number in order.tolist()]
                found["retrieval_map_global"].append(average_precision(ranking, truth.relevant, truth.junk))
        return {name: np.array(values) for name, values in found.items()}

    def _extracted(self, model: Path) -> dict[str, Features]:
        """The features of all photos by name, reduced."""
        extractor = Extractor(model, self._settings.extract)
        identity = read_header(model)[1].get(IDENTITY, [])
        plan = extractor.plan
        count = max(plan.stored_features, plan.query_features)

        def extracted(name: str) -> Features:
            return extractor.extract(decode(self._paths[name], self._settings.decode), count)

        if "reduction" not in identity:
            return {name: extracted(name) for name in self._paths}
        names = list(self._paths)
        sample = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, _FITTED).round().astype(int)).tolist()]
        full = {name: extracted(name) for name in sample}
        moments = Moments(extractor.fingerprint.dim)
        for one in full.values():
            moments.add(torch.from_numpy(one.descriptors))
        mean, projection, _ = moments.components(min(DIM, extractor.fingerprint.dim))

        def reduced(one: Features) -> Features:
            codes = (one.descriptors - mean.numpy()) @ projection.numpy().T
            codes /= np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
            return _with(one, codes.astype(np.float32), one.global_descriptor)

        short = {name: reduced(full.pop(name) if name in full else extracted(name)) for name in names}
        if "global_reduction" not in identity:
            return short
        vectors = [one.global_descriptor for one in short.values() if len(one.global_descriptor)]
        if not vectors:
            return short
        centre = np.mean(vectors, axis=0)
        return {
            name: _with(one, one.descriptors, _centred(one.global_descriptor, centre)) for name, one in short.items()
        }


def _with(one: Features, descriptors: npt.NDArray[np.float32], whole: npt.NDArray[np.float32]) -> Features:
    return Features(one.locations, one.scales, one.attention, descriptors, one.width, one.height, whole)


def _centred(vector: npt.NDArray[np.float32], centre: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not len(vector):
        return vector
    moved = vector - centre
    length = np.linalg.norm(moved)
    # A photo that is the mean itself is like no other.
    return np.asarray(moved / length if length > 1e-6 else vector, np.float32)
