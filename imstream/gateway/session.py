"""The state of one socket: its client, its login, and its end."""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import timedelta
from math import ceil

import structlog

from imstream.codes import CloseCode, Code
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.session_writer import SessionWriter
from imstream.gateway.websocket_protocol import SocketProtocol
from imstream.guards.guard import Reject
from imstream.texts import Text
from imstream.user_ids import UserId
from imstream.wire import ServerFrame

log = structlog.get_logger()


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Session:
    """One socket. Times are those of the event loop, in seconds."""

    socket: SocketProtocol
    frames: FrameBuilder
    writer: SessionWriter
    warning: timedelta
    peer: str
    origin: str | None
    url_user: UserId | None
    token: str | None  # authenticates the user if INIT has no token
    user_id: UserId | None = None
    has_asked: bool = False  # an INIT was received. If it could not be checked in time, the client may come back later.
    login: int = 0  # number of the login: of two, the newer one has the higher number. 0: not known.
    ends_at: float | None = None  # when the login expires; None: with the socket
    warn_at: float | None = None  # when the client is warned of that; None when it was
    throttled: int = 0  # how often the client received that it is throttled
    was_slow: bool = False  # the client has stopped reading for a while, at least once
    began_at: float = field(default_factory=_loop_time)
    heard_at: float = field(default_factory=_loop_time)
    closing_since: float | None = None

    def __post_init__(self) -> None:
        self.socket.on_throttle = self._on_throttle

    def logged_in(self, user_id: UserId, until: float | None) -> None:
        """Note a login, until a time in seconds since 1970. It may be repeated to extend it."""
        if self.user_id is None:
            log.debug("session opened", user=user_id, peer=self.peer, origin=self.origin)
            self.socket.trust()
        self.user_id = self.frames.user_id = user_id
        self.ends_at = self.warn_at = None
        if until is not None:
            rest = until - time.time()
            self.ends_at = _loop_time() + rest  # the wall clock may be changed meanwhile
            # After a short login, a warning at once would make the client do nothing but log in.
            self.warn_at = self.ends_at - min(self.warning.total_seconds(), rest / 2)

    def warn(self) -> None:
        """Tell the client that its login expires soon, so that it may log in again."""
        if self.ends_at is not None:
            self.warn_at = None
            seconds = max(0, ceil(self.ends_at - _loop_time()))
            self.writer.send(self.frames.system(Code.UNAUTHORIZED, Text.LOGIN_ENDING, seconds=seconds))

    def close(self, code: CloseCode, kind: Code, text: Text) -> None:
        """Close with a sentence, when everything before it was sent."""
        self._close(code, self.frames.system(kind, text))

    def close_rejected(self, verdict: Reject, message_id: str | None = None) -> None:
        """Close with the sentence of a guard."""
        self._close(verdict.close or CloseCode.LOCKED, self.frames.rejected(verdict, message_id))

    def _close(self, code: CloseCode, last_frame: ServerFrame) -> None:
        if self.closing_since is None:
            self.closing_since = _loop_time()
            self.writer.close(code, last_frame)

    def expel(self, code: CloseCode, kind: Code, text: Text) -> None:
        """Close with a sentence, without waiting for a peer that does not read."""
        self.close(code, kind, text)
        self.writer.close_now()

    def stop(self) -> None:
        """Release the socket, which is gone."""
        self.writer.stop()
        self.socket.on_throttle = None

    def _on_throttle(self, seconds: float) -> None:
        self.throttled += 1
        if self.closing_since is None:
            self.writer.send(self.frames.throttled(seconds))
