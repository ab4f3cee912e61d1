"""Tokens (JSON Web Tokens, RFC 7519) that show who a user is: the rules they are read by, and the keys.

What is imported from here is light; its modules bring cryptography, which a node without tokens does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token shows: who, and until when (seconds since 1970)."""

    user_id: int
    until: float


class InvalidToken(Exception):  # noqa: N818 - a verdict, not an error of ours
    """A token shows nothing. `reason`: a stable word for the log; its bearer is told no more than a sentence says."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


Reason = Literal[
    "missing",
    "malformed",
    "algorithm",
    "signature",
    "unknown_key",
    "audience",
    "issuer",
    "claims",
    "expired",
    "not_yet_valid",
    "lifetime",
    "other_user",
]


class KeysUnavailable(Exception):  # noqa: N818 - reads as the state that it names
    """The key of a token cannot be had now. `retry_after`: when it may be had."""

    def __init__(self, retry_after: timedelta) -> None:
        super().__init__("no key")
        self.retry_after = retry_after


class KeySource(Protocol):
    """Where keys come from. `at_work` is open while the node runs."""

    def at_work(self) -> AbstractAsyncContextManager[object]:
        """Get keys, and keep them fresh. Waits for nobody."""
        ...

    async def reload(self) -> bool:
        """Look at the keys now; False when they are fixed."""
        ...

    async def keys_for(self, token: str) -> Sequence[Any]:
        """The keys that may have signed a token. Raises `InvalidToken` when there are none, `KeysUnavailable`."""
        ...
