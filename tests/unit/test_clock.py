"""Days of quotas, in time zones with unusual midnights; the clock of Redis, as a node estimates it."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.clock import Calendar, RedisClock
from imstream.settings import validate_timezone

HOUR = 3_600_000
# Clock changes at midnight, by half an hour, in the southern hemisphere, and a skipped date.
ZONES = st.sampled_from(
    [
        *("UTC", "Asia/Shanghai", "Europe/Berlin", "Africa/Cairo", "America/Havana", "Asia/Beirut"),
        *("America/Sao_Paulo", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Kathmandu", "America/Asuncion"),
    ]
)
MOMENTS = st.integers(1_000_000_000_000, 4_000_000_000_000)  # 2001 to 2096


def ms(text: str) -> int:
    """A time in UTC as milliseconds since 1970."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


@given(ZONES, MOMENTS)
def test_days_follow_each_other_without_gap_or_overlap_and_have_the_date_of_their_moments(zone: str, at: int) -> None:
    calendar = Calendar(ZoneInfo(zone))
    day = calendar.day(at)
    assert day.start <= at < day.end
    assert day.name == datetime.fromtimestamp(at / 1000, ZoneInfo(zone)).date().isoformat()
    assert calendar.day(day.start) == calendar.day(day.end - 1) == day
    following = calendar.day(day.end)
    assert following.start == day.end
    assert following.name > day.name
    assert 22 * HOUR <= day.end - day.start <= 26 * HOUR


@pytest.mark.parametrize(
    ("zone", "at", "begins", "ends"),
    [
        ("UTC", "2026-11-24T23:59:59.999", "2026-11-24T00:00", "2026-11-25T00:00"),
        ("Asia/Shanghai", "2026-11-24T16:00", "2026-11-24T16:00", "2026-11-25T16:00"),
        ("Europe/Berlin", "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00"),  # 23 hours
        ("Europe/Berlin", "2026-10-25T12:00", "2026-10-24T22:00", "2026-10-25T23:00"),  # 25 hours
        ("Africa/Cairo", "2026-04-24T12:00", "2026-04-23T22:00", "2026-04-24T21:00"),  # midnight is skipped
        ("America/Havana", "2026-11-01T12:00", "2026-11-01T04:00", "2026-11-02T05:00"),  # midnight is repeated
    ],
)
def test_a_day_is_as_long_as_its_clock_says(zone: str, at: str, begins: str, ends: str) -> None:
    day = Calendar(ZoneInfo(zone)).day(ms(at))
    assert (day.start, day.end) == (ms(begins), ms(ends))


def test_a_moment_is_shown_in_the_zone_and_never_too_early() -> None:
    calendar = Calendar(ZoneInfo("Asia/Shanghai"))
    assert calendar.format(ms("2026-11-24T07:30:00.000")) == "2026-11-24 15:30 (Asia/Shanghai)"
    assert calendar.format(ms("2026-11-24T07:30:00.001")) == "2026-11-24 15:31 (Asia/Shanghai)"
    assert {calendar.format(at) for at in (1e300, -1e300, float("inf"))} == {"beyond all years"}


LATENCIES = st.lists(st.tuples(*[st.floats(0, 0.05)] * 2), min_size=1, max_size=5)
"""Seconds that commands take to Redis, and their answers back."""


@given(st.lists(st.tuples(st.integers(-HOUR, HOUR), LATENCIES), min_size=1, max_size=3))
def test_the_clock_of_redis_is_known_to_the_shortest_round_trip_since_it_was_set(
    settings: list[tuple[int, list[tuple[float, float]]]],
) -> None:
    now = 1_000_000.0
    clock = RedisClock(lambda: now)
    for ahead, latencies in settings:
        for number, (there, back) in enumerate(latencies, 1):
            sent = now
            at = int(1000 * (sent + there) + ahead)
            now = sent + there + back
            clock.adjust(at, sent=sent)
            shortest = min(map(sum, latencies[:number]))
            assert abs(clock.now() - (1000 * now + ahead)) <= 1000 * shortest + 2  # times are whole milliseconds
            now += 1


@pytest.mark.parametrize("name", ["Mars/Olympus", "Asia", "", "/etc/passwd", "../UTC", "x" * 300, "UTC\0"])
def test_what_is_no_time_zone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a time zone such as UTC"):
        validate_timezone(name)
