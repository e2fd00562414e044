"""Keys that any number of writers agree on without talking to each other.

An image's key is 51 bits of a hash of its tenant and its id; a feature's key is `image_key << ORDINAL_BITS | ordinal`,
ordinals counting from 0 in falling attention. Both are non-negative and fit a signed 64-bit integer, so that a bare
neighbour key says which image and which keypoint was hit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.features import MAX_FEATURES, ORDINAL_BITS

Int64Array = npt.NDArray[np.int64]

IMAGE_KEY_BITS = 63 - ORDINAL_BITS
"""Bits of an image key: what is left of a positive INT64 beside the ordinal."""


def image_key(image_id: str, tenant: str = "") -> int:
    """The key of an image: the first 51 bits of BLAKE2b over tenant and id, the tenant framed by its length."""
    owner = tenant.encode("utf-8", "surrogatepass")
    framed = len(owner).to_bytes(8, "little") + owner + image_id.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(framed, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - IMAGE_KEY_BITS)


def feature_keys(key: int, count: int, first: int = 0) -> Int64Array:
    """The keys of an image's features with ordinals from `first` up to, but without, `count`: (count - first,) int64.

    Raises ValueError for an image key or an ordinal out of range.
    """
    if not 0 <= key < 1 << IMAGE_KEY_BITS:
        raise ValueError(f"an image key has {IMAGE_KEY_BITS} bits, {key} does not fit")
    if not 0 <= first <= count <= MAX_FEATURES:
        raise ValueError(f"ordinals are between 0 and {MAX_FEATURES}, not from {first} to {count}")
    return np.arange(first, count, dtype=np.int64) + (key << ORDINAL_BITS)


def split_keys(keys: npt.NDArray[Any]) -> tuple[Int64Array, Int64Array]:
    """Image keys and ordinals of feature keys of any shape, int64. The padding key -1 gives the image key -1."""
    whole = np.asarray(keys, dtype=np.int64)
    return whole >> ORDINAL_BITS, whole & (MAX_FEATURES - 1)
