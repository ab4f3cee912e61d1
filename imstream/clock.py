"""The wall clock and time spans: what Redis wants in milliseconds, and the days that quotas are counted by."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import time as time_of_day
from math import ceil
from zoneinfo import ZoneInfo


def milliseconds(span: timedelta) -> int:
    """Whole milliseconds, at least one: Redis takes 0 for "at once" or "for ever"."""
    return max(1, int(span.total_seconds() * 1000))


def to_timedelta(count: float) -> timedelta:
    """A span of so many milliseconds, as Redis has them; what is beyond all years, or no number, is the longest one."""
    try:
        return timedelta(milliseconds=count)
    except (OverflowError, ValueError):
        return timedelta.max


def now_ms() -> int:
    """What the clock says, in whole milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Day:
    """One day. Times are in milliseconds since 1970.

    Attributes:
        name: Its date, such as `2026-11-24`.
        start: When it begins.
        end: When the next one does.
    """

    name: str
    start: int
    end: int


class Calendar:
    """The days of one time zone."""

    def __init__(self, zone: ZoneInfo) -> None:
        self.zone = zone
        self._last = Day("", 0, 0)

    def day(self, at: int) -> Day:
        """The day of a moment, in milliseconds since 1970.

        Raises:
            ValueError, OverflowError, OSError: It is beyond all years.
        """
        last = self._last
        if not last.start <= at < last.end:
            last = self._last = self._find(at)
        return last

    def format(self, at: float) -> str:
        """A moment, in milliseconds since 1970, as people read it: `2026-11-24 15:30 (UTC)`. Never too early."""
        try:
            minute = datetime.fromtimestamp(ceil(at / 60_000) * 60, self.zone)
        except (ValueError, OverflowError, OSError):
            return "beyond all years"
        return f"{minute:%Y-%m-%d %H:%M} ({self.zone.key})"

    def _find(self, at: int) -> Day:
        date = datetime.fromtimestamp(at // 1000, self.zone).date()
        # A midnight that a clock change leaves out is the moment of the change, one that comes twice the first of both.
        midnights = (datetime.combine(date + timedelta(days=n), time_of_day(), self.zone) for n in (0, 1))
        begins, ends = (int(midnight.timestamp()) * 1000 for midnight in midnights)
        return Day(date.isoformat(), start=begins, end=ends)
