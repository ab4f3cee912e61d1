"""The wall clock jumps, for the node and for Redis."""

from pathlib import Path

import pytest

from imstream.clock import now_ms
from imstream.codes import Event
from tests.support.chatter import Frame
from tests.support.one_node import standing_node
from tests.support.servers import DemoBackend, missing
from tests.support.stage import fresh_redis, stage
from tests.support.waiting import wait_until

HOUR = 3600
SLOWLY = "[[demo first=0s pace=15ms]]"

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
"""The library of Debian's package `libfaketime`."""


def _said_at(frame: Frame) -> float:
    """The node's wall clock, in seconds."""
    return int(frame["respTime"]) / 1000


def _fake_clock(clock: Path, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of processes that start now be ahead by the seconds in a file."""
    if not LIBRARIES:
        missing("libfaketime")
    clock.write_text(f"+{ahead}")
    monkeypatch.setenv("LD_PRELOAD", str(LIBRARIES[0]))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("DONT_FAKE_MONOTONIC", "1")


async def test_no_answer_is_lost_when_the_clock_jumps_an_hour_forward_and_back(
    demo: DemoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = tmp_path / "clock"
    _fake_clock(clock, 0, monkeypatch)
    with fresh_redis(tmp_path) as server:
        async with stage(server, demo, tmp_path, read_block="1s") as play:
            user = await play.user()
            for message_id, offset in (("forward", HOUR), ("back", 0)):
                assert await user.ask(message_id, f"what time is it? {SLOWLY}") == Event.ACCEPTED
                await user.grown(message_id, 20)
                clock.write_text(f"+{offset}")
                if message_id == "forward":  # after a jump back, Redis itself holds a blocked read for an hour
                    assert await play.node.status() == 200
                assert await user.ended(message_id) == "done"
            first, last = user.frames["forward"][0], user.frames["forward"][-1]
            assert _said_at(last) - _said_at(first) > HOUR, "the clock did jump"
            await play.node.becomes(200, limit=5.0)  # once it has given up the blocked read
            assert play.ai_calls() == 2


async def test_the_times_in_log_lines_are_right_when_the_clock_of_the_node_is_an_hour_ahead_of_that_of_redis(
    demo: DemoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_redis(tmp_path) as server:
        _fake_clock(tmp_path / "clock", HOUR, monkeypatch)
        with standing_node(tmp_path, demo.url, server) as node:
            async with node.peer(10001) as someone:
                await someone.chat(10001, f"what time is it? {SLOWLY}", "whole")
                await someone.end_of("whole")
                assert _said_at(someone.frames[-1]) > now_ms() / 1000 + HOUR - 60
                await someone.chat(10001, f"what time is it? {SLOWLY}", "cut")
                await someone.some_text("cut", 40)
                await node.killed()
            for name in ("LD_PRELOAD", "FAKETIME_TIMESTAMP_FILE"):
                monkeypatch.delenv(name)
            await node.start()
            await wait_until(lambda: node.logged("request ended", message_id="cut"), "its end is told", limit=20)
            [whole, cut] = node.logged("request ended")
            assert 0 < whole["first_delta_ms"] < whole["total_ms"] < 60_000
            assert 0 <= cut["queue_wait_ms"] < cut["first_delta_ms"] < cut["total_ms"] < 60_000
            assert cut["attempts"] == 2
