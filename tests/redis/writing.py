"""A writer that appends continuously while Redis changes, and remembers each reply."""

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
        confirmed: The numbers whose append was confirmed.
        unsure: Texts of `StoreUnavailable`.
        errors: Any other errors; there must be none.
        longest: The longest wait for a reply, in seconds.
        stopped: Set to end `run`.
    """

    redis_client: RedisClient
    stream: str
    confirmed: list[int] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    longest: float = 0.0
    stopped: bool = False

    async def run(self) -> None:
        """Write until stopped."""
        loop = asyncio.get_running_loop()
        number = 0
        while not self.stopped:
            number += 1
            began = loop.time()
            try:
                await self.redis_client.execute("XADD", self.stream, "*", "n", number)
                self.confirmed.append(number)
            except StoreUnavailable as error:
                self.unsure.append(str(error))
                await asyncio.sleep(0.005)  # about a round trip
            except Exception as error:  # noqa: BLE001 - the test checks it
                self.errors.append(error)
            self.longest = max(self.longest, loop.time() - began)

    async def goes_on(self, entries: int = 20) -> None:
        """Wait until so many more entries are confirmed."""
        before = len(self.confirmed)
        await wait_until(lambda: len(self.confirmed) >= before + entries, f"{self.stream} is written to", limit=LIMIT)

    def in_redis(self, client: redis.Redis) -> list[int]:
        """The numbers in the stream."""
        rows: Any = client.xrange(self.stream)
        return [int(fields["n"]) for _, fields in rows]


@asynccontextmanager
async def writing(redis_client: RedisClient, *streams: str) -> AsyncIterator[list[Writer]]:
    """One writer for each stream. At the end, each append was confirmed or raised `StoreUnavailable`."""
    writers = [Writer(redis_client, stream) for stream in streams]
    tasks = [asyncio.create_task(writer.run()) for writer in writers]
    try:
        for writer in writers:
            await writer.goes_on()
        yield writers
    finally:
        for writer in writers:
            writer.stopped = True
        await asyncio.wait(tasks)
    for writer in writers:
        assert writer.errors == []


SCRIPT = LUA["ensure_group"]
"""A script that the server does not have yet."""
