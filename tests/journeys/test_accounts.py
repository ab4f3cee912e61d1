"""Bans, locks and quotas on two nodes: by command, with redis-cli, and after violations."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.guards.account import BANNED, QUOTA_EXHAUSTED
from imstream.keys import Keys
from imstream.user_ids import UserId
from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.noon import NOON, today
from tests.support.peer import Frame, Peer, peer
from tests.support.servers import DemoBackend
from tests.support.strict_node import NO, RUDE, RUDE_AT_SECOND_SIGHT
from tests.support.users import user_id
from tests.support.waiting import wait_until

USER, OTHER = user_id(10001), user_id(10002)
DOCUMENT = Path(__file__).parents[2] / "ops" / "docs" / "operating.md"
AT_ONCE = "hello [[demo first=0s pace=0s]]"
SLOWLY = "hello [[demo first=0s pace=20ms length=100]]"
QUOTA = 40
ZONE = re.escape(f"({NOON})")


@pytest.fixture(scope="module")
def standing_pair(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes with a quota and two AI calls per message. The first one has the guard of `strict_node`."""
    folder = tmp_path_factory.mktemp("accounts")
    limits: dict[str, Any] = {"max_attempts": 2, "chats_per_minute": 0, "frame_rate": 0}
    limits |= {"daily_quota": QUOTA, "quota_timezone": NOON}
    with standing_nodes(folder, demo.url, "0", "1", **limits) as nodes:
        nodes["0"].now.process.terminate()
        nodes["0"].start_now(command=("-m", "tests.support.strict_node"))
        yield nodes


@pytest.fixture
async def nodes(standing_pair: ManyNodes) -> AsyncIterator[ManyNodes]:
    """The nodes; at the end, the keys of the users are deleted."""
    await standing_pair.mended()
    yield standing_pair
    for user in (USER, OTHER):
        for key in standing_pair.redis.scan_iter(f"im:{{user:{user}}}:*"):
            if ":reply:" not in key:
                standing_pair.redis.delete(key)
    await standing_pair.settled()
    standing_pair.check_logs()


async def command(nodes: ManyNodes, *words: str) -> str:
    """Run `imstream user …` and return its output."""
    words = ("user", *words, "--redis", nodes.server.url)
    env = {"IMSTREAM_DAILY_QUOTA": str(QUOTA), "IMSTREAM_QUOTA_TIMEZONE": NOON}
    result = await asyncio.to_thread(CliRunner().invoke, main, words, env=env)
    assert result.exit_code == 0, result.output
    return result.output


async def is_closed(someone: Peer, sentence: str) -> None:
    """Wait until the socket is closed with this sentence."""
    assert await someone.closed() == 4503
    last = someone.frames[-1]
    assert (last["msgType"], last["code"]) == ("SYSTEM", "FORBIDDEN")
    assert re.fullmatch(sentence, last["contents"]), last


async def login_is_refused(nodes: ManyNodes, user: UserId, *, lang: str, sentence: str) -> None:
    """Check this on both nodes."""
    for url in nodes.urls():
        async with peer(url, lang=lang) as someone:
            await someone.send_frame("INIT", userId=user)
            await is_closed(someone, sentence)


def used(nodes: ManyNodes, user: UserId = USER) -> int:
    """The number of messages counted today."""
    return int(nodes.redis.zcard(Keys().quota(user, today())))


# Bans and locks


async def test_a_ban_by_command_closes_all_sessions_of_the_user_on_all_nodes_and_nobody_elses(nodes: ManyNodes) -> None:
    async with (
        nodes["0"].peer(USER, lang="en") as here,
        nodes["1"].peer(USER, lang="zh") as there,
        nodes["1"].peer(OTHER) as other,
    ):
        await here.chat(USER, SLOWLY, "running")
        await there.some_text("running")
        out = await command(nodes, "ban", str(USER), "--reason", "spam", "--by", "alice")
        assert out.splitlines() == [
            f"user {USER} is banned",
            *(f"node {node} was notified to close the user's sessions" for node in "01"),
        ]
        await is_closed(here, re.escape(BANNED.en))
        await is_closed(there, re.escape(BANNED.zh))
        await login_is_refused(nodes, USER, lang="en", sentence=re.escape(BANNED.en))
        await other.send_frame("HEARTBEAT")
        await other.until(msgType="HEARTBEAT")
        shown = await command(nodes, "show", str(USER))
        assert "account     banned" in shown
        assert "reason    spam" in shown
        assert "by        alice" in shown
        assert f"1 of {QUOTA} used" in shown
        await wait_until(lambda: _has_no_sockets(nodes), "its sockets are forgotten")
        # Accepted messages are answered, although no socket shows the answer.
        await nodes["0"].all_finished()
        assert nodes.any.recorded(USER, "running")[0] == "done"
        assert await command(nodes, "unban", str(USER)) == f"user {USER} is unbanned\n"
        assert await command(nodes, "unban", str(USER)) == f"user {USER} was not banned\n"
    async with nodes["1"].peer(USER) as back:
        assert (await back.chat(USER, AT_ONCE, "after"))["event"] == "accepted"
        await back.end_of("after")


