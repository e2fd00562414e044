"""Keeps requests from a database that does not answer, so that they fail at once instead of one after the other late.

Contract: it is closed, and everything passes, until `failures` questions in a row found the database away or too late.
Then it is open for `seconds`, and nothing passes. After that one question may pass, as a trial: if it is answered the
breaker closes, else it is open for as long again. An answer that is an error of another kind (a filter that does not
fit, a full disk) is an answer. All methods belong to one event loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from delf_milvus.errors import CollectionError, DatabaseError, NotFoundError
from delf_milvus.store.connection import AwayError, DeadlineError

State = Literal["closed", "open", "trying"]


class OpenError(Exception):
    """The breaker is open. seconds: after which a question may pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the database has not answered lately")
        self.seconds = seconds


class Breaker:
    """failures: in a row that open it; 0: never. seconds: that it stays open. opened: how often it has opened."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = failures
        self._seconds = seconds
        self._clock = clock
        self._failed = 0
        self._until = -math.inf
        self.state: State = "closed"
        self.opened = 0

    def check(self) -> None:
        """Raise OpenError where a question could not pass now."""
        if self.state == "trying":
            raise OpenError(1.0)
        if self.state == "open" and (left := self._until - self._clock()) > 0:
            raise OpenError(left)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around one question; raises OpenError, and what the question raises.

        One that ends before it reached the database, with a photo that is none, says nothing of it: the next may try.
        """
        self.check()
        trial = self.state == "open"
        if trial:
            self.state = "trying"
        try:
            yield
        except (AwayError, DeadlineError):
            self._fail(trial=trial)
            raise
        except (DatabaseError, CollectionError, NotFoundError):
            self._succeed(trial=trial)
            raise
        except BaseException:
            if trial:
                self.state = "open"
            raise
        else:
            self._succeed(trial=trial)

    def _succeed(self, *, trial: bool) -> None:
        # What was asked before it opened says nothing of now.
        if trial or self.state == "closed":
            self.state = "closed"
            self._failed = 0

    def _fail(self, *, trial: bool) -> None:
        if self.state != "closed" and not trial:
            return
        self._failed += 1
        if trial or (self._most and self._failed >= self._most):
            self.state = "open"
            self.opened += 1
            self._until = self._clock() + self._seconds
