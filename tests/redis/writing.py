"""Someone who writes all the time while Redis changes, and knows what he was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import redis

from imstream.errors import StoreUnavailable
from imstream.redis.client import RedisClient
from imstream.store.scripts import LUA
from tests.support.waiting import wait_until

LIMIT = 20.0


@dataclass
class Writer:
    """Appends 1, 2, 3, … to a stream, one after the other, and repeats nothing.

    Attributes:
        stream: Its key.
        told: The numbers that Redis has answered for.
        unsure: Those for which it was told `StoreUnavailable`.
        errors: Anything else it was told, which must be nothing.
        longest: Seconds that it waited for an answer at most.
        over: It shall write no more.
    """

    redis_client: RedisClient
    stream: str
    told: list[int] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    longest: float = 0.0
    over: bool = False

    async def run(self) -> None:
        """Write until it is over."""
        loop = asyncio.get_running_loop()
        number = 0
        while not self.over:
            number += 1
            began = loop.time()
            try:
                await self.redis_client.execute("XADD", self.stream, "*", "n", number)
                self.told.append(number)
            except StoreUnavailable as error:
                self.unsure.append(str(error))
                await asyncio.sleep(0.005)  # as long as an answer takes; nothing answers now
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.errors.append(error)
            self.longest = max(self.longest, loop.time() - began)

    async def goes_on(self, entries: int = 20) -> None:
        """Wait until that many more are written."""
        before = len(self.told)
        await wait_until(lambda: len(self.told) >= before + entries, f"{self.stream} is written to", limit=LIMIT)

    def in_redis(self, client: redis.Redis) -> list[int]:
        """The numbers that are in the stream."""
        rows: Any = client.xrange(self.stream)
        return [int(fields["n"]) for _, fields in rows]


@asynccontextmanager
async def writing(redis_client: RedisClient, *streams: str) -> AsyncIterator[list[Writer]]:
    """One writer for each stream; at the end all have been told answers or `StoreUnavailable`."""
    writers = [Writer(redis_client, stream) for stream in streams]
    tasks = [asyncio.create_task(writer.run()) for writer in writers]
    try:
        for writer in writers:
            await writer.goes_on()
        yield writers
    finally:
        for writer in writers:
            writer.over = True
        await asyncio.wait(tasks)
    for writer in writers:
        assert writer.errors == []


SCRIPT = LUA["ensure_group"]
"""A script of ours, for a server that does not know it."""
