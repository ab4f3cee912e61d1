"""Accepted requests survive a restart of Redis, with the users of ops/redis-users.acl."""

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.redis.worker_harness import run_worker
from tests.support.servers import RedisServer


async def test_writes_of_scripts_survive_a_restart_of_redis(own_server: RedisServer) -> None:
    async with run_worker(own_server, start=False) as worker:
        await worker.requests.ensure_group()
        await worker.ask()
    own_server.stop()
    own_server.start()
    async with run_worker(own_server, start=False) as worker:
        assert worker.redis.xlen(worker.keys.requests("0")) == 1
        assert [entry["event"] for entry in worker.entries()] == ["queued"]
    with (
        redis.Redis(port=own_server.port, retry=Retry(NoBackoff(), 0)) as nobody,
        pytest.raises(redis.exceptions.AuthenticationError),
    ):
        nobody.get("im:nodes")
