"""A time zone in which no day ends during the tests: a quota that is counted per day must not begin again in one."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

_EAST = 12 - datetime.now(UTC).hour

NOON = f"Etc/GMT{-_EAST:+d}"
"""The zone with a time between 12 and 13 o'clock when the tests begin; names of this kind have the sign reversed."""


def today() -> str:
    """The date there."""
    return f"{datetime.now(ZoneInfo(NOON)):%Y-%m-%d}"
