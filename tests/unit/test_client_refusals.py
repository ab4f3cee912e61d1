"""Errors of the client when there is no answer, and cancellation."""

import asyncio
from datetime import timedelta

import pytest

from imstream.client import (
    BadMessage,
    Busy,
    Cancelled,
    Client,
    Expired,
    Failed,
    Outcome,
    RateLimited,
    Receipt,
    Refused,
    Result,
    Unavailable,
)
from imstream.codes import Code
from tests.support.scripted_ws import FAST, USER, Session, all_of, connected, scripted_server, within

# Ends without an answer


@pytest.mark.parametrize(("event", "kind"), [("failed", Failed), ("cancelled", Cancelled)])
async def test_an_answer_that_ends_early_says_why_and_what_there_is(event: str, kind: type[Failed | Cancelled]) -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="half", attempt=1, offset=4)
        await session.peer.send_chat(reply.message_id, event, contents="sorry", attempt=1, offset=2)
        with pytest.raises(kind, match="sorry") as caught:
            await within(reply.text())
        assert caught.value.text == "half"
        with pytest.raises(kind):
            await within(all_of(aiter(reply)))
        assert await reply.result() == Result(Outcome(event), "half", 1, why="sorry")


async def test_text_of_an_attempt_before_the_one_that_failed_is_void() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="half", attempt=1, offset=4)
        await session.peer.send_chat(reply.message_id, "failed", contents="sorry", attempt=4)
        assert await within(reply.result()) == Result(Outcome.FAILED, "", 4, why="sorry")


async def test_a_reply_that_is_no_longer_kept_is_expired() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_frame("CHAT", code="EXPIRED", message_id=reply.message_id, contents="too old")
        with pytest.raises(Expired, match="too old"):
            await within(reply.text())
        assert (await reply.result()).outcome is Outcome.EXPIRED


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.BUSY, Busy),
        (Code.RATE_LIMITED, RateLimited),
        (Code.BAD_REQUEST, BadMessage),
        (Code.FORBIDDEN, Refused),
    ],
)
async def test_a_message_that_is_refused_says_why_and_when_to_try_again(code: Code, kind: type[Refused]) -> None:
    async with connected() as session:
        reply = await session.client.send("hello", message_id="m1")
        other = await session.client.send("hello", message_id="m2")
        await session.peer.send_frame("SYSTEM", code=code, message_id="m1", contents="not now", retry_after_ms=1500)
        for waited in (reply.accepted(), reply.text(), reply.result(), all_of(reply.events())):
            with pytest.raises(kind, match="not now") as caught:
                await within(waited)
            assert (caught.value.code, caught.value.retry_after) == (code, timedelta(milliseconds=1500))
        assert not other.ended


async def test_a_message_that_a_draining_node_refuses_is_sent_again_elsewhere_once() -> None:
    async with scripted_server() as draining, scripted_server() as other:
        login = asyncio.create_task(draining.logged_in())
        async with Client([draining.url, other.url], USER, timing=FAST) as client:
            session = Session(draining, client, await login)
            running = await session.asked(message_id="m1")
            refused, again = [await client.send("hello", message_id=name) for name in ("m2", "m3")]
            await session.peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id="m2", retry_after_ms=1500)
            await session.peer.gone()
            peer = await other.peer()
            assert [point.message_id for point in (await peer.hear_init()).resume] == ["m1"]
            await peer.send_frame("INIT")
            assert [(await peer.hear_chat()).message_id for _ in range(2)] == ["m2", "m3"]
            await peer.send_chat("m3", "accepted", position=1)
            await within(again.accepted())
            await peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id="m2", contents="not now")
            with pytest.raises(Unavailable, match="not now"):
                await within(refused.text())
            assert not running.ended


async def test_a_refusal_without_an_id_is_about_the_only_message_it_can_be_about() -> None:
    async with connected() as session:
        first = await session.client.send("hello")
        await session.peer.send_frame("SYSTEM", code="BAD_REQUEST", contents="history: too long")
        with pytest.raises(BadMessage, match="history"):
            await within(first.text())
        both = [await session.client.send("hello"), await session.client.send("hello")]
        await session.peer.send_frame("SYSTEM", code="BUSY")
        await session.asked()
        assert not any(reply.ended for reply in both)


