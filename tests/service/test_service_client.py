"""The clients of a service: results are those of the index, errors the same classes, over a real connection."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import make_photo, save_photo
from service.serving import READ, WRITE, Process, cropped, png, process

from delf_milvus import AsyncDelfClient, DelfClient, ImageRecord, SearchResult
from delf_milvus.errors import ImageError, ImageFormatError, InputError, NotFoundError, ServiceError, UsageError


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Process]:
    keys = {"DELF_MILVUS_SERVICE__READ_KEYS": READ, "DELF_MILVUS_SERVICE__WRITE_KEYS": WRITE}
    with process(tmp_path_factory.mktemp("service"), tiny_model, **keys) as running:
        running.ready()
        yield running


@pytest.fixture
def service(filled: Process) -> Iterator[Process]:
    """The service, without an image before and after."""
    yield filled
    with DelfClient(filled.address, WRITE) as client:
        client.delete([record.image_id for record in client.list(limit=1000).images])


def test_a_life_of_images(service: Process, tmp_path: Path) -> None:
    with DelfClient(service.address, WRITE) as client:
        path = save_photo(tmp_path / "1.png", make_photo(1))
        sources = [png(make_photo(0)), path, make_photo(2), PIL.Image.fromarray(make_photo(3))]
        for seed, source in enumerate(sources):
            assert client.add(source, f"life/{seed} ä?#%.png", {"year": 1990 + seed}) == 300
        page = client.list("life/", 3)
        assert [record.image_id for record in page.images] == [f"life/{seed} ä?#%.png" for seed in range(3)]
        rest = client.list("life/", 3, after=page.next or "")
        assert ([record.metadata for record in rest.images], rest.next) == ([{"year": 1993}], None)
        shown = client.show("life/1 ä?#%.png")
        assert isinstance(shown, ImageRecord)
        assert (shown.width, shown.height, shown.feature_count) == (320, 240, 300)
        result = client.search(path, 2, include_unverified=True, correspondences=True, filter={"year": {">=": 1991}})
        assert isinstance(result, SearchResult)
        assert result.query == str(path)
        assert result.hits[0].image_id == "life/1 ä?#%.png"
        assert result.hits[0].correspondence.query_points.shape[1] == 2
        assert len(result.hits[0].correspondence.residuals) >= 20
        assert result.hits[0].transform == pytest.approx(np.array([[1, 0, 0], [0, 1, 0]]), abs=0.5)
        assert result.timings.total > 0
        plain = client.search(path, 2, include_unverified=True, filter="year >= 1991")
        assert len(plain.hits[0].correspondence.residuals) == 0
        assert plain.hits[0].to_dict() == result.hits[0].to_dict()
        part = client.search(cropped(1), box=(0, 0, 100, 100), include_unverified=True, parts=False, turned=False)
        assert part.hits
        assert client.status()["store"]["images"] == 4
        assert client.delete([record.image_id for record in page.images] + ["missing"]) == [
            record.image_id for record in page.images
        ]


def test_errors_are_those_of_the_index(service: Process, tmp_path: Path) -> None:
    with DelfClient(service.address, WRITE) as client, DelfClient(service.address, READ) as reader:
        for error, call in (
            (ImageFormatError, lambda: client.search(b"no photo")),
            (ImageError, lambda: client.search(png(make_photo(1))[:5000])),
            (NotFoundError, lambda: client.show("missing")),
            (UsageError, lambda: client.search(make_photo(1), 0)),
            (UsageError, lambda: client.search(make_photo(1), filter="missing == 1")),
            (InputError, lambda: client.add(make_photo(1), "1", {"year": "soon"})),
            (InputError, lambda: client.search(tmp_path / "missing.png")),
            (ImageError, lambda: client.search(np.zeros((4, 4, 7), np.uint8))),
        ):
            with pytest.raises(error):
                call()
        client.add(make_photo(1), "once")
        with pytest.raises(ServiceError) as twice:
            client.add(make_photo(1), "once", replace=False)
        assert (twice.value.status, twice.value.kind) == (409, "exists")
        with pytest.raises(ServiceError) as refused:
            reader.add(make_photo(1), "1")
        assert (refused.value.status, refused.value.kind) == (403, "forbidden")
    with pytest.raises(ServiceError, match="API key"), DelfClient(service.address) as nobody:
        nobody.status()
    with pytest.raises(ServiceError, match="does it run"), DelfClient("http://127.0.0.1:9") as nowhere:
        nowhere.status()
    with pytest.raises(UsageError, match="http://"):
        DelfClient("127.0.0.1:8080")


def test_a_busy_service_is_asked_again(tmp_path: Path, tiny_model: Path) -> None:
    with process(tmp_path, tiny_model, DELF_MILVUS_SERVICE__REQUESTS_PER_MINUTE="60") as running:
        running.ready()
        with DelfClient(running.address, patience=0) as client:
            with pytest.raises(ServiceError) as busy:
                _ = [client.status() for _ in range(200)]
            assert (busy.value.status, busy.value.kind) == (429, "rate_limited")
            assert busy.value.retry_after is not None
        with DelfClient(running.address, patience=30) as client:
            assert client.status()["store"]["images"] == 0


def test_many_at_once_on_an_event_loop(service: Process) -> None:
    async def main() -> None:
        async with AsyncDelfClient(service.address, WRITE) as client:
            await asyncio.gather(*(client.add(make_photo(seed), f"{seed}.png") for seed in range(6)))
            found = await asyncio.gather(*(client.search(cropped(s), 1, include_unverified=True) for s in range(6)))
            assert [result.hits[0].image_id for result in found] == [f"{seed}.png" for seed in range(6)]
            assert len((await client.list()).images) == 6
            assert (await client.show("1.png")).image_id == "1.png"
            assert (await client.status())["service"]["may_write"] is True
            with pytest.raises(NotFoundError):
                await client.show("missing")
            assert len(await client.delete([f"{seed}.png" for seed in range(7)])) == 6

    asyncio.run(asyncio.wait_for(main(), 120))


def test_the_example_runs(service: Process, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import service_client
    finally:
        sys.path.pop(0)
    code = asyncio.run(service_client.main(service.address, WRITE, photo_folder))
    assert code == 0
    printed = capsys.readouterr().out
    assert "8 photos" in printed
    assert json.dumps(printed)
