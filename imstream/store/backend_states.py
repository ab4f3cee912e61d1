"""The states of the backends as each node sees them: one hash per node, for `imstream backends`."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from pydantic_core import from_json, to_json

from imstream.clock import milliseconds, now_ms
from imstream.keys import Keys
from imstream.redis.client import RedisClient, to_dict
from imstream.settings import Settings
from imstream.store.scripts import LUA

TTL = timedelta(minutes=1)  # how long the states of a node that has ended are kept

State = Mapping[str, str | int | None]


class BackendStates:
    """Writes the states of this node, and reads those of all nodes."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._key = self._keys.backends(settings.node)
        self._written: Mapping[str, State] = {}
        self._written_at = 0

    async def publish(self, states: Mapping[str, State]) -> None:
        """Write the states if they have changed, or would expire soon. Raises `StoreError`."""
        now = now_ms()
        if states == self._written and now - self._written_at < milliseconds(TTL) / 2:
            return
        fields = [part for name, state in states.items() for part in (name, to_json({**state, "at": now}).decode())]
        await LUA["publish_backends"].run(self._redis, (self._key,), (milliseconds(TTL), *fields))
        self._written, self._written_at = states, now

    async def read(self) -> dict[str, dict[str, Any]]:
        """The states, by node and name. Nodes that do not publish them have none. Raises `StoreError`."""
        nodes = sorted(await self._redis.execute("ZRANGE", self._keys.nodes(), 0, -1))
        hashes = await asyncio.gather(*(self._redis.execute("HGETALL", self._keys.backends(node)) for node in nodes))
        return {node: decode_states(found) for node, found in zip(nodes, hashes, strict=True)}


def decode_states(found: Any) -> dict[str, Any]:  # noqa: ANN401 - what Redis answers
    """The states of one node, by name."""
    states = dict[str, Any]()
    for name, text in to_dict(found).items():
        with suppress(ValueError):  # written by hand
            states[name] = from_json(text)
    return {name: state for name, state in states.items() if isinstance(state, dict)}
