"""Who is connected to this node: the sessions, by user; and the one clock that ends those that have gone silent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from imstream.logs import LIMITED
from imstream.texts import Text
from imstream.wire import CloseCode, Code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imstream.gateway.session import Session
    from imstream.settings import Settings

CLOSE_GRACE = 2.0
"""Seconds a closing session has to get its last frames out."""

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


class Registry:
    """The sessions of this node."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions: set[Session] = set()
        self._of_user: dict[int, list[Session]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions))

    @property
    def is_full(self) -> bool:
        """Whether the node has all the sockets that it may have."""
        return len(self._sessions) >= self._settings.node_sockets

    def has_room_for(self, user_id: int) -> bool:
        """Whether a user may have one more socket here. Where only one may stay, the newest replaces the others."""
        open_ones = sum(one.closing_since is None for one in self._of_user.get(user_id, ()))
        return open_ones < self._settings.user_sockets or self._settings.sessions == "one"

    def add(self, session: Session) -> None:
        """A socket was accepted."""
        self._sessions.add(session)

    def log_in(self, session: Session, user_id: int) -> None:
        """A socket is a user's. May be repeated."""
        sessions = self._of_user.setdefault(user_id, [])
        if session not in sessions:
            sessions.append(session)

    def remove(self, session: Session) -> None:
        """A socket is gone."""
        self._sessions.discard(session)
        if session.user_id is not None and (of_user := self._of_user.get(session.user_id)):
            of_user.remove(session)
            if not of_user:
                del self._of_user[session.user_id]

    def of(self, user_id: int) -> tuple[Session, ...]:
        """The sessions of a user who has logged in here."""
        return tuple(self._of_user.get(user_id, ()))

    def users(self) -> list[int]:
        """The users who have logged in here."""
        return list(self._of_user)

    async def run(self) -> None:
        """Look after all sessions with one timer, instead of one for each: a second more or less matters to none."""
        settings = self._settings
        limits = [settings.init_timeout, settings.idle_timeout, settings.stall_timeout, settings.auth_warning]
        interval = min(1.0, min(limits).total_seconds() / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(interval)
            now = loop.time()
            for session in self:
                self._look_after(session, now)

    def _look_after(self, session: Session, now: float) -> None:
        settings = self._settings
        if session.closing_since is not None:
            if now - session.closing_since > CLOSE_GRACE:
                session.expel(CloseCode.READER_TOO_SLOW, Text.TOO_SLOW)  # with the words it was closing with
        elif session.blocked_since is not None and now - session.blocked_since > settings.stall_timeout.total_seconds():
            note = limited.info if session.user_id is None else log.info
            note("session closed", why="reader too slow", user=session.user_id, peer=session.peer)
            session.expel(CloseCode.READER_TOO_SLOW, Text.TOO_SLOW)
        elif session.user_id is None and now - session.began_at > settings.init_timeout.total_seconds():
            if session.has_asked:  # Redis, or the keys of tokens, are away
                session.close(CloseCode.NODE_FULL, Text.UNAVAILABLE, Code.UNAVAILABLE)
            else:
                session.close(CloseCode.NOT_AUTHENTICATED, Text.NO_INIT)
        elif session.ends_at is not None and now > session.ends_at:
            session.close(CloseCode.NOT_AUTHENTICATED, Text.LOGIN_EXPIRED, Code.UNAUTHORIZED)
        elif now - session.heard_at > settings.idle_timeout.total_seconds():
            session.close(CloseCode.NO_HEARTBEAT, Text.NO_HEARTBEAT)
        elif session.warn_at is not None and now > session.warn_at:
            session.warn()
