"""Files of this machine behind `deadly://`: a storage for fsspec that kills who reads some of them, with SIGKILL."""

from __future__ import annotations

import os
import signal
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class DeadlyFileSystem(LocalFileSystem):
    """Reading `deadly*` kills the process each time; reading `once*` the first time, which leaves a file beside it."""

    protocol = "deadly"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("deadly://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        name = os.path.basename(path)
        if name.startswith("deadly") or (name.startswith("once") and self._is_first(f"{path}.killed")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._open(path, mode, **options)

    @staticmethod
    def _is_first(mark: str) -> bool:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
