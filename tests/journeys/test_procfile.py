"""The Procfile with real process runners: three nodes behind a balancer, one Redis, one AI; none is left at the end."""

import asyncio
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from imstream.cli.balancer import installed_program
from imstream.client import Client, Connected, ConnectionChange
from imstream.demo.answer import canned_answer
from tests.support.processes import PYTHON, consecutive_ports, free_port, http_status, start, wait_for
from tests.support.servers import DENIED, missing, node_rights
from tests.support.users import user_id

pytestmark = pytest.mark.usefixtures("unmeasured")

PROCFILE = Path(__file__).parents[2] / "Procfile"
THIRD = 200
"""Offset of the port of the first process of the third line; the second process gets the next port."""


def runner(name: str) -> list[str]:
    """The command of a process runner, with its option for the number of processes."""
    if name == "honcho":
        return [PYTHON, "-m", "honcho", "start", "-c"]
    program = shutil.which("foreman")
    if program is None:
        missing("foreman")
        return []
    return [program, "start", "-m"]


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether all processes have ended."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def is_ready(port: int) -> bool:
    """Whether a node on this port is ready."""
    return http_status(f"http://127.0.0.1:{port}/readyz") == 200


def processes_of(runner: int, *words: str) -> list[psutil.Process]:
    """The processes of imstream with these arguments, without the script that starts them again."""
    found = []
    for process in psutil.Process(runner).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if command[1:3] == ["-m", "imstream"] and {*words} <= {*command}:
                found.append(process)
    return found


@pytest.mark.parametrize("name", ["honcho", pytest.param("foreman", marks=pytest.mark.long)])
async def test_a_process_runner_starts_three_nodes_behind_a_balancer_and_one_of_them_may_die(
    name: str, tmp_path: Path
) -> None:
    # The Python of the tests instead of the script that creates a virtual environment.
    procfile = PROCFILE.read_text().replace("ops/imstream", f"{sys.executable} -m imstream")
    assert procfile.count(" -m imstream ") == 5  # one of them is an alternative, in a comment
    (tmp_path / "Procfile").write_text(procfile.replace("ops/respawn", str(PROCFILE.parent / "ops" / "respawn")))
    redis, ai, balancer, base = free_port(), free_port(), free_port(), consecutive_ports(3) - THIRD
    env = {
        "IMSTREAM_EMBEDDED_PORT": str(redis),
        "IMSTREAM_EMBEDDED_CONFIG": str(node_rights(tmp_path)),
        "IMSTREAM_REDIS_URL": f"redis://127.0.0.1:{redis}/0?password_file=.imstream/redis/password",
        "IMSTREAM_DEMO_PORT": str(ai),
        "IMSTREAM_AI_URL": f"http://127.0.0.1:{ai}/v1",
        "IMSTREAM_DEMO_PACE": "1ms",
        "IMSTREAM_LEASE": "2s",
        "IMSTREAM_UP_BALANCER_PORT": str(balancer),
    }
    if installed_program() is None:
        missing("haproxy")
    command = [*runner(name), "redis=1,ai=1,node=3,balancer=1", "-p", str(base)]
    with start(command, tmp_path / "log", env=env, cwd=tmp_path) as running:
        nodes = [base + THIRD + number for number in range(3)]
        for node in nodes:
            wait_for(partial(is_ready, node), running, name, limit=40)
        wait_for(partial(is_ready, balancer), running, name, limit=40)
        changes: list[ConnectionChange] = []
        url = f"ws://127.0.0.1:{balancer}/ws"
        async with Client(url, user_id(10001), on_change=changes.append) as client, asyncio.timeout(60):
            assert await (await client.send("why?")).text() == "".join(canned_answer("why?"))
            question = "What if you die? [[demo length=150 pace=20ms]]"
            reply = await client.send(question)
            await anext(aiter(reply))
            home = [int(change.node or 0) for change in changes if isinstance(change, Connected)][-1]
            [victim] = processes_of(running.pid, "node", str(home))
            victim.kill()
            assert await reply.text() == "".join(canned_answer(question, 150))
            [victim] = processes_of(running.pid, "balancer")
            victim.kill()
            assert await (await client.send("and now?")).text() == "".join(canned_answer("and now?"))
        wait_for(partial(is_ready, home), running, name, limit=40)
        processes = psutil.Process(running.pid).children(recursive=True)
        assert len(processes) >= 6
        # With an answer that does not end: the runner kills processes after 5 s.
        async with Client(f"ws://127.0.0.1:{nodes[0]}/ws", user_id(10001)) as client:
            reply = await client.send("[[demo length=5000 pace=20ms]]")
            await anext(aiter(reply))
            await asyncio.to_thread(running.terminate, 20)
        psutil.wait_procs(processes, timeout=10)
        assert gone(processes)
    output = running.output()
    assert re.search(r"node\.2.*ready", output)
    assert len(re.findall(r"node\.[123].*drained", output)) == 3, output
    assert output.count("was killed by signal 9 and is started again") == 2
    assert "SIGKILL" not in output
    assert DENIED not in output
