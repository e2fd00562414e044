"""Seconds a photo: the extractor beside the plain fp32 eager network, on the same photos in the same run.

    python tests/benchmarks/extraction.py --photos ../shared/data/landmarks

Also prints how far the two agree: cosine of the descriptors of common keypoints, share of common keypoints.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from delf_milvus.features import Features
from delf_milvus.imaging.decode import decode
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import PRESETS, DecodeSettings, ExtractSettings


class Plain(Extractor):
    """The same pyramid over the network as it was loaded: fp32, nothing folded, channels first."""

    def __init__(self, model: str, settings: ExtractSettings) -> None:
        super().__init__(model, settings)
        network = weights.load(self.path)
        inner = network.forward
        network.forward = lambda pixels, selection: inner(pixels.contiguous(), selection)  # type: ignore[method-assign]
        self._network = network


def agreement(one: Features, two: Features) -> tuple[float, float]:
    """Share of common keypoints, and the mean cosine of their descriptors."""
    rows = {(*p, s): i for i, (p, s) in enumerate(zip(two.locations.tolist(), two.scales.tolist(), strict=True))}
    pairs = [
        (i, rows[(*p, s)])
        for i, (p, s) in enumerate(zip(one.locations.tolist(), one.scales.tolist(), strict=True))
        if (*p, s) in rows
    ]
    mine, theirs = map(list, zip(*pairs, strict=True))
    return len(pairs) / len(one), float((one.descriptors[mine] * two.descriptors[theirs]).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    paths = sorted(options.photos.rglob("*.jpg"))
    photos = [decode(p, DecodeSettings()) for p in paths[:: max(1, len(paths) // options.count)][: options.count]]
    print("preset     plain fp32   extractor   ratio   common keypoints   cosine")
    with torch.inference_mode():
        for preset in PRESETS:
            settings = ExtractSettings(preset=preset)
            plain, fast = Plain(options.model, settings), Extractor(options.model, settings)
            count = settings.plan.stored_features
            seconds: dict[str, list[float]] = {"plain": [], "fast": []}
            agreements = []
            for photo in photos:
                found = {}
                for name, extractor in (("plain", plain), ("fast", fast)):
                    extractor.extract(photo, count)
                    started = time.perf_counter()
                    found[name] = extractor.extract(photo, count)
                    seconds[name].append(time.perf_counter() - started)
                agreements.append(agreement(found["fast"], found["plain"]))
            slow, quick = (float(np.median(seconds[name])) for name in ("plain", "fast"))
            common, cosine = np.mean(agreements, axis=0)
            print(f"{preset:8}   {slow:10.3f}   {quick:9.3f}   {slow / quick:5.1f}   {common:16.1%}   {cosine:.4f}")


if __name__ == "__main__":
    main()
