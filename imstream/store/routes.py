"""Routes: which nodes hold a socket of which user, so that a reply finds its way to them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from imstream.clock import milliseconds
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.redis.scripts import Script
from imstream.settings import Settings

ROUTE_TTL = timedelta(minutes=30)
"""How long a route is kept unless it is noted again: that long a dead node is left notices which nobody reads."""

_ARRIVE = Script("arrive")


@dataclass(frozen=True, slots=True)
class RouteAdded:
    """A login is noted.

    Attributes:
        number: Of two logins of a user, on whichever nodes, the newer one has the higher number.
        nodes: Nodes that hold a socket of the user, this one included.
        marked: Something is in the user's account: it is to be seen whether the user may stay.
    """

    number: int
    nodes: tuple[str, ...]
    marked: bool = False


class Routes:
    """The routes that lead to this node."""

    def __init__(self, commands: RedisClient, settings: Settings) -> None:
        self.node = settings.node
        self._commands = commands
        self._keys = Keys(settings.key_prefix)

    async def arrive(self, user_id: int) -> RouteAdded:
        """Note that this node holds a socket of the user. May be repeated."""
        keys = (self._keys.route(user_id), self._keys.account(user_id))
        number, marked, *nodes = await _ARRIVE.run(self._commands, keys, (self.node, milliseconds(ROUTE_TTL)))
        return RouteAdded(int(number), tuple(nodes), marked=bool(marked))

    async def leave(self, user_id: int) -> None:
        """Note that this node holds none any more."""
        await self._commands.execute("SREM", self._keys.route(user_id), self.node)
