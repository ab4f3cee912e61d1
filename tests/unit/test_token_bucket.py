"""Token buckets allow exactly bursts of their size and their rate in the long run."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.token_bucket import NEVER_USED, TokenBucket

RATES = st.floats(0.01, 1000)
SIZES = st.integers(1, 500)
GAPS = st.lists(st.floats(0, 30), min_size=1, max_size=200)
BEGIN = 1_000_000.0  # seconds of a clock that has run for days
ROUNDING = 1e-5  # seconds within the tolerance of a bucket


def taken(bucket: TokenBucket, times: list[float]) -> list[float]:
    """The times, of those given, at which a token is available and taken."""
    full_at, got = NEVER_USED, []
    for now in times:
        after = bucket.consume(full_at, now)
        if not bucket.wait_time(after, now):
            full_at = after
            got.append(now)
    return got


@given(RATES, SIZES, GAPS)
def test_in_no_span_of_time_more_is_taken_than_flows_in_and_fits(rate: float, size: int, gaps: list[float]) -> None:
    times = taken(TokenBucket(rate, size), list(accumulate(gaps, initial=BEGIN)))
    for begin in range(0, len(times), 7):
        for end in range(begin, len(times), 5):
            assert end - begin + 1 <= size + (times[end] - times[begin]) * rate + 0.01


@given(RATES, SIZES)
def test_all_that_fits_may_be_taken_at_once_and_then_one_for_each_that_flows_in(rate: float, size: int) -> None:
    bucket = TokenBucket(rate, size)
    assert len(taken(bucket, [BEGIN] * (size + 10))) == size
    later = [BEGIN + (n + 0.5) / rate for n in range(20)]
    assert len(taken(bucket, [BEGIN] * size + later)) == size + 19


@given(RATES, SIZES, GAPS)
def test_who_waits_as_long_as_told_gets_a_token(rate: float, size: int, gaps: list[float]) -> None:
    bucket, full_at = TokenBucket(rate, size), NEVER_USED
    for now in accumulate(gaps, initial=BEGIN):
        after = bucket.consume(full_at, now)
        if wait := bucket.wait_time(after, now):
            assert not bucket.wait_time(bucket.consume(full_at, now + wait), now + wait)
            if wait > ROUNDING:
                assert bucket.wait_time(bucket.consume(full_at, now + wait / 2), now + wait / 2)
        else:
            full_at = after


@given(RATES, SIZES, st.integers(1, 1000), GAPS)
def test_a_bucket_whose_moment_has_passed_is_as_good_as_new(
    rate: float, size: int, tokens: int, gaps: list[float]
) -> None:
    bucket = TokenBucket(rate, size)
    full_at = bucket.consume(NEVER_USED, BEGIN, tokens)
    now = full_at + gaps[0]
    assert bucket.consume(full_at, now) == bucket.consume(NEVER_USED, now)


@pytest.mark.parametrize("debt", [1, 40, 300])
def test_who_takes_what_is_not_there_waits_until_it_has_flowed_in(debt: int) -> None:
    bucket = TokenBucket(50, 200)
    full_at = bucket.consume(NEVER_USED, BEGIN, 200 + debt)
    assert bucket.wait_time(full_at, BEGIN) == pytest.approx(debt / 50)
    assert bucket.wait_time(full_at, BEGIN + debt / 50) == 0


def test_more_tokens_at_once_are_as_many_one_by_one() -> None:
    bucket = TokenBucket(3, 10)
    at_once = bucket.consume(NEVER_USED, BEGIN, 5)
    one_by_one = [NEVER_USED]
    for _ in range(5):
        one_by_one.append(bucket.consume(one_by_one[-1], BEGIN))
    assert one_by_one[-1] == pytest.approx(at_once)
    assert all(before < after for before, after in pairwise(one_by_one))
