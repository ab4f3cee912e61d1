"""A burst of ten times the stream's cap."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imstream.codes import Code, Event
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import REQUESTS, stage

SOCKETS, CHATS, CAP = 300, 1000, 100


@contextmanager
def lengths_of_the_stream(server: RedisServer) -> Iterator[list[int]]:
    """XLEN, sampled about every millisecond by a separate thread."""
    lengths: list[int] = []
    over = threading.Event()

    def sample() -> None:
        with server.client() as client:
            while not over.wait(0.001):
                lengths.append(int(client.xlen(REQUESTS)))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield lengths
    finally:
        over.set()
        sampler.join()


async def test_of_a_thousand_chats_at_once_those_accepted_are_answered_once_and_all_others_are_told_busy(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with stage(redis_server, demo, tmp_path, queue_limit=CAP, user_limit=CHATS, redis_timeout="5s") as play:
        users = await asyncio.gather(*(play.user(10001 + number) for number in range(SOCKETS)))
        with lengths_of_the_stream(redis_server) as lengths:
            # The first answer arrives after the burst: until then, no entry leaves the stream.
            chats = [(users[n % SOCKETS], f"m{n}", f"{n} of many [[demo first=2s pace=0s]]") for n in range(CHATS)]
            told = Counter(await asyncio.gather(*(user.ask(message_id, text) for user, message_id, text in chats)))
            await play.curtain()
        assert set(told) == {Event.ACCEPTED, Code.BUSY}
        assert told.total() == CHATS
        assert told[Event.ACCEPTED] >= CAP
        assert play.admitted_ever() == play.ai_calls() == told[Event.ACCEPTED]
        assert max(lengths) == CAP
        for user, message_id, _ in chats:
            if message_id not in user.accepted:
                assert len(user.frames[message_id]) == 1, "BUSY, and nothing more"
                assert not play.redis.exists(f"im:{{user:{user.user_id}}}:reply:{message_id}")
