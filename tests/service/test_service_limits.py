"""Uploads of strangers: too large, too slow, no photos, too many; and clients that leave."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import make_photo
from service.serving import READ, WRITE, SlowSearches, add, client_of, cropped, png, refusal, run, serving, settings_of


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that declares and contains side x side grey pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_what_is_no_photo_or_too_large_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    small = png(make_photo(1, 64, 48))

    async def main() -> None:
        settings = settings_of(
            tmp_path, tiny_model, max_photo_bytes=300_000, max_body_bytes=1_500_000, max_pixels=10**6
        )
        async with serving(settings) as (_, client):
            whole = png(make_photo(1))
            for content, status, kind in (
                (b"", 400, "no_photo"),
                (b"no photo", 415, "unsupported_format"),
                (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_format"),
                (whole[: len(whole) // 2], 422, "damaged_photo"),
                (bomb(1001), 413, "photo_too_large"),
                (bytes(300_001), 413, "photo_too_large"),
                (bytes(900_000), 413, "body_too_large"),
            ):
                for path in ("/v1/search", "/v1/images?id=x"):
                    answer = await client.post(path, content=content)
                    if path == "/v1/images?id=x" and kind == "body_too_large":
                        kind = "photo_too_large"
                    refusal(answer, status, kind)
            assert len(bomb(1001)) < 5000
            for files, status, kind in (
                ([("photo", b"")], 400, "no_photo"),
                ([("photo", small), ("photo", small)], 413, "too_many_photos"),
                ([("other", small)], 422, "invalid_argument"),
                ([("photo", bytes(300_001))], 413, "photo_too_large"),
            ):
                refusal(await client.post("/v1/search", files=files), status, kind)
            refusal(await client.post("/v1/images", content=bytes(1_500_001)), 413, "body_too_large")
            for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
                answer = await client.post("/v1/search", content=b'{"url": "http://a"}', headers={"content-type": kind})
                refusal(answer, 415, "unsupported_media_type")
            for damaged, kind in (("", "bad_request"), ("; boundary=x", "no_photo"), ("; boundary=y", "bad_request")):
                headers = {"content-type": f"multipart/form-data{damaged}"}
                answer = await client.post("/v1/search", content=b"--x\r\nnonsense", headers=headers)
                refusal(answer, 400, kind)
            assert (await client.get("/v1/images")).json()["images"] == []

    run(main)


def test_a_body_without_a_length_is_cut_off_where_it_is_too_long(tmp_path: Path, tiny_model: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000_000:
            sent += 10_000
            yield bytes(10_000)

    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, max_photo_bytes=100_000)) as (service, client):
            headers = {"content-type": "image/png"}
            refusal(await client.post("/v1/search", content=endless(), headers=headers), 413, "body_too_large")
            assert service.buffered == 0

    run(main)
    assert sent < 2_000_000


def test_a_slow_client_is_not_waited_for(tmp_path: Path, tiny_model: Path) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"\x89PNG"
        await asyncio.sleep(30)

    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, body_seconds=0.3)) as (_, client):
            answer = await client.post("/v1/search", content=slow(), headers={"content-type": "image/png"})
            refusal(answer, 408, "slow_upload")

    run(main)


def test_uploads_in_memory_are_bounded_together(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        photo = png(make_photo(1))
        async with serving(settings_of(tmp_path, tiny_model, buffer_bytes=int(1.5 * len(photo)))) as (service, client):
            slow = SlowSearches(service)
            first = asyncio.ensure_future(client.post("/v1/search", content=photo))
            await slow.until(1)
            answer = await client.post("/v1/search", content=photo)
            refusal(answer, 503, "too_busy")
            assert int(answer.headers["retry-after"]) >= 1
            slow.go_on.set()
            assert (await first).status_code == 200
            assert service.buffered == 0
            assert (await client.post("/v1/search", content=photo)).status_code == 200

    run(main)


def test_a_full_queue_is_told_with_when_to_come_back(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        settings = settings_of(tmp_path, tiny_model, threads=1, queue=3, queue_each=2, read_keys=READ, write_keys=WRITE)
        async with serving(settings, READ) as (service, client):
            slow = SlowSearches(service)
            photo = png(cropped(1))
            tasks = [asyncio.ensure_future(client.post("/v1/search", content=photo)) for _ in range(3)]
            await slow.until(1)
            while service.queue.length < 2:
                await asyncio.sleep(0.005)
            answer = await client.post("/v1/search", content=photo)
            refusal(answer, 429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
            async with client_of(service, WRITE) as other:
                tasks.append(asyncio.ensure_future(other.post("/v1/search", content=photo)))
                while service.queue.length < 3:
                    await asyncio.sleep(0.005)
                refusal(await other.post("/v1/search", content=photo), 429, "queue_full")
                # What needs no photo to be computed goes on.
                assert (await client.get("/v1/images")).status_code == 200
                assert (await client.get("/readyz")).status_code == 200
                slow.go_on.set()
                assert [(await task).status_code for task in tasks] == [200] * 4
            rejected = 'delf_milvus_rejected_total{reason="queue_full"} 2.0'
            assert rejected in (await client.get("/metrics")).text.splitlines()

    run(main)


def test_clients_take_turns(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> list[int]:
        settings = settings_of(tmp_path, tiny_model, threads=1, read_keys=READ, write_keys=WRITE)
        async with serving(settings, READ) as (service, greedy):
            slow = SlowSearches(service)
            photos = [png(cropped(seed)) for seed in range(7)]
            tasks = [asyncio.ensure_future(greedy.post("/v1/search", content=photo)) for photo in photos[:6]]
            while service.queue.length < 5:
                await asyncio.sleep(0.005)
            async with client_of(service, WRITE) as modest:
                tasks.append(asyncio.ensure_future(modest.post("/v1/search", content=photos[6])))
                while service.queue.length < 6:
                    await asyncio.sleep(0.005)
                slow.go_on.set()
                assert [(await task).status_code for task in tasks] == [200] * 7
            return [photos.index(photo) for photo in slow.order]

    # One runs, one of the greedy client's was there first; then it is the other's turn.
    assert run(main) == [0, 1, 6, 2, 3, 4, 5]


def test_a_late_answer_is_a_504_and_its_turn_ends_with_the_work(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        settings = settings_of(tmp_path, tiny_model, threads=1, request_seconds=0.5)
        async with serving(settings) as (service, client):
            slow = SlowSearches(service)
            photo = png(cropped(1))
            running = asyncio.ensure_future(client.post("/v1/search", content=photo))
            await slow.until(1)
            refusal(await client.post("/v1/search", content=photo), 504, "timeout")
            refusal(await running, 504, "timeout")
            # The thread still computes, so that nobody else may.
            assert (service.queue.running, service.queue.length) == (1, 0)
            slow.go_on.set()
            while service.queue.running:
                await asyncio.sleep(0.005)
            assert slow.begun == 1

    run(main)


def test_a_client_that_leaves_the_queue_costs_nothing(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, threads=1)) as (service, client):
            slow = SlowSearches(service)
            photo = png(cropped(1))
            running = asyncio.ensure_future(client.post("/v1/search", content=photo))
            await slow.until(1)
            waiting = asyncio.ensure_future(client.post("/v1/search", content=photo))
            while not service.queue.length:
                await asyncio.sleep(0.005)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert service.queue.length == 0
            slow.go_on.set()
            assert (await running).status_code == 200
            assert (slow.begun, service.queue.running) == (1, 0)

    run(main)


def test_an_add_that_has_begun_is_completed_when_its_client_leaves(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, uploads=tmp_path / "uploads")) as (service, client):
            adding = asyncio.ensure_future(add(client, 1))
            # Not for its turn: who leaves between that and the work costs nothing.
            while not service._working:
                await asyncio.sleep(0.001)
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            while service.queue.running:
                await asyncio.sleep(0.005)
            assert (await client.get("/v1/images/1.png/photo")).content == png(make_photo(1))

    run(main)


def test_two_that_replace_one_image_leave_one_whole_image(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        uploads = tmp_path / "uploads"
        async with serving(settings_of(tmp_path, tiny_model, uploads=uploads, threads=4)) as (service, client):
            answers = await asyncio.gather(*(add(client, seed, "same") for seed in range(4)))
            assert sorted(answer.json()["stored"][0]["replaced"] for answer in answers) == [False, True, True, True]
            (kept,) = uploads.iterdir()
            assert (await client.get("/v1/images/same/photo")).content == kept.read_bytes()
            assert service._locks == {}

    run(main)
