"""A store on a real server. Each test runs on the embedded Valkey, on Redis 6.2 and on Redis 7.0."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from imstream.keys import Keys
from imstream.metrics import Metrics
from imstream.model import ChatRequest
from imstream.redis.client import BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.replies import ReplyStore
from imstream.store.requests import RequestStream
from imstream.tracing import new_traceparent
from imstream.user_ids import UserId
from tests.conftest import SERVERS
from tests.support.processes import free_port
from tests.support.servers import RedisServer
from tests.support.tiers import examples


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses a store on all servers, or on those that its module names in `ON_SERVERS`."""
    if "redis_server" in metafunc.fixturenames:
        servers = getattr(metafunc.module, "ON_SERVERS", list(SERVERS))
        metafunc.parametrize("redis_server", servers, indirect=True)


def examples_on(server: RedisServer, count: int) -> int:
    """Number of examples of a state machine: `count` on the embedded server, a third on others, which hardly differ."""
    return examples(count if server.binary == SERVERS["valkey"]() else count // 3)


@dataclass
class Store:
    """The store of one node, and a client of the test's own."""

    settings: Settings
    redis_client: RedisClient
    requests: RequestStream
    replies: ReplyStore
    redis: redis.Redis
    keys: Keys
    metrics: Metrics

    def dead(self) -> list[dict[str, str]]:
        """The dead letters of node 0."""
        letters: Any = self.redis.xrange(self.keys.dead("0"))
        return [fields for _, fields in letters]


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    """The store of node 0 with small caps."""
    settings = Settings.load(redis_url=redis_server.url, queue_limit=5, user_limit=2, node="0")
    reader = BlockingReader(settings.redis_url, block=settings.read_block, timeout=settings.redis_timeout)
    client = redis_server.client()
    metrics = Metrics()
    async with RedisClient(settings.redis_url, connections=2, timeout=settings.redis_timeout) as redis_client:
        yield Store(
            settings,
            redis_client,
            RequestStream(redis_client, reader, settings, metrics=metrics),
            ReplyStore(redis_client, settings),
            client,
            Keys(settings.key_prefix),
            metrics,
        )
    await reader.aclose()
    client.close()


@pytest.fixture
def own_server(redis_server: RedisServer, tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, which it may stop and kill."""
    server = RedisServer(redis_server.binary, free_port(), tmp_path)
    server.start()
    yield server
    server.stop()


def chat_request(user_id: UserId = 10001, message_id: str | None = None, contents: str = "你好") -> ChatRequest:
    """A complete request."""
    return ChatRequest(
        user_id=user_id,
        message_id=message_id or secrets.token_hex(4),
        contents=contents,
        history=(("user", "hi"), ("assistant", "hello")),
        lang="zh",
        at=time.time_ns() // 1_000_000,
        traceparent=new_traceparent(),
    )
