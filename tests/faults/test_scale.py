"""`ops/bench scale` at a small scale: a reconnect storm loses nothing, and the program cleans up after itself."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from ops.benchmark import capacity
from ops.generated import replace
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ops.benchmark", "scale", "--small"]

pytestmark = pytest.mark.usefixtures("unmeasured")


def measure(*options: str, file: Path) -> tuple[dict[str, Any], str]:
    """Run it; returns its measurements and its output."""
    done = subprocess.run(
        [*COMMAND, *options, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()), done.stdout


def test_users_who_lose_their_node_all_have_their_complete_answers_in_the_end(tmp_path: Path) -> None:
    found, printed = measure("--storm", file=tmp_path / "storm.json")
    storm = found["storm"]
    assert (storm["clients"], storm["lost"], storm["right"]) == (100, 100, 100)
    assert storm["under_way"] > 0
    assert storm["refusals"]["connection refused"] > 0  # they try the dead node first
    assert storm["ends"] == {"done": 100}
    assert 0 < storm["again"]["p50"] <= storm["whole"]["p99"] <= storm["ended"]["p99"]
    assert "storm: 100 of 100 answers complete and right" in printed


@pytest.mark.long
def test_a_small_run_gives_all_figures_of_the_capacity_document(tmp_path: Path) -> None:
    found, printed = measure(file=tmp_path / "scale.json")
    assert found["idle"]["heartbeats"] == found["idle"]["sockets"] == 200
    assert found["check"]["right"] == found["check"]["chats"] > 0
    text = capacity.DOCUMENT.read_text("utf-8")
    filled = replace(text, {**capacity.run_tables(found), **capacity.model_tables(capacity.figures(found))})
    assert capacity.read_figures(filled) == capacity.figures(found)
    assert "CPU of the node" in printed
    assert "predicted" in printed


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_all_that_it_has_started(number: signal.Signals) -> None:
    running = await asyncio.create_subprocess_exec(
        *COMMAND, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert running.stderr is not None
    while b"storm" not in await running.stderr.readline():
        assert running.returncode is None
    program = psutil.Process(running.pid)
    children = list[psutil.Process]()

    def has_nodes_and_users() -> bool:
        children[:] = program.children(recursive=True)
        return len(children) >= 5  # Redis, the backend, two nodes, the load generator

    await wait_until(has_nodes_and_users, "all processes run", limit=30)
    running.send_signal(number)
    assert await asyncio.wait_for(running.wait(), 60) == 128 + number
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
