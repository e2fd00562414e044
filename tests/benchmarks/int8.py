"""The network in int8 beside fp32, on OpenVINO: seconds a photo, and how far the features agree.

    pip install nncf
    python tests/benchmarks/int8.py --photos ../shared/data/objects --judged ../shared/data/landmarks

Post-training quantisation of every convolution, its ranges from the levels of `--photos`; "mixed" leaves the attention
head and the first convolution in fp32. Photos of both take turns, so that other load falls on both alike. Common
keypoints and cosine are of the 1000 best features; the cosine of the whole is that of the global descriptors.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import nncf
import numpy as np
import torch
from agreement import agreement

from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.openvino_network import OpenVinoNetwork
from delf_milvus.settings import DecodeSettings, ExtractSettings


class Quantised(Extractor):
    """The extractor over a network that was quantised with the levels of some photos."""

    def __init__(self, model: str, settings: ExtractSettings, photos: list[RgbImage], scope: Any) -> None:
        super().__init__(model, settings)
        levels = [
            pixels[None].float().numpy()
            for photo in photos
            for scale in self.plan.scales
            if (pixels := self._resized(photo, scale * min(1.0, self.plan.longest_side / max(photo.shape[:2]))))
            is not None
        ]
        self._network = OpenVinoNetwork(
            weights.load(self.path),
            self.selection,
            torch.float32,
            lambda found: nncf.quantize(
                found,
                nncf.Dataset(levels),
                subset_size=len(levels),
                preset=nncf.QuantizationPreset.MIXED,
                ignored_scope=scope,
            ),
        )


def photos_of(folder: Path, count: int) -> list[RgbImage]:
    paths = sorted(folder.rglob("*.jpg"))
    return [decode(path, DecodeSettings()) for path in paths[:: max(1, len(paths) // count)][:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="to take the ranges from")
    parser.add_argument("--judged", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--ranges", type=int, default=40, metavar="PHOTOS")
    parser.add_argument("--count", type=int, default=12)
    options = parser.parse_args()
    settings = ExtractSettings(runtime="openvino", precision="fp32")
    ranges = photos_of(options.photos, options.ranges)
    extractors: dict[str, Extractor] = {
        "fp32": Extractor(options.model, settings),
        "int8": Quantised(options.model, settings, ranges, None),
        "mixed": Quantised(
            options.model,
            settings,
            ranges,
            nncf.IgnoredScope(patterns=[".*attention.*", ".*trunk.conv1.*"], validate=False),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in extractors}
    agreed: dict[str, list[tuple[float, float, float]]] = {name: [] for name in extractors}
    for photo in photos_of(options.judged, options.count):
        found = {}
        for name, extractor in extractors.items():
            extractor.extract(photo, 1000)
            started = time.process_time()
            found[name] = extractor.extract(photo, 1000)
            seconds[name].append(time.process_time() - started)
            whole = float(found["fp32"].global_descriptor @ found[name].global_descriptor)
            agreed[name].append((*agreement(found["fp32"], found[name]), whole))
    print("        CPU s a photo   times fp32   common keypoints   cosine   cosine of the whole")
    for name, own in seconds.items():
        ratio = np.median(np.array(seconds["fp32"]) / np.array(own))
        common, cosine, whole = np.mean(agreed[name], axis=0)
        print(f"{name:6}  {np.median(own):13.2f}  {ratio:10.2f}x  {common:16.1%}  {cosine:7.4f}  {whole:7.4f}")


if __name__ == "__main__":
    main()
