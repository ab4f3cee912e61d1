"""Tells other nodes which users have sockets here, and closes sessions that may not stay: older ones where a user may
have only one, and all of a user whose account was banned or locked."""  # noqa: D205, D209 - one sentence

import asyncio
from dataclasses import dataclass, field

import structlog

from imstream.codes import CloseCode, Code
from imstream.errors import StoreError
from imstream.gateway.registry import Registry
from imstream.gateway.session import Session
from imstream.guards.chain import GuardChain
from imstream.store.inbox import ROUTE_TTL, Inbox, RouteAdded, Routes, SessionReplaced
from imstream.texts import Text
from imstream.user_ids import UserId

_RETRY_INTERVAL = 1.0  # seconds between two attempts to write a route while Redis is not available

_REFRESH_AFTER_ERROR = 15.0
"""Seconds from a failed attempt until all routes are written again: a removal may have run after its time limit."""

log = structlog.get_logger()


@dataclass(kw_only=True, repr=False)
class Presence:
    """Maintains the routes that lead to this node.

    Attributes:
        one_session: A user may have only one session.
        _logging_in: Sessions whose login has no number yet, and the newest login that was announced meanwhile.
        _stale: Users whose route has to be written.
    """

    one_session: bool
    routes: Routes
    inbox: Inbox
    registry: Registry
    guards: GuardChain
    _logging_in: dict[Session, int] = field(default_factory=dict)
    _stale: set[UserId] = field(default_factory=set)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def on_login(self, session: Session, user_id: UserId) -> None:
        """Write the route of a user, and close older sessions if there may be only one.

        Without Redis the session is served all the same; replies from other nodes come late.
        """
        self._logging_in[session] = 0
        try:
            login = await self.routes.add_route(user_id)
        except StoreError as error:
            log.warning("route not written", user=user_id, error=str(error))
            self._mark_stale(user_id)
            return
        finally:
            # Of two logins at the same moment, each may receive the notice of the other before the order is known.
            newest = self._logging_in.pop(session)
        session.login = login.login
        if self.one_session:
            await self._replace_everywhere(SessionReplaced(user_id, max(login.login, newest)), login)
        if login.has_account:  # the account may have changed since the guards checked the login
            await self.review(user_id)

    def on_disconnect(self, user_id: UserId) -> None:
        """Remove the route of a user if no socket is left."""
        if not self.registry.sessions_of(user_id):
            self._mark_stale(user_id)

    async def review(self, user_id: UserId) -> None:
        """Close the sessions of a banned or locked user. Without Redis this is retried soon."""
        try:
            await self._review(user_id)
        except StoreError as error:
            log.warning("account not checked", user=user_id, error=str(error))
            self._mark_stale(user_id)

    async def _review(self, user_id: UserId) -> None:
        if not self.registry.sessions_of(user_id):
            return
        verdict = await self.guards.check_session(user_id)
        if verdict is not None:
            sessions = self.registry.sessions_of(user_id)
            log.info("sessions closed", why=verdict.reason, user=user_id, sessions=len(sessions))
            for session in sessions:
                session.close_rejected(verdict)

    def replace(self, notice: SessionReplaced) -> None:
        """Close the sessions of the user with an older login."""
        for session in self.registry.sessions_of(notice.user_id):
            if session in self._logging_in:
                self._logging_in[session] = max(self._logging_in[session], notice.login)
            elif session.login < notice.login:
                session.close(CloseCode.REPLACED, Code.REPLACED, Text.REPLACED)

    async def _replace_everywhere(self, notice: SessionReplaced, login: RouteAdded) -> None:
        self.replace(notice)
        await self.inbox.notify(login.nodes, notice)

    async def run(self) -> None:
        """Write stale routes: of users who have disconnected, those that failed, and all before they expire."""
        interval = ROUTE_TTL.total_seconds() / 3
        loop = asyncio.get_running_loop()
        refresh_at = loop.time() + interval
        while True:
            try:
                async with asyncio.timeout_at(refresh_at):
                    await self._wake.wait()
            except TimeoutError:
                refresh_at = loop.time() + interval
                self._stale.update(self.registry.users())
            self._wake.clear()
            while self._stale:
                user_id = self._stale.pop()
                try:
                    await self._write_route(user_id)
                except StoreError:
                    self._stale.add(user_id)
                    refresh_at = loop.time() + _REFRESH_AFTER_ERROR
                    await asyncio.sleep(_RETRY_INTERVAL)

    async def _write_route(self, user_id: UserId) -> None:
        if self.registry.sessions_of(user_id):
            login = await self.routes.add_route(user_id)
            await self._number_login(user_id, login)
            if login.has_account:
                await self._review(user_id)
            return
        await self.routes.remove_route(user_id)
        if self.registry.sessions_of(user_id):  # it logged in meanwhile, perhaps before the route was removed
            self._stale.add(user_id)

    async def _number_login(self, user_id: UserId, login: RouteAdded) -> None:
        """Give the newest session that logged in without Redis the number that it could not get then."""
        sessions = self.registry.sessions_of(user_id)
        unnumbered = [one for one in sessions if one.login == 0 and one not in self._logging_in]
        if unnumbered:
            unnumbered[-1].login = login.login
            if self.one_session:
                await self._replace_everywhere(SessionReplaced(user_id, login.login), login)

    def _mark_stale(self, user_id: UserId) -> None:
        self._stale.add(user_id)
        self._wake.set()
