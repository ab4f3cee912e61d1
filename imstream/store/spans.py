"""Time spans as Redis wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import timedelta


def milliseconds(span: timedelta) -> int:
    """Whole milliseconds, at least one: Redis takes 0 for "at once" or "for ever"."""
    return max(1, int(span.total_seconds() * 1000))
