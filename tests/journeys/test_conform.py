"""The conformance kit: our clients and those of the documents pass it, and it finds what is wrong with others."""

import asyncio
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from imstream.cli.conform import SCENARIOS
from tests.support.npm import node
from tests.support.processes import PYTHON
from tests.support.scripted_ws import USER, scripted_server
from tests.support.waiting import SLOW

ROOT = Path(__file__).parents[2]
NPM = ROOT / "tests" / "npm"
EXAMPLES = ROOT / "ops" / "docs" / "examples"
SMALL = (EXAMPLES / "client.py").read_text("utf-8")


async def conform(command: Sequence[str | Path], *only: str, limit: int) -> tuple[int, str]:
    """Run the kit; its exit code and its table."""
    kit = [PYTHON, "-m", "imstream", "conform", f"--limit={limit}", *(f"--only={name}" for name in only), *command]
    process = await asyncio.create_subprocess_exec(*kit, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    table, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, table.decode()


@pytest.mark.parametrize(
    ("program", "file"),
    [
        pytest.param("node", NPM / "conforming.mjs", id="our client in Node.js"),
        pytest.param("python", ROOT / "tests" / "support" / "conforming.py", id="our Python client"),
        pytest.param("node", EXAMPLES / "client.mjs", id="the example for Node.js"),
        pytest.param("python", EXAMPLES / "client.py", id="the example in Python"),
    ],
)
async def test_passes_every_scenario(program: str, file: Path, tmp_path: Path) -> None:
    if program == "node" and file.parent == EXAMPLES:  # it imports ws from beside itself
        (tmp_path / "node_modules").symlink_to(NPM / "node_modules")
        file = Path(shutil.copy(file, tmp_path))
    command = node(NPM) if program == "node" else [sys.executable]
    code, table = await conform([*command, file], limit=20 * SLOW)
    assert code == 0, table
    assert f"{len(SCENARIOS)} of {len(SCENARIOS)} scenarios passed" in table


async def test_a_server_that_is_not_ready_does_not_end_a_program_in_node() -> None:
    async with scripted_server() as server:
        server.refusals = 2
        command = [*node(NPM), str(NPM / "conforming.mjs")]
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        assert process.stdin is not None
        step = {"step": "connect", "url": server.url, "userId": USER, "tokens": ["t-1"]}
        process.stdin.write(json.dumps(step).encode() + b"\n")
        await server.logged_in()
        process.kill()
        await process.wait()


BREAKS = [
    ("login", "?userId={userId}", ""),
    ("resume", ', offset=frame.get("offset", 0)', ""),
    ("busy", 'frame["retryAfterMs"] / 1000', "0.05"),
]
"""Changes of the example in Python that a scenario finds at once."""

SLOW_BREAKS = [
    ("chat", 'or code == "EXPIRED"', ""),
    ("resume", "self.send_again(message)", "pass"),
    ("cancel", 'in message["again"].values()', 'in message["again"].values() if "CHAT" in message["again"] else ()'),
    ("drain", "resume[-64:]", "resume[-1:]"),
    ("token", "4500 < closed", "4500 <= closed"),
    ("closed", "4500 < closed <= 4999", "closed == 1"),
    ("heartbeat", 'frame.get("heartbeatMs", 25_000) / 1000', "60"),
    ("cut", 'message["text"] + frame["contents"]', 'frame["contents"]'),
    ("unknown", 'event in ("accepted", "restart", "delta")', "event"),
]
"""Others, found when a time limit has passed, or that change more than one scenario."""


@pytest.mark.parametrize(
    ("scenario", "right", "wrong"), [*BREAKS, *(pytest.param(*one, marks=pytest.mark.long) for one in SLOW_BREAKS)]
)
async def test_finds_what_is_wrong(scenario: str, right: str, wrong: str, tmp_path: Path) -> None:
    assert right in SMALL
    client = tmp_path / "client.py"
    client.write_text(SMALL.replace(right, wrong))
    code, table = await conform([sys.executable, client], scenario, limit=SLOW)
    assert code == 1
    assert "0 of 1 scenarios passed" in table
