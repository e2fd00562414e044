"""A collection in memory: the same search as over Milvus, without a database, for judging and calibrating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.features import ORDINAL_BITS, Features
from delf_milvus.retrieval.answers import Named
from delf_milvus.retrieval.search import Candidate

LISTS_VISITED = 1 / 32
"""Share of the inverted lists that a search visits: what is lost is below what an evaluation can resolve."""


class MemoryCollection:
    """Images by number, in the order given; a `CandidateSource` for the search.

    names: image ids. features: their stored features, all of one dimension. exact: compare with every descriptor,
    which for millions takes seconds a query.
    """

    def __init__(self, names: Sequence[str], features: Sequence[Features], *, exact: bool = False) -> None:
        # faiss comes with the embedded database.
        import faiss

        self.names = list(names)
        self.features = list(features)
        counts = np.array([len(f) for f in self.features], np.int64)
        images = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        ordinals = np.concatenate([np.arange(n, dtype=np.int64) for n in counts])
        self._keys = images << ORDINAL_BITS | ordinals
        descriptors = np.concatenate([f.descriptors for f in self.features])
        dim = descriptors.shape[1]
        lists = min(4096, len(descriptors) // 400)
        if exact or lists < 64:
            self._index: Any = faiss.index_factory(dim, "Flat", faiss.METRIC_INNER_PRODUCT)
        else:
            self._index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).permutation(len(descriptors))[: lists * 60]
            self._index.train(descriptors[np.sort(sample)])
            self._index.nprobe = max(8, round(lists * LISTS_VISITED))
        self._index.add(descriptors)
        length = max((len(f.global_descriptor) for f in self.features), default=0)
        none = np.zeros(length, np.float32)
        self._globals = np.array([f.global_descriptor if len(f.global_descriptor) else none for f in self.features])

    def neighbours(
        self, descriptors: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Feature keys (Q, k) and similarities (Q, k)."""
        similarities, rows = self._index.search(descriptors, k)
        return np.where(rows >= 0, self._keys[rows], -1), similarities

    def similar(
        self, descriptor: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Numbers (N,) and similarities (N,) of the nearest images by global descriptor; exact."""
        similarities = self._globals @ descriptor
        nearest = np.argsort(-similarities, kind="stable")[:k]
        return nearest, similarities[nearest]

    def candidates(self, image_keys: npt.NDArray[np.int64]) -> dict[int, Candidate]:
        """The images of these numbers."""
        return {i: Candidate(self.names[i], self.names[i], self.features[i]) for i in image_keys.tolist()}

    def named(self, image_keys: npt.NDArray[np.int64]) -> dict[int, Named]:
        """The same without their features."""
        return {i: Named(self.names[i], self.names[i]) for i in image_keys.tolist()}
