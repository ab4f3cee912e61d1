"""Tells other nodes which users have sockets here, and closes those of users who may not stay: older ones where a user
may have only one, and all when the account was banned or locked."""  # noqa: D205, D209 - one thought

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from imstream.errors import StoreError
from imstream.store.inbox import SessionReplaced
from imstream.store.routes import ROUTE_TTL
from imstream.texts import Text
from imstream.wire import CloseCode

if TYPE_CHECKING:
    from imstream.gateway.registry import Registry
    from imstream.gateway.session import Session
    from imstream.guards.chain import GuardChain
    from imstream.settings import Settings
    from imstream.store.inbox import Inbox
    from imstream.store.routes import RouteAdded, Routes

_AGAIN = 1.0
"""Seconds until routes are noted again that could not be."""

log = structlog.get_logger()


class Presence:
    """Keeps the routes that lead to this node."""

    def __init__(
        self, settings: Settings, routes: Routes, inbox: Inbox, registry: Registry, guards: GuardChain
    ) -> None:
        self._only_one = settings.sessions == "one"
        self._guards = guards
        self._routes = routes
        self._inbox = inbox
        self._registry = registry
        self._arriving: dict[Session, int] = {}
        """Sessions whose own login has no number yet, and the newest login that was heard of meanwhile."""
        self._stale: set[int] = set()
        """Users whose route may not say what is so."""
        self._woken = asyncio.Event()

    async def arrive(self, session: Session, user_id: int) -> None:
        """A user has logged in: note the route, and replace older sessions if there may be only one.

        Without Redis the session is served all the same; its replies from other nodes come late.
        """
        self._arriving[session] = 0
        try:
            login = await self._routes.add_route(user_id)
        except StoreError as error:
            log.warning("route not noted", user=user_id, error=str(error))
            self._mark(user_id)
            return
        finally:
            # Of two logins at the same moment, each may hear of the other before it knows which of them is the newer.
            newest = self._arriving.pop(session)
        session.login = login.login
        if self._only_one:
            await self._replace_everywhere(SessionReplaced(user_id, max(login.login, newest)), login)
        if login.has_account:  # since it was asked whether the user may come in
            await self.review(user_id)

    def left(self, user_id: int) -> None:
        """A socket of the user is gone."""
        if not self._registry.of(user_id):
            self._mark(user_id)

    async def review(self, user_id: int) -> None:
        """Close the user's sessions if they may not stay. Without Redis they are looked at again soon."""
        try:
            await self._review(user_id)
        except StoreError as error:
            log.warning("account not looked at", user=user_id, error=str(error))
            self._mark(user_id)

    async def _review(self, user_id: int) -> None:
        if not self._registry.of(user_id):
            return
        verdict = await self._guards.stay(user_id)
        if verdict is not None:
            sessions = self._registry.of(user_id)
            log.info("sessions closed", why=verdict.reason, user=user_id, sessions=len(sessions))
            for session in sessions:
                session.refuse(verdict)

    def replace(self, notice: SessionReplaced) -> None:
        """Close the user's sessions with an older login."""
        for session in self._registry.of(notice.user_id):
            if session in self._arriving:
                self._arriving[session] = max(self._arriving[session], notice.login)
            elif session.login < notice.login:
                session.close(CloseCode.REPLACED, Text.REPLACED)

    async def _replace_everywhere(self, notice: SessionReplaced, login: RouteAdded) -> None:
        self.replace(notice)
        await self._inbox.notify(login.nodes, notice)

    async def run(self) -> None:
        """Mend routes: those of users who have left, those that could not be noted, and all before they expire."""
        interval = ROUTE_TTL.total_seconds() / 3
        loop = asyncio.get_running_loop()
        refresh_at = loop.time() + interval
        while True:
            try:
                async with asyncio.timeout_at(refresh_at):
                    await self._woken.wait()
            except TimeoutError:
                refresh_at = loop.time() + interval
                self._stale.update(self._registry.users())
            self._woken.clear()
            await self._mend_all()

    async def _mend_all(self) -> None:
        while self._stale:
            user_id = self._stale.pop()
            try:
                await self._mend(user_id)
            except StoreError:
                self._stale.add(user_id)
                await asyncio.sleep(_AGAIN)

    async def _mend(self, user_id: int) -> None:
        if self._registry.of(user_id):
            login = await self._routes.add_route(user_id)
            await self._number(user_id, login)
            if login.has_account:
                await self._review(user_id)
            return
        await self._routes.remove_route(user_id)
        if self._registry.of(user_id):  # somebody came meanwhile, and may have been noted before that
            self._stale.add(user_id)

    async def _number(self, user_id: int, login: RouteAdded) -> None:
        """Give the last of the sessions that came while Redis was away the number that it could not get then."""
        came = [one for one in self._registry.of(user_id) if one.login == 0 and one not in self._arriving]
        if came:
            came[-1].login = login.login
            if self._only_one:
                await self._replace_everywhere(SessionReplaced(user_id, login.login), login)

    def _mark(self, user_id: int) -> None:
        self._stale.add(user_id)
        self._woken.set()
