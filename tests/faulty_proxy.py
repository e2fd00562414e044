"""A TCP proxy between a client and a real server, through which a test makes the network slow, silent, deaf or broken.

It looks at no byte that it passes on. What it does may be changed at any time, from the test's thread:

- `latency`: seconds that every piece waits before it is passed on.
- `silent`: nothing is passed on either way, and connections stay as they are: a hang, of the server or the network.
  What came meanwhile is passed on afterwards, as TCP would.
- `refusing`: new connections are closed at once. `cut` breaks those that there are.
- `cut_after`: so many bytes of the server's later, which may be in the middle of an answer, every connection is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType
from urllib.parse import urlsplit

_PIECE = 4096


class FaultyProxy:
    """A proxy of the server at a uri, on a port of its own; a context manager.

    uri: where clients connect. refused: connections that it closed at once, in all. cuts: how often it broke off those
    that there were. passed: bytes that it passed on, both ways.
    """

    def __init__(self, uri: str) -> None:
        place = urlsplit(uri)
        self._target = place.hostname or "127.0.0.1", place.port or 19530
        self.latency = 0.0
        self.refusing = False
        self.refused = 0
        self.cuts = 0
        self.passed = 0
        self._cut_after: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def silent(self) -> bool:
        return not self._speaking.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        self._loop.call_soon_threadsafe(self._speaking.clear if silent else self._speaking.set)

    @property
    def cut_after(self) -> int | None:
        return self._cut_after

    @cut_after.setter
    def cut_after(self, count: int | None) -> None:
        self._cut_after = count

    def cut(self) -> None:
        """Break all connections, and wait until that is done."""
        self._run(self._cut())

    def heal(self) -> None:
        """Pass everything on again."""
        self.latency, self.refusing, self._cut_after = 0.0, False, None
        self.silent = False

    def _run(self, coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)  # type: ignore[arg-type]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            self.refused += 1
            writer.transport.abort()
            return
        try:
            from_server, to_server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_server}
        pumps = [
            asyncio.ensure_future(self._pump(reader, to_server, of_server=False)),
            asyncio.ensure_future(self._pump(from_server, writer, of_server=True)),
        ]
        self._pumps |= set(pumps)
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            self._pumps -= set(pumps)
            for one in (writer, to_server):
                self._writers.discard(one)
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, of_server: bool) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while piece := await reader.read(_PIECE):
                await self._speaking.wait()
                if self.latency:
                    await asyncio.sleep(self.latency)
                if of_server and self._cut_after is not None:
                    self._cut_after -= len(piece)
                    if self._cut_after <= 0:
                        self._cut_after = None
                        writer.write(piece[: len(piece) // 2])
                        await writer.drain()
                        await self._cut()
                        return
                self.passed += len(piece)
                writer.write(piece)
                await writer.drain()

    async def _cut(self) -> None:
        self.cuts += 1
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()  # type: ignore[attr-defined]
        await self._cut()
        for pump in list(self._pumps):
            pump.cancel()
        while self._writers:
            await asyncio.sleep(0.01)
