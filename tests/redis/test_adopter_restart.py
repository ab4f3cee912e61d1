"""An adopter is restarted after the node of the adopted stream came back (I1)."""

from typing import Any

import pytest

from tests.redis.worker_harness import PlayedBackend, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

ON_SERVERS = ["valkey"]


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_what_a_restarted_adopter_left_behind_is_answered(redis_server: RedisServer, how: str) -> None:
    """Rolling restart: 1 adopts the stream of 0, 0 comes back, and 1 is restarted before the next scan."""
    settings: dict[str, Any] = {"lease": "400ms", "sweep_interval": "2s"}
    backend = PlayedBackend()
    async with (
        run_worker(redis_server, lease="400ms") as dying,
        run_worker(redis_server, node="1", **settings) as adopter,
    ):
        await dying.ask()
        await dying.backend.call(1)
        await dying.crash()
        await adopter.backend.call(1)
        async with run_worker(redis_server, backend=backend, **settings) as back:
            await wait_until(lambda: back.lease_keeper.held and back.consumer.reached_redis_within(1), "node 0 is back")
            await (adopter.stop() if how == "stopped" else adopter.crash())
            async with run_worker(redis_server, node="1", backend=backend, **settings) as again:
                await wait_until(lambda: again.lease_keeper.held, "node 1 is back")
                (await backend.call(1)).done("x")
                await back.idle()
                assert back.recorded() == ("done", "x")
                await wait_until(lambda: back.consumers() == ["0"], "the stream is released")
                assert again.adopter.adopted == []
