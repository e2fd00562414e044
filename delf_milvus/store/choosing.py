"""Which features of an image a search looks for, where it does not look for all of them.

The others are compared with a query, and vote, all the same, once the indexed ones or the global descriptor have made
the image a candidate: they lie packed in its row, on disk, and take no memory of the index.

Spread: the features come one after the other, each the one whose score is worth most by then. What lies near a chosen
one and looks like it is worth less: the same corner at two scales, one window of many, leaves of one tree. That is
non-maximum suppression whose radius need not be tuned to the number: every first part of the order is spread too.
"""

from __future__ import annotations

import numpy as np

from delf_milvus.features import Features

_RADIUS = 0.06
"""Standard deviation of nearness, of the square root of the photo's area."""

_LEAST = 1e-3
"""What of a score is left at least: scores stay far from where half precision ends."""


def spread(features: Features, count: int) -> Features:
    """The same features with `count` first that are spread over the photo and unlike each other, in the order chosen.

    Their attention is what was left of the score when each was chosen, of the others what is left then, so that it
    falls as it must; scores that are not all positive count from the lowest one. The global descriptor stays. Equal
    features always come in the same order.
    """
    scores = features.attention.astype(np.float64)
    low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
    if low <= 0:
        scores = (scores - low) / (high - low) + _LEAST if high > low else np.ones(len(features))
    places = features.locations / (_RADIUS * np.sqrt(features.width * features.height))
    left = np.ones(len(features))
    order: list[int] = []
    worth: list[float] = []
    chosen = np.zeros(len(features), bool)
    for _ in range(min(count, len(features))):
        values = np.where(chosen, -1.0, scores * left)
        best = int(values.argmax())
        order.append(best)
        worth.append(float(values[best]))
        chosen[best] = True
        near = np.exp(-0.5 * ((places - places[best]) ** 2).sum(axis=1))
        alike = np.maximum(features.descriptors @ features.descriptors[best], 0) ** 2
        left = np.maximum(left * (1 - np.minimum(near * alike, 1)), _LEAST)
    values = scores * left
    rest = np.flatnonzero(~chosen)
    rest = rest[np.argsort(-values[rest], kind="stable")]
    rows = np.concatenate([np.array(order, np.intp), rest])
    attention = np.concatenate([np.array(worth), values[rest]]).astype(np.float32)
    return Features(
        features.locations[rows],
        features.scales[rows],
        attention,
        features.descriptors[rows],
        features.width,
        features.height,
        features.global_descriptor,
    )
