"""The conformance kit: our clients and those of the documents pass it, and it finds violations of others."""

import asyncio
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from imstream.cli.conform import SCENARIOS, SECTIONS
from tests.support.npm import node
from tests.support.processes import PYTHON
from tests.support.scripted_ws import USER, scripted_server
from tests.support.waiting import SLOW

ROOT = Path(__file__).parents[2]
NPM = ROOT / "tests" / "npm"
EXAMPLES = ROOT / "ops" / "docs" / "examples"
DRIVER = EXAMPLES / "conform_driver.py"
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
        pytest.param("node", EXAMPLES / "conform_driver.mjs", id="the example for Node.js"),
        pytest.param("python", DRIVER, id="the example in Python"),
    ],
)
async def test_passes_every_scenario(program: str, file: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [*node(NPM)] if program == "node" else [sys.executable]
    if file.parent == EXAMPLES:  # it imports ws from beside itself
        (tmp_path / "node_modules").symlink_to(NPM / "node_modules")
        client = shutil.copy(EXAMPLES / f"client{file.suffix}", tmp_path)
        command += [shutil.copy(file, tmp_path), client]
    else:
        command += [file]
    code, table = await conform(command, limit=20 * SLOW)
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


@pytest.mark.parametrize("name", ["client.mjs", "client.py"])
def test_the_examples_are_short(name: str) -> None:
    lines = (EXAMPLES / name).read_text("utf-8").splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


BREAKS = [
    ("login", "?userId={user_id}", ""),
    ("resume", '("messageId", "attempt", "offset")', '("messageId", "attempt")'),
    ("busy", 'frame["retryAfterMs"] / 1000', "0.05"),
]
"""Changes of the example in Python that a scenario finds at once."""

SLOW_BREAKS = [
    ("chat", '{"EXPIRED": "expired"}.get(frame["code"], "refused")', '"refused"'),
    ("resume", 'self.write(message["again"])', "pass"),
    ("refused", 'event == "refused" and not message["point"]', 'frame["code"] == "FORBIDDEN"'),
    ("cancel", 'self.write(message["again"])', 'self.write({"CHAT": message["again"].get("CHAT")})'),
    ("drain", "points[-64:]", "points[-1:]"),
    ("token", "4500 < closed", "4500 <= closed"),
    ("closed", "4500 < closed < 5000", "closed == 1"),
    ("heartbeat", 'frame.get("heartbeatMs", 25_000) / 1000', "60"),
    ("cut", 'message["text"] + frame["contents"]', 'frame["contents"]'),
    ("unknown", 'event in ("accepted", "restart", "delta")', "event"),
]
"""Others, found when a time limit has passed, or that change more than one scenario."""


@pytest.mark.parametrize(
    ("scenario", "right", "wrong"), [*BREAKS, *(pytest.param(*one, marks=pytest.mark.long) for one in SLOW_BREAKS)]
)
async def test_finds_each_violation(scenario: str, right: str, wrong: str, tmp_path: Path) -> None:
    assert right in SMALL
    client = tmp_path / "client.py"
    client.write_text(SMALL.replace(right, wrong))
    for _ in range(5):  # beside busy processes, what is too early may be late enough
        code, table = await conform([sys.executable, DRIVER, client], scenario, limit=SLOW)
        if code:
            break
    assert code == 1
    assert "0 of 1 scenarios passed" in table


async def test_reports_the_expectation_the_steps_before_and_the_section_to_read(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(SMALL.replace('frame["retryAfterMs"] / 1000', "0.05"))
    for _ in range(5):  # beside busy processes, it may send no earlier than it should
        _, table = await conform([sys.executable, DRIVER, client], "busy", limit=20 * SLOW)
        if re.search(r"CHAT again after 0\.\d\d s, expected 0\.3 s", table):
            break
    else:
        pytest.fail(table)
    happened = re.findall(r"^ +(step|client|server) .*?(send|CHAT|BUSY)", table, re.MULTILINE)
    assert happened[-4:] == [("step", "send"), ("client", "CHAT"), ("server", "BUSY"), ("client", "CHAT")]
    assert "see ops/docs/protocol.md#codes\n" in table


async def test_a_client_that_exits_is_not_waited_for(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text("raise SystemExit(3)")
    async with asyncio.timeout(60 * SLOW):
        code, table = await conform([sys.executable, client], "login", "chat", limit=3600)
    assert code == 1
    assert table.count("the client has exited with 3\n") == 2


def test_every_scenario_names_a_section_of_the_protocol() -> None:
    headings = re.findall(r"^##* (.*)$", (ROOT / "ops" / "docs" / "protocol.md").read_text("utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(SECTIONS) <= anchors
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(SCENARIOS)
