"""Turns for work that takes a processor: a bounded number at once, the others wait in a fair queue.

Contract: at most `slots` turns are taken. A turn that is given back goes to the client that has waited through the most
turns of others: clients alternate, and each client's own requests keep their order. So one client with a thousand
photos delays another's single photo by one photo. All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class QueueFullError(Exception):
    """No place to wait. seconds: an estimate of when there will be one."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


class FairQueue:
    """slots: turns at once. most: waiting requests of all clients. most_each: of one client."""

    def __init__(self, slots: int, most: int, most_each: int) -> None:
        self._slots = slots
        self._most = most
        self._most_each = most_each
        # The first client is the next one.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._seconds = 1.0
        self.length = 0
        self.running = 0

    async def enter(self, client: str) -> None:
        """Wait for a turn, which `leave` must give back; a cancelled call has none. Raises QueueFullError."""
        if self.running < self._slots:
            self.running += 1
            return
        mine = self._waiting.get(client, ())
        if self.length >= self._most or len(mine) >= self._most_each:
            raise QueueFullError(self._seconds * (self.length + 1) / self._slots)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self.length += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # It was given in the moment of the cancellation.
                self._pass_on()
            else:
                self._forget(client, turn)
            raise

    def leave(self, seconds: float | None = None) -> None:
        """Give a turn back. seconds: how long it took, for estimates."""
        if seconds is not None:
            self._seconds += 0.2 * (seconds - self._seconds)
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            self.length -= 1
            if turns:
                self._waiting[client] = turns
            # One that was cancelled in this moment, which its own call has not seen yet, costs its client nothing.
            if not turn.done():
                turn.set_result(None)
                return
            if turns:
                self._waiting.move_to_end(client, last=False)
        self.running -= 1

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client)
        if turns is None or turn not in turns:
            return
        turns.remove(turn)
        self.length -= 1
        if not turns:
            del self._waiting[client]
