"""Token buckets: how much may come in a time on average, and how much at once."""

from __future__ import annotations

from dataclasses import dataclass

NEVER_USED = 0.0
"""A bucket from which nothing was taken yet."""

_ROUNDING = 1e-6
"""Seconds by which a sum of times may be wrong."""


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """So many tokens flow into a bucket in each second, up to its size; whatever comes takes one, or what it costs.

    All that there is to know of one bucket is the moment at which it will be full again, in seconds of any clock. So a
    bucket is a number, and one whose moment has passed need not be kept.

    Attributes:
        rate: Tokens that flow in each second.
        size: Most tokens that a bucket holds.
    """

    rate: float
    size: int

    def consume(self, full_at: float, now: float, tokens: float = 1) -> float:
        """Take tokens, also those that are not there; when the bucket will be full again then."""
        return max(full_at, now) + tokens / self.rate

    def wait_time(self, full_at: float, now: float) -> float:
        """Seconds until a bucket owes nothing any more; 0 when it does not."""
        wait = full_at - now - self.size / self.rate
        return wait if wait > _ROUNDING else 0.0
