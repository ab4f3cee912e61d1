"""SIGTERM: no request is started, running ones may end, clients are informed, the rest is left for the next start."""

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from imstream.texts import Text
from tests.support.backend_scripts import by_question, goes_on_until
from tests.support.one_node import one_node
from tests.support.peer import Told, peer
from tests.support.processes import http_status
from tests.support.raw_socket import raw_user
from tests.support.scripted_backend import chunk, event, hangs, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.waiting import SLOW, wait_until

USER, OTHER = 10001, 10002


def _why_not_ready(url: str) -> str:
    with pytest.raises(urllib.error.HTTPError, match="503") as refused:
        urllib.request.urlopen(f"{url}/readyz", timeout=5)  # noqa: S310 - our own URL
    with refused.value as answer:
        return str(json.load(answer)["why"])


async def test_running_answers_end_and_idle_sockets_are_told_at_once(redis_server: RedisServer, tmp_path: Path) -> None:
    question, waiting = "a long story", "the next one"
    finished, sent = asyncio.Event(), dict[str, str]()
    scripts = {question: [goes_on_until(finished, sent, pace=0.01)]}
    async with (
        scripted_backend(always=by_question(scripts, otherwise=streams("And ", "so on"))) as backend,
        one_node(tmp_path, redis_server, backend.url, concurrency=1, drain_grace="20s") as node,
    ):
        async with node.peer(USER, lang="en") as busy, node.peer(OTHER, lang="en") as idle:
            await busy.chat(USER, question, "m1")
            await busy.some_text("m1")
            await busy.chat(USER, waiting, "m2")
            node.now.process.signal(signal.SIGTERM)

            assert await idle.closed() == 1012
            assert idle.frames[-1]["contents"] == Text.DRAINING.en
            assert busy.told["m1"].terminal is None
            assert await asyncio.to_thread(_why_not_ready, node.now.http) == "draining"
            assert await asyncio.to_thread(http_status, f"{node.now.http}/healthz") == 200
            with pytest.raises(InvalidStatus, match="503"):  # for load balancers
                async with peer(node.now.ws(OTHER)):
                    pass
            refused = await busy.chat(USER, "one more", "m3")
            assert (refused["code"], refused["contents"]) == ("UNAVAILABLE", Text.DRAINING.en)
            assert refused["retryAfterMs"] > 0

            finished.set()
            assert (await busy.end_of("m1")).text == sent[question]
            assert await busy.closed() == 1012
            assert busy.told["m2"].events == ["accepted"]
        assert await node.died() == 0
        assert node.recorded(USER, "m1")[0] == "done"
        assert (node.unfinished(), node.pending()) == (1, [])  # the waiting one was not started

        await node.start()
        async with node.peer(USER, resume={"m2": busy.told["m2"]}) as someone:
            assert (await someone.end_of("m2")).text == "And so on"
        await node.settled()


async def test_what_does_not_end_within_the_grace_is_handed_back_and_answered_after_the_next_start(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    limits: dict[str, Any] = {"drain_grace": "200ms", "max_deliveries": 1, "flush_interval": "20ms"}
    async with (
        scripted_backend(always=streams("A whole ", "answer")) as backend,
        one_node(tmp_path, redis_server, backend.url, **limits) as node,
    ):
        backend.then(*(hangs(event(chunk(f"Life {life} begins"))) for life in range(2)))
        told = Told()
        for life, stop in enumerate(
            (signal.SIGTERM, signal.SIGINT)
        ):  # one more time than a request may die with its worker
            async with node.peer(USER, resume={"m1": told} if life else None) as someone:
                if life == 0:
                    await someone.chat(USER, "hello", "m1")
                await wait_until(lambda n=life: len(backend.requests) == n + 1, "the backend is called")
                while someone.told["m1"].text != f"Life {life} begins":
                    await someone.until(messageId="m1")
                node.now.process.signal(stop)
                assert await someone.closed() == 1012
                told = someone.told["m1"]
                assert told.terminal is None
            assert await node.died() == 0
            await backend.requests[life].gone()  # the AI call was closed, not left running
            [left] = node.pending()
            assert left["times_delivered"] == 0  # no death of the worker was counted
            assert "".join(entry.get("text", "") for entry in node.record(USER, "m1")).endswith(f"Life {life} begins")
            await node.start()

        async with node.peer(USER, resume={"m1": told}) as someone:
            whole = await someone.end_of("m1")
        await node.settled()
        assert whole.text == "A whole answer"
        assert whole.events.count("restart") == 2
        assert node.recorded(USER, "m1") == ("done", "A whole answer")
        assert node.dead() == []


async def test_a_stalled_reader_does_not_hold_up_the_end(redis_server: RedisServer, tmp_path: Path) -> None:
    much = [letter * 16_000 for letter in "abcdefghijklmnopqrst"]
    scripts = {"endless": [hangs(event(chunk("It begins")))]}
    limits: dict[str, Any] = {"drain_grace": "1s", "stall_timeout": "2m", "max_answer": 400_000}
    # The drain must not wait for the limit of a stalled reader.
    async with (
        scripted_backend(always=by_question(scripts, otherwise=streams(*much))) as backend,
        one_node(tmp_path, redis_server, backend.url, **limits) as node,
    ):
        async with (
            raw_user(node.port, USER, narrow=True) as stalled,
            raw_user(node.port, OTHER, narrow=True) as stalled_and_busy,
        ):
            await stalled.send_frame(msgType="CHAT", userId=USER, contents="much", messageId="m1")
            await stalled_and_busy.send_frame(msgType="CHAT", userId=OTHER, contents="much", messageId="m1")
            await stalled_and_busy.send_frame(msgType="CHAT", userId=OTHER, contents="endless", messageId="endless")
            await wait_until(lambda: node.ended() == 2, "the answers are complete")
            await wait_until(lambda: len(backend.requests) == 3, "the endless one is running")
            began = time.monotonic()
            assert await node.terminated(90) == 0
            # The grace, and the bounded waits after it: for the last records, for close frames, and uvicorn's own.
            assert time.monotonic() - began < (1 + 2 + 2 + 3) * SLOW
        [left] = node.pending()
        assert left["times_delivered"] == 0
        await node.start()
        async with node.peer(OTHER, resume={"endless": Told()}) as someone:
            assert (await someone.end_of("endless")).text == "".join(much)
        await node.settled()
