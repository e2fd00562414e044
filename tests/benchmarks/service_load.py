"""A service under load: clients that search at once, one after the other each, and how health checks fare meanwhile.

    python tests/benchmarks/service_load.py --photos DATA/ukbench --requests 64
    python tests/benchmarks/service_load.py --tiny --requests 2000

Starts `delf-milvus serve` with an embedded database of its own and `--stored` photos, generated ones without
`--photos`. --tiny: a network of milliseconds and few features, to measure the service alone. A request waits for the
others, so its time is held against clients x the time of a single request. Memory is that of the whole process:
service, model and database.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import numpy as np
from conftest import make_photo
from model.models import write_tiny_model
from service.serving import Process, png, process

CLIENTS, THREADS = 16, 1


def resident(address: str) -> float:
    """Resident memory of the service, MB."""
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    return float(next(line for line in lines if line.startswith("process_resident_memory_bytes")).split()[1]) / 1e6


def photos_of(folder: Path | None, count: int) -> list[bytes]:
    if folder is None:
        return [png(make_photo(seed)) for seed in range(count)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    return [path.read_bytes() for path in paths[:count]]


async def load(running: Process, photos: list[bytes], requests: int) -> None:
    address = running.address
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        for number, photo in enumerate(photos):
            (await client.post("/v1/images", params={"id": f"{number}"}, content=photo)).raise_for_status()

        async def search(number: int) -> tuple[float, int]:
            started = time.perf_counter()
            status = (await client.post("/v1/search", content=photos[number % len(photos)])).status_code
            return time.perf_counter() - started, status

        single = float(np.median([(await search(number))[0] for number in range(8)][1:]))
        taken: list[float] = []
        memory: list[float] = []
        health: list[float] = []
        errors = 0
        left = iter(range(requests))

        async def work() -> None:
            nonlocal errors
            for number in left:
                seconds, status = await search(number)
                errors += status != 200
                taken.append(seconds)
                if len(taken) % max(1, requests // 20) == 0:
                    memory.append(await asyncio.to_thread(resident, address))

        async def watch() -> None:
            async with httpx.AsyncClient(base_url=address, timeout=60) as watcher:
                while True:
                    started = time.perf_counter()
                    (await watcher.get("/healthz")).raise_for_status()
                    health.append(time.perf_counter() - started)
                    await asyncio.sleep(0.02)

        watching = asyncio.ensure_future(watch())
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        seconds = time.perf_counter() - started
        watching.cancel()
    p50, p95 = np.quantile(taken, [0.5, 0.95])
    fair = CLIENTS * single / THREADS
    half = memory[len(memory) // 2 :]
    print(f"{len(taken)} searches of {CLIENTS} clients among {len(photos)} photos, {THREADS} threads: {seconds:.0f} s")
    print(f"errors {errors}; one alone {single:.3f} s; p50 {p50:.3f} s, p95 {p95:.3f} s")
    print(f"p50 and p95 of (clients x one alone / threads): {p50 / fair:.2f}, {p95 / fair:.2f}")
    print(f"p50 and p95 of (clients x one alone): {p50 / (fair * THREADS):.2f}, {p95 / (fair * THREADS):.2f}")
    print(
        f"health during it, ms, of {len(health)}: median {1e3 * np.median(health):.1f}, "
        f"99 % {1e3 * np.quantile(health, 0.99):.1f}, most {1e3 * max(health):.1f}"
    )
    print(f"memory, MB: after a twentieth {memory[0]:.0f}, halfway {half[0]:.0f}, at the end {memory[-1]:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--stored", type=int, default=100)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    given = {"DELF_MILVUS_SERVICE__REQUESTS_PER_MINUTE": "0", "DELF_MILVUS_SERVICE__REQUEST_SECONDS": "600"}
    if options.tiny:
        features = {"STORED_FEATURES": "60", "QUERY_FEATURES": "60"}
        given |= {f"DELF_MILVUS_EXTRACT__{name}": value for name, value in features.items()}
        given["DELF_MILVUS_SEARCH__NEIGHBOURS"] = "20"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "tiny.safetensors") if options.tiny else None
        with process(folder, model, "--threads", str(THREADS), **given) as running:
            running.ready()
            asyncio.run(load(running, photos_of(options.photos, options.stored), options.requests))


if __name__ == "__main__":
    main()
