"""The sessions of a node, by user, and the one timer that closes silent ones."""

import asyncio
from collections.abc import Iterator

import structlog

from imstream.codes import CloseCode, Code, Want
from imstream.gateway.session import Session
from imstream.logs import LIMITED
from imstream.metrics import Metrics
from imstream.reply_buffer import ReplyBuffer
from imstream.settings import Settings
from imstream.texts import Text
from imstream.user_ids import UserId

CLOSE_GRACE = 2.0  # seconds a closing session has to send its last frames
SLOW_AFTER = 1.0  # seconds without reading after which a client counts as a slow reader

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


class Registry:
    """The sessions of this node."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._sessions: set[Session] = set()
        self._by_user: dict[UserId, list[Session]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions))

    @property
    def is_full(self) -> bool:
        """Whether the node has the maximum number of sockets."""
        return len(self._sessions) >= self._settings.node_sockets

    def has_room_for(self, user_id: UserId) -> bool:
        """Whether a user may have another socket here. With one session per user, the newest replaces the others."""
        open_ones = sum(one.closing_since is None for one in self._by_user.get(user_id, ()))
        return open_ones < self._settings.user_sockets or self._settings.sessions == "one"

    def add(self, session: Session) -> None:
        """Add an accepted socket."""
        self._sessions.add(session)

    def log_in(self, session: Session, user_id: UserId) -> None:
        """Assign a socket to a user. May be repeated."""
        sessions = self._by_user.setdefault(user_id, [])
        if session not in sessions:
            sessions.append(session)

    def remove(self, session: Session) -> None:
        """Remove a closed socket. May be repeated."""
        self._sessions.discard(session)
        if session.user_id is not None and (sessions := self._by_user.get(session.user_id)):
            sessions.remove(session)
            if not sessions:
                del self._by_user[session.user_id]

    def sessions_of(self, user_id: UserId) -> tuple[Session, ...]:
        """The sessions of a user who has logged in here."""
        return tuple(self._by_user.get(user_id, ()))

    def users(self) -> list[UserId]:
        """The users who have logged in here."""
        return list(self._by_user)

    def follow_new(self, reply: ReplyBuffer) -> None:
        """Have every socket of the user follow a reply that begins, here or on another node."""
        for session in self.sessions_of(reply.user_id):
            session.writer.follow_new(reply)

    def followers(self, reply: ReplyBuffer) -> tuple[int, int]:
        """How many sockets follow a reply, and how many of them do not read."""
        count = slow = 0
        for session in self._by_user.get(reply.user_id, ()):
            if session.writer.follows(reply.message_id):
                count += 1
                slow += session.writer.is_slow
        return count, slow

    def follow_queued(self, reply: ReplyBuffer) -> bool:
        """Have the user's sockets that request questions follow a waiting message. Returns whether there are any."""
        wanting = [one for one in self.sessions_of(reply.user_id) if Want.ASKED in one.writer.wants]
        for session in wanting:
            session.writer.follow_new(reply)
        return bool(wanting)

    async def run(self) -> None:
        """Check all sessions with one timer instead of one for each: a second of delay does not matter."""
        settings = self._settings
        limits = [settings.init_timeout, settings.idle_timeout, settings.stall_timeout, settings.auth_warning]
        interval = min(1.0, min(limits).total_seconds() / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(interval)
            now = loop.time()
            for session in self:
                self._check(session, now)

    def _check(self, session: Session, now: float) -> None:
        settings = self._settings
        stall_timeout = settings.stall_timeout.total_seconds()
        blocked = session.writer.blocked_since
        if blocked is not None and now - blocked > SLOW_AFTER and not session.was_slow:
            session.was_slow = True
            self._metrics.slow_readers.inc()
        if session.closing_since is not None:
            if now - session.closing_since > CLOSE_GRACE:
                # with the frame that it was closing with
                session.expel(CloseCode.READER_TOO_SLOW, Code.READER_TOO_SLOW, Text.TOO_SLOW)
        elif blocked is not None and now - blocked > stall_timeout:
            level = limited.info if session.user_id is None else log.info
            level("session closed", why="reader too slow", user=session.user_id, peer=session.peer)
            session.expel(CloseCode.READER_TOO_SLOW, Code.READER_TOO_SLOW, Text.TOO_SLOW)
        elif session.user_id is None and now - session.began_at > settings.init_timeout.total_seconds():
            if session.has_asked:  # Redis, or the key set for tokens, is not available
                session.close(CloseCode.NODE_FULL, Code.UNAVAILABLE, Text.UNAVAILABLE)
            else:
                session.close(CloseCode.NOT_AUTHENTICATED, Code.INIT_TIMEOUT, Text.NO_INIT)
        elif session.ends_at is not None and now > session.ends_at:
            session.close(CloseCode.NOT_AUTHENTICATED, Code.UNAUTHORIZED, Text.LOGIN_EXPIRED)
        elif now - session.heard_at > settings.idle_timeout.total_seconds():
            session.close(CloseCode.NO_HEARTBEAT, Code.NO_HEARTBEAT, Text.NO_HEARTBEAT)
        elif session.warn_at is not None and now > session.warn_at:
            session.warn()
