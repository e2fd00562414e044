"""What many tests share: the folder of real photos where there is one, and generated photos where there is none."""

from __future__ import annotations

import os
import platform
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before torch loads: see the command line's `run`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import pytest
from hypothesis import settings
from milvus_server import COMPOSE, DockerServer, Server, WheelServer, compose_environment, servers
from numpy.typing import NDArray
from pymilvus import MilvusClient
from pytest_docker.plugin import DockerComposeExecutor, Services

from delf_milvus import DelfIndex, Settings
from delf_milvus.retrieval.answers import Hit
from delf_milvus.settings import ExtractSettings

# A suite that a shell starts in the background ignores Ctrl-C, and so would all that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example takes as long as a busy machine lets it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

RgbImage = NDArray[np.uint8]
WHEEL_SERVER = pytest.StashKey[WheelServer]()


def _shared() -> Path:
    return Path(os.environ.get("DELF_MILVUS_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photos, ImageNet weights and reference files; tests that need it skip without it."""
    folder = _shared()
    if not (folder / "data").is_dir():
        pytest.skip("needs the folder of real photos (DELF_MILVUS_SHARED)")
    return folder


def make_photo(seed: int, width: int = 320, height: int = 240) -> RgbImage:
    """A textured scene of its own for each seed: shapes of many sizes over a smooth background."""
    rng = np.random.default_rng(seed)
    base = cv2.resize(rng.integers(0, 255, (4, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(60):
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        size = int(rng.integers(4, max(5, width // 6)))
        kind = rng.integers(0, 3)
        if kind == 0:
            cv2.circle(base, (x, y), size // 2, colour, -1)
        elif kind == 1:
            cv2.rectangle(base, (x, y), (x + size, y + size // 2), colour, -1)
        else:
            end = (x + int(rng.integers(-size, size)), y + int(rng.integers(-size, size)))
            cv2.line(base, (x, y), end, colour, int(rng.integers(1, 5)))
    return base


def save_photo(path: Path, photo: RgbImage) -> Path:
    """Write an RGB photo; the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))
    return path


def the_same(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """What hits beside other searches must equal. The embedded database may sum up a similarity in another order then,
    and the score is made of similarities."""
    return [{**hit.to_dict(), "score": pytest.approx(hit.score, rel=1e-6)} for hit in hits]


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight generated photos, two of them in a folder inside."""
    root = tmp_path_factory.mktemp("photos")
    for seed in range(8):
        folder = root / "more" if seed >= 6 else root
        save_photo(folder / f"scene{seed}.png", make_photo(seed))
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file with a network of milliseconds."""
    from model.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def tiny_settings(tiny_model: Path) -> Settings:
    """The settings of an index with that network."""
    return Settings(model=str(tiny_model), extract=ExtractSettings(preset="fast"))


@pytest.fixture
def tiny_index(tmp_path: Path, tiny_settings: Settings) -> Iterator[DelfIndex]:
    """An index of its own, empty."""
    with DelfIndex.open(tmp_path / "photos.db", settings=tiny_settings) as opened:
        yield opened


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes the server directly runs on each of them."""
    if "milvus" in metafunc.fixturenames:
        metafunc.parametrize("milvus", servers(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def milvus(request: pytest.FixtureRequest) -> Server:
    """A real Milvus server, shared by all tests: each takes collection names of its own, and may restart it."""
    server: Server = request.getfixturevalue(f"{getattr(request, 'param', 'wheel')}_server")
    return server


@pytest.fixture
def name(milvus: Server) -> Iterator[str]:
    """A name for collections of the server; what is called so is dropped afterwards."""
    name = f"t{uuid.uuid4().hex[:12]}"
    yield name
    client = MilvusClient(milvus.uri)
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()


@pytest.fixture(scope="session")
def wheel_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WheelServer]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the server comes as a wheel for Linux x86-64 only")
    server = WheelServer(tmp_path_factory.mktemp("milvus"))
    request.config.stash[WHEEL_SERVER] = server
    yield server
    del request.config.stash[WHEEL_SERVER]
    server.kill()


@pytest.fixture(autouse=True)
def live_server(request: pytest.FixtureRequest) -> None:
    """Every test finds a server that runs, whatever the one before did to it."""
    server = request.config.stash.get(WHEEL_SERVER, None)
    if server is not None:
        server.revive()


@pytest.fixture(scope="session")
def docker_compose_file() -> str:
    return str(COMPOSE)


@pytest.fixture(scope="session")
def docker_setup() -> str:
    os.environ.update(compose_environment())
    return "up --detach --wait"


@pytest.fixture(scope="session")
def docker_server(
    docker_services: Services,
    docker_ip: str,
    docker_compose_command: str,
    docker_compose_file: str,
    docker_compose_project_name: str,
) -> DockerServer:
    compose = DockerComposeExecutor(docker_compose_command, docker_compose_file, docker_compose_project_name)
    return DockerServer(docker_services, compose, docker_ip)