async def test_a_lock_by_command_says_until_when_and_ends_by_itself(nodes: ManyNodes) -> None:
    async with nodes["1"].peer(USER, lang="en") as someone:
        assert re.match(rf"user {USER} is locked until \S+ \S+ {ZONE}\n", await command(nodes, "lock", str(USER)))
        sentence = rf"This account is locked until \d{{4}}-\d\d-\d\d \d\d:\d\d {ZONE}!"
        await is_closed(someone, sentence)
        assert 3_500_000 < someone.frames[-1]["retryAfterMs"] <= 3_600_000
        await login_is_refused(nodes, USER, lang="en", sentence=sentence)
        assert "account     locked" in await command(nodes, "show", str(USER))
        assert await command(nodes, "unlock", str(USER)) == f"user {USER} is unlocked\n"
        await command(nodes, "lock", str(USER), "--for", "50ms")
        await wait_until(lambda: _is_free(nodes), "the lock is over")
    async with nodes["0"].peer(USER):
        pass


async def _is_free(nodes: ManyNodes) -> bool:
    return "account     free" in await command(nodes, "show", str(USER))


async def _has_no_sockets(nodes: ManyNodes) -> bool:
    return "sockets     none" in await command(nodes, "show", str(USER))


async def test_the_lines_of_the_readme_for_redis_cli_do_the_same(nodes: ManyNodes) -> None:
    document = DOCUMENT.read_text("utf-8").replace("10001", str(USER))
    [ban, route, notice] = re.findall(rf"^(?:HSET|SMEMBERS|XADD) .*{re.escape(str(USER))}.*$", document, re.MULTILINE)
    async with nodes["0"].peer(USER, lang="en") as here, nodes["1"].peer(USER, lang="en") as there:
        cli: Any = nodes.redis.execute_command
        cli(*ban.split())
        holders = cli(*route.split())
        assert sorted(holders) == ["0", "1"]
        for node in holders:
            cli(*notice.replace("{node:0}", f"{{node:{node}}}").split())
            # An inbox created by hand has no expiry until a node writes to it.
            nodes.redis.expire(Keys().inbox(node), 60)
        await is_closed(here, re.escape(BANNED.en))
        await is_closed(there, re.escape(BANNED.en))
    await login_is_refused(nodes, USER, lang="zh", sentence=re.escape(BANNED.zh))


async def test_with_a_quota_a_ban_that_no_node_was_told_of_holds_from_the_next_message_on(nodes: ManyNodes) -> None:
    async with nodes["0"].peer(USER, lang="en") as someone:
        nodes.redis.hset(Keys().account(USER), "banned", 1)
        await someone.send_frame("CHAT", userId=USER, contents=AT_ONCE, messageId="m")
        await is_closed(someone, re.escape(BANNED.en))
    assert used(nodes) == 0
    assert nodes.any.record(USER, "m") == []


async def test_too_many_violations_lock_the_user_on_all_nodes(nodes: ManyNodes) -> None:
    async with nodes["0"].peer(USER, lang="en") as rude, nodes["1"].peer(USER, lang="en") as too:
        assert (await rude.chat(USER, RUDE, "m1"))["contents"] == NO.sentence.en
        assert (await rude.chat(USER, RUDE_AT_SECOND_SIGHT, "m2"))["event"] == "accepted"
        terminal = (await rude.end_of("m2")).terminal
        assert terminal is not None
        assert (terminal["event"], terminal["contents"]) == ("failed", NO.sentence.en)
        await rude.send_frame("HEARTBEAT")
        await rude.until(msgType="HEARTBEAT")
        assert "violations  2, expire in 0:09:" in await command(nodes, "show", str(USER))
        # The third one: the reason is sent before the socket is closed.
        assert (await rude.chat(USER, RUDE, "m3"))["contents"] == NO.sentence.en
        for someone in (rude, too):
            await is_closed(someone, "This account is locked until .*")
        assert nodes.redis.hget(Keys().account(USER), "reason") == "3 refused contents"
        await nodes["0"].all_finished()
        assert used(nodes) == 1, "messages refused by the worker are counted, those refused before admission are not"


# The quota


