"""A real Milvus server for tests, without a container: the wheel `milvus==2.3.5` (Linux x86-64), as its own process.

It is old and for tests only. What matters here:
- `localStorage.path` must be relative: with the wheel's default, a query that returns vectors deletes the raw vectors.
- SIGTERM takes it more than a minute, and nothing acknowledged is lost by SIGKILL: it is killed, by its own pid.
- The ports that the wheel looks for are the same in every process that looks at that time: it gets ports from here.
- Its embedded etcd would take the ports 2379 and 2380, whoever has them already: it gets a configuration of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path


class WheelServer:
    """The server in a folder of its own, on free ports of the loopback interface.

    uri: where it listens. storage: folder that the server reads files of a bulk import from; a file `storage / name`
    is called `str(storage / name)` in the import. config: values of the wheel's template, by its names.
    """

    def __init__(self, folder: Path, config: Mapping[str, str | int | bool] | None = None) -> None:
        from milvus import MilvusServer

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
        unpacked.config.template_text = text.replace("\netcd:\n", f"\netcd:\n  config:\n    path: {etcd}\n", 1)
        unpacked.start()
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
                raise RuntimeError(f"the server did not start again; its logs are in {self._folder / 'logs'}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self._health, timeout=5) as response:
                return b"OK" in response.read()
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _etcd_config(path: Path) -> Path:
    urls = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    path.write_text(
        f"name: default\nlisten-client-urls: {urls[0]}\nadvertise-client-urls: {urls[0]}\n"
        f"listen-peer-urls: {urls[1]}\ninitial-advertise-peer-urls: {urls[1]}\ninitial-cluster: default={urls[1]}\n"
    )
    return path
