"""Photos on a Ray cluster: real worker processes on this machine, some of which are killed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from conftest import make_photo, save_photo
from deadly_storage import DeadlyFileSystem
from file_imports import as_files, count_imports
from milvus_server import Server
from pymilvus import MilvusClient
from stored_rows import rows

from delf_milvus import DelfIndex, Settings
from delf_milvus.errors import ClusterError, ModelError, UsageError
from delf_milvus.ingestion import distributed
from delf_milvus.ingestion.distributed import OnRay, _knock, _room, _Worker
from delf_milvus.matcher import PhotoMatcher
from delf_milvus.settings import RaySettings

RUN = [sys.executable, "-m", "delf_milvus"]
COUNT = 18


def configured(model: Path, **ray: Any) -> Settings:
    given: dict[str, Any] = {"model": str(model), "extract": {"preset": "fast"}, "ray": {"actors": 2, **ray}}
    return Settings(**given)


def on_ray(settings: Settings) -> Settings:
    return settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"engine": "ray"})})


def needs_ray() -> None:
    """Skip without Ray; here nobody may import it before the engine has set it up."""
    if find_spec("ray") is None:
        pytest.skip("needs the extra ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    """The address of a cluster that this process is connected to; its workers know the deadly storage."""
    needs_ray()
    folder = tmp_path_factory.mktemp("storage")
    package = folder / "deadly-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[fsspec.specs]\ndeadly = deadly_storage:DeadlyFileSystem\n")
    fsspec.register_implementation("deadly", DeadlyFileSystem, clobber=True)
    settings = configured(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        path = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        engine = OnRay(settings, PhotoMatcher(settings).fingerprint)
        with engine._connected():
            import ray

            yield ray.get_runtime_context().gcs_address


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a worker of one processor: with another number of threads the last bits of features differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed in range(COUNT):
        save_photo(folder / ("more" if seed % 3 else ".") / f"{seed:02}.png", make_photo(seed, 160, 120))
    save_photo(folder / "tiny.png", make_photo(91, 40, 24))
    (folder / "damaged.jpg").write_bytes(b"no photo")
    return folder


def told(report: Any) -> dict[str, Any]:
    return {name: value for name, value in report.to_dict().items() if name != "seconds"}


def test_killed_workers_change_nothing_and_a_photo_that_kills_them_is_given_up(
    cluster: str, one_thread: None, photos: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"deadly://{photos}"
    # Behind others in its block, which are done each time before it kills.
    deadly = photos / "more" / "13" / "deadly.png"
    save_photo(deadly, make_photo(92, 160, 120))
    settings = configured(tiny_model)
    client = MilvusClient(str(tmp_path / "both.db"))
    far = DelfIndex(client=client, collection="far", settings=on_ray(settings))
    here = DelfIndex(client=client, collection="here", settings=settings)

    progress: list[tuple[int, int]] = []
    report = far.ingest([base], progress=lambda one: progress.append((one.done, one.total)))
    assert [failure.path for failure in report.failures] == [f"{base}/damaged.jpg", f"{base}/more/13/deadly.png"]
    assert "the worker that had it alone died, 2 times" in report.failures[1].error
    assert progress == [(done, COUNT + 3) for done in range(COUNT + 4)]

    deadly.unlink()
    plain = here.ingest([base])
    assert plain.sparse == ["tiny.png"]
    assert told(report) | {"failed": 1, "failures": told(plain)["failures"]} == told(plain)
    for suffix, key in (("_features", "feature_key"), ("_images", "image_key")):
        assert rows(client, f"far{suffix}", key) == rows(client, f"here{suffix}", key)

    save_photo(photos / "00.png", make_photo(70, 160, 120))
    (photos / "03.png").unlink()
    # What is stored already is told apart in the worker too, and photos are handed over in parts.
    monkeypatch.setattr(distributed, "_WINDOW", 13)
    one = DelfIndex(client=client, collection="far", settings=on_ray(configured(tiny_model, actors=1)))
    again = [index.ingest([base], prune=True, dry_run=True) for index in (one, here)]
    assert (again[0].updated, again[0].unchanged, again[0].removed) == (1, COUNT - 1, 1)
    assert told(again[0]) == told(again[1])
    client.close()


@pytest.mark.server
def test_what_workers_extract_is_imported_as_files_by_a_server(
    cluster: str,
    one_thread: None,
    photos: Path,
    milvus: Server,
    name: str,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imports = count_imports(monkeypatch)
    settings = configured(tiny_model)
    store = settings.store.model_copy(update=as_files(milvus, 400))
    client = MilvusClient(milvus.uri)
    far = DelfIndex(
        client=client, collection=f"{name}_far", settings=on_ray(settings).model_copy(update={"store": store})
    )
    report = far.ingest([photos])
    assert report.added == COUNT + 1
    assert imports
    assert min(imports) >= 400
    here = DelfIndex(client=client, collection=f"{name}_here", settings=settings)
    assert told(here.ingest([photos])) == told(report)
    for suffix, key in (("_features", "feature_key"), ("_images", "image_key")):
        assert rows(client, f"{name}_far{suffix}", key) == rows(client, f"{name}_here{suffix}", key)
    client.close()


def test_the_command_joins_a_cluster_and_tells_the_same_as_the_local_engine(
    cluster: str, one_thread: None, photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    environment = {
        **os.environ,
        "DELF_MILVUS_MODEL": str(tiny_model),
        "DELF_MILVUS_EXTRACT__PRESET": "fast",
        "RAY_ADDRESS": cluster,
    }
    ended = subprocess.run(
        [*RUN, "--uri", "ray.db", "--json", "ingest", "photos", "--engine", "ray", "--actors", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    with DelfIndex.open(tmp_path / "local.db", settings=configured(tiny_model)) as index:
        report = index.ingest([photos])
    assert ended.returncode == 1
    assert ended.stderr == f"failed: {report.failures[0].error}\n" + (
        "few features: tiny.png is stored, but has too few features to be found reliably\n"
    )
    assert json.loads(ended.stdout) | {"seconds": 0} == report.to_dict() | {"seconds": 0}
    assert report.added == COUNT + 1


def test_a_worker_with_another_model_says_so(tiny_model: Path) -> None:
    settings = configured(tiny_model)
    fingerprint = replace(PhotoMatcher(settings).fingerprint, weights="0" * 64)
    with pytest.raises(ModelError, match="A worker of the Ray cluster has another model"):
        _Worker(None, settings, fingerprint, False)._made()


def test_ctrl_c_ends_a_cluster_of_ones_own_which_nobody_else_could_reach(
    photos: Path, tmp_path: Path, tiny_model: Path
) -> None:
    needs_ray()
    for copy in range(30):
        shutil.copytree(photos, tmp_path / "many" / str(copy))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "DELF_MILVUS_MODEL": str(tiny_model),
        "DELF_MILVUS_EXTRACT__PRESET": "fast",
    }
    command = [*RUN, "--uri", "many.db", "--json", "ingest", "many", "--engine", "ray", "--actors", "1"]
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    program = psutil.Process(run.pid)
    while not any("MapWorker" in one for one in names(program)):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    processes = [program, *program.children(recursive=True)]
    listening = {c.laddr.ip for one in processes for c in connections(one) if c.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    # As a terminal does, to all that belongs to the command.
    os.killpg(run.pid, signal.SIGINT)
    out, error = run.communicate(timeout=120)
    assert run.returncode == 130, error
    report = json.loads(out)
    assert report["interrupted"]
    assert report["added"] < 30 * (COUNT + 1)
    assert [line for line in error.splitlines() if not line.startswith("failed: ")] == [
        "Interrupted: what was stored stays; run the same command again to go on."
    ]
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def names(process: psutil.Process) -> list[str]:
    return [" ".join(told) for child in process.children(recursive=True) if (told := command_line(child))]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections()
    except psutil.Error:
        return []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_one_sentence_at_once(address: str) -> None:
    with pytest.raises(ClusterError) as refused:
        _knock(address)
    assert str(refused.value).startswith(f"The Ray cluster at {address} cannot be reached (")
    assert refused.value.exit_code == 3


def test_without_ray_the_command_says_what_to_install(tmp_path: Path, photos: Path, tiny_model: Path) -> None:
    program = "import sys; sys.modules['ray'] = None; from delf_milvus.cli.main import run; run()"
    arguments = ["--model", str(tiny_model), "ingest", "photos", "--engine", "ray"]
    refused = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "Error: The engine ray needs ray, which is not installed: run `pip install 'delf-milvus[ray]'`.\n"
    )


def test_feature_files_need_no_workers(tmp_path: Path) -> None:
    refused = subprocess.run(
        [*RUN, "ingest", "features", "--features", "--engine", "ray"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--engine ray extracts photos" in refused.stderr


def test_workers_are_told_neither_address_nor_secrets_of_the_database(tiny_model: Path) -> None:
    needs_ray()
    given: dict[str, Any] = {"uri": "http://milvus.example:19530", "token": "root:hush", "model": str(tiny_model)}
    settings = Settings(**given, store={"user": "me", "password": "hush"})  # type: ignore[arg-type]
    sent = pickle.dumps(OnRay(settings, PhotoMatcher(settings).fingerprint)._arguments)
    assert b"hush" not in sent
    assert b"milvus.example" not in sent
    assert str(tiny_model).encode() in sent


@pytest.mark.parametrize(
    ("there", "cpus", "gpus", "room"),
    [
        ({"CPU": 8.0}, 1, 0, 8),
        ({"CPU": 8.0}, 3, 0, 2),
        ({"CPU": 64.0, "GPU": 2.0}, 4, 0.5, 4),
        ({"CPU": 1.0}, 0.1, 0, 10),
    ],
)
def test_there_are_as_many_workers_as_the_cluster_has_room_for(
    there: dict[str, float], cpus: float, gpus: float, room: int
) -> None:
    assert _room(there, RaySettings(cpus=cpus, gpus=gpus)) == room


def test_a_cluster_without_room_for_a_worker_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="has 8 processors and 0 GPUs, too few for a worker"):
        _room({"CPU": 8.0}, RaySettings(gpus=1))
