"""A client that impersonates another user or requests another user's data is refused, and leaves nothing in Redis."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.one_node import OneNode, one_node
from tests.support.peer import peer
from tests.support.servers import DemoBackend, RedisServer
from tests.support.tokens import SECRET, key_of, token

VICTIM, ATTACKER, NOBODY = 10001, 10002, 10003
BRIEF = "[[demo first=0 pace=1ms length=20]]"
LONG = "[[demo first=0 pace=10ms length=5000]]"

FORGED = {
    "no token": None,
    "an empty one": "",
    "another user's": token(sub=str(ATTACKER)),
    "an expired one": token(sub=str(VICTIM), exp=time.time() - 60),
    "one that never ends": token(sub=str(VICTIM), exp=None),
    "one that begins later": token(sub=str(VICTIM), nbf=time.time() + 3600),
    "one for another service": token(sub=str(VICTIM), aud="mail"),
    "one signed with another secret": token("guess" * 10, sub=str(VICTIM)),
    "one signed with another algorithm": token(key_of("ES256"), "ES256", sub=str(VICTIM)),
    "one that is not signed": token(None, "none", sub=str(VICTIM)),
    "one with its signature cut off": token(sub=str(VICTIM)).rpartition(".")[0] + ".",
    "one that is too long": "x" * 15_000,  # but within the limit for a message before INIT
}


def contents_of(node: OneNode) -> dict[str, Any]:
    """The contents of Redis, without the keys that the node itself renews."""
    found: dict[str, Any] = {}
    for key in node.redis.scan_iter():
        if key.endswith((":lease", ":nodes", ":status", ":backends")):
            continue
        kind: Any = node.redis.type(key)
        if kind == "stream":
            found[key] = node.redis.xrange(key)
        elif kind == "hash":
            found[key] = node.redis.hgetall(key)
        elif kind == "set":
            found[key] = node.redis.smembers(key)
        else:
            found[key] = kind
    return found


@asynccontextmanager
async def guarded_node(folder: Path, redis_server: RedisServer, demo: DemoBackend) -> AsyncIterator[OneNode]:
    async with one_node(folder, redis_server, demo.url, auth="jwt", auth_secret=SECRET) as node:
        yield node


async def test_forged_and_expired_tokens_leave_nothing_in_redis(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with guarded_node(tmp_path, redis_server, demo) as node:
        calls, before = node.ai_stats()["calls"], contents_of(node)
        for what, shown in FORGED.items():
            async with peer(node.now.ws(VICTIM)) as someone:
                await someone.send_frame("INIT", userId=VICTIM, token=shown, resume=[{"messageId": "m-1"}])
                await someone.send_frame("CHAT", userId=VICTIM, contents=f"hello {BRIEF}", messageId="m-1")
                await someone.send_frame("CANCEL", messageId="m-1")
                assert await someone.closed() == 4500, what
                assert [frame["code"] for frame in someone.frames] == ["UNAUTHORIZED"], what
        await node.nothing_open()
        assert contents_of(node) == before
        assert node.ai_stats()["calls"] == calls


@pytest.mark.parametrize("claimed", [VICTIM, NOBODY])
async def test_a_frame_for_another_user_is_refused_and_leaves_nothing_in_redis(
    claimed: int, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with guarded_node(tmp_path, redis_server, demo) as node:
        async with node.peer(ATTACKER, token=token(sub=str(ATTACKER))) as someone:
            before = contents_of(node)
            await someone.send_frame("CHAT", userId=claimed, contents=f"hello {BRIEF}", messageId="m-1")
            await someone.send_frame("CANCEL", userId=claimed, messageId="m-1")
            await someone.send_frame("HEARTBEAT", userId=claimed)
            await someone.send_frame("INIT", userId=claimed, token=token(sub=str(ATTACKER)))
            assert [(await someone.frame())["code"] for _ in range(4)] == ["FORBIDDEN"] * 4
            assert contents_of(node) == before
        # The same before the login, on a socket whose URL names the other user, or none.
        for url in (node.now.ws(claimed), node.now.ws()):
            async with peer(url) as someone:
                await someone.send_frame("CHAT", userId=claimed, contents=f"hello {BRIEF}", messageId="m-1")
                assert (await someone.frame())["code"] == "FORBIDDEN"


async def test_the_message_of_another_user_can_be_neither_read_nor_stopped(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with guarded_node(tmp_path, redis_server, demo) as node:
        async with node.peer(VICTIM, token=token(sub=str(VICTIM))) as victim:
            await victim.chat(VICTIM, f"long {LONG}", "m-theirs")
            await victim.some_text("m-theirs")
            async with peer(node.now.ws(ATTACKER)) as someone:
                points = [{"messageId": "m-theirs", "attempt": 1, "offset": 0}]
                await someone.send_frame("INIT", userId=ATTACKER, token=token(sub=str(ATTACKER)), resume=points)
                await someone.send_frame("CANCEL", messageId="m-theirs")
                await someone.send_frame("HEARTBEAT")
                told = [await someone.frame() for _ in range(4)]
                assert [frame["code"] for frame in told] == ["SUCCESS", "EXPIRED", "UNKNOWN", "SUCCESS"]
                seen = len(victim.told["m-theirs"].text)
                await victim.some_text("m-theirs", seen + 100)  # it continues
                assert len(someone.frames) == 4
            left = [key for key in contents_of(node) if f"user:{ATTACKER}" in key]
            assert [key for key in left if "route" not in key] == []
            await victim.send_frame("CANCEL", messageId="m-theirs")
            await victim.end_of("m-theirs")
        await node.settled()
