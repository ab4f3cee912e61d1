"""Times and time spans as Redis wants them."""

from __future__ import annotations

import time
from datetime import timedelta


def milliseconds(span: timedelta) -> int:
    """Whole milliseconds, at least one: Redis takes 0 for "at once" or "for ever"."""
    return max(1, int(span.total_seconds() * 1000))


def span_of(count: float) -> timedelta:
    """A span of so many milliseconds, as Redis has them; what is beyond all years, or no number, is the longest one."""
    try:
        return timedelta(milliseconds=count)
    except (OverflowError, ValueError):
        return timedelta.max


def now() -> int:
    """What the clock says, in whole milliseconds since 1970."""
    return time.time_ns() // 1_000_000
