"""Token buckets: limit an average rate and the size of a burst."""

from dataclasses import dataclass

NEVER_USED = 0.0  # the state of a bucket that was never used
_ROUNDING = 1e-6  # seconds of rounding error to tolerate in a sum of times


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """`rate` tokens a second flow into a bucket, which holds at most `size`.

    The state of a bucket is one number, which the caller keeps: when it will be full again, in seconds of any clock.
    Once that time has passed, the state may be dropped.
    """

    rate: float
    size: int

    def consume(self, full_at: float, now: float, tokens: float = 1) -> float:
        """Take tokens, if need be on credit; return the new state."""
        return max(full_at, now) + tokens / self.rate

    def wait_time(self, full_at: float, now: float) -> float:
        """Seconds until the credit is paid back; 0 without credit."""
        wait = full_at - now - self.size / self.rate
        return wait if wait > _ROUNDING else 0.0
