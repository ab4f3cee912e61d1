"""Where, when and with which token a client connects next. No I/O but the caller's token function."""

import inspect
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from ssl import SSLContext
from urllib.parse import urlencode, urlsplit, urlunsplit

from imstream.client.errors import ClientError
from imstream.codes import CloseCode, Code
from imstream.user_ids import UserId
from imstream.wire import ClientInit, ResumePoint

Token = str | Callable[[], str | Awaitable[str]]
"""A token, or a function that returns a new one at each call."""

_FINAL_CODES = range(4500, 5000)


@dataclass(frozen=True, slots=True)
class Timing:
    """The time limits and intervals of a client.

    Attributes:
        open: Time limit for the first login, all tries together; then `NotConnected` is raised.
        login: Time limit for one server to accept the connection, and again to answer INIT.
        heartbeat: Heartbeat interval unless the server announces another.
        probe: Time limit for a sign of life when a message or a cancel is sent; then the client connects again.
        backoff: Upper bound of the first delay before reconnecting; it doubles with each failure.
        backoff_max: Limit of the doubling.
        later: Minimum delay after a server reported that it is full.
        close: Time limit for the closing handshake.
    """

    open: timedelta = timedelta(seconds=10)
    login: timedelta = timedelta(seconds=10)
    heartbeat: timedelta = timedelta(seconds=25)
    probe: timedelta = timedelta(seconds=3)
    backoff: timedelta = timedelta(milliseconds=500)
    backoff_max: timedelta = timedelta(seconds=30)
    later: timedelta = timedelta(seconds=5)
    close: timedelta = timedelta(seconds=2)


class RetryMode(Enum):
    """When to connect again."""

    NOW = "now"
    BACKOFF = "backoff"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class ReconnectPolicy:
    """The next step after a connection has ended. With `switch_server` the next server is tried first."""

    mode: RetryMode
    switch_server: bool = False


def after_close(code: int | None, cause: str | None = None) -> ReconnectPolicy:
    """The policy for a close code (see `imstream.codes.CloseCode`); None: the connection broke without one.

    `cause` is the code of the frame with the reason.
    """
    if code == CloseCode.DRAINING:
        return ReconnectPolicy(RetryMode.NOW, switch_server=True)
    if code == CloseCode.NODE_FULL:
        return ReconnectPolicy(RetryMode.LATER, switch_server=True)
    # A login that came too late is no fault of the user, as a missing token is, which closes with the same code.
    is_final = code in _FINAL_CODES and cause != Code.INIT_TIMEOUT
    return ReconnectPolicy(RetryMode.NEVER if is_final else RetryMode.BACKOFF)


@dataclass(slots=True)
class Backoff:
    """The delay before the next connection: exponential with full jitter.

    Full jitter spreads clients that lost their node at the same moment over the whole interval; see
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    timing: Timing
    failures: int = 0
    rng: random.Random = field(default_factory=random.Random)

    def delay(self, mode: RetryMode) -> timedelta:
        """The delay for `mode`. Every call counts as a failure until `reset`."""
        first, self.failures = self.failures == 0, self.failures + 1
        if mode is RetryMode.NOW and first:
            return timedelta(0)
        if mode is RetryMode.LATER:
            return self.timing.later * self.rng.uniform(1, 2)
        doubled: timedelta = self.timing.backoff * (1 << min(self.failures - 1, 20))
        return min(doubled, self.timing.backoff_max) * self.rng.random()

    def reset(self) -> None:
        """Forget the failures, after a connection that delivered an answer."""
        self.failures = 0


@dataclass(slots=True)
class Servers:
    """The addresses of the servers in order of preference. `tls` replaces the system's trust store for `wss`."""

    urls: Sequence[str]
    tls: SSLContext | None = None
    index: int = 0
    tried: int = 0

    @property
    def current(self) -> str:
        """The address to connect to."""
        return self.urls[self.index]

    def advance(self) -> bool:
        """Switch to the next address; False if all of them were tried since the last `reset`."""
        self.index = (self.index + 1) % len(self.urls)
        self.tried += 1
        return self.tried % len(self.urls) != 0

    def reset(self) -> None:
        """Note that the current address accepted the login."""
        self.tried = 0


def connect_url(url: str, user_id: UserId) -> str:
    """A WebSocket URL with `userId` in its query, by which load balancers choose the node; ValueError for others."""
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"not a WebSocket address: {url!r}; it looks like ws://127.0.0.1:8080/ws")
    query = "&".join(filter(None, (parts.query, urlencode({"userId": user_id}))))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


class TokenUnavailable(ClientError):  # noqa: N818 - reads as the state that it names
    """The caller's token function has raised an error."""


@dataclass(slots=True)
class Credentials:
    """User, token and language of a client, and the optional frames that it wants.

    A rejected token is not sent again. A new one is sent once: if the server rejects two in a row, the session ends.
    """

    user_id: UserId
    token: Token | None = field(repr=False)
    lang: str | None
    wants: Sequence[str] = ()
    _last_sent: str | None = field(default=None, init=False, repr=False)
    _accepted: str | None = field(default=None, init=False, repr=False)
    _rejected: str | None = field(default=None, init=False, repr=False)

    @property
    def is_renewable(self) -> bool:
        """Whether each token is a new one."""
        return callable(self.token)

    @property
    def is_rejected(self) -> bool:
        """Whether `next_token` has returned the token that the server rejected."""
        return self._rejected is not None and self._last_sent == self._rejected

    def init(self, token: str | None, resume: Sequence[ResumePoint] = ()) -> ClientInit:
        """The frame that logs in, or renews the login."""
        wants = list(self.wants)
        return ClientInit(msg_type="INIT", user_id=self.user_id, token=token, resume=list(resume), wants=wants)

    async def next_token(self) -> str | None:
        """The token for the next login; raises `TokenUnavailable` if the caller's function fails."""
        token = self.token
        if callable(token):
            try:
                given = token()
                token = await given if inspect.isawaitable(given) else given
            except Exception as error:
                raise TokenUnavailable(f"there is no token: {type(error).__name__}") from error
        self._last_sent = token
        return token

    def on_accepted(self) -> None:
        """The server has accepted the login."""
        self._rejected, self._accepted = None, self._last_sent

    def on_rejected(self, *, was_logged_in: bool) -> ReconnectPolicy:
        """The server has closed the connection with NOT_AUTHENTICATED: try again with a new token if there may be one.

        If a login expired, the token it began with is the rejected one: a newer token may have been sent too late.
        """
        first, self._rejected = self._rejected is None, self._accepted if was_logged_in else self._last_sent
        return ReconnectPolicy(RetryMode.BACKOFF if self.is_renewable and first else RetryMode.NEVER)
