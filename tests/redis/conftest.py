"""A store on a real server: each test here runs on the embedded Valkey, on Redis 6.2 and on Redis 7.0."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from imstream.keys import Keys
from imstream.settings import Settings
from imstream.store.connection import Commands, Reader
from imstream.store.replies import ReplyStore
from imstream.store.requests import ChatRequest, RequestStream
from tests.conftest import SERVERS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import redis

    from tests.support.servers import RedisServer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses a store on all servers."""
    if "redis_server" in metafunc.fixturenames:
        metafunc.parametrize("redis_server", list(SERVERS), indirect=True)


@dataclass
class Store:
    """What one node has of the store, and a client of the test's own."""

    settings: Settings
    commands: Commands
    requests: RequestStream
    replies: ReplyStore
    redis: redis.Redis
    keys: Keys


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    """The store of node 0 with small caps."""
    settings = Settings.load(redis_url=redis_server.url, queue_limit=5, user_limit=2, node="0")
    reader = Reader(settings.redis_url, block=settings.read_block, timeout=settings.redis_timeout)
    client = redis_server.client()
    async with Commands(settings.redis_url, lanes=2, timeout=settings.redis_timeout) as commands:
        yield Store(
            settings,
            commands,
            RequestStream(commands, reader, settings),
            ReplyStore(commands, settings),
            client,
            Keys(settings.key_prefix),
        )
    await reader.aclose()
    client.close()


def chat_request(user_id: int = 10001, message_id: str | None = None, contents: str = "你好") -> ChatRequest:
    """A request with everything filled in."""
    return ChatRequest(
        user_id=user_id,
        message_id=message_id or secrets.token_hex(4),
        contents=contents,
        history=(("user", "hi"), ("assistant", "hello")),
        lang="zh",
        at=time.time_ns() // 1_000_000,
        trace=secrets.token_hex(4),
    )
