"""`imstream balancer` without addresses: nodes that appear get users, and no running answer is disturbed."""

import asyncio
import json
import signal
import socket
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
from tests.support.processes import PYTHON, free_port, http_status, start
from tests.support.scripted_backend import scripted_backend
from tests.support.servers import OPS, RedisServer, missing, start_node
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USERS = range(10001, 10017)


@asynccontextmanager
async def following(folder: Path, program: Program, server: RedisServer) -> AsyncIterator[Balancer]:
    """A balancer that finds its nodes by itself."""
    port = free_port()
    command = [PYTHON, "-m", "imstream", "balancer", "--program", program, "--listen", f"127.0.0.1:{port}"]
    command += ["--folder", str(folder / program)]
    with start(command, folder / "balancer.log", cwd=folder, env={"IMSTREAM_REDIS_URL": server.url}) as running:
        yield Balancer(program, port, running)
        children = psutil.Process(running.pid).children(recursive=True)
        assert await asyncio.to_thread(running.terminate) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []


async def nodes_of(balancer: Balancer) -> set[str]:
    """The nodes that users come to now; none while the balancer has not started."""
    try:
        return set((await balancer.nodes_of(USERS)).values())
    except OSError:
        return set()


@pytest.mark.parametrize("program", ["haproxy", pytest.param("nginx", marks=pytest.mark.long)])
async def test_a_node_that_appears_gets_users_and_a_running_answer_goes_on_in_its_socket(
    program: Program, redis_server: RedisServer, tmp_path: Path
) -> None:
    finished, sent = asyncio.Event(), dict[str, str]()
    changes: list[ConnectionChange] = []
    async with scripted_backend(goes_on_until(finished, sent, pace=0.04)) as backend:
        node = partial(start_node, tmp_path, redis_url=redis_server.url, ai_url=backend.url)
        async with following(tmp_path, program, redis_server) as balancer:
            await wait_until(lambda: "waiting for a node" in balancer.process.output(), "it waits")
            with node(node="a").process:

                async def reaches(*nodes: str) -> bool:
                    return await nodes_of(balancer) == set(nodes)

                await wait_until(lambda: reaches("a"), "users come to the first node", limit=30)
                async with Client(balancer.url, user_id(10001), on_change=changes.append) as client:
                    reply = await client.send("why?")
                    pieces = aiter(reply)
                    text = (await anext(pieces)).text
                    with node(node="b").process:
                        balancer.process.signal(signal.SIGHUP)  # it would look within a second anyway
                        await wait_until(lambda: reaches("a", "b"), "users come to both nodes", limit=30)
                        finished.set()
                        async for piece in pieces:
                            text += piece.text
                        assert (reply.attempt, reply.repeated) == (1, 0)
                assert text == sent["why?"]
                assert sum(isinstance(change, Connected) for change in changes) == 1
                # The dead node stays in the configuration, and the health checks find out.
                await wait_until(lambda: reaches("a"), "users come to the remaining node", limit=30)
            assert "Traceback" not in balancer.process.output()


async def test_the_shipped_configuration_of_haproxy_is_reloaded_without_a_disconnect_and_has_a_stats_socket(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    finished, sent = asyncio.Event(), dict[str, str]()
    changes: list[ConnectionChange] = []
    if (path := find_program("haproxy")) is None:
        missing("haproxy")
        return
    async with scripted_backend(goes_on_until(finished, sent, pace=0.04)) as backend:
        with start_node(tmp_path, redis_url=redis_server.url, ai_url=backend.url).process as node:
            port = next(one.laddr.port for one in psutil.Process(node.pid).net_connections() if one.status == "LISTEN")
            balancer = Balancer("haproxy", free_port(), node)
            shipped = (OPS / "haproxy.cfg").read_text("utf-8")
            for old, new in (("127.0.0.1:8080", f"127.0.0.1:{port}"), ("127.0.0.1:8000", f"127.0.0.1:{balancer.port}")):
                shipped = shipped.replace(old, new)
            (tmp_path / "haproxy.cfg").write_text(shipped)
            command = [path, "-W", "-db", "-C", str(tmp_path), "-f", str(tmp_path / "haproxy.cfg")]
            with start(command, tmp_path / "log") as running:
                await wait_until(lambda: http_status(f"{balancer.http}/readyz") == 200, "it has found the node")
                async with Client(balancer.url, user_id(10001), on_change=changes.append) as client:
                    reply = await client.send("why?")
                    pieces = aiter(reply)
                    text = (await anext(pieces)).text
                    [worker] = psutil.Process(running.pid).children()
                    running.signal(signal.SIGUSR2)

                    def new_workers() -> list[psutil.Process]:
                        return [one for one in psutil.Process(running.pid).children() if one.pid != worker.pid]

                    await wait_until(lambda: len(new_workers()) == 1, "there is a new worker")
                    # New connections come to it while the old one still has the socket.
                    await wait_until(
                        lambda: http_status(f"{balancer.http}/readyz") == 200, "new connections are served"
                    )
                    assert f"127.0.0.1:{port}" in await asyncio.to_thread(stats, tmp_path, "show servers conn")
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
        async with following(tmp_path, "haproxy", redis_server) as balancer:
            await wait_until(lambda: file.exists() and "server 127" in file.read_text(), "the program is configured")
            lines = [line.split() for line in file.read_text().splitlines()]
            assert sorted(words[1] for words in lines if words[:1] == ["server"]) == [
                *("10.0.0.9:1004", "127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.9:1005", "::1:1003"),
            ]
            for node in ("not-here", "unknown", "broken", "hostile"):
                assert f"node {node} cannot be reached from here" in balancer.process.output()
            await wait_until(lambda: "haproxy in front of" in balancer.process.output(), "it is started")
        client.flushall()
