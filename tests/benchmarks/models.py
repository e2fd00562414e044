"""CPU seconds a photo of the models that come with the package, side by side: decoded and extracted.

    python tests/benchmarks/models.py --photos ../shared/data/landmarks

The models take turns at each photo, so that other load falls on all alike; figures are medians over the photos, ratios
those of one photo against the first model with the same library.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from extraction import measured

from delf_milvus.imaging.decode import decode
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import PRESETS, DecodeSettings, ExtractSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["bundled", "small"])
    parser.add_argument("--runtimes", nargs="+", choices=["torch", "openvino"], default=["torch", "openvino"])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["standard"])
    parser.add_argument("--count", type=int, default=12)
    options = parser.parse_args()
    files = sorted(options.photos.rglob("*.jpg"))
    files = files[:: max(1, len(files) // options.count)][: options.count]
    print("preset    library   model         seconds  CPU seconds  ratio [least, most]")
    for preset in options.presets:
        for runtime in options.runtimes:
            settings = ExtractSettings(preset=preset, runtime=runtime)
            extractors = {name: Extractor(name, settings) for name in options.models}
            count = settings.plan.stored_features
            spent: dict[str, list[tuple[float, float]]] = {name: [] for name in extractors}
            for number, path in enumerate([files[0], *files]):
                for name, extractor in extractors.items():
                    run = lambda: extractor.extract(decode(path, DecodeSettings()), count)  # noqa: B023, E731
                    _, wall, cpu = measured(run)
                    if number:
                        spent[name].append((wall, cpu))
            plain = np.array(spent[options.models[0]])
            for name in extractors:
                own = np.array(spent[name])
                wall, cpu = np.median(own, axis=0)
                ratios = plain[:, 1] / own[:, 1]
                print(
                    f"{preset:9} {runtime:9} {Path(name).stem:12}  {wall:7.3f}  {cpu:11.3f}"
                    f"  {np.median(ratios):5.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"
                )


if __name__ == "__main__":
    main()
