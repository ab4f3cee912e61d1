"""`imstream up --nodes 3`: three nodes and a balancer, each of which can be killed during chats."""

import asyncio
import re
import signal
from pathlib import Path

import psutil
import pytest

from imstream.cli.balancer import Program
from imstream.client import Client, Connected, ConnectionChange
from imstream.demo.answer import canned_answer
from tests.support.balancing import PROGRAMS, Balancer
from tests.support.processes import consecutive_ports, free_port, http_status
from tests.support.up_command import gone, up
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USERS = range(10001, 10101)


@pytest.mark.parametrize("program", PROGRAMS)
async def test_three_nodes_and_a_balancer_from_one_command(program: Program, tmp_path: Path) -> None:
    first, port = consecutive_ports(3), free_port()
    options = ("--nodes", "3", "--balancer", program, "--balancer-port", str(port), "--drain-grace", "20s")
    with up(tmp_path, *options, ports=(first, free_port(), free_port())) as imstream:
        await asyncio.to_thread(imstream.wait_until_ready)
        output = imstream.running.output()
        assert f"page     http://127.0.0.1:{port}/\n" in output
        for node in range(3):
            assert f"node {node}   ws://127.0.0.1:{first + node}/ws\n" in output
        children = imstream.children()
        assert sorted(children) == sorted(["redis", "demo-ai", "node", "node 1", "node 2", program])
        balancer = Balancer(program, port, imstream.running)
        assert http_status(f"{balancer.http}/") == 200
        homes = await balancer.homes_of(USERS, ("0", "1", "2"))

        # A killed node is restarted; the other parts keep running.
        children["node 1"].kill()
        await wait_until(lambda: "node 1 is back" in imstream.running.output(), "node 1 to be back", limit=30)
        assert "node 1 exited unexpectedly (killed by SIGKILL); restarting in 1 s" in imstream.running.output()
        now = imstream.children()
        assert [name for name in children if children[name] != now[name]] == ["node 1"]

        # The stop below closes the sockets of nodes without answers at once: the client has to be where its answer is.
        async def are_at_home() -> bool:
            return await balancer.nodes_now(USERS) == homes

        await wait_until(are_at_home, "the balancer to use node 1 again", limit=30)

        # The balancer is restarted, too; its clients reconnect and resume, also while the nodes drain.
        changes: list[ConnectionChange] = []
        async with Client(balancer.url, user_id(10001), on_change=changes.append) as client, asyncio.timeout(60):
            question = "Still there? [[demo length=400 pace=10ms]]"
            reply = await client.send(question)
            await anext(aiter(reply))
            now[program].kill()
            back = f"{program} is back"
            await wait_until(lambda: back in imstream.running.output(), f"{program} to be back", limit=30)
            await wait_until(
                lambda: sum(isinstance(one, Connected) for one in changes) >= 2, "the client too", limit=30
            )
            children = imstream.children()
            imstream.running.signal(signal.SIGINT)
            assert await reply.text() == "".join(canned_answer(question, 400))
        assert await asyncio.to_thread(imstream.running.wait, 30) == 0
        assert gone(list(children.values()))
        assert len(re.findall(r"node \d .*drained", imstream.running.output())) == 3


def test_no_worker_process_of_the_balancer_survives_when_everything_is_killed(tmp_path: Path) -> None:
    options = ("--nodes", "2", "--balancer", "nginx", "--balancer-port", str(free_port()))
    with up(tmp_path, *options, ports=(consecutive_ports(2), free_port(), free_port())) as imstream:
        imstream.wait_until_ready()
        everything = psutil.Process(imstream.running.pid).children(recursive=True)
        assert len(everything) > len(imstream.children())
        imstream.running.kill()
        psutil.wait_procs(everything, timeout=10)
        assert gone(everything)


@pytest.mark.parametrize("victim", ["redis", "demo-ai"])
def test_what_every_node_needs_takes_all_down_when_it_dies(tmp_path: Path, victim: str) -> None:
    options = ("--nodes", "2", "--balancer", "none", "--drain-grace", "100ms")
    with up(tmp_path, *options, ports=(consecutive_ports(2), free_port(), free_port())) as imstream:
        imstream.wait_until_ready()
        children = imstream.children()
        children[victim].kill()
        assert imstream.running.wait(30) == 1
        assert gone(list(children.values()))
