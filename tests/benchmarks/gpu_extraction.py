"""Photos a second on a GPU by preset and precision: one by one, together, and from the files; and what bounds them.

    python tests/benchmarks/gpu_extraction.py --photos ../shared/data/landmarks

"one by one" and "together" extract photos that are decoded already, "from files" is the path of `extract` without its
writing: read and decoded in threads, extracted together. "decoding" is those threads alone. "of matmul" is the
floating-point operations of the pyramid's network a second (a product and its sum are two), of the photos extracted
together, against those of a product of two large matrices on the same card in the same precision. Common keypoints and
cosine are of the features stored in the preset, against fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from agreement import agreement
from extraction import pyramid_flops

from delf_milvus.imaging.decode import RgbImage, decode
from delf_milvus.ingestion.ahead import Ahead, PhotoExtraction, ready
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import PRESETS, DecodeSettings, ExtractSettings, IngestSettings

MATRIX = 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, what it left the GPU to do included."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def matrix_rate(precision: str) -> float:
    """Floating-point operations a second of a product of two large matrices of random numbers."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").to(DTYPES[precision]) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * MATRIX**3 / seconds_of(lambda: a @ b, 10)


def from_files(paths: Sequence[Path], extractor: Extractor) -> int:
    """Extract the photos of files as `extract` does; how many had features."""
    extraction = PhotoExtraction(lambda: extractor)
    found = 0
    with Ahead(lambda path: decode(path, DecodeSettings()), paths, IngestSettings()) as ahead:
        taken = iter(ahead)
        while group := list(islice(taken, extraction.at_once)):
            pixels = [(str(path), photo) for path, future in group if not isinstance(photo := ready(future), Exception)]
            found += sum(not isinstance(features, Exception) for features in extraction(pixels))
            ahead.widen(extraction.at_once)
    return found


def decoded(paths: Sequence[Path]) -> None:
    """Decode the photos of files in as many threads as beside a GPU."""
    with Ahead(lambda path: decode(path, DecodeSettings()), paths, IngestSettings()) as ahead:
        ahead.widen(32)
        for _, future in ahead:
            ready(future)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--count", type=int, default=512, help="photos; files are read again where there are fewer")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["fast", "standard", "paper"])
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=["bf16", "fp16", "fp32"])
    parser.add_argument("--compared", type=int, default=6, help="photos that are compared with the CPU")
    options = parser.parse_args()
    files = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = (files * (options.count // len(files) + 1))[: options.count]
    photos = [decode(path, DecodeSettings()) for path in files]
    shapes = [photo.shape for photo in photos]
    alike = [photo for photo in photos if photo.shape == max(set(shapes), key=shapes.count)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} processors")
    print(f"{len(files)} files of {len(set(shapes))} sizes; alike: {alike[0].shape[1]} x {alike[0].shape[0]}")
    rates = {precision: matrix_rate(precision) for precision in options.precisions}
    print(", ".join(f"{precision} {rate / 1e12:.0f} TFLOP/s" for precision, rate in rates.items()), "of matmul")
    rate = len(paths) / seconds_of(lambda: decoded(paths), 2)
    print(f"decoding alone: {rate:.0f} photos a second")
    head = "preset    precision  one by one  together  from files  of matmul  common keypoints  least   cosine"
    print(head)
    for preset in options.presets:
        plain = Extractor(options.model, ExtractSettings(preset=preset, device="cpu", precision="fp32"))
        count = plain.plan.stored_features
        step = max(1, len(photos) // options.compared)
        wanted = [plain.extract(photo, count) for photo in photos[::step][: options.compared]]
        flops = pyramid_flops(plain.path, plain.plan, alike[0])
        for precision in options.precisions:
            settings = ExtractSettings(preset=preset, device="cuda", precision=precision)
            show(Extractor(options.model, settings), preset, precision, photos, alike, paths, wanted, flops, rates)


def show(
    extractor: Extractor,
    preset: str,
    precision: str,
    photos: list[RgbImage],
    alike: list[RgbImage],
    paths: list[Path],
    wanted: list[Any],
    flops: int,
    rates: dict[str, float],
) -> None:
    """Measure one preset in one precision, and print a line of the table."""
    count = extractor.plan.stored_features
    many = extractor.together(alike[0].shape[:2])
    batch = (alike * (many // len(alike) + 1))[:many]
    for _ in range(2):
        extractor.extract(alike[0], count)
        extractor.extract_many(batch, count)
    one = 1 / seconds_of(lambda: extractor.extract(alike[0], count), 20)
    together = many / seconds_of(lambda: extractor.extract_many(batch, count), 8)
    files = from_files(paths, extractor) / seconds_of(lambda: from_files(paths, extractor), 1)
    step = max(1, len(photos) // len(wanted))
    agreements = [
        agreement(extractor.extract(photo, count), features)
        for photo, features in zip(photos[::step], wanted, strict=False)
    ]
    common, cosine = np.mean(agreements, axis=0)
    print(
        f"{preset:9} {precision:9}  {one:10.0f}  {together:8.0f}  {files:10.0f}"
        f"  {together * flops / rates[precision]:9.0%}  {common:16.1%}  {min(agreements)[0]:5.1%}  {cosine:.5f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
