"""Routes: which nodes hold a socket of which user, so that a reply finds its way to them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from imstream.clock import milliseconds
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

ROUTE_TTL = timedelta(minutes=30)
"""How long a route is kept unless it is noted again: that long a dead node is left notices which nobody reads."""

_ADD_ROUTE = load_script("add_route")


@dataclass(frozen=True, slots=True)
class RouteAdded:
    """A login is noted.

    Attributes:
        login: Of two logins of a user, on whichever nodes, the newer one has the higher number.
        nodes: Nodes that hold a socket of the user, this one included.
        has_account: Something is in the user's account: it is to be seen whether the user may stay.
    """

    login: int
    nodes: tuple[str, ...]
    has_account: bool = False


class Routes:
    """The routes that lead to this node."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._keys = Keys(settings.key_prefix)

    async def add_route(self, user_id: int) -> RouteAdded:
        """Note that this node holds a socket of the user. May be repeated."""
        keys = (self._keys.route(user_id), self._keys.account(user_id))
        login, has_account, *nodes = await _ADD_ROUTE.run(self._redis, keys, (self.node, milliseconds(ROUTE_TTL)))
        return RouteAdded(int(login), tuple(nodes), has_account=bool(has_account))

    async def remove_route(self, user_id: int) -> None:
        """Note that this node holds none any more."""
        await self._redis.execute("SREM", self._keys.route(user_id), self.node)
