"""The event `status`: places in the queue, estimates that come true, and when an answer begins."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Frame, Peer, peer
from tests.support.servers import DemoBackend
from tests.support.users import user_id

USER = user_id(10001)

ALIKE = "[[demo first=0 pace=10ms length=30]]"
LONG = "[[demo first=0 pace=10ms length=5000]]"


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node with one worker slot that has answered nothing yet."""
    with standing_node(tmp_path_factory.mktemp("status"), demo.url, concurrency=1) as node:
        yield node


@asynccontextmanager
async def watching(node: OneNode, *wants: str) -> AsyncIterator[Peer]:
    """Connect and log in with these wants, by default `status`."""
    async with peer(node.now.ws(USER)) as someone:
        await someone.send_frame("INIT", userId=USER, wants=[*(wants or ["status"])])
        await someone.frame()
        yield someone


def statuses(someone: Peer, message_id: str) -> list[Frame]:
    """The status frames about a message."""
    return [one for one in someone.frames if (one.get("event"), one.get("messageId")) == ("status", message_id)]


def brief(someone: Peer, message_id: str) -> list[tuple[str, int | None]]:
    """The states and places that were sent."""
    return [(one["state"], one.get("position")) for one in statuses(someone, message_id)]


def at(frame: Frame) -> int:
    """When the server sent a frame, in milliseconds."""
    return int(frame["respTime"])


async def test_without_measured_times_there_is_a_place_and_no_estimate(node: OneNode) -> None:
    async with watching(node) as someone:
        await someone.chat(USER, f"first {LONG}", "1st")
        await someone.some_text("1st")
        assert someone.told["1st"].events[:3] == ["accepted", "status", "delta"]
        accepted = await someone.chat(USER, f"second {ALIKE}", "2nd")
        queued = await someone.until(event="status", messageId="2nd")
        assert (queued["state"], queued["position"]) == ("queued", accepted["position"]) == ("queued", 1)
        assert "etaMs" not in queued
        await someone.send_frame("CANCEL", messageId="1st")
        await someone.end_of("2nd")
    assert brief(someone, "1st") == [("started", None)]
    assert brief(someone, "2nd") == [("queued", 1), ("started", None)]


async def test_estimates_come_true(node: OneNode) -> None:
    """No estimate includes a stall of a busy machine: one of five rounds is enough."""
    async with watching(node) as someone:
        for number in range(2):
            await someone.chat(USER, f"measured {number} {ALIKE}", f"measured-{number}")
            await someone.end_of(f"measured-{number}")
        for attempt in range(5):
            names = [f"estimated-{attempt}-{number}" for number in range(4)]
            for name in names:
                await someone.chat(USER, f"{name} {ALIKE}", name)
            for name in names:
                await someone.end_of(name)
            wrong = [problem for name in names[2:] for problem in wrong_estimates(someone, name)]
            if not wrong:
                return
    raise AssertionError(wrong)


def wrong_estimates(someone: Peer, name: str) -> list[tuple[str, Frame, int]]:
    """The estimates that are less than half or more than twice the actual times, and those times."""
    *queued, started = statuses(someone, name)
    assert started["state"] == "started"
    assert queued
    happened = [(status, at(started) - at(status)) for status in queued]
    return [(name, one, ms) for one, ms in happened if not ms / 2 - 200 <= one["etaMs"] <= ms * 2 + 200]


async def test_a_place_is_sent_again_when_it_changes_and_at_most_once_a_second(node: OneNode) -> None:
    async with watching(node) as someone:
        for name in ("a", "b", "c"):
            await someone.chat(USER, f"{name} {LONG}", name)
        await someone.until(event="status", messageId="c", position=2)
        await someone.send_frame("CANCEL", messageId="a")
        await someone.until(event="status", messageId="c", position=1)
        await someone.send_frame("CANCEL", messageId="b")
        await someone.until(event="status", messageId="c", state="started")
        await someone.send_frame("CANCEL", messageId="c")
        await someone.end_of("c")
    places = [place for state, place in brief(someone, "c") if state == "queued"]
    assert [place for place, after in pairwise([*places, None]) if place != after] == [2, 1]
    queued = [one for one in statuses(someone, "c") if one["state"] == "queued"]
    assert all(at(later) - at(earlier) >= 700 for earlier, later in pairwise(queued))


async def test_a_socket_that_resumes_or_requests_it_later_receives_the_state_and_others_do_not(node: OneNode) -> None:
    async with watching(node) as someone, node.peer(USER) as plain, watching(node) as other:
        await someone.chat(USER, f"runs {LONG}", "runs")
        await someone.some_text("runs")
        await someone.chat(USER, f"waits {ALIKE}", "waits")
        await other.send_frame("INIT", userId=USER, wants=["status"], resume=[{"messageId": "waits"}])
        queued = await other.until(event="status", messageId="waits")
        assert (queued["state"], queued["position"]) == ("queued", 1)
        await plain.some_text("runs")
        await plain.send_frame("INIT", userId=USER, wants=["status"])
        assert (await plain.until(event="status"))["state"] == "started"
        await plain.send_frame("INIT", userId=USER)
        await someone.send_frame("CANCEL", messageId="runs")
        for socket in (someone, plain, other):
            await socket.end_of("waits")
    assert brief(other, "waits") == [("queued", 1), ("started", None)]
    assert brief(plain, "waits") == []
