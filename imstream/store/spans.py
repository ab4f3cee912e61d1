"""Times and time spans as Redis wants them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import timedelta


def milliseconds(span: timedelta) -> int:
    """Whole milliseconds, at least one: Redis takes 0 for "at once" or "for ever"."""
    return max(1, int(span.total_seconds() * 1000))


def now() -> int:
    """What the clock says, in whole milliseconds since 1970."""
    return time.time_ns() // 1_000_000
