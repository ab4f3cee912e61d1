"""What Redis denies, said once: nodes ask again and again until an operator has seen to it, and not mutely."""

from __future__ import annotations

import time

import structlog

from imstream.errors import StoreDenied

SAY_AGAIN = 300.0
"""Seconds after which the same is said once more, if it is still denied."""

_MOST_KEPT = 100
"""Sentences kept in mind. There are hardly as many; more are forgotten and said again."""

log = structlog.get_logger()


class AccessLog:
    """One for all connections of a process, so that a login that is denied to each of them is said once."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def note(self, denied: StoreDenied) -> None:
        """Log what was denied, unless that was done lately."""
        sentence, now = str(denied), time.monotonic()
        if now - self._said.get(sentence, float("-inf")) < SAY_AGAIN:
            return
        if len(self._said) >= _MOST_KEPT:
            self._said.clear()
        self._said[sentence] = now
        log.error("redis denies access", error=sentence)
