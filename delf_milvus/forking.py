"""Libraries with threads of their own (torch, OpenVINO, gRPC) and `fork`: it copies a process without its threads.

In a process that was forked after they had begun, they wait for what never comes, or abort: matching two photos hangs,
and so does a search; opening a database ends the process. So such a use is refused in one sentence.
"""

from __future__ import annotations

import os

from delf_milvus.errors import UsageError


class OneProcess:
    """What works only in the process that used it first. what: how its sentence begins, "Photos were computed"."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = 0

    def check(self) -> None:
        """Note this process, at the first call; raise UsageError in one that was forked from it."""
        self._process = self._process or os.getpid()
        if self._process != os.getpid():
            raise UsageError(
                f"{self._what} before this process was forked, and what does it is not in a fork: start processes "
                "with the method spawn, and open the index in each."
            )

    @property
    def is_elsewhere(self) -> bool:
        """Whether another process used it first."""
        return self._process not in (0, os.getpid())
