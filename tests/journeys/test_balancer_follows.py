"""`imstream balancer` without addresses: nodes that appear get users, and no running answer is disturbed."""

import asyncio
import json
import math
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, chdir
from functools import partial
from pathlib import Path

import psutil
import pytest

from imstream.cli.balancer import Program, find_program
from imstream.client import Client, Connected, ConnectionChange
from tests.support.backend_scripts import goes_on_until
from tests.support.balancing import Balancer
from tests.support.processes import PYTHON, free_port, http_status, start, wait_for
from tests.support.scripted_backend import scripted_backend
from tests.support.servers import OPS, USER, DemoBackend, RedisServer, missing, start_node
from tests.support.tcp_proxy import tcp_proxy
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USERS = range(10001, 10017)


@asynccontextmanager
async def following(folder: Path, program: Program, redis_url: str, *options: str) -> AsyncIterator[Balancer]:
    """A balancer that finds its nodes by itself."""
    port = free_port()
    command = [PYTHON, "-m", "imstream", "balancer", "--program", program, "--listen", f"127.0.0.1:{port}"]
    command += ["--folder", str(folder / program), *options]
    with start(command, folder / f"balancer-{port}.log", cwd=folder, env={"IMSTREAM_REDIS_URL": redis_url}) as running:
        yield Balancer(program, port, running)
        children = psutil.Process(running.pid).children(recursive=True)
        assert await asyncio.to_thread(running.terminate) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []


async def reaches(balancer: Balancer, *nodes: str) -> bool:
    """Whether users come to these nodes, and each of them has one."""
    return set((await balancer.nodes_now(USERS)).values()) == set(nodes)


@pytest.mark.parametrize("program", ["haproxy", pytest.param("nginx", marks=pytest.mark.long)])
async def test_a_node_that_appears_gets_users_and_a_running_answer_goes_on_in_its_socket(
    program: Program, redis_server: RedisServer, tmp_path: Path
) -> None:
    finished, sent = asyncio.Event(), dict[str, str]()
    changes: list[ConnectionChange] = []
    async with scripted_backend(goes_on_until(finished, sent, pace=0.04)) as backend:
        node = partial(start_node, tmp_path, redis_url=redis_server.url, ai_url=backend.url)
        async with following(tmp_path, program, redis_server.url) as balancer:
            await wait_until(lambda: "waiting for a node" in balancer.process.output(), "it waits")
            with node(node="a").process:
                await wait_until(lambda: reaches(balancer, "a"), "users come to the first node", limit=30)
                async with Client(balancer.url, user_id(10001), on_change=changes.append) as client:
                    reply = await client.send("why?")
                    pieces = aiter(reply)
                    text = (await anext(pieces)).text
                    with node(node="b").process:
                        balancer.process.signal(signal.SIGHUP)  # it would look within a second anyway
                        await wait_until(lambda: reaches(balancer, "a", "b"), "users come to both nodes", limit=30)
                        finished.set()
                        async for piece in pieces:
                            text += piece.text
                        assert (reply.attempt, reply.repeated) == (1, 0)
                assert text == sent["why?"]
                assert sum(isinstance(change, Connected) for change in changes) == 1
                # The dead node stays in the configuration, and the health checks find out.
                await wait_until(lambda: reaches(balancer, "a"), "users come to the remaining node", limit=30)
            assert "Traceback" not in balancer.process.output()


AWAY = "the nodes in Redis cannot be read, the known ones stay"


