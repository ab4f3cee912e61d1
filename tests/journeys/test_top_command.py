"""`imstream top`: nodes, their rates and percentiles, unreadable values, and the live view."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from tests.support.many_nodes import ManyNodes
from tests.support.talk import question
from tests.support.terminal import CTRL_C, WITHOUT_EXTRA, at_terminal, imstream
from tests.support.waiting import wait_until

USER = 10001


async def look(nodes: ManyNodes, *options: str) -> Result:
    """Run the command."""
    arguments = ["top", "--redis", nodes.server.url, *options]
    return await asyncio.to_thread(CliRunner().invoke, main, arguments)


async def shown(nodes: ManyNodes, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Its output with `--json`, once all metrics can be read and a condition holds."""
    found = dict[str, Any]()

    async def holds() -> bool:
        result = await look(nodes, "--json")
        assert result.exit_code == 0, result.output
        found.update(json.loads(result.stdout))
        return condition(found)

    await wait_until(holds, f"the condition holds: {found}")
    return found


@pytest.fixture
def nodes(pair: ManyNodes) -> ManyNodes:
    return pair


async def test_metrics_of_nodes_and_state_in_redis_are_shown_together(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, question(20), "short")
        await someone.end_of("short")
        await someone.chat(USER, question(20_000), "long")
        await someone.some_text("long")

        def is_counted(found: dict[str, Any]) -> bool:
            [a, b] = found["nodes"]
            return len(found["backends"]) == 2 and a.get("done", 0) > 0 and a["running"] == 1 and "done" in b

        found = await shown(nodes, is_counted)
        [a, b] = found["nodes"]
        assert (a["sessions"], a["unfinished"], b["sessions"], b["unfinished"]) == (1, 1, 0, 0)
        assert 0 < a["first_text"]["p50"] <= a["answer"]["p99"]
        assert (b["answer"]["p50"], b["done"]) == (None, 0)
        assert found["total"]["done"] == pytest.approx(a["done"], rel=0.1)
        assert [(one["node"], one["state"]) for one in found["backends"]] == [("a", "working"), ("b", "working")]
        [oldest] = found["oldest"]
        assert (oldest["node"], oldest["user"], oldest["message_id"]) == ("a", str(USER), "long")
        lines = (await look(nodes)).output.splitlines()
        assert "rates and percentiles since each node began" in lines[0]
        assert [line.split()[0] for line in lines[1:5]] == ["node", "a", "b", "all"]
        assert any("long" in line.split() for line in lines[lines.index("oldest requests") :])
        await someone.send_frame("CANCEL", userId=USER, messageId="long")
        await someone.end_of("long")


async def test_each_round_is_a_block_or_a_line_of_json(nodes: ManyNodes) -> None:
    blocks = (await look(nodes, "--count", "2", "--interval", "10ms")).output
    assert blocks.count("rates and percentiles") == 2
    assert blocks.count("since each node began") == 1
    [first, second] = map(
        json.loads, (await look(nodes, "--json", "--count", "2", "--interval", "10ms")).output.splitlines()
    )
    assert first["seconds"] is None
    assert second["seconds"] is not None


async def test_a_node_whose_metrics_cannot_be_read_is_shown_with_its_state_in_redis_and_the_reason(
    nodes: ManyNodes,
) -> None:
    await nodes.killed("b")
    await nodes["b"].start(metrics="off")
    why = "metrics of node b: it serves none: see IMSTREAM_METRICS"
    found = await shown(nodes, lambda found: found["problems"] == [why])
    [a, b] = found["nodes"]
    assert "done" in a
    assert (b["state"], b["unfinished"], "done" in b) == ("running", 0, False)
    assert f"warning: {why}" in (await look(nodes)).output
    await nodes.killed("b")
    await shown(nodes, lambda found: found["nodes"][1]["state"] == "dead" and not found["problems"])


async def test_on_a_terminal_it_is_live_until_ctrl_c(nodes: ManyNodes) -> None:
    line = imstream("top", "--redis", nodes.server.url, "--interval", "100ms")
    async with at_terminal(line, size=(100, 30)) as terminal:
        await terminal.has("rates and percentiles over ")  # not the first one
        await terminal.has("Ctrl-C ends")
        async with nodes["a"].peer(USER) as someone:
            await someone.chat(USER, question(20_000), "seen")
            await terminal.has("seen")
            await someone.send_frame("CANCEL", userId=USER, messageId="seen")
            await someone.end_of("seen")
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == 0


async def test_without_rich_it_is_plain_text_with_a_hint(nodes: ManyNodes) -> None:
    line = imstream("top", "--redis", nodes.server.url, "--interval", "100ms")
    async with at_terminal(line, size=(150, 40), env=WITHOUT_EXTRA) as terminal:
        await terminal.has("for a live view: pip install '.[terminal]'")
        await terminal.has("rates and percentiles over ")
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == 0
