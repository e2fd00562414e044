"""The breaker: three failures in a row open it, a cool-down later one trial decides."""

from __future__ import annotations

import pytest

from delf_milvus.errors import DatabaseError, ImageError, NotFoundError
from delf_milvus.service.breaker import Breaker, OpenError
from delf_milvus.store.connection import AwayError, DeadlineError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(3, 10.0, clock)


def ask(breaker: Breaker, error: BaseException | None = None) -> None:
    """One question, which ends with an answer or this error."""
    with breaker.asking():
        if error is not None:
            raise error


def fail(breaker: Breaker, times: int) -> None:
    for kind in (AwayError, DeadlineError, AwayError)[:times]:
        with pytest.raises(kind):
            ask(breaker, kind("away"))


def test_it_opens_after_failures_in_a_row_and_says_when_to_come_back(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 2)
    ask(breaker)
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert (breaker.state, breaker.opened) == ("open", 1)
    clock.now = 4.0
    with pytest.raises(OpenError) as refused:
        ask(breaker)
    assert refused.value.seconds == 6.0


def test_one_trial_passes_after_the_cool_down_and_closes_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now = 10.0
    with breaker.asking():
        assert breaker.state == "trying"
        with pytest.raises(OpenError):
            ask(breaker)
    assert breaker.state == "closed"
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_a_trial_that_fails_opens_it_for_as_long_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now = 10.0
    fail(breaker, 1)
    clock.now = 19.0
    with pytest.raises(OpenError):
        ask(breaker)
    clock.now = 20.0
    ask(breaker)
    assert (breaker.state, breaker.opened) == ("closed", 2)


@pytest.mark.parametrize("answer", [DatabaseError("the disk is full"), NotFoundError("no such image")])
def test_an_error_that_the_database_answered_is_an_answer(breaker: Breaker, clock: Clock, answer: Exception) -> None:
    fail(breaker, 2)
    with pytest.raises(type(answer)):
        ask(breaker, answer)
    fail(breaker, 2)
    assert breaker.state == "closed"


@pytest.mark.parametrize("end", [ImageError("no photo"), KeyboardInterrupt()])
def test_a_question_that_never_reached_the_database_decides_nothing(
    breaker: Breaker, clock: Clock, end: BaseException
) -> None:
    fail(breaker, 2)
    with pytest.raises(type(end)):
        ask(breaker, end)
    fail(breaker, 1)
    assert breaker.state == "open"
    clock.now = 10.0
    with pytest.raises(type(end)):
        ask(breaker, end)
    assert breaker.state == "open"
    # The next one is the trial.
    ask(breaker)
    assert breaker.state == "closed"


def test_what_was_asked_before_it_opened_does_not_close_it(breaker: Breaker) -> None:
    with breaker.asking():
        fail(breaker, 3)
    assert breaker.state == "open"


def test_it_can_be_switched_off(clock: Clock) -> None:
    breaker = Breaker(0, 10.0, clock)
    for _ in range(5):
        fail(breaker, 3)
    assert breaker.state == "closed"
