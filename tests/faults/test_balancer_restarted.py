"""The load balancer restarts during answers: clients reconnect and resume, and nothing is lost."""

import asyncio
import signal
from pathlib import Path

import pytest

from imstream.cli.balancer import Program
from imstream.client import Client, Connected, ConnectionChange, Disconnected
from tests.support.backend_scripts import goes_on_until
from tests.support.balancing import PROGRAMS, start_balancer
from tests.support.processes import free_port
from tests.support.scripted_backend import scripted_backend
from tests.support.servers import RedisServer, start_node
from tests.support.waiting import SLOW, wait_until

USERS = range(10001, 10013)
LIMIT = 40.0 * SLOW
TIMES = 2


@pytest.mark.parametrize("program", PROGRAMS)
async def test_clients_reconnect_and_resume_when_the_load_balancer_is_restarted(
    program: Program, redis_server: RedisServer, tmp_path: Path
) -> None:
    sent: dict[str, str] = {}
    shown: dict[int, str] = {}
    changes: dict[int, list[ConnectionChange]] = {user: [] for user in USERS}
    finished = asyncio.Event()

    async def talk(user: int) -> None:
        async with Client(balancer.url, user, on_change=changes[user].append) as client:
            reply = await client.send(str(user))
            shown[user] = ""
            async for piece in reply:
                shown[user] += piece.text
            assert (reply.attempt, reply.repeated) == (1, 0)
            assert await reply.text() == shown[user]

    async with scripted_backend(goes_on_until(finished, sent, pace=0.04)) as backend:
        nodes = [start_node(tmp_path, redis_url=redis_server.url, ai_url=backend.url, node=str(n)) for n in range(3)]
        ports, port = [node.port for node in nodes], free_port()
        balancer = start_balancer(tmp_path, program, ports, port=port)
        try:
            async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as talking:
                for user in USERS:
                    talking.create_task(talk(user))
                for connected in range(1, TIMES + 2):
                    await wait_until(
                        lambda n=connected: all(count(changes[user], Connected) == n for user in USERS), "all connected"
                    )
                    before = {user: len(shown.get(user, "")) for user in USERS}
                    await wait_until(
                        lambda b=before: all(len(shown.get(user, "")) > b[user] for user in USERS), "all read on"
                    )
                    if connected > TIMES:
                        break
                    assert await asyncio.to_thread(balancer.process.terminate) in {0, -signal.SIGTERM}
                    await wait_until(
                        lambda n=connected: all(count(changes[user], Disconnected) >= n for user in USERS), "all cut"
                    )
                    balancer = await asyncio.to_thread(start_balancer, tmp_path, program, ports, port=port)
                finished.set()
            assert shown == {user: sent[str(user)] for user in USERS}
            for user in USERS:
                resumed = [change.resumed for change in changes[user] if isinstance(change, Connected)]
                assert resumed == [0, *[1] * TIMES]
            with redis_server.client() as redis:
                await wait_until(
                    lambda: not any(redis.xlen(f"im:{{node:{node}}}:requests") for node in range(3)), "all are removed"
                )
        finally:
            for running in (balancer.process, *(node.process for node in nodes)):
                running.__exit__(None, None, None)


def count(changes: list[ConnectionChange], kind: type[ConnectionChange]) -> int:
    """Count the changes of this kind."""
    return sum(isinstance(change, kind) for change in changes)
