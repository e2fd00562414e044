"""Seconds a photo by each library and precision, beside the plain fp32 eager network, and how far they agree with it.

    python tests/benchmarks/extraction.py --photos ../shared/data/landmarks

All of them extract the same photos in turn, so that other load falls on all alike; figures are medians over the photos,
ratios those of one photo. CPU seconds are what the process used: beside other load they are the surer figure.
"of matmul" is the floating-point operations of the pyramid's network (a product and its sum are two) a CPU second,
against those of a product of two large matrices of the same precision by the same library. Common keypoints and cosine
are of the features stored in the preset, against the plain network's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import numpy as np
import torch
from agreement import agreement
from torch.utils.flop_counter import FlopCounterMode

from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import PRESETS, DecodeSettings, ExtractionPlan, ExtractSettings

VARIANTS: dict[str, dict[str, str]] = {
    "torch fp32": {"runtime": "torch", "precision": "fp32"},
    "torch bf16": {"runtime": "torch", "precision": "bf16"},
    "torch fp16": {"runtime": "torch", "precision": "fp16"},
    "openvino fp32": {"runtime": "openvino", "precision": "fp32"},
    "openvino bf16": {"runtime": "openvino", "precision": "bf16"},
    "openvino fp16": {"runtime": "openvino", "precision": "fp16"},
}

PLAIN = "plain fp32"

MATRIX = 2048


class Plain(Extractor):
    """The same pyramid over the network as it was loaded: fp32, nothing folded, channels first."""

    def __init__(self, model: str, settings: ExtractSettings) -> None:
        super().__init__(model, settings)
        network, selection = weights.load(self.path), self.selection
        self._network = lambda pixels: network(pixels.permute(0, 3, 1, 2).float().contiguous(), selection)


def pyramid_flops(model: Path, plan: ExtractionPlan, photo: RgbImage) -> int:
    """Floating-point operations of the network over the pyramid of a photo."""
    network = weights.load(model).to("meta")
    height, width = photo.shape[:2]
    shrink = min(1.0, plan.longest_side / max(height, width))
    with FlopCounterMode(display=False) as counter:
        for scale in plan.scales:
            size = (round(height * scale * shrink), round(width * scale * shrink))
            network(torch.zeros(1, 3, *size, device="meta"))
    return int(counter.get_total_flops())


def torch_product(dtype: torch.dtype) -> Callable[[], object]:
    """The product of two large matrices by torch."""
    a, b = (torch.rand(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return lambda: a @ b


def openvino_product(precision: str) -> Callable[[], object]:
    """The product of two large matrices by OpenVINO, one of them constant as weights are."""
    import openvino
    from openvino import opset13

    a, b = (np.random.default_rng(i).random((MATRIX, MATRIX), np.float32) for i in range(2))
    given = opset13.parameter([MATRIX, MATRIX], np.float32)
    model = openvino.Model([opset13.matmul(given, opset13.constant(b), False, False)], [given])
    hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    return lambda: request.infer({0: a}, share_inputs=True, share_outputs=True)


def measured(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, the seconds that it took, and the CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def matrix_rates(names: list[str], rounds: int) -> dict[str, float]:
    """Floating-point operations a CPU second of a large product, by variant."""
    torch_names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    openvino_names = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
    products = {}
    for name in names:
        library, precision = name.split()
        own = openvino_product(openvino_names[precision]) if library == "openvino" else None
        products[name] = own or torch_product(torch_names[precision])
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for number in range(rounds + 1):
        for name, product in products.items():
            spent = measured(product)[2]
            if number:
                seconds[name].append(spent)
    rates = {name: 2 * MATRIX**3 / float(np.median(times)) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"product of two {MATRIX} x {MATRIX} matrices, {name}: {rate / 1e9:.0f} GFLOP a CPU second")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["standard", "paper"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    # Of one size, so that one photo warms up for all.
    candidates = [decode(path, DecodeSettings()) for path in sorted(options.photos.rglob("*.jpg"))]
    shapes = [photo.shape for photo in candidates]
    alike = [photo for photo in candidates if photo.shape == max(set(shapes), key=shapes.count)]
    photos = alike[:: max(1, len(alike) // options.count)][: options.count]
    print(f"{len(photos)} photos of {photos[0].shape[1]} x {photos[0].shape[0]}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        rates = matrix_rates(options.variants, 9)
        for preset in options.presets:
            compare(options.model, preset, options.variants, photos, rates)


def compare(model: str, preset: Any, variants: list[str], photos: list[RgbImage], rates: dict[str, float]) -> None:
    """Measure all variants and the plain network under one preset, and print a table."""
    extractors: dict[str, Extractor] = {PLAIN: Plain(model, ExtractSettings(preset=preset, precision="fp32"))}
    for name in variants:
        extractors[name] = Extractor(model, ExtractSettings(preset=preset, **VARIANTS[name]))  # type: ignore[arg-type]
    plan = extractors[PLAIN].plan
    flops = pyramid_flops(extractors[PLAIN].path, plan, photos[0])
    for extractor in extractors.values():
        extractor.extract(photos[0], 1)
    wall: dict[str, list[float]] = {name: [] for name in extractors}
    cpu: dict[str, list[float]] = {name: [] for name in extractors}
    agreements: dict[str, list[tuple[float, float]]] = {name: [] for name in extractors}
    for photo in photos:
        found = {}
        for name, extractor in extractors.items():
            found[name], seconds, spent = measured(lambda: extractor.extract(photo, plan.stored_features))  # noqa: B023
            wall[name].append(seconds)
            cpu[name].append(spent)
            agreements[name].append(agreement(found[name], found[PLAIN]))
    print(f"\n{preset}: {flops / 1e9:.0f} GFLOP a pyramid")
    print(f"{'':14}  seconds  ratio  CPU seconds  ratio  of matmul  common keypoints  least  cosine")
    for name in extractors:
        ratio, cpu_ratio = (float(np.median(np.divide(t[PLAIN], t[name]))) for t in (wall, cpu))
        share = "" if name == PLAIN else f"{flops / float(np.median(cpu[name])) / rates[name]:.0%}"
        common, cosine = np.mean(agreements[name], axis=0)
        print(
            f"{name:14}  {np.median(wall[name]):7.3f}  {ratio:5.2f}  {np.median(cpu[name]):11.3f}  {cpu_ratio:5.2f}"
            f"  {share:>9}  {common:16.1%}  {min(agreements[name])[0]:5.1%}  {cosine:.5f}"
        )


if __name__ == "__main__":
    main()
