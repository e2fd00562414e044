"""How far the features of one photo agree between libraries and precisions: whether a collection may hold both.

    python tests/benchmarks/mixed_precision.py --photos ../shared/data/landmarks

For each pair: share of common keypoints among the 1000 best, mean cosine of their descriptors, and cosine of the global
descriptors; mean and least over the photos.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import combinations
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import numpy as np
from agreement import agreement
from extraction import VARIANTS

from delf_milvus.imaging.decode import decode
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import PRESETS, DecodeSettings, ExtractSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--preset", choices=list(PRESETS), default="standard")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    paths = sorted(path for folder in options.photos for path in folder.rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    extractors = {
        name: Extractor(options.model, ExtractSettings(preset=options.preset, **VARIANTS[name]))  # type: ignore[arg-type]
        for name in options.variants
    }
    figures: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for path in paths:
        photo = decode(path, DecodeSettings())
        found = {name: extractor.extract(photo, 1000) for name, extractor in extractors.items()}
        for one, two in combinations(found, 2):
            whole = float(found[one].global_descriptor @ found[two].global_descriptor)
            figures.setdefault((one, two), []).append((*agreement(found[one], found[two]), whole))
    print(f"{len(paths)} photos, {options.preset}; mean (least)")
    print(f"{'':31}  common keypoints   cosine             global cosine")
    for (one, two), rows in figures.items():
        mean, least = np.mean(rows, axis=0), np.min(rows, axis=0)
        print(
            f"{one:14} - {two:14}  {mean[0]:6.1%} ({least[0]:6.1%})   {mean[1]:.5f} ({least[1]:.5f})"
            f"  {mean[2]:.5f} ({least[2]:.5f})"
        )


if __name__ == "__main__":
    main()