async def test_one_invalid_message_of_several_is_refused_by_its_id() -> None:
    async with connected() as session:
        replies = [await session.client.send("hello", message_id=name) for name in ("m1", "m2", "m3")]
        await session.peer.send_frame("SYSTEM", code="BAD_REQUEST", message_id="m2", contents="contents: too long")
        with pytest.raises(BadMessage, match="too long"):
            await within(replies[1].accepted())
        assert [reply.ended for reply in replies] == [False, True, False]


async def test_a_message_that_a_newer_server_refuses_with_a_code_of_its_own_is_refused() -> None:
    async with connected() as session:
        reply = await session.client.send("hello", message_id="m1")
        await session.peer.send_frame("SYSTEM", code="TOO_EXPENSIVE", message_id="m1", contents="think less")
        with pytest.raises(Refused, match="think less") as caught:
            await within(reply.accepted())
        assert (type(caught.value), caught.value.code) == (Refused, "TOO_EXPENSIVE")


async def test_who_is_asked_to_send_slower_loses_nothing() -> None:
    async with connected() as session:
        reply = await session.client.send("hello")
        await session.peer.hear_chat()
        await session.peer.send_frame("SYSTEM", code="RATE_LIMITED", contents="too fast", retry_after_ms=500)
        await session.peer.send_chat(reply.message_id, "accepted", position=1)
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
        assert await within(reply.text()) == ""


# Cancelling


@pytest.mark.parametrize(
    ("answer", "receipt"),
    [
        ({"msg_type": "CHAT", "event": "cancelled"}, Receipt.CANCELLED),
        ({"msg_type": "SYSTEM", "code": "TOO_LATE"}, Receipt.TOO_LATE),
        ({"msg_type": "SYSTEM", "code": "UNKNOWN"}, Receipt.UNKNOWN),
    ],
)
async def test_cancelling_gives_the_servers_receipt(answer: dict[str, str], receipt: Receipt) -> None:
    async with connected() as session:
        twice = [asyncio.create_task(session.client.cancel("m1")) for _ in range(2)]
        assert (await session.peer.hear_cancel()).message_id == "m1"
        await session.peer.send_frame(message_id="m1", **answer)
        assert await within(asyncio.gather(*twice)) == [receipt, receipt]


async def test_a_cancelled_answer_ends_with_the_text_so_far() -> None:
    async with connected() as session:
        reply = await session.asked()
        cancelling = asyncio.create_task(reply.cancel())
        await session.peer.hear_cancel()
        await session.peer.send_chat(reply.message_id, "delta", contents="half", attempt=1, offset=4)
        await session.peer.send_chat(reply.message_id, "cancelled", attempt=1, offset=4)
        assert await within(cancelling) is Receipt.CANCELLED
        assert (await reply.result()).text == "half"


async def test_a_cancellation_that_is_not_possible_now_raises() -> None:
    async with connected() as session:
        reply = await session.asked()
        cancelling = asyncio.create_task(reply.cancel())
        await session.peer.hear_cancel()
        await session.peer.send_frame(
            "SYSTEM", code="UNAVAILABLE", message_id=reply.message_id, contents="Redis is away"
        )
        with pytest.raises(Unavailable, match="Redis is away"):
            await within(cancelling)
        assert not reply.ended


async def test_a_cancellation_goes_on_over_a_new_connection() -> None:
    async with connected() as session:
        reply = await session.asked()
        cancelling = asyncio.create_task(reply.cancel())
        await session.peer.hear_cancel()
        await session.lose_connection()
        assert (await session.peer.hear_cancel()).message_id == reply.message_id
        await session.peer.send_frame("SYSTEM", code="TOO_LATE", message_id=reply.message_id)
        assert await within(cancelling) is Receipt.TOO_LATE


async def test_a_resumption_that_fails_does_not_end_the_cancellation() -> None:
    async with connected() as session:
        reply = await session.asked()
        cancelling = asyncio.create_task(reply.cancel())
        await session.peer.hear_cancel()
        await session.lose_connection()
        await session.peer.hear_cancel()
        await session.peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id=reply.message_id)
        session.peer = await session.server.logged_in()
        await session.peer.hear_cancel()
        await session.peer.send_chat(reply.message_id, "cancelled")
        assert await within(cancelling) is Receipt.CANCELLED
        assert reply.ended


async def test_a_malformed_id_cannot_be_cancelled() -> None:
    async with connected() as session:
        with pytest.raises(ValueError, match="validation error"):
            await session.client.cancel("no spaces")
