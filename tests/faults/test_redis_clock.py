"""The wall clock jumps, for the node and for Redis."""

from pathlib import Path

import pytest

from imstream.codes import Event
from tests.support.chatter import Frame
from tests.support.servers import DemoBackend, missing
from tests.support.stage import fresh_redis, stage

HOUR = 3600
SLOWLY = "[[demo first=0s pace=15ms]]"

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
"""The library of Debian's package `libfaketime`."""


def _said_at(frame: Frame) -> float:
    """The node's wall clock, in seconds."""
    return int(frame["respTime"]) / 1000


async def test_no_answer_is_lost_when_the_clock_jumps_an_hour_forward_and_back(
    demo: DemoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not LIBRARIES:
        missing("libfaketime")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(LIBRARIES[0]))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("DONT_FAKE_MONOTONIC", "1")
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
            assert await play.node.status() == 200
            assert play.ai_calls() == 2
