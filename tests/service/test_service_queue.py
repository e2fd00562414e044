"""The fair queue by itself, against what its contract says."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delf_milvus.service.queue import FairQueue, QueueFullError


def order_of(clients: list[str], slots: int) -> list[int]:
    """The order in which requests of these clients, made at once, get their turns; each turn ends before the next."""

    async def main() -> list[int]:
        queue = FairQueue(slots, 1000, 1000)
        order: list[int] = []

        async def one(number: int) -> None:
            await queue.enter(clients[number])
            order.append(number)
            assert 1 <= queue.running <= slots
            await asyncio.sleep(0)
            queue.leave(0.1)

        await asyncio.gather(*(one(number) for number in range(len(clients))))
        assert (queue.running, queue.length, len(queue._waiting)) == (0, 0, 0)
        return order

    return asyncio.run(main())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=25), st.integers(1, 3))
def test_everybody_gets_a_turn_and_each_client_s_own_requests_keep_their_order(clients: list[str], slots: int) -> None:
    order = order_of(clients, slots)
    assert sorted(order) == list(range(len(clients)))
    for client in set(clients):
        own = [number for number in order if clients[number] == client]
        assert own == sorted(own)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 30), st.integers(1, 3))
def test_one_request_waits_for_at_most_one_of_a_client_with_many(many: int, slots: int) -> None:
    order = order_of(["a"] * many + ["b"], slots)
    assert order.index(many) <= slots + 1


def test_a_full_queue_says_when_there_will_be_room() -> None:
    async def main() -> None:
        queue = FairQueue(1, 3, 2)
        await queue.enter("a")
        waiting = [asyncio.ensure_future(queue.enter(client)) for client in ("a", "a")]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await queue.enter("a")
        waiting.append(asyncio.ensure_future(queue.enter("b")))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await queue.enter("c")
        assert full.value.seconds == pytest.approx(4.0)
        for _ in range(4):
            queue.leave(1.0)
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert (queue.running, queue.length) == (0, 0)

    asyncio.run(main())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=3, max_size=12))
def test_a_cancelled_wait_keeps_no_turn(cancelled: list[bool]) -> None:
    async def main() -> None:
        queue = FairQueue(1, 100, 100)
        await queue.enter("first")
        tasks = [asyncio.ensure_future(queue.enter(str(i % 2))) for i in range(len(cancelled))]
        await asyncio.sleep(0)
        # Given back first, so that one turn is given to a task that is cancelled before it runs.
        queue.leave()
        for task, gone in zip(tasks, cancelled, strict=True):
            if gone:
                task.cancel()
        left = len(cancelled) - sum(cancelled)
        for _ in range(left):
            for _ in range(5):
                await asyncio.sleep(0)
            queue.leave()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert (queue.running, queue.length) == (0, 0)

    asyncio.run(main())
