"""Redis executes a command, and its reply arrives late or never."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from imstream.codes import Code, Event
from imstream.store.scripts import LUA
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, expected, stage
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until

NEVER = "1h"

ONE_SLOT: dict[str, Any] = {"concurrency": 1}
"""The slot of the blocked read: each request is admitted, read and opened in steps of its own."""


async def test_a_request_whose_delivery_was_not_heard_is_found_pending_and_answered_once(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        # The sweep is off: an entry whose delivery was lost is found at once or never.
        stage(redis_server, demo, tmp_path, redis_url=proxy.url, sweep_interval=NEVER, **ONE_SLOT) as play,
    ):
        user = await play.user()
        for fate in Fate:
            trap = proxy.on_answer(b"contents", fate.encode(), fate=fate, delay=2)
            assert await user.ask(fate, f"{fate} {AT_ONCE}") == Event.ACCEPTED
            assert await user.ended(fate) == "done"
            assert trap.sprung
            assert await user.ask(f"after-{fate}", f"after it {AT_ONCE}") == Event.ACCEPTED
            assert await user.ended(f"after-{fate}") == "done"
        assert play.ai_calls() == 2 * len(Fate)


TEXT = "[[demo first=0s pace=5ms length=400]]"
"""Two seconds: text is recorded before the end, on a busy machine too."""

STEPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "admission": ("begin", AT_ONCE, {}),
    "text": ("append", TEXT, {}),
    "end": ("end", AT_ONCE, {}),
    "admission alone": ("admit", AT_ONCE, ONE_SLOT),
    "opening": ("open", AT_ONCE, ONE_SLOT),
}
"""The scripts a message passes, the pace of its answer, and the settings of the node."""


@pytest.mark.parametrize("step", STEPS)
async def test_an_answer_of_redis_that_is_lost_at_any_step_leaves_one_reply(
    step: str, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    script, pace, settings = STEPS[step]
    async with (
        tcp_proxy(redis_server.port) as proxy,
        stage(redis_server, demo, tmp_path, redis_url=proxy.url, **settings) as play,
    ):
        user = await play.user()
        assert await user.ask("first", f"so that Redis knows the scripts {AT_ONCE}") == Event.ACCEPTED
        assert await user.ended("first") == "done"
        for fate in (Fate.SILENCE, Fate.CUT):
            await wait_until(lambda: play.unfinished() == 0, "nothing is under way")
            trap = proxy.on_answer_to(LUA[script].digest.encode(), fate=fate)
            refusals = await user.ask_until_accepted(fate, f"lost at its {step} {pace}")
            assert refusals == ([Code.UNAVAILABLE] if step.startswith("admission") else [])
            assert await user.ended(fate) == "done"
            await wait_until(lambda it=trap: it.sprung, "it was met")
        await play.curtain()
        assert play.ai_calls() == 3


@pytest.mark.parametrize("fate", [Fate.SILENCE, Fate.CUT])
async def test_a_message_that_waits_is_not_called_accepted_when_the_answer_to_its_mark_is_lost(
    fate: Fate, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        stage(redis_server, demo, tmp_path, redis_url=proxy.url, concurrency=1) as play,
    ):
        user = await play.user()
        assert await user.ask("long", "so that the other waits [[demo first=3s length=1]]") == Event.ACCEPTED
        trap = proxy.on_answer_to(LUA["mark_queued"].digest.encode(), fate=fate)
        # A message that may not be recorded is not `accepted`: another node could not resume it (I1).
        assert await user.ask_until_accepted("waiting", f"lost at its mark {AT_ONCE}") == [Code.UNAVAILABLE]
        assert trap.sprung
        assert await user.ended("waiting") == "done"
        await play.curtain()
        assert play.ai_calls() == 2


async def test_a_message_that_a_worker_opens_late_is_not_marked_as_waiting_before(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        stage(redis_server, demo, tmp_path, redis_url=proxy.url, **ONE_SLOT) as play,
    ):
        user = await play.user()
        assert await user.ask("first", f"so that Redis knows the scripts {AT_ONCE}") == Event.ACCEPTED
        assert await user.ended("first") == "done"
        for number in range(10):  # the process may be paused before the worker has taken it: then a mark is right
            opened = proxy.on_answer_to(LUA["open"].digest.encode(), fate=Fate.DELAY, delay=0.3)
            mark = proxy.on_answer_to(LUA["mark_queued"].digest.encode(), fate=Fate.DELAY)
            assert await user.ask(f"m{number}", f"late? {AT_ONCE}") == Event.ACCEPTED
            assert await user.ended(f"m{number}") == "done"
            assert opened.sprung
            if not mark.sprung:
                break
        else:
            pytest.fail("all were marked")


async def test_an_answer_that_begins_before_its_acceptance_can_be_said_is_told_after_it_and_once(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        stage(redis_server, demo, tmp_path, redis_url=proxy.url, redis_timeout="3s", **ONE_SLOT) as play,
    ):
        user = await play.user()
        assert await user.ask("first", f"so that Redis knows the scripts {AT_ONCE}") == Event.ACCEPTED
        trap = proxy.on_answer_to(LUA["admit"].digest.encode(), fate=Fate.DELAY, delay=0.4)
        assert await user.ask("m1", "quick? [[demo first=0s pace=5ms length=40]]") == Event.ACCEPTED
        assert await user.ended("m1") == "done"
        assert trap.sprung
        assert user.frames["m1"][0]["event"] == Event.ACCEPTED


async def test_a_socket_that_was_welcomed_late_follows_what_was_asked_elsewhere_meanwhile(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        stage(redis_server, demo, tmp_path, redis_url=proxy.url) as play,
    ):
        asking = await play.user()
        trap = proxy.on_answer_to(LUA["add_route"].digest.encode(), fate=Fate.DELAY, delay=0.4)
        watching = asyncio.create_task(play.user())
        await wait_until(lambda: trap.sprung, "its login is on the way")
        await asking.ask("m1", "who is there? [[demo first=0s pace=5ms length=40]]")
        assert await (await watching).ended("m1") == "done"
        assert watching.result().text("m1") == expected("who is there? [[demo first=0s pace=5ms length=40]]")
