"""How far two extractions of one photo agree."""

from __future__ import annotations

from delf_milvus.features import Features


def agreement(one: Features, two: Features) -> tuple[float, float]:
    """Share of the keypoints of `one` that `two` has too, and the mean cosine of the descriptors of those."""
    rows = {(*p, s): i for i, (p, s) in enumerate(zip(two.locations.tolist(), two.scales.tolist(), strict=True))}
    pairs = [
        (i, rows[(*p, s)])
        for i, (p, s) in enumerate(zip(one.locations.tolist(), one.scales.tolist(), strict=True))
        if (*p, s) in rows
    ]
    mine, theirs = map(list, zip(*pairs, strict=True))
    return len(pairs) / len(one), float((one.descriptors[mine] * two.descriptors[theirs]).sum(1).mean())
