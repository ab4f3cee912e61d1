"""Where to connect next, and when. No I/O; the client carries it out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from ssl import SSLContext
from urllib.parse import urlencode, urlsplit, urlunsplit

from imstream.wire import CloseCode

_FINAL = range(4500, 5000)
"""Close codes after which a client does not come back."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The time limits and intervals of a client.

    Attributes:
        open: Time until the first login, all tries together; then `NotConnected` is raised.
        login: Time that one server has to take the connection, and again to answer INIT.
        heartbeat: Time between two heartbeats, unless the server asks for another.
        backoff: Upper end of the first wait before connecting again; it doubles with each failure.
        backoff_max: Where it stops doubling.
        later: Least wait after a server said that it is full.
        close: Time that a server has to answer the closing handshake.
    """

    open: timedelta = timedelta(seconds=10)
    login: timedelta = timedelta(seconds=10)
    heartbeat: timedelta = timedelta(seconds=25)
    backoff: timedelta = timedelta(milliseconds=500)
    backoff_max: timedelta = timedelta(seconds=30)
    later: timedelta = timedelta(seconds=5)
    close: timedelta = timedelta(seconds=2)


class Patience(Enum):
    """How long to wait before connecting again."""

    NOW = "now"
    BACKOFF = "backoff"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Reaction:
    """What to do when a connection has ended.

    Attributes:
        patience: When to connect again.
        elsewhere: Whether another server shall be tried first, when there is one.
    """

    patience: Patience
    elsewhere: bool = False


def after_close(code: int | None) -> Reaction:
    """What a close code asks for (see `imstream.wire.CloseCode`); None when the connection broke without one."""
    if code == CloseCode.DRAINING:
        return Reaction(Patience.NOW, elsewhere=True)
    if code == CloseCode.NODE_FULL:
        return Reaction(Patience.LATER, elsewhere=True)
    if code in _FINAL:
        return Reaction(Patience.NEVER)
    return Reaction(Patience.BACKOFF)


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next connection: exponential with full jitter.

    Full jitter spreads clients that lost their node at the same moment over the whole interval; see
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    timing: Timing
    failures: int = 0
    chance: random.Random = field(default_factory=random.Random)

    def wait(self, patience: Patience) -> timedelta:
        """The wait that `patience` stands for now. Every call counts as a failure until `succeed`."""
        first, self.failures = self.failures == 0, self.failures + 1
        if patience is Patience.NOW and first:
            return timedelta(0)
        if patience is Patience.LATER:
            return self.timing.later * self.chance.uniform(1, 2)
        doubled: timedelta = self.timing.backoff * (1 << min(self.failures - 1, 20))
        return min(doubled, self.timing.backoff_max) * self.chance.random()

    def succeed(self) -> None:
        """A connection was of use: begin anew."""
        self.failures = 0


@dataclass(slots=True)
class Servers:
    """The addresses of the servers, and which one is next. `tls`: whom to trust at `wss`; else whom the system does."""

    urls: Sequence[str]
    tls: SSLContext | None = None
    index: int = 0
    tried: int = 0

    @property
    def current(self) -> str:
        """The address to connect to."""
        return self.urls[self.index]

    @property
    def current_tls(self) -> SSLContext | bool | None:
        """How to connect to it with TLS; None without."""
        return (self.tls or True) if urlsplit(self.current).scheme == "wss" else None

    def move(self) -> bool:
        """Go on to the next address; False when every one was tried since the last `succeed`."""
        self.index = (self.index + 1) % len(self.urls)
        self.tried += 1
        return self.tried % len(self.urls) != 0

    def succeed(self) -> None:
        """The current address let us in."""
        self.tried = 0


def address(url: str, user_id: int) -> str:
    """The URL with `userId` in its query, by which load balancers choose the node.

    Raises:
        ValueError: It is no WebSocket URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"not a WebSocket address: {url!r}; it looks like ws://127.0.0.1:8080/ws")
    query = "&".join(filter(None, (parts.query, urlencode({"userId": user_id}))))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))
