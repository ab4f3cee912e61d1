"""The moderation service dies, hangs and recovers, while the AI backend works."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from imstream.demo.answer import canned_answer
from tests.support.one_node import OneNode, one_node
from tests.support.servers import DemoBackend, RedisServer, start_demo
from tests.support.waiting import wait_until

USER = 10001
BRIEF = "[[demo first=0 pace=0 length=5]]"
LONG = "[[demo first=0 pace=10ms length=200]]"
QUICK = {"moderation_timeout": "1s", "ai_breaker_pause": "100ms", "retry_wait_max": "200ms", "lock_after": 0}


@asynccontextmanager
async def moderated_node(
    folder: Path, redis_server: RedisServer, ai: DemoBackend, **settings: object
) -> AsyncIterator[tuple[OneNode, DemoBackend]]:
    """A node and its moderation service."""
    service = await asyncio.to_thread(start_demo, folder, "--first", "0")
    with service.process:
        given: dict[str, Any] = {**QUICK, "moderation_url": service.url, **settings}
        async with one_node(folder, redis_server, ai.url, **given) as node:
            yield node, service


async def test_closed_messages_wait_until_the_service_is_back(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with moderated_node(tmp_path, redis_server, demo) as (node, service):
        await asyncio.to_thread(service.process.kill)
        calls = node.ai_stats()["calls"]
        async with node.peer(USER) as someone:
            for number in range(8):
                await someone.chat(USER, f"question {number} {BRIEF}", f"m{number}")
            await someone.chat(USER, "[[flag]]", "flagged")
            await wait_until(
                lambda: node.now.process.output().count("message waits for its backend") == 9, "all of them wait"
            )
            assert node.ai_stats()["calls"] == calls
            assert node.unfinished() == 9
            again = await asyncio.to_thread(start_demo, tmp_path, "--first", "0", port=service.port)
            with again.process:
                for number in range(8):
                    told = await someone.end_of(f"m{number}")
                    assert told.text == "".join(canned_answer(f"question {number} {BRIEF}"))
                ended = (await someone.end_of("flagged")).terminal
                assert ended is not None
                assert (ended["event"], ended["code"]) == ("failed", "FORBIDDEN")
        assert node.now.process.output().count("moderation is away") == 1
        assert node.now.process.output().count("moderation is back") == 1
        await node.settled()


async def test_closed_messages_fail_in_the_end_and_those_being_answered_go_on(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with moderated_node(tmp_path, redis_server, demo, retry_window="1s") as (node, service):
        async with node.peer(USER) as someone:
            await someone.chat(USER, f"long {LONG}", "long")
            await someone.some_text("long")
            service.process.signal(signal.SIGSTOP)
            await someone.chat(USER, f"short {BRIEF}", "short")
            await someone.chat(USER, f"never mind {BRIEF}", "cancelled")
            await someone.send_frame("CANCEL", messageId="cancelled")
            assert (await someone.end_of("cancelled")).events[-1] == "cancelled"
            ended = (await someone.end_of("short")).terminal
            assert ended is not None
            assert (ended["event"], ended["code"]) == ("failed", "AI_FAILED")
            assert (await someone.end_of("long")).text == "".join(canned_answer(f"long {LONG}"))
            service.process.signal(signal.SIGCONT)

            async def answered() -> bool:
                message_id = f"after-{len(someone.told)}"
                await someone.chat(USER, f"after {BRIEF}", message_id)
                return (await someone.end_of(message_id)).events[-1] == "done"

            await wait_until(answered, "messages are answered again")
        letter = node.dead()[0]
        assert (letter["message_id"], letter["reason"]) == ("short", "moderation_unavailable")
        assert letter["error"].startswith(("timeout: ", "paused: "))
        await node.settled()


async def test_open_messages_are_answered_without_it_and_moderated_when_it_is_back(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with moderated_node(tmp_path, redis_server, demo, moderation_fail="open") as (node, service):
        service.process.signal(signal.SIGSTOP)
        async with node.peer(USER) as someone:
            for number in range(8):
                await someone.chat(USER, f"[[flag]] {number} {BRIEF}", f"m{number}")
            for number in range(8):
                told = await someone.end_of(f"m{number}")
                assert told.events[-1] == "done"
                assert "restart" not in told.events
            assert node.now.process.output().count("moderation is away") == 1
            service.process.signal(signal.SIGCONT)

            async def flagged() -> bool:
                message_id = f"after-{len(someone.told)}"
                await someone.chat(USER, f"[[flag]] {BRIEF}", message_id)
                return (await someone.end_of(message_id)).events[-1] == "failed"

            await wait_until(flagged, "flagged messages are refused again")
        await node.settled()
