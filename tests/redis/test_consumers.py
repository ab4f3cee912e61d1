"""No consumer is deleted while it has pending requests: they would be forgotten."""

import asyncio

from imstream.keys import GROUP
from imstream.redis.client import BlockingReader
from imstream.store.leases import Leases
from imstream.store.requests import RequestStream
from tests.redis.conftest import Store, chat_request

ROUNDS = 60


async def test_a_consumer_with_a_pending_request_is_never_deleted_however_much_happens_at_once(store: Store) -> None:
    settings = store.settings.model_copy(update={"queue_limit": 10_000, "user_limit": 10_000})
    reader = BlockingReader(settings.redis_url, block=settings.read_block, timeout=settings.redis_timeout)
    home = RequestStream(store.redis_client, reader, settings)
    adopters = {
        node: RequestStream(store.redis_client, reader, settings.model_copy(update={"node": node}), node="0")
        for node in ("1", "2")
    }
    leases = {node: Leases(store.redis_client, settings.model_copy(update={"node": node})) for node in adopters}
    taken: list[str] = []
    finished: set[str] = set()
    await home.ensure_group()

    async def deliver(node: str) -> None:
        for _ in range(ROUNDS):
            await home.admit(chat_request())
            for entry in await adopters[node].read(count=2, block=None):
                taken.append(entry.entry_id)
                if len(taken) % 2:
                    await adopters[node].finish(entry)
                    finished.add(entry.entry_id)

    async def tidy(node: str) -> None:
        for _ in range(2 * ROUNDS):
            await leases[node].release_stream("0")
            await home.remove_consumer(node)

    await asyncio.gather(*(work(node) for node in adopters for work in (deliver, deliver, tidy, tidy)))
    await reader.aclose()
    assert len(taken) == len(set(taken))
    pending = {one.entry_id for node in adopters for one in await home.pending(node)}
    assert pending == set(taken) - finished
    assert len(pending) > ROUNDS / 2
    # Consumers without pending requests are removed.
    for node, stream in adopters.items():
        for one in await home.pending(node):
            entry = await home.claim(one, deliveries=1)
            assert entry is not None
            await stream.finish(entry)
        await home.remove_consumer(node)
    consumers = store.redis.xinfo_consumers(store.keys.requests("0"), GROUP)
    assert {row["name"] for row in consumers} <= {"0"}
