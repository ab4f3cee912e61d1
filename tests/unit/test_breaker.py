"""The circuit breaker: when it opens, for how long, and what closes it."""

# ruff: noqa: D102 - the rules of the state machine are described by their names

from datetime import timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imstream.ai.call_gate import Breaker
from imstream.settings import Settings

FAILURES, PAUSE, LONGEST = 3, 2.0, 30.0


class Clock:
    """A clock set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return make_breaker(clock)


def make_breaker(clock: Clock) -> Breaker:
    settings = Settings.load(ai_breaker_failures=FAILURES, ai_breaker_pause=PAUSE, retry_wait_max=LONGEST)
    return Breaker(settings, clock=clock)


def fail(breaker: Breaker, times: int = 1, *, retry_after: float | None = None) -> None:
    for _ in range(times):
        breaker.record_failure(None if retry_after is None else timedelta(seconds=retry_after))


def test_a_few_failures_hold_nothing_back(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    assert (breaker.tripped, breaker.remaining()) == (False, 0)


def test_failures_in_a_row_open_it_for_its_first_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, FAILURES)
    assert (breaker.tripped, breaker.remaining()) == (True, PAUSE)
    clock.now += PAUSE - 0.5
    assert breaker.remaining() == 0.5


def test_a_success_in_between_begins_the_count_anew(breaker: Breaker) -> None:
    for _ in range(5):
        fail(breaker, FAILURES - 1)
        breaker.record_success()
    assert not breaker.tripped


def test_after_the_pause_it_is_still_tripped_until_a_call_succeeds(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, FAILURES)
    clock.now += PAUSE
    assert (breaker.tripped, breaker.remaining()) == (True, 0)
    breaker.record_success()
    assert (breaker.tripped, breaker.remaining()) == (False, 0)


def test_each_pause_lasts_twice_as_long_up_to_the_longest(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, FAILURES - 1)
    pauses = []
    for _ in range(6):
        fail(breaker)
        pauses.append(breaker.remaining())
        clock.now += breaker.remaining()
    assert pauses == [2, 4, 8, 16, 30, 30]


def test_after_a_success_pauses_are_short_again(breaker: Breaker, clock: Clock) -> None:
    for _ in range(10):
        fail(breaker)
        clock.now += LONGEST
    breaker.record_success()
    fail(breaker, FAILURES)
    assert breaker.remaining() == PAUSE


def test_calls_that_fail_during_a_pause_do_not_lengthen_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, FAILURES)
    clock.now += 1
    fail(breaker, 20)
    assert breaker.remaining() == PAUSE - 1
    clock.now += 1
    fail(breaker)
    assert breaker.remaining() == 2 * PAUSE


def test_one_trial_is_made_in_each_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, FAILURES)
    clock.now += PAUSE
    breaker.record_probe()
    assert breaker.remaining() == 2 * PAUSE
    breaker.record_success()
    assert breaker.remaining() == 0


def test_a_backend_that_asks_to_be_left_alone_is_left_alone_at_once(breaker: Breaker) -> None:
    fail(breaker, retry_after=7)
    assert (breaker.tripped, breaker.remaining()) == (True, 7)


def test_it_is_not_left_alone_for_longer_than_the_longest_wait(breaker: Breaker) -> None:
    fail(breaker, retry_after=3600)
    assert breaker.remaining() == LONGEST


def test_a_call_that_slipped_through_does_not_lift_what_the_backend_asked_for(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, retry_after=7)
    clock.now += 1
    breaker.record_success()
    assert (breaker.tripped, breaker.remaining()) == (True, 6)
    clock.now += 6
    breaker.record_success()
    assert not breaker.tripped


def test_a_trial_does_not_lift_what_the_backend_asked_for(breaker: Breaker) -> None:
    fail(breaker, retry_after=7)
    breaker.record_probe()  # an abandoned request is claimed whatever the state of the breaker
    assert breaker.remaining() == 7


class BreakerUsed(RuleBasedStateMachine):
    """Any sequence of results of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = make_breaker(self.clock)
        self.failed_in_a_row = 0
        self.asked_until = 0.0

    @rule(seconds=st.integers(0, 120).map(lambda halves: halves / 2))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(retry_after=st.none() | st.integers(0, 60))
    def a_call_fails(self, retry_after: int | None) -> None:
        before = self.breaker.remaining()
        fail(self.breaker, retry_after=retry_after)
        self.failed_in_a_row += 1
        self.asked_until = max(self.asked_until, self.clock.now + min(retry_after or 0.0, LONGEST))
        assert self.breaker.remaining() >= before
        if self.failed_in_a_row >= FAILURES:
            assert self.breaker.remaining() > 0

    @rule()
    def a_call_succeeds(self) -> None:
        self.breaker.record_success()
        self.failed_in_a_row = 0
        assert self.breaker.tripped == (self.asked_until > self.clock.now)

    @rule()
    def a_trial_is_begun(self) -> None:
        self.breaker.record_probe()
        assert self.breaker.remaining() > 0

    @invariant()
    def nothing_is_held_back_for_longer_than_the_longest_wait(self) -> None:
        assert 0 <= self.breaker.remaining() <= LONGEST

    @invariant()
    def who_is_held_back_knows_that_it_is_tripped(self) -> None:
        assert self.breaker.tripped or self.breaker.remaining() == 0

    @invariant()
    def the_wish_of_the_backend_is_kept(self) -> None:
        assert self.clock.now + self.breaker.remaining() >= self.asked_until


TestAnyCourseOfCalls = BreakerUsed.TestCase