@pytest.mark.parametrize("program", ["haproxy", pytest.param("nginx", marks=pytest.mark.long)])
async def test_a_balancer_that_is_restarted_while_redis_is_away_has_the_nodes_that_it_knew_and_goes_on_looking(
    program: Program, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with tcp_proxy(redis_server.port) as redis:
        viewer = redis.url.replace(USER, "viewer:viewer-secret")  # as in ops/deploy/compose.yaml
        with start_node(tmp_path, redis_url=redis_server.url, ai_url=demo.url, node="a").process:
            async with following(tmp_path, program, viewer) as balancer:
                await wait_until(lambda: reaches(balancer, "a"), "users come to the node", limit=30)
            redis.target_port, redis.accepted = free_port(), 0
            redis.drop()
            async with following(tmp_path, program, viewer) as balancer:
                await wait_until(lambda: reaches(balancer, "a"), "users come to the node that was known", limit=30)
                await wait_until(lambda: redis.accepted > 3, "it goes on looking", limit=30)
                assert balancer.process.output().count(AWAY) == 1
                redis.target_port = redis_server.port
                again = "the nodes in Redis can be read again"
                await wait_until(lambda: again in balancer.process.output(), "it follows Redis again", limit=30)


@pytest.mark.long  # the test above is of the first tier
async def test_a_balancer_that_never_saw_redis_has_the_nodes_that_were_given(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    file = tmp_path / "haproxy" / "nodes.json"
    file.parent.mkdir()
    file.write_text(damaged := '{"x": "127.0.0.1:1;include", "y": 5}')
    node = start_node(tmp_path, redis_url=redis_server.url, ai_url=demo.url)
    with node.process:
        async with following(tmp_path, "haproxy", nowhere, "--follow", f"127.0.0.1:{node.port}") as balancer:
            await wait_until(lambda: reaches(balancer, "0"), "users come to the node", limit=30)
    assert file.read_text() == damaged  # others may be given the next time


@pytest.mark.long  # test_procfile.py kills the command itself in the first tier
async def test_a_balancer_whose_program_was_killed_ends_as_a_killed_one(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """So `ops/respawn` starts it again."""
    given = f"127.0.0.1:{free_port()}"
    port = free_port()
    command = [PYTHON, "-m", "imstream", "balancer", "--program", "haproxy", "--listen", f"127.0.0.1:{port}"]
    command += ["--folder", str(tmp_path / "haproxy"), "--follow", given]
    env = {"IMSTREAM_REDIS_URL": f"redis://127.0.0.1:{redis_server.port}/0"}  # without a login
    with start(command, tmp_path / "log", cwd=tmp_path, env=env) as running:
        await wait_until(lambda: psutil.Process(running.pid).children(), "the program runs", limit=30)
        [program] = psutil.Process(running.pid).children()
        workers = program.children(recursive=True)
        program.kill()
        assert await asyncio.to_thread(running.wait) == 128 + signal.SIGKILL
        await asyncio.to_thread(psutil.wait_procs, workers, 10)


async def test_the_shipped_configuration_of_haproxy_is_reloaded_without_a_disconnect_and_has_a_stats_socket(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    finished, sent = asyncio.Event(), dict[str, str]()
    changes: list[ConnectionChange] = []
    if (path := find_program("haproxy")) is None:
        missing("haproxy")
        return
    async with scripted_backend(goes_on_until(finished, sent, pace=0.04)) as backend:
        nodes = {one: start_node(tmp_path, redis_url=redis_server.url, ai_url=backend.url, node=one) for one in "ab"}
        with nodes["a"].process, nodes["b"].process:
            balancer = Balancer("haproxy", free_port(), nodes["a"].process)
            shipped = (OPS / "haproxy.cfg").read_text("utf-8")
            for old, new in ((8080, nodes["a"].port), (8081, nodes["b"].port), (8000, balancer.port)):
                shipped = shipped.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
            (tmp_path / "haproxy.cfg").write_text(shipped)
            command = [path, "-W", "-db", "-C", str(tmp_path), "-f", str(tmp_path / "haproxy.cfg")]
            with start(command, tmp_path / "log") as running:
                await wait_until(lambda: reaches(balancer, "a", "b"), "it has found the nodes")
                async with Client(balancer.url, user_id(10001), on_change=changes.append) as client:
                    reply = await client.send("why?")
                    pieces = aiter(reply)
                    text = (await anext(pieces)).text
                    [worker] = psutil.Process(running.pid).children()
                    asked = -math.inf

                    def has_new_worker() -> bool:
                        nonlocal asked
                        if time.monotonic() > asked + 5:  # a master that is still starting may lose a signal
                            running.signal(signal.SIGUSR2)
                            asked = time.monotonic()
                        return any(one.pid != worker.pid for one in psutil.Process(running.pid).children())

                    await asyncio.to_thread(wait_for, has_new_worker, running, "a new worker")
                    # New connections come to it, soon to it alone, while the old one still has the socket.
                    await wait_until(
                        lambda: http_status(f"{balancer.http}/readyz") == 200, "new connections are served"
                    )
                    conns = await asyncio.to_thread(stats, tmp_path, "show servers conn")
                    assert all(f"127.0.0.1:{node.port}" in conns for node in nodes.values())
                    drained = f"set server nodes/127.0.0.1:{nodes['a'].port} state drain"

                    async def avoid_a() -> bool:
                        assert not (await asyncio.to_thread(stats, tmp_path, drained)).strip()
                        return await reaches(balancer, "b")

                    # Again and again: the old worker may still answer the first command.
                    await wait_until(avoid_a, "new sockets avoid the node that is taken out")
                    assert worker.is_running()
                    finished.set()
                    async for piece in pieces:
                        text += piece.text
                assert text == sent["why?"]
                assert (reply.attempt, reply.repeated) == (1, 0)
                assert sum(isinstance(change, Connected) for change in changes) == 1
                await asyncio.to_thread(psutil.wait_procs, [worker], 20)
                assert not worker.is_running()  # it ends with its last socket


def stats(folder: Path, command: str) -> str:
    """Ask HAProxy through its stats socket, which only its user can open."""
    file = folder / "haproxy.sock"
    assert file.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as connection, chdir(folder):  # the path may be too long for an address
        connection.connect(file.name)
        connection.sendall(f"{command}\n".encode())
        return connection.makefile().read()


async def test_only_nodes_that_can_be_reached_from_here_are_listed(redis_server: RedisServer, tmp_path: Path) -> None:
    def lease(address: str, host: str) -> str:
        return json.dumps({"instance": "i", "host": host, "machine": "", "pid": 1, "address": address})

    here = socket.gethostname()
    leases = {
        "here": lease("http://127.0.0.1:1001", here),
        "everywhere": lease("http://0.0.0.0:1002", here),
        "six": lease("http://[::1]:1003", here),
        "elsewhere": lease("http://10.0.0.9:1004", "elsewhere"),
        "named": lease("http://[::]:1005", "127.0.0.9"),
        "not-here": lease("http://127.0.0.1:1006", "elsewhere"),
        "unknown": lease("http://0.0.0.0:1007", "no.such.host.invalid"),
        "broken": "{",
        "hostile": lease("http://10.0.0.9:1;include", "a\nb"),
    }
    with redis_server.client() as client:
        for node, value in leases.items():
            client.zadd("im:nodes", {node: 1})
            client.set(f"im:{{node:{node}}}:lease", value, ex=60)
        file = tmp_path / "haproxy" / "haproxy.cfg"
        async with following(tmp_path, "haproxy", redis_server.url) as balancer:
            await wait_until(lambda: file.exists() and "server 127" in file.read_text(), "the program is configured")
            lines = [line.split() for line in file.read_text().splitlines()]
            assert sorted(words[1] for words in lines if words[:1] == ["server"]) == [
                *("10.0.0.9:1004", "127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.9:1005", "::1:1003"),
            ]
            for node in ("not-here", "unknown", "broken", "hostile"):
                assert f"node {node} cannot be reached from here" in balancer.process.output()
            await wait_until(lambda: "haproxy in front of" in balancer.process.output(), "it is started")
        client.flushall()
