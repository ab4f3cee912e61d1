"""When and where a client reconnects."""

import random
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.client.reconnect import Backoff, ReconnectPolicy, RetryMode, Servers, Timing, after_close
from imstream.codes import CloseCode, Code

TIMING = Timing(backoff=timedelta(seconds=1), backoff_max=timedelta(seconds=20), later=timedelta(seconds=5))


def backoff() -> Backoff:
    return Backoff(TIMING, rng=random.Random(1))  # noqa: S311 - no secret depends on it


@pytest.mark.parametrize(
    ("code", "reaction"),
    [
        (None, ReconnectPolicy(RetryMode.BACKOFF)),
        (1000, ReconnectPolicy(RetryMode.BACKOFF)),
        (1006, ReconnectPolicy(RetryMode.BACKOFF)),
        (CloseCode.FRAME_TOO_BIG, ReconnectPolicy(RetryMode.BACKOFF)),
        (CloseCode.DRAINING, ReconnectPolicy(RetryMode.NOW, switch_server=True)),
        (CloseCode.NODE_FULL, ReconnectPolicy(RetryMode.LATER, switch_server=True)),
        (4000, ReconnectPolicy(RetryMode.BACKOFF)),
        (CloseCode.NO_HEARTBEAT, ReconnectPolicy(RetryMode.BACKOFF)),
        (4499, ReconnectPolicy(RetryMode.BACKOFF)),
        (4500, ReconnectPolicy(RetryMode.NEVER)),
        (CloseCode.REPLACED, ReconnectPolicy(RetryMode.NEVER)),
        (4999, ReconnectPolicy(RetryMode.NEVER)),
    ],
)
def test_a_close_code_says_when_to_come_back(code: int | None, reaction: ReconnectPolicy) -> None:
    assert after_close(code) == reaction


@pytest.mark.parametrize(
    ("cause", "mode"),
    [
        (Code.INIT_TIMEOUT, RetryMode.BACKOFF),
        (Code.UNAUTHORIZED, RetryMode.NEVER),
        ("OF_A_NEWER_SERVER", RetryMode.NEVER),
        (None, RetryMode.NEVER),
    ],
)
def test_a_login_that_came_too_late_may_be_tried_again(cause: str | None, mode: RetryMode) -> None:
    assert after_close(CloseCode.NOT_AUTHENTICATED, cause) == ReconnectPolicy(mode)


def test_a_wait_is_anywhere_below_a_bound_that_doubles_up_to_its_limit() -> None:
    bounds = [1, 2, 4, 8, 16, 20, 20]
    longest = [timedelta()] * len(bounds)
    for _ in range(500):
        one = Backoff(TIMING)
        longest = [max(known, one.delay(RetryMode.BACKOFF)) for known in longest]
    for bound, wait in zip(bounds, longest, strict=True):
        assert timedelta(seconds=bound * 0.9) < wait <= timedelta(seconds=bound)


def test_a_connection_that_was_of_use_begins_anew() -> None:
    one = backoff()
    for _ in range(10):
        one.delay(RetryMode.BACKOFF)
    one.reset()
    assert one.delay(RetryMode.BACKOFF) <= TIMING.backoff


def test_now_is_at_once_only_the_first_time() -> None:
    one = backoff()
    assert one.delay(RetryMode.NOW) == timedelta(0)
    assert one.delay(RetryMode.NOW) > timedelta(0)


def test_later_is_not_before_the_time_that_is_set() -> None:
    one = backoff()
    assert all(timedelta(seconds=5) <= one.delay(RetryMode.LATER) <= timedelta(seconds=10) for _ in range(100))


@given(failures=st.integers(0, 10**6), mode=st.sampled_from([RetryMode.NOW, RetryMode.BACKOFF, RetryMode.LATER]))
def test_no_wait_is_longer_than_its_bound(failures: int, mode: RetryMode) -> None:
    wait = Backoff(TIMING, failures).delay(mode)
    assert timedelta(0) <= wait <= max(TIMING.backoff_max, 2 * TIMING.later)


def test_every_server_is_tried_before_waiting() -> None:
    servers = Servers(["a", "b", "c"])
    assert [(servers.advance(), servers.current) for _ in range(4)] == [
        (True, "b"),
        (True, "c"),
        (False, "a"),
        (True, "b"),
    ]
    servers.reset()
    assert [(servers.advance(), servers.current) for _ in range(3)] == [(True, "c"), (True, "a"), (False, "b")]


def test_a_single_server_is_waited_for() -> None:
    servers = Servers(["a"])
    assert (servers.advance(), servers.current) == (False, "a")
