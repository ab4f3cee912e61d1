"""Redis Cluster: send each command to the master that owns the slot of its key, and follow redirections."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from redis.asyncio import ConnectionPool
from redis.crc import key_slot
from redis.exceptions import MovedError

from imstream.errors import StoreDenied, StoreError, StoreRefused, StoreUnavailable
from imstream.redis.connection import CLOSED, Argument
from imstream.redis.errors import Redirected, describe
from imstream.redis.pipeline import Pipeline
from imstream.redis.pools import server_pool
from imstream.urls import RedisUrl

SLOTS = 16_384
_NO_OWNERS: list["NodeAddress | None"] = [None] * SLOTS

MAX_REDIRECTIONS = 5
"""Maximum number of redirections of one command. Beyond it the nodes do not agree: `StoreUnavailable`."""

REFRESH_PAUSE = 0.5  # minimum seconds between two requests for the slots

_KEYLESS = frozenset({"PING", "INFO", "ECHO", "TIME", "CONFIG", "CLIENT", "SCRIPT", "DBSIZE", "WAIT", "COMMAND"})
_KEY_AFTER_SUBCOMMAND = frozenset({"XINFO", "XGROUP", "OBJECT", "MEMORY"})
_SCRIPTS = frozenset({"EVALSHA", "EVAL"})
_READS = {"XREADGROUP": 4, "XREAD": 1}  # index of the first option: before it, STREAMS may name a group or a consumer


class NodeAddress(NamedTuple):
    """Host and port of a node."""

    host: str
    port: int


class Cluster:
    """Owns the connections to each node, made by `connect` when first needed, and the map of slots."""

    def __init__(
        self, url: RedisUrl, connect: Callable[[ConnectionPool], Pipeline], *, connections: int, timeout: timedelta
    ) -> None:
        self._url = url
        self._connect = connect
        self._pool_size = connections
        self._timeout = timeout
        self._connections: dict[NodeAddress, Pipeline] = {}
        self._nodes: set[NodeAddress] = set()
        self._owners: list[NodeAddress | None] = []
        """The master of each slot. Empty until it is known; then always known, though possibly outdated."""
        self._refreshing: asyncio.Task[None] | None = None
        self._next_refresh = 0.0
        self._failure = StoreUnavailable("no node of the Redis Cluster answers in time")
        self._closed = False

    async def aclose(self) -> None:
        """Close all connections."""
        self._closed = True
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        await asyncio.gather(*(connections.aclose() for connections in self._connections.values()))

    async def send(self, *command: Argument, urgent: bool = True) -> Any:  # noqa: ANN401 - what Redis answers
        """Send a command to the owner of its key. A redirected command was not executed, so it is sent again.

        Raises as `Pipeline.send` does, and `StoreUnavailable` when the slot has no owner.
        """
        if not self._owners:
            await self._wait_for_owners()
        key = key_of(command)
        address, asking = self._owner_of(key), False
        for _ in range(MAX_REDIRECTIONS):
            try:
                return await self._connections_to(address).send(*command, asking=asking, urgent=urgent)
            except Redirected as redirected:
                error = redirected.error
                address = NodeAddress(error.host or address.host, error.port)  # an empty host is the one that answered
                asking = not isinstance(error, MovedError)
                if not asking:
                    self._owners[error.slot_id] = address
                    self._refresh_soon()  # other slots have probably moved, too
            except StoreRefused as refused:
                # The key was deleted, or moved to another node, under a blocked read. Nothing was delivered.
                if not str(refused).startswith("UNBLOCKED"):
                    raise
            except StoreUnavailable:
                self._refresh_soon(address)
                raise
        raise StoreUnavailable(f"the nodes of the Redis Cluster do not agree on the owner of {key!r}")

    async def masters(self) -> dict[str, Pipeline]:
        """The connections to each master, by address. Raises `StoreUnavailable` when no node answers."""
        if not self._owners:
            await self._wait_for_owners()
        return {
            f"{owner.host}:{owner.port}": self._connections_to(owner) for owner in dict.fromkeys(self._owners) if owner
        }

    def _owner_of(self, key: Argument | None) -> NodeAddress:
        if key is None:
            return next(owner for owner in self._owners if owner is not None)
        slot = key_slot(key if isinstance(key, bytes) else str(key).encode("utf-8", "replace"))
        owner = self._owners[slot]
        if owner is None:
            self._refresh_soon()
            raise StoreUnavailable(f"no node of the Redis Cluster has slot {slot}")
        return owner

    def _connections_to(self, address: NodeAddress) -> Pipeline:
        if self._closed:
            raise StoreUnavailable(CLOSED)
        if address not in self._connections:
            pool = server_pool(self._url, address, connections=self._pool_size, timeout=self._timeout)
            self._connections[address] = self._connect(pool)
        return self._connections[address]

    async def _wait_for_owners(self) -> None:
        self._refresh_soon()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing], timeout=self._timeout.total_seconds())
        if not self._owners:
            raise type(self._failure)(*self._failure.args)

    def _refresh_soon(self, failed: NodeAddress | None = None) -> None:
        """Request the slots, at most every `REFRESH_PAUSE`. `failed`: the node to try last."""
        loop = asyncio.get_running_loop()
        if self._refreshing is None and not self._closed and loop.time() >= self._next_refresh:
            self._refreshing = loop.create_task(self._refresh(failed), name="redis-cluster-refresh")

    async def _refresh(self, failed: NodeAddress | None) -> None:
        owners, nodes = _NO_OWNERS, set[NodeAddress]()
        try:
            # All known nodes may have been replaced: then those of the URL lead to the new ones.
            known = sorted(self._nodes, key=lambda node: node == failed)
            for node in dict.fromkeys([*known, *(NodeAddress(*server) for server in self._url.servers)]):
                found, members = await self._request_slots(node)
                if found.count(None) < owners.count(None):
                    owners, nodes = found, members
                if None not in owners:
                    break
            if nodes:
                self._owners, self._nodes = owners, nodes
                for gone in self._connections.keys() - nodes:
                    await self._connections.pop(gone).aclose()
        finally:
            self._next_refresh = asyncio.get_running_loop().time() + REFRESH_PAUSE
            self._refreshing = None

    async def _request_slots(self, node: NodeAddress) -> tuple[list[NodeAddress | None], set[NodeAddress]]:
        """The owners of slots and all nodes, as one node sees them; none when it does not answer."""
        owners, nodes = [*_NO_OWNERS], set[NodeAddress]()
        try:
            # Nodes are asked one after the other, and some may hang.
            async with asyncio.timeout(self._timeout.total_seconds() / 3):
                ranges = await self._connections_to(node).send("CLUSTER", "SLOTS")
        except StoreDenied as denied:
            self._failure = denied
        except (StoreError, TimeoutError) as error:
            self._failure = StoreUnavailable(f"no node of the Redis Cluster answers: {describe(error)}")
        else:
            for first, last, *members in ranges:
                # A node leaves the host empty if its own address is unknown to it.
                addresses = [NodeAddress(host or node.host, int(port)) for host, port, *_ in members]
                owners[first : last + 1] = [addresses[0]] * (last + 1 - first)
                nodes.update(addresses)
        return owners, nodes


def key_of(command: tuple[Argument, ...]) -> Argument | None:
    """The first key of a command, or None. All keys of a command must share a slot."""
    name = str(command[0]).upper()
    if name in _KEYLESS:
        return None
    if name in _SCRIPTS:
        return command[3] if int(command[2]) else None
    if name in _READS:
        words = [str(word).upper() for word in command]
        return command[words.index("STREAMS", _READS[name]) + 1]
    return command[2 if name in _KEY_AFTER_SUBCOMMAND else 1]