async def test_of_300_messages_at_once_on_two_nodes_exactly_as_many_are_accepted_as_there_are(nodes: ManyNodes) -> None:
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(peer(url, user=USER)) for url in nodes.urls() for _ in range(3)]
        for index, socket in enumerate(sockets):
            for n in range(50):
                await socket.send_frame("CHAT", userId=USER, contents=AT_ONCE, messageId=f"m-{index}-{n}")
        answers = [frame for part in await asyncio.gather(*map(_first_answers, sockets, range(6))) for frame in part]
        accepted = [frame for frame in answers if frame.get("event") == "accepted"]
        refused = [frame for frame in answers if frame["msgType"] == "SYSTEM"]
        assert (len(accepted), len(refused)) == (QUOTA, 300 - QUOTA)
        assert sorted(frame["remaining"] for frame in accepted) == list(range(QUOTA))
        for frame in refused:
            assert frame["code"] == "RATE_LIMITED"
            assert frame["contents"].startswith(QUOTA_EXHAUSTED.zh.partition("{until}")[0].format(quota=QUOTA))
            assert 0 < frame["retryAfterMs"] <= timedelta(days=1) / timedelta(milliseconds=1)
        assert used(nodes) == QUOTA
        # An accepted message may be sent again, and other users' quotas are separate.
        await sockets[0].end_of(accepted[0]["messageId"])
        again = await sockets[0].chat(USER, AT_ONCE, accepted[0]["messageId"])
        assert (again["event"], again["remaining"]) == ("accepted", 0)
        async with nodes["1"].peer(OTHER) as other:
            assert (await other.chat(OTHER, AT_ONCE, "m"))["remaining"] == QUOTA - 1
            await other.end_of("m")
    for url in nodes.urls():
        async with peer(url) as someone:
            assert (await someone.login(USER))["remaining"] == 0


async def _first_answers(socket: Peer, index: int) -> list[Frame]:
    """The first answer to each message of this socket; sockets of one user receive the events of all messages."""
    waiting = {f"m-{index}-{n}" for n in range(50)}
    found: list[Frame] = []
    while waiting:
        frame = await socket.frame()
        if frame.get("messageId") in waiting and (frame["msgType"] == "SYSTEM" or frame.get("event") == "accepted"):
            waiting.discard(frame["messageId"])
            found.append(frame)
    return found


async def test_what_fails_is_given_back_and_what_is_refused_as_busy_is_not_counted(nodes: ManyNodes) -> None:
    async with nodes["1"].peer(USER) as someone:
        assert (await someone.chat(USER, "hello [[demo fail=9 status=400]]", "fails"))["remaining"] == QUOTA - 1
        assert (await someone.end_of("fails")).events[-1] == "failed"
        await wait_until(lambda: used(nodes) == 0, "it is no longer counted")
        assert (await someone.chat(USER, AT_ONCE, "succeeds"))["remaining"] == QUOTA - 1
        await someone.end_of("succeeds")
        nodes.redis.hset(Keys().load("1"), str(USER), 1000)
        assert (await someone.chat(USER, AT_ONCE, "too-many"))["code"] == "BUSY"
        nodes.redis.hdel(Keys().load("1"), str(USER))
        await wait_until(lambda: used(nodes) == 1, "it is not counted")


async def test_what_redis_refuses_to_admit_is_not_counted(nodes: ManyNodes) -> None:
    load = Keys().load("1")
    async with nodes["1"].peer(USER) as someone:
        nodes.redis.delete(load)
        nodes.redis.set(load, "not a hash")
        assert (await someone.chat(USER, AT_ONCE, "refused"))["code"] == "UNAVAILABLE"
        nodes.redis.delete(load)
        await wait_until(lambda: used(nodes) == 0, "it is not counted")
        assert (await someone.chat(USER, AT_ONCE, "refused"))["remaining"] == QUOTA - 1
        await someone.end_of("refused")


async def test_an_operator_sees_what_was_asked_today_and_may_give_it_back(nodes: ManyNodes) -> None:
    async with nodes["0"].peer(USER) as someone:
        for message_id in ("m1", "m2", "m3"):
            await someone.chat(USER, AT_ONCE, message_id)
            await someone.end_of(message_id)
        shown = await command(nodes, "quota", str(USER))
        assert f"user {USER}: 3 of {QUOTA} used" in shown
        assert re.search(rf"^  \d{{4}}-\d\d-\d\d \d\d:\d\d {ZONE}  m3$", shown, re.MULTILINE)
        given_back = await command(nodes, "quota", str(USER), "--give-back", "m2")
        assert "message m2 is given back" in given_back
        assert f"2 of {QUOTA} used" in given_back
        assert "not counted today" in await command(nodes, "quota", str(USER), "--give-back", "m2")
        assert f"messages given back: 2\nuser {USER}: 0 of {QUOTA} used" in await command(
            nodes, "quota", str(USER), "--reset"
        )
        assert (await someone.chat(USER, AT_ONCE, "m4"))["remaining"] == QUOTA - 1
        await someone.end_of("m4")
