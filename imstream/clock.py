"""The wall clock, the clock of Redis, time spans in milliseconds for Redis, and the days of quotas."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import time as time_of_day
from math import ceil
from zoneinfo import ZoneInfo


def milliseconds(span: timedelta) -> int:
    """Whole milliseconds, at least 1: to Redis, 0 means "at once" or "for ever"."""
    return max(1, int(span.total_seconds() * 1000))


def to_timedelta(milliseconds: float) -> timedelta:
    """A span from milliseconds. Values out of range, or not numbers, give the longest span."""
    try:
        return timedelta(milliseconds=milliseconds)
    except (OverflowError, ValueError):
        return timedelta.max


def now_ms() -> int:
    """Whole milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def time_of(entry_id: str) -> int:
    """When a stream entry was added, in milliseconds since 1970 by the clock of Redis."""
    return int(entry_id.partition("-")[0])


class RedisClock:
    """The clock of the server with the requests stream of this node, estimated from its answers; before, our own.

    An answer with a time bounds by how much that clock is ahead of the monotonic one; the estimate is moved as little
    as that requires. So it is more exact than one round trip, and follows a clock that is set.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._ahead = 1000 * (time.time() - monotonic())

    def adjust(self, at: int, *, sent: float) -> None:
        """Redis has answered just now, with its time in whole milliseconds, to a command `sent` at a monotonic time."""
        self._ahead = min(max(self._ahead, at - 1000 * self._monotonic()), at + 1 - 1000 * sent)

    def at(self, moment: float) -> int:
        """Convert a monotonic time in seconds to milliseconds since 1970."""
        return int(1000 * moment + self._ahead)

    def now(self) -> int:
        """The time in milliseconds since 1970."""
        return self.at(self._monotonic())


@dataclass(frozen=True, slots=True)
class Day:
    """A date such as `2026-11-24`, from `start` to before `end`, in milliseconds since 1970."""

    name: str
    start: int
    end: int


class Calendar:
    """The days of one time zone."""

    def __init__(self, zone: ZoneInfo) -> None:
        self.zone = zone
        self._last = Day("", 0, 0)

    def day(self, at: int) -> Day:
        """The day of a time in milliseconds since 1970.

        Raises:
            ValueError, OverflowError, OSError: The time is out of range.
        """
        if not self._last.start <= at < self._last.end:
            date = datetime.fromtimestamp(at // 1000, self.zone).date()
            # A midnight that a clock change skips is the time of the change; of a repeated one, the first is taken.
            midnights = (datetime.combine(date + timedelta(days=n), time_of_day(), self.zone) for n in (0, 1))
            self._last = Day(date.isoformat(), *(int(midnight.timestamp()) * 1000 for midnight in midnights))
        return self._last

    def format(self, at: float) -> str:
        """A time in milliseconds since 1970, as `2026-11-24 15:30 (UTC)`, rounded up to the minute."""
        try:
            minute = datetime.fromtimestamp(ceil(at / 60_000) * 60, self.zone)
        except (ValueError, OverflowError, OSError):
            return "beyond all years"
        return f"{minute:%Y-%m-%d %H:%M} ({self.zone.key})"
