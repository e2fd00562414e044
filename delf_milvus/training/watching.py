"""Telling how far a training is, to whoever listens to its lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

Say = Callable[[str], None]


@runtime_checkable
class Watcher(Protocol):
    """A listener that wants more than lines: what is done now, of how much."""

    def __call__(self, line: str, /) -> None:
        """Take a line."""

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """Take how far `what` is. unit: of the numbers, in the plural."""


def tell(say: Say, what: str, done: int, total: int, unit: str = "photos") -> None:
    """Tell a watcher how far it is; whoever takes lines alone is not bothered."""
    if isinstance(say, Watcher):
        say.progress(what, done, total, unit)
