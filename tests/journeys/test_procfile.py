"""The Procfile with real process runners: two nodes, one Redis, one AI; no process is left at the end."""

import asyncio
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest

from imstream.client import Client
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


@pytest.mark.parametrize("name", ["honcho", "foreman"])
async def test_a_process_runner_starts_two_nodes_and_stops_everything(name: str, tmp_path: Path) -> None:
    # The Python of the tests instead of the script that creates a virtual environment.
    procfile = PROCFILE.read_text().replace("ops/imstream", f"{sys.executable} -m imstream")
    assert procfile.count(" -m imstream ") == 4  # one of them is an alternative, in a comment
    (tmp_path / "Procfile").write_text(procfile)
    redis, ai, base = free_port(), free_port(), consecutive_ports(2) - THIRD
    env = {
        "IMSTREAM_EMBEDDED_PORT": str(redis),
        "IMSTREAM_EMBEDDED_CONFIG": str(node_rights(tmp_path)),
        "IMSTREAM_REDIS_URL": f"redis://127.0.0.1:{redis}/0?password_file=.imstream/redis/password",
        "IMSTREAM_DEMO_PORT": str(ai),
        "IMSTREAM_AI_URL": f"http://127.0.0.1:{ai}/v1",
        "IMSTREAM_DEMO_PACE": "1ms",
    }
    command = [*runner(name), "redis=1,ai=1,node=2", "-p", str(base)]
    with start(command, tmp_path / "log", env=env, cwd=tmp_path) as running:
        nodes = (base + THIRD, base + THIRD + 1)
        for node in nodes:
            wait_for(partial(is_ready, node), running, name, limit=40)
        for node in nodes:
            async with Client(f"ws://127.0.0.1:{node}/ws", user_id(10001)) as client, asyncio.timeout(30):
                assert await (await client.send("why?")).text() == "".join(canned_answer("why?"))
        processes = psutil.Process(running.pid).children(recursive=True)
        assert len(processes) >= 4
        # With an answer that does not end: the runner kills processes after 5 s.
        async with Client(f"ws://127.0.0.1:{nodes[0]}/ws", user_id(10001)) as client:
            reply = await client.send("[[demo length=5000 pace=20ms]]")
            await anext(aiter(reply))
            await asyncio.to_thread(running.terminate, 20)
        psutil.wait_procs(processes, timeout=10)
        assert gone(processes)
    output = running.output()
    assert re.search(r"node\.2.*ready", output)
    assert len(re.findall(r"node\.[12].*drained", output)) == 2, output
    assert "SIGKILL" not in output
    assert DENIED not in output
