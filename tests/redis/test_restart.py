"""Accepted requests survive a restart of Redis, with the users of ops/redis-users.acl."""

from __future__ import annotations

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.redis.workshop import workshop
from tests.support.servers import RedisServer


async def test_what_scripts_have_written_is_there_after_a_restart_of_redis(own_server: RedisServer) -> None:
    async with workshop(own_server, start=False) as shop:
        await shop.requests.ensure_group()
        await shop.ask()
    own_server.stop()
    own_server.start()
    async with workshop(own_server, start=False) as shop:
        assert shop.redis.xlen(shop.keys.requests("0")) == 1
        assert [entry["event"] for entry in shop.entries()] == ["queued"]
    with (
        redis.Redis(port=own_server.port, retry=Retry(NoBackoff(), 0)) as nobody,
        pytest.raises(redis.exceptions.AuthenticationError),
    ):
        nobody.get("im:nodes")
