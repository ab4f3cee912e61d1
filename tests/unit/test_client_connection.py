"""Reconnecting, resuming and heartbeats of the client."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from imstream.client import (
    BadMessage,
    Busy,
    ClientClosed,
    Connected,
    ConnectionChange,
    Disconnected,
    Piece,
    Receipt,
    SessionEnded,
    Timing,
)
from imstream.codes import CloseCode
from imstream.wire import ClientCancel, ClientChat, ClientHeartbeat, ResumePoint
from tests.support.scripted_ws import FAST, USER, all_of, connected, within


async def test_an_accepted_message_is_resumed_where_it_stood() -> None:
    changes: list[ConnectionChange] = []
    async with connected(on_change=changes.append) as session:
        reply = await session.asked(message_id="m1")
        await session.peer.send_chat("m1", "delta", contents="one ", attempt=1, offset=4)
        pieces = aiter(reply)
        assert await within(anext(pieces)) == Piece("one ", 1)
        session.peer.drop()
        session.peer = await session.server.peer()
        init = await session.peer.hear_init()
        assert init.resume == [ResumePoint(message_id="m1", attempt=1, offset=4)]
        await session.peer.send_frame("INIT", node="1")
        await session.peer.send_chat("m1", "delta", contents="two", attempt=1, offset=7)
        await session.peer.send_chat("m1", "done", attempt=1, offset=7)
        assert await within(all_of(pieces)) == [Piece("two", 1)]
        assert await within(reply.text()) == "one two"
    assert [type(change) for change in changes] == [Connected, Disconnected, Connected]
    assert isinstance(changes[2], Connected)
    assert (changes[2].node, changes[2].resumed) == ("1", 1)


async def test_a_resumed_message_that_was_restarted_meanwhile_begins_again() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="old", attempt=1, offset=3)
        assert await within(anext(aiter(reply))) == Piece("old", 1)
        await session.lose_connection()
        await session.peer.send_chat(reply.message_id, "restart", attempt=2)
        await session.peer.send_chat(reply.message_id, "delta", contents="new", attempt=2, offset=3)
        await session.peer.send_chat(reply.message_id, "done", attempt=2, offset=3)
        assert await within(reply.text()) == "new"


async def test_a_message_without_an_answer_is_sent_again_with_its_id() -> None:
    async with connected() as session:
        reply = await session.client.send("hello")
        first = await session.peer.hear_chat()
        session.peer.drop()
        session.peer = await session.server.peer()
        assert (await session.peer.hear_init()).resume == []
        await session.peer.send_frame("INIT")
        assert await session.peer.hear_chat() == first
        await session.peer.send_chat(reply.message_id, "accepted")
        assert await within(reply.accepted()) is None


async def test_what_is_sent_without_a_connection_goes_out_after_the_login() -> None:
    async with connected() as session:
        session.peer.drop()
        session.peer = await session.server.peer()
        await session.peer.hear_init()
        await session.client.send("hello", message_id="m1")
        cancelling = asyncio.create_task(session.client.cancel("m1"))
        await session.peer.send_frame("INIT")
        assert (await session.peer.hear_chat()).message_id == "m1"
        assert (await session.peer.hear_cancel()).message_id == "m1"
        await session.peer.send_chat("m1", "cancelled", attempt=0)
        assert await within(cancelling) is Receipt.CANCELLED


async def test_a_message_that_was_refused_is_not_sent_again() -> None:
    async with connected() as session:
        refused = await session.client.send("hello", message_id="m1")
        await session.peer.send_frame("SYSTEM", code="BUSY", message_id="m1")
        with pytest.raises(Busy):
            await within(refused.text())
        await session.lose_connection()
        await session.client.send("hello", message_id="m2")
        assert (await session.peer.hear_chat()).message_id == "m2"


@pytest.mark.parametrize("message_id", ["m1", None])
async def test_a_resumption_that_is_not_possible_now_is_tried_again(message_id: str | None) -> None:
    async with connected() as session:
        reply = await session.asked(message_id="m1")
        unanswered = await session.client.send("hello")
        await session.lose_connection()
        await session.peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id=message_id)
        await session.peer.gone()
        session.peer = await session.server.logged_in()
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
        assert await within(reply.text()) == ""
        assert not unanswered.ended


async def test_a_server_that_is_not_ready_is_asked_again_soon_and_the_reply_goes_on() -> None:
    changes: list[ConnectionChange] = []
    async with connected(on_change=changes.append) as session:
        reply = await session.asked()
        session.server.refusals = 2
        await session.peer.close(CloseCode.DRAINING)
        peer = await session.server.logged_in()
        await peer.send_chat(reply.message_id, "delta", contents="here", attempt=1, offset=4)
        await peer.send_chat(reply.message_id, "done", attempt=1, offset=4)
        assert await within(reply.text()) == "here"
    why = [change.why for change in changes if isinstance(change, Disconnected)]
    assert ["503" in words for words in why] == [False, True, True]
    assert all(change.retry_in <= FAST.backoff_max for change in changes if isinstance(change, Disconnected))


async def test_connections_that_are_of_use_do_not_make_the_next_wait_longer() -> None:
    changes: list[ConnectionChange] = []
    timing = replace(FAST, backoff_max=timedelta(minutes=1))
    async with connected(timing=timing, on_change=changes.append) as session:
        for _ in range(10):
            await session.asked()
            await session.lose_connection()
    waits = [change.retry_in for change in changes if isinstance(change, Disconnected)]
    assert len(waits) == 10
    assert max(waits) <= FAST.backoff


async def test_a_message_is_sent_before_it_is_cancelled_even_when_much_waits_to_be_sent() -> None:
    async with connected() as session:
        session.peer.drop()
        session.peer = await session.server.peer()
        await session.peer.hear_init()
        for number in range(24):
            await session.client.send("x" * 2**20, message_id=str(number))
        await session.peer.send_frame("INIT")
        assert (await session.peer.hear_chat()).message_id == "0"
        # The server reads nothing now, and the socket buffers cannot hold all messages.
        cancelling = asyncio.create_task(session.client.cancel("23"))
        heard = [await session.peer.hear() for _ in range(24)]
        about = [frame for frame in heard if isinstance(frame, ClientChat | ClientCancel)]
        assert [type(frame) for frame in about if frame.message_id == "23"] == [ClientChat, ClientCancel]
        await session.peer.send_chat("23", "cancelled")
        assert await within(cancelling) is Receipt.CANCELLED


async def test_what_a_server_says_before_it_closes_is_about_no_message() -> None:
    async with connected() as session:
        reply = await session.client.send("hello")
        await session.peer.send_frame("SYSTEM", code="SYSTEM_ERROR", contents="about to restart")
        await session.peer.close(CloseCode.DRAINING)
        session.peer = await session.server.logged_in()
        assert (await session.peer.hear_chat()).message_id == reply.message_id


async def test_a_lost_connection_is_reported_with_the_reason_of_the_server() -> None:
    changes: list[ConnectionChange] = []
    async with connected(on_change=changes.append) as session:
        await session.peer.send_frame("SYSTEM", code="DRAINING", contents="we restart")
        await session.peer.close(CloseCode.DRAINING, CloseCode.DRAINING.reason)
        session.peer = await session.server.logged_in()
        await session.peer.send_frame("SYSTEM", code="RATE_LIMITED", contents="slower, please")
        await session.peer.send_frame("HEARTBEAT")
        await session.peer.close(CloseCode.NO_HEARTBEAT, CloseCode.NO_HEARTBEAT.reason)
        session.peer = await session.server.logged_in()
        await session.peer.send_frame("SYSTEM", code="BAD_REQUEST", contents="no such field")
        await session.peer.close(CloseCode.FRAME_TOO_BIG, "too many fragments")
        session.peer = await session.server.logged_in()
        await session.peer.send_frame("SYSTEM", code="RATE_LIMITED", contents="slower, please")
        session.peer.drop()
        session.peer = await session.server.logged_in()
    *told, dropped = [change.why for change in changes if isinstance(change, Disconnected)]
    assert told == ["we restart", "no heartbeat", "too many fragments"]
    assert dropped
    assert dropped != "slower, please"


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4001, 4002, 4499])
async def test_reconnects_after_a_close_code_that_allows_it(code: int) -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.close(code)
        session.peer = await session.server.logged_in()
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
        await within(reply.text())


@pytest.mark.parametrize("code", [4500, 4502, 4504, 4999])
async def test_a_session_that_is_ended_for_good_ends_everything_that_waits(code: int) -> None:
    async with connected() as session:
        reply = await session.asked()
        unanswered = await session.client.send("hello")
        cancelling = asyncio.create_task(session.client.cancel(reply.message_id))
        await session.peer.hear_chat()
        await session.peer.hear_cancel()
        await session.peer.send_frame(
            "SYSTEM", code="FORBIDDEN", contents="you are somewhere else now", message_id="other"
        )
        await session.peer.close(code)
        for waited in (reply.text(), unanswered.accepted(), cancelling):
            with pytest.raises(SessionEnded, match="somewhere else now"):
                await within(waited)
        with pytest.raises(SessionEnded):
            await session.client.send("hello")
        with pytest.raises(SessionEnded):
            await session.client.cancel("m1")


async def test_the_end_of_a_session_can_be_awaited_without_a_message() -> None:
    async with connected() as session:
        ended = asyncio.create_task(session.client.ended())
        await session.peer.close(CloseCode.LOCKED, "locked")
        error = await within(ended)
        assert isinstance(error, SessionEnded)
        assert error.code == CloseCode.LOCKED


async def test_a_message_that_is_too_big_is_given_up_and_the_others_go_on() -> None:
    async with connected() as session:
        accepted = await session.asked()
        small = await session.client.send("small")
        big = await session.client.send("big " * 1000)
        await session.peer.hear_chat()
        await session.peer.close(CloseCode.FRAME_TOO_BIG)
        with pytest.raises(BadMessage, match="too big"):
            await within(big.text())
        session.peer = await session.server.logged_in()
        assert (await session.peer.hear_chat()).contents == "small"
        assert not accepted.ended
        assert not small.ended


async def test_heartbeats_are_sent_while_nothing_else_is() -> None:
    timing = Timing(heartbeat=timedelta(milliseconds=10), open=FAST.open)
    async with connected(timing=timing) as session:
        for _ in range(3):
            frame = await session.peer.hear_anything()
            assert isinstance(frame, ClientHeartbeat)
            assert frame.user_id == USER


async def test_heartbeats_are_sent_as_often_as_the_server_asks_for_them() -> None:
    async with connected() as session:  # the default interval is 25 s
        session.peer.drop()
        session.peer = await session.server.peer()
        await session.peer.hear_init()
        await session.peer.send_frame("INIT", heartbeat_ms=20)
        for _ in range(3):
            assert isinstance(await session.peer.hear_anything(), ClientHeartbeat)


async def test_closing_ends_everything_that_waits_and_says_goodbye() -> None:
    async with connected() as session:
        reply = await session.asked()
        waiting = asyncio.create_task(reply.text())
    with pytest.raises(ClientClosed):
        await within(waiting)
    with pytest.raises(ClientClosed):
        await session.client.send("hello")
    await session.peer.gone()
    assert session.peer.socket.close_code == 1000


async def test_closing_does_not_wait_for_a_server_that_is_away() -> None:
    changes: asyncio.Queue[ConnectionChange] = asyncio.Queue()
    timing = Timing(backoff=timedelta(minutes=1), open=FAST.open)
    async with connected(timing=timing, on_change=changes.put_nowait) as session:
        session.peer.drop()
        while not isinstance(await within(changes.get()), Disconnected):
            pass


async def test_an_error_of_ours_is_not_swallowed() -> None:
    def break_down(change: ConnectionChange) -> None:
        if isinstance(change, Disconnected):
            raise ZeroDivisionError

    async def lose_the_connection() -> None:
        async with connected(on_change=break_down) as session:
            reply = await session.asked()
            session.peer.drop()
            with pytest.raises(ClientClosed):
                await within(reply.text())

    with pytest.raises(ZeroDivisionError):
        await lose_the_connection()
