"""`imstream explain`: the timeline of one message, while it runs, after its end, and when Redis has only a part."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from imstream.keys import GROUP, Keys
from imstream.model import Question, Terminal, Waiting
from imstream.redis.client import BlockingReader, RedisClient, to_dict
from imstream.settings import Settings
from imstream.store.replies import ReplyStore
from imstream.store.requests import Admitted, RequestStream
from tests.redis.conftest import chat_request
from tests.support.documents import redis_cli
from tests.support.many_nodes import ManyNodes
from tests.support.redis_sets import Topology
from tests.support.talk import question, whole
from tests.support.waiting import wait_until

KEYS = Keys()
USER = 10001


async def ask(on: Topology, message: str, *options: str) -> Result:
    """Run the command. It has its own event loop, so it runs in a thread."""
    command = ["explain", "--redis", on.url, *options, str(USER), message]
    return await asyncio.to_thread(CliRunner().invoke, main, command)


async def explained(on: Topology, message: str) -> dict[str, Any]:
    """Its output with `--json`."""
    found: dict[str, Any] = json.loads((await ask(on, message, "--json")).stdout)
    return found


def events(found: dict[str, Any]) -> list[str]:
    return [one["event"] for one in found["events"]]


@pytest.fixture
def nodes(pair: ManyNodes) -> ManyNodes:
    return pair


async def test_a_message_is_followed_while_it_runs_over_the_death_of_its_node_to_its_end(nodes: ManyNodes) -> None:
    asked = question(150, stall=1)
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, asked, "m")
        await someone.some_text("m")
        await wait_until(lambda: nodes.any.record(USER, "m")[-1]["event"] == "text", "text is recorded")
        running = await explained(nodes.server, "m")
        assert (running["state"], running["now"]) == ("running", "it is answered on node a")
        # Queued for a moment, if its worker is slow to open it.
        assert [event for event in events(running) if event != "queued"] == ["asked", "opened", "text"]
        assert "the text of the last moments: it is recorded in batches" in running["unknown"]
        await nodes.killed("a")
    assert await nodes.opened(USER, "m", 2) == ["a", "b"]
    async with nodes["b"].peer(USER, resume=someone.told) as someone:
        await someone.end_of("m")
    ended = await explained(nodes.server, "m")
    assert (ended["state"], ended["now"]) == ("done", "it has ended: done")
    told = [event for event in events(ended) if event != "queued"]
    assert told == ["asked", "opened", "text", "opened", "text", "done"]
    first, second = (one for one in ended["events"] if one["event"] == "opened")
    assert [(one["attempt"], one["about"]["by"]) for one in (first, second)] == [(1, "a"), (2, "b")]
    assert ended["request"].startswith("a/")
    assert ended["events"][-1]["offset"] == len(whole(asked))
    assert int(ended["events"][-2]["about"]["batches"]) > 1
    times = [datetime.fromisoformat(one["at"]) for one in ended["events"]]
    assert times == sorted(times)
    assert abs(times[0] - datetime.now(UTC)) < timedelta(minutes=5)
    assert ended["kept_for"] > 0
    names = {"10001": str(USER), "m-1": "m", "node:0": "node:a", "1795600000000-0": ended["request"].partition("/")[2]}
    [reply, kept, request, pending, letters, listed] = redis_cli("One message", nodes.server, names).values()
    told = [to_dict(flat)["event"] for _, flat in reply]
    assert [event for event in told if event not in {"queued", "text"}] == ["opened", "opened", "done"]
    assert kept > 0
    assert (request, pending, letters, listed[0]) == ([], [], [], "m")
    text = (await ask(nodes.server, "m")).output
    assert "opened: attempt 2 on node b" in text
    assert "tell me more" not in text + json.dumps(ended), "texts are not shown"


async def test_the_reason_and_the_end_of_a_wait_are_shown(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, "again? [[demo fail=1000]]", "m")
        await wait_until(lambda: nodes.any.record(USER, "m")[-1]["event"] == "waiting", "it waits")
        found = await explained(nodes.server, "m")
        assert found["state"] == "waiting"
        assert found["now"].startswith("it waits for backend ")
        waiting = found["events"][-1]
        assert found["now"].endswith(f" on node a, at most until {waiting['about']['until']}")
        assert datetime.fromisoformat(waiting["about"]["until"]) > datetime.now(UTC)
        assert waiting["about"]["reason"] == "http_503"
        text = (await ask(nodes.server, "m")).output
        assert "reason http_503" in text
        await someone.send_frame("CANCEL", userId=USER, messageId="m")
        await someone.end_of("m")
    assert (await explained(nodes.server, "m"))["state"] == "cancelled"


class Parts:
    """The stores of node 0."""

    def __init__(self, on: Topology, redis: RedisClient, reader: BlockingReader, settings: Settings) -> None:
        self.on = on
        self.redis = redis
        self.requests = RequestStream(redis, reader, settings)
        self.replies = ReplyStore(redis, settings)

    async def admit(self, message: str) -> str:
        """Admit a request; its entry id."""
        await self.redis.execute("ZADD", KEYS.nodes(), 1, "0")
        await self.requests.ensure_group()
        admitted = await self.requests.admit(chat_request(USER, message, "private"))
        assert isinstance(admitted, Admitted)
        return admitted.entry_id


@asynccontextmanager
async def parts_of(on: Topology) -> AsyncIterator[Parts]:
    settings = Settings.load(redis_url=on.url, node="0")
    reader = BlockingReader(settings.redis_url, block=settings.read_block, timeout=settings.redis_timeout)
    async with RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout) as redis:
        yield Parts(on, redis, reader, settings)
    await reader.aclose()


async def test_each_step_of_a_message_is_shown_with_every_topology_of_redis(empty_redis: Topology) -> None:
    async with parts_of(empty_redis) as parts:
        nobody = await ask(empty_redis, "m")
        assert nobody.exit_code == 1
        assert "not in Redis" in nobody.output
        entry_id = await parts.admit("m")
        waits = "it waits for a worker of node 0, in a stream of 1 unfinished requests"
        assert (found := await explained(empty_redis, "m"))["now"] == waits
        assert (events(found), found["request"]) == (["asked"], f"0/{entry_id}")
        await parts.replies.mark_queued(USER, "m", Question("private", "x"))
        assert (found := await explained(empty_redis, "m"))["now"] == waits
        assert (events(found), found["state"]) == (["asked", "queued"], "queued")
        with empty_redis.client() as client:
            client.hset(KEYS.paused(), "0", "new weights")
            assert (await explained(empty_redis, "m"))["now"] == f"{waits}; an operator has paused the node"
            client.delete(KEYS.paused())
        [entry] = await parts.requests.read(count=1, block=timedelta(seconds=1))
        assert (await explained(empty_redis, "m"))["now"] == "node 0 has read it, and has not opened its reply"
        await parts.replies.open(USER, "m", Question("private", "x"), request=f"0/{entry_id}")
        assert (found := await explained(empty_redis, "m"))["now"] == (
            "it is answered on node 0, which has no lease: another node takes over"
        )
        for error in ("away", "still away"):
            await parts.replies.wait(USER, "m", attempt=1, pause=timedelta(), why=Waiting("one", "http_503", error))
        assert (found := await explained(empty_redis, "m"))["state"] == "waiting"
        assert (found["events"][-1]["about"]["error"], found["events"][-1]["about"]["times"]) == ("still away", "2")
        for before in (0, 3):
            await parts.replies.append(USER, "m", attempt=1, before=before, after=before + 3, text="abc")
        failed = Terminal("failed", reason="http_400", error="no such model")
        await parts.replies.append(USER, "m", attempt=1, before=6, after=6, text="", terminal=failed)
        await parts.requests.bury(entry, reason="http_400", error="no such model", attempts=1)
        found = await explained(empty_redis, "m")
        assert events(found) == ["asked", "queued", "opened", "waiting", "text", "failed", "dead letter"]
        assert found["events"][4]["about"]["batches"] == "2"
        assert found["events"][4]["about"]["characters"] == "6"
        assert found["events"][-1]["about"]["node"] == "0"
        with empty_redis.client() as client:
            again = ("dead", "retry", "--redis", empty_redis.url, "--node", "0", "--user", str(USER))
            assert (await asyncio.to_thread(CliRunner().invoke, main, again)).exit_code == 0
            found = await explained(empty_redis, "m")
            assert (events(found)[-2:], found["state"], found["now"]) == (["failed", "retried"], "queued", waits)
            assert found["events"][0]["about"]["entry"] == entry_id
            [entry] = await parts.requests.read(count=1, block=timedelta(seconds=1))
            await parts.requests.bury(entry, reason="http_400", error="no such model", attempts=1)
            client.delete(KEYS.reply(USER, "m"))
            found = await explained(empty_redis, "m")
            assert (found["state"], events(found)) == ("failed", ["dead letter"])
            assert "its attempts: its reply has expired" in found["unknown"]
            client.delete(KEYS.dead("0"))
            assert (await ask(empty_redis, "m")).exit_code == 1


async def test_a_message_that_was_handed_back_by_a_pause_is_told_before_and_after_its_first_attempt(
    empty_redis: Topology,
) -> None:
    async with parts_of(empty_redis) as parts:
        entry_id = await parts.admit("m")
        await parts.replies.mark_queued(USER, "m")
        await parts.requests.read(count=1, block=timedelta(seconds=1))
        with empty_redis.client() as client:
            client.hset(KEYS.paused(), "*", "new weights")
            now = "node 0 has read it, and has not opened its reply; an operator has paused the node"
            assert (await explained(empty_redis, "m"))["now"] == now
            client.delete(KEYS.paused())
        await parts.replies.open(USER, "m", request=f"0/{entry_id}")
        await parts.replies.wait(USER, "m", attempt=1, pause=timedelta(), why=Waiting("one", "paused"), counts=False)
        assert (found := await explained(empty_redis, "m"))["state"] == "waiting"
        assert found["now"].startswith("it waits on node 0")
        assert found["now"].endswith(" for the end of a pause by an operator")
        assert found["events"][-1]["about"]["reason"] == "paused"


async def test_the_newest_messages_of_a_user_are_listed_also_those_whose_reply_is_gone(empty_redis: Topology) -> None:
    command = ["explain", "--redis", empty_redis.url]
    nobody = await asyncio.to_thread(CliRunner().invoke, main, [*command, "10002"])
    assert (nobody.exit_code, "Redis has no messages of this user" in nobody.output) == (1, True)
    async with parts_of(empty_redis) as parts:
        for message in ("gone", "open"):
            request = f"0/{await parts.admit(message)}"
            await parts.replies.open(USER, message, request=request)
        with empty_redis.client() as client:
            client.delete(KEYS.reply(USER, "gone"), KEYS.requests("0"))
    listed = await asyncio.to_thread(CliRunner().invoke, main, [*command, str(USER)])
    heading, newest, before = (re.split(r"  +", line) for line in listed.output.splitlines()[:3])
    assert (listed.exit_code, heading) == (0, ["asked", "message", "state"])
    assert (newest[1], newest[2].startswith("it has not ended, but no stream")) == ("open", True)
    assert before[1:] == ["gone", "not in Redis: it was never accepted, or its reply has expired"]


async def test_a_message_whose_request_is_lost_is_shown_as_lost(empty_redis: Topology) -> None:
    async with parts_of(empty_redis) as parts:
        entry_id = await parts.admit("lost")
        await parts.replies.open(USER, "lost", request=f"0/{entry_id}", after=2)
        with empty_redis.client() as client:
            client.delete(KEYS.requests("0"), KEYS.load("0"))
        found = await explained(empty_redis, "lost")
        assert found["now"] == (
            "it has not ended, but no stream has its request: it was deleted, or Redis has lost data"
        )
        assert "attempts before 3: Redis has lost them" in found["unknown"]


async def test_a_request_behind_many_others_is_found(empty_redis: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstream.store.timeline.PAGE", 2)
    with empty_redis.client() as client:
        client.zadd(KEYS.nodes(), {"other": 1})
        for number in range(5):
            client.xadd(KEYS.requests("other"), {"user": str(USER), "message_id": f"m{number}"})
        client.xgroup_create(KEYS.requests("other"), GROUP, "0")
        assert (await explained(empty_redis, "m0"))["request"].startswith("other/")
        client.delete(KEYS.requests("other"), KEYS.nodes())
