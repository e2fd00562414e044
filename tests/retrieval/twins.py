"""The plain, slow twin of the retrieval room: what it computes, written for reading.

Votes with dictionaries, mutual neighbours with loops, and the geometry as in the official DELF matching example
(tensorflow/models, research/delf): skimage's RANSAC with an affine model of three samples.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from reference_pipeline import verify

from delf_milvus.features import ORDINAL_BITS


def exact_neighbours(query, descriptors, keys, count):
    """The `count` most similar stored descriptors of each query descriptor: keys (Q, K), similarities (Q, K)."""
    similarity = query @ descriptors.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return keys[order], np.take_along_axis(similarity, order, axis=1)


def slow_vote(keys, similarities):
    """{image: score} and {(query feature, image): (similarity, ordinal)} of the best hits."""
    scores, best_hits = defaultdict(float), {}
    rows = [{} for _ in keys]
    for row, row_keys, row_similarities in zip(rows, keys.tolist(), similarities.tolist(), strict=True):
        for key, similarity in zip(row_keys, row_similarities, strict=True):
            if key >= 0:
                row[key] = max(similarity, row.get(key, -np.inf))
    single = max((np.count_nonzero(row_keys >= 0) for row_keys in keys), default=0) <= 1
    for feature, row in enumerate(rows):
        if not row:
            continue
        background = (
            0.0 if single else min(s for k, s in zip(keys[feature], similarities[feature], strict=True) if k >= 0)
        )
        by_image = defaultdict(list)
        for key, similarity in row.items():
            by_image[key >> ORDINAL_BITS].append((-similarity, key & ((1 << ORDINAL_BITS) - 1)))
        for image, hits in by_image.items():
            similarity, ordinal = min(hits)
            best_hits[feature, image] = (-similarity, ordinal)
            scores[image] += max(-similarity - float(background), 0) / len(hits) ** 0.5
    return dict(scores), best_hits


def slow_match(query, candidate, threshold):
    """[(query index, candidate index, similarity)] of mutual nearest neighbours, in falling similarity."""
    similarity = query @ candidate.T
    found = []
    for i in range(len(query)):
        j = int(np.argmax(similarity[i]))
        if int(np.argmax(similarity[:, j])) == i and similarity[i, j] >= threshold:
            found.append((i, j, float(similarity[i, j])))
    return sorted(found, key=lambda m: -m[2])


def slow_count(query, candidate, levels):
    """The votes of a candidate's features: of each query feature the best one above its level, damped by how many."""
    total = 0.0
    for row, level in zip(query, levels, strict=True):
        above = [similarity for similarity in candidate @ row if similarity > level + 1e-6]
        total += (float(max(above)) - float(level)) / len(above) ** 0.5 if above else 0.0
    return total


def slow_levels(query, candidates, others, share, wanted):
    """Of each query feature the similarity at which it has so many neighbours: each feature of the candidates is one,
    each of the others, given as a list of similarities for each query feature, stands for `share`."""
    levels = []
    for row, far in zip(query, others, strict=True):
        items = [(float(s), 1.0) for candidate in candidates for s in candidate @ row] + [(s, share) for s in far]
        items.sort(reverse=True)
        reached = np.cumsum([weight for _, weight in items])
        levels.append(items[int(np.argmax(reached >= wanted))][0])
    return levels


def slow_verify(query_points, image_points, residual, *, trials=1000, seed=0):
    """Inlier mask (M,) of skimage's RANSAC: affine, three samples."""
    return verify(query_points, image_points, residual, trials=trials, seed=seed).mask
