"""Real Milvus servers for tests: one without a container, and the current one in containers where an engine runs.

The first is the wheel `milvus==2.3.5` (Linux x86-64), as its own process. It is old and for tests only. What matters:
- `localStorage.path` must be relative: with the wheel's default, a query that returns vectors deletes the raw vectors.
- SIGTERM takes it more than a minute, and nothing acknowledged is lost by SIGKILL: it is killed, by its own pid.
- The ports that the wheel looks for are the same in every process that looks at that time: it gets ports from here.
- Its embedded etcd would take the ports 2379 and 2380, whoever has them already: it gets a configuration of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest
from _pytest.mark import ParameterSet
from pytest_docker.plugin import DockerComposeExecutor, Services

COMPOSE = Path(__file__).parents[1] / "deploy/standalone/compose.yaml"


class Server(Protocol):
    """What tests may do with a server.

    uri: where it listens. storage: folder that the server reads files of a bulk import from; a file `storage / name`
    is called `str(storage / name)` in the import.
    """

    uri: str

    @property
    def storage(self) -> Path: ...

    def kill(self) -> None:
        """SIGKILL, as a crash would."""

    def restart(self) -> None:
        """Kill, start again on the same data and ports, and wait until it serves."""


@functools.cache
def no_engine() -> str:
    """Why no Docker engine with Compose can be used here; "" where one can."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "needs a Docker engine: there is no docker, or it does not answer"
        if done.returncode:
            return f"needs a Docker engine with Compose: `{' '.join(command)}` fails"
    return ""


def servers(*marks: pytest.MarkDecorator) -> list[ParameterSet]:
    """Parameters of a fixture that asks for `wheel_server` or `docker_server`."""
    reason = no_engine()
    skipped = [pytest.mark.skip(reason=reason)] if reason else []
    return [pytest.param("wheel", marks=marks), pytest.param("docker", marks=[*marks, *skipped])]


def compose_environment() -> dict[str, str]:
    """What the compose file asks for: secrets of this run, and a port that stays through restarts."""
    (port,) = free_ports(1)
    return {
        "MINIO_ROOT_USER": secrets.token_hex(8),
        "MINIO_ROOT_PASSWORD": secrets.token_hex(16),
        "MILVUS_ROOT_PASSWORD": secrets.token_hex(16),
        "MILVUS_AUTHORIZATION": "false",
        "MILVUS_PORT": str(port),
    }


class DockerServer:
    """The server of `deploy/standalone/compose.yaml`, started by pytest-docker."""

    def __init__(self, services: Services, compose: DockerComposeExecutor, address: str) -> None:
        self._compose = compose
        self.uri = f"http://{address}:{services.port_for('milvus', 19530)}"

    @property
    def storage(self) -> Path:
        pytest.skip("a server in a container reads the files of a bulk import from its object store")

    def kill(self) -> None:
        # The exit code is that of a container that runs no more, too.
        self._compose.execute("kill --signal SIGKILL milvus", success_codes=(0, 1))

    def restart(self) -> None:
        self.kill()
        self._compose.execute("up --detach --wait milvus")


class WheelServer:
    """The server of the wheel in a folder of its own, on free ports of the loopback interface.

    config: values of the wheel's template, by its names.
    """

    def __init__(self, folder: Path, config: Mapping[str, str | int | bool] | None = None) -> None:
        from milvus import MilvusServer

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.storage = folder / "data"
        unpacked = MilvusServer(data_dir=str(folder))
        names = [name for name in unpacked.config.configurable_items if name.endswith("_port")]
        unpacked.webservice_port, *ports = free_ports(1 + len(names))
        unpacked.config.update(**dict(zip(names, ports, strict=True)))
        unpacked.config.set("localStorage.path", "data")
        for name, value in (config or {}).items():
            unpacked.config.set(name, value)
        etcd = _etcd_config(folder / "etcd.yaml")
        text = unpacked.config.template_text
        text = text.replace("\netcd:\n", f"\netcd:\n  config:\n    path: {etcd}\n", 1)
        # A server that starts again waits for its dead predecessor's session to end before it loads anything. One that
        # has no processor for so long, on a machine with too much to do, ends itself.
        unpacked.config.template_text = re.sub(r"(\n  session:\n    ttl: )\d+", r"\g<1>20", text)
        unpacked.start()
        assert "ttl: 20" in (folder / "configs/milvus.yaml").read_text()
        assert "path: data" in (folder / "configs/milvus.yaml").read_text()
        self._process: subprocess.Popen[bytes] = unpacked.server_proc
        # Its own `stop`, called when the object goes, would signal a pid that is somebody else's by then.
        unpacked.server_proc = None
        self._health = f"http://127.0.0.1:{unpacked.webservice_port}/healthz"
        self.uri = f"http://127.0.0.1:{unpacked.listen_port}"
        self._environment = {
            **os.environ,
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(unpacked.webservice_port),
            "MILVUS_RUN_DIR": str(folder / "run"),
            "LD_LIBRARY_PATH": f"{folder / 'bin'}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def restart(self) -> None:
        """Kill, start again on the same data and ports, and wait until it serves."""
        self.kill()
        with (self._folder / "logs/restarted.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._folder / "bin/milvus"), "run", "standalone"],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        give_up = time.monotonic() + 120
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server did not start again; the end of its log:\n{self._end_of_log()}")
            time.sleep(0.2)

    def revive(self) -> None:
        """Start again what a test left dead, so that its failure is not every later test's as well."""
        if self._process.poll() is not None:
            warnings.warn(f"a server was left dead; the end of its log:\n{self._end_of_log()}", stacklevel=2)
            self.restart()

    @contextlib.contextmanager
    def refusing_writes(self) -> Iterator[None]:
        """Deny all writing meanwhile, as a full disk or a quota does; the server takes it up some six seconds later."""
        path = self._folder / "configs/milvus.yaml"
        text = path.read_text()
        before, after = text.split("limitWriting:", 1)
        path.write_text(f"{before}limitWriting:{after.replace('forceDeny: false', 'forceDeny: true', 1)}")
        try:
            yield
        finally:
            path.write_text(text)

    def _end_of_log(self) -> str:
        logs = sorted((self._folder / "logs").glob("*"), key=lambda path: path.stat().st_mtime)
        return logs[-1].read_text(errors="replace")[-4000:] if logs else ""

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self._health, timeout=5) as response:
                return b"OK" in response.read()
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now.

    They lie below those that the system gives to outgoing connections: one of these would take the port of a server
    that is dead for a moment, and a client that knocks there often enough even connects to itself.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 32768
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, max(first, 20_000)), 1000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("this machine has no free ports for a test server")


def _etcd_config(path: Path) -> Path:
    urls = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    path.write_text(
        f"name: default\nlisten-client-urls: {urls[0]}\nadvertise-client-urls: {urls[0]}\n"
        f"listen-peer-urls: {urls[1]}\ninitial-advertise-peer-urls: {urls[1]}\ninitial-cluster: default={urls[1]}\n"
    )
    return path
