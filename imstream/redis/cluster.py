"""Redis Cluster: which master has the key of a command, and what becomes of a command that went to the wrong one.

redis-py asks the nodes who has which slot and reads what they say; the connections are ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.cluster import PRIMARY
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisClusterException

from imstream.errors import StoreDenied, StoreUnavailable
from imstream.redis.errors import AccessLog, Redirected, error_from_loss
from imstream.redis.pipeline import Argument
from imstream.redis.pools import connection_options
from imstream.urls import RedisUrl

MAX_REDIRECTIONS = 5
"""How often one command follows where nodes send it. More means that they do not agree: `StoreUnavailable`."""

REFRESH_PAUSE = 0.5
"""Least seconds between two questions who has which slot: to read the answer holds all else up for 4 ms."""

_KEYLESS = frozenset({"PING", "INFO", "ECHO", "TIME", "CONFIG", "CLIENT", "SCRIPT", "DBSIZE", "WAIT", "COMMAND"})
_KEY_AFTER_WORD = frozenset({"XINFO", "XGROUP", "OBJECT", "MEMORY"})
_SCRIPTS = frozenset({"EVALSHA", "EVAL"})
_READS = {"XREADGROUP": 4, "XREAD": 1}
"""Where their options begin: before that STREAMS may be the name of a group or a consumer."""


class NodeAddress(NamedTuple):
    """Host and port of a node."""

    host: str
    port: int


class NodeConnections(Protocol):
    """Connections to one node."""

    async def aclose(self) -> None:
        """Close them."""


SomeWay = TypeVar("SomeWay", bound=NodeConnections)


def key_of(command: tuple[Argument, ...]) -> str | int | bytes | None:
    """The first key of a command; None when it has none. All keys of ours that one command has share a slot."""
    name = str(command[0]).upper()
    if name in _KEYLESS:
        return None
    if name in _SCRIPTS:
        return command[3] if int(command[2]) else None
    if name in _READS:
        words = [str(word).upper() for word in command]
        return command[words.index("STREAMS", _READS[name]) + 1]
    return command[2 if name in _KEY_AFTER_WORD else 1]


class Cluster(Generic[SomeWay]):
    """A way to each master, and who has which slot. `make_way` makes one when it is first needed; they are owned."""

    def __init__(
        self, url: RedisUrl, *, timeout: timedelta, make_way: Callable[[NodeAddress], SomeWay], access_log: AccessLog
    ) -> None:
        self._url = url
        # The nodes are asked one after the other, and one that hangs must not cost all the time there is.
        self._each = timeout / 3
        self._timeout = timeout.total_seconds()
        self._make_way = make_way
        self._ways: dict[NodeAddress, SomeWay] = {}
        self._nodes = self._as_given()
        self._refreshing: asyncio.Task[None] | None = None
        self._next_refresh = 0.0
        self._access_log = access_log
        self._why = StoreUnavailable("no node of the Redis Cluster answers in time")
        self._closed = False

    async def aclose(self) -> None:
        """Close every way."""
        self._closed = True
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        await _close(self._nodes)
        await asyncio.gather(*(way.aclose() for way in self._ways.values()))

    async def send(self, command: tuple[Argument, ...], send: Callable[[SomeWay, bool], Awaitable[Any]]) -> Any:  # noqa: ANN401 - what Redis answers
        """Send a command where its key is, and again where it is sent on to: it was not carried out there.

        Args:
            command: The command.
            send: Sends it over a way. With True, as one that asks for a key of a slot that is being moved there.

        Raises:
            StoreUnavailable: As the way does; or nobody has the key now.
            StoreError: As the way does.
        """
        address, asking = await self._address_of(key_of(command)), False
        for _ in range(MAX_REDIRECTIONS):
            try:
                return await send(self._way_to(address), asking)
            except Redirected as redirected:
                error = redirected.error
                asking = not isinstance(error, MovedError)
                if isinstance(error, MovedError):
                    await self._moved(error)
                # No host means the one that has answered.
                address = NodeAddress(error.host or address.host, error.port)
            except StoreUnavailable:
                self._refresh_soon(address)
                raise
        raise StoreUnavailable(f"the nodes of the Redis Cluster do not agree who has {key_of(command)!r}")

    async def masters(self) -> dict[NodeAddress, SomeWay]:
        """A way to every master."""
        await self._known()
        primaries = self._nodes.get_nodes_by_server_type(PRIMARY)
        addresses = [_address(node) for node in primaries]
        return {address: self._way_to(address) for address in addresses}

    async def _address_of(self, key: Argument | None) -> NodeAddress:
        await self._known()
        if key is None:
            node = self._nodes.default_node
        else:
            slot = key_slot(key if isinstance(key, bytes) else str(key).encode("utf-8", "replace"))
            try:
                node = self._nodes.get_node_from_slot(slot)
            except RedisClusterException as uncovered:
                self._refresh_soon()
                raise StoreUnavailable(str(uncovered)) from None
        return _address(node)

    def _way_to(self, address: NodeAddress) -> SomeWay:
        if self._closed:
            raise StoreUnavailable("the connections to Redis are closed")
        if address not in self._ways:
            self._ways[address] = self._make_way(address)
        return self._ways[address]

    async def _moved(self, moved: MovedError) -> None:
        """Note one slot at once. Others will have moved with it, so ask about all."""
        if moved.slot_id in self._nodes.slots_cache and moved.host:
            await self._nodes.move_slot(moved)
        self._refresh_soon()

    # Who has which slot

    async def _known(self) -> None:
        """Wait until the slots are known. Afterwards they are known for ever, though perhaps not as they are now."""
        if self._nodes.slots_cache:
            return
        self._refresh_soon()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing], timeout=self._timeout)
        if not self._nodes.slots_cache:
            raise type(self._why)(*self._why.args)

    def _refresh_soon(self, failed: NodeAddress | None = None) -> None:
        """Ask who has which slot, unless that has just been done. `failed`: the node to ask last."""
        loop = asyncio.get_running_loop()
        if self._refreshing is None and not self._closed and loop.time() >= self._next_refresh:
            self._refreshing = loop.create_task(self._refresh(failed), name="redis-cluster-refresh")

    async def _refresh(self, failed: NodeAddress | None) -> None:
        last = f"{failed.host}:{failed.port}" if failed else None
        try:
            try:
                await self._nodes.initialize(last_failed_node_name=last)
            except RedisClusterException:
                # All nodes that we know may have gone, and others be found under the names that we were given.
                self._nodes = await self._anew(self._nodes)
            nodes = {_address(node) for node in self._nodes.nodes_cache.values()}
            for gone in self._ways.keys() - nodes:
                await self._ways.pop(gone).aclose()
        except Exception as error:  # noqa: BLE001 - whatever it is: who asks next is told, and asks again
            self._why = error_from_loss(error)
            if isinstance(self._why, StoreDenied):
                self._access_log.report(self._why)
        finally:
            self._next_refresh = asyncio.get_running_loop().time() + REFRESH_PAUSE
            self._refreshing = None

    async def _anew(self, old: NodesManager) -> NodesManager:
        fresh = self._as_given()
        try:
            await fresh.initialize()
        except BaseException:
            await _close(fresh)
            raise
        await _close(old)
        return fresh

    def _as_given(self) -> NodesManager:
        """What knows only the nodes of the URL. Its connections serve no other purpose than to ask for the slots."""
        options = connection_options(self._url, self._url.servers[0], self._each)
        for name in ("host", "port", "db", "maint_notifications_config"):
            options.pop(name, None)
        options["socket_timeout"] = self._each.total_seconds()
        nodes = [ClusterNode(*server, **options) for server in self._url.servers]
        # Slots that nobody has are no reason to refuse the others.
        return NodesManager(nodes, require_full_coverage=False, connection_kwargs=options)


def _address(node: ClusterNode) -> NodeAddress:
    return NodeAddress(node.host, int(node.port))


async def _close(nodes: NodesManager) -> None:
    for node in {*nodes.startup_nodes.values(), *nodes.nodes_cache.values()}:
        await node.disconnect()
