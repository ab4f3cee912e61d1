"""How the client assembles an answer, and handles missing and repeated text."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from imstream.client import (
    Accepted,
    Client,
    Outcome,
    Piece,
    ProtocolViolation,
    Reply,
    Restarted,
    Result,
    Status,
    Thinking,
    Turn,
)
from imstream.client.pending import MAX_OPEN
from tests.support.scripted_ws import FAST, USER, Session, all_of, connected, scripted_server, within
from tests.support.waiting import wait_until

# One answer


async def test_an_answer_comes_in_pieces_and_as_a_whole() -> None:
    async with connected() as session:
        turns, trace = [Turn(role="user", content="before")], f"00-{'1' * 32}-{'2' * 16}-01"
        reply = await session.client.send("hello", history=turns, message_id="m1", traceparent=trace)
        chat = await session.peer.hear_chat()
        assert (chat.user_id, chat.message_id, chat.contents, chat.traceparent) == (USER, "m1", "hello", trace)
        assert chat.history == [Turn(role="user", content="before")]
        await session.peer.send_chat("m1", "accepted", position=3)
        assert await within(reply.accepted()) == 3
        assert not reply.ended
        pieces = aiter(reply)
        await session.peer.send_chat("m1", "delta", contents="你好", attempt=1, offset=2)
        assert await within(anext(pieces)) == Piece("你好", 1)
        await session.peer.send_chat("m1", "delta", contents=" there", attempt=1, offset=8)
        second = await within(anext(pieces))
        assert second == Piece(" there", 1)
        assert str(second) == " there"
        await session.peer.send_chat("m1", "done", attempt=1, offset=8, finish_reason="stop", usage={"total_tokens": 9})
        assert await within(all_of(pieces)) == []
        assert await within(reply.text()) == "你好 there"
        assert await reply.result() == Result(Outcome.DONE, "你好 there", 1, "stop", {"total_tokens": 9})
        assert (reply.message_id, reply.position, reply.attempt, reply.offset) == ("m1", 3, 1, 8)
        assert (reply.so_far, reply.repeated, reply.ended) == ("你好 there", 0, True)


async def test_who_reads_late_gets_one_large_piece_and_every_reader_gets_it_all() -> None:
    async with connected() as session:
        reply = await session.asked()
        for offset in range(1, 101):
            await session.peer.send_chat(reply.message_id, "delta", contents="x", attempt=1, offset=offset)
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=100)
        result = await within(reply.result())
        for _ in range(2):
            assert await within(all_of(reply.events())) == [Accepted(1), Piece("x" * 100, 1), result]


async def test_answers_to_several_messages_are_kept_apart() -> None:
    async with connected() as session:
        one = await session.asked(message_id="one")
        two = await session.asked(message_id="two")
        await session.peer.send_chat("two", "delta", contents="B", attempt=1, offset=1)
        await session.peer.send_chat("one", "delta", contents="A", attempt=1, offset=1)
        await session.peer.send_chat("nobody's", "delta", contents="C", attempt=1, offset=1)
        await session.peer.send_chat("one", "done", attempt=1, offset=1)
        await session.peer.send_chat("two", "done", attempt=1, offset=1)
        assert (await within(one.text()), await within(two.text())) == ("A", "B")


async def test_an_id_is_made_up_and_unique() -> None:
    async with connected() as session:
        ids = {(await session.asked()).message_id for _ in range(10)}
        assert len(ids) == 10


async def test_one_id_cannot_be_asked_twice_at_once_but_again_later() -> None:
    async with connected() as session:
        once = await session.asked(message_id="m1")
        with pytest.raises(ValueError, match="still being answered"):
            await session.client.send("again", message_id="m1")
        await session.peer.send_chat("m1", "done", attempt=1, offset=0)
        assert await within(once.text()) == ""
        again = await session.asked(message_id="m1")
        await session.peer.send_chat("m1", "delta", contents="as recorded", attempt=1, offset=11)
        await session.peer.send_chat("m1", "done", attempt=1, offset=11)
        assert await within(again.text()) == "as recorded"


@pytest.mark.parametrize(("contents", "message_id"), [("", None), ("hello", "no spaces"), ("hello", "x" * 65)])
async def test_a_message_that_no_server_takes_is_not_sent(contents: str, message_id: str | None) -> None:
    async with connected() as session:
        with pytest.raises(ValueError, match="validation error"):
            await session.client.send(contents, message_id=message_id)


async def test_sending_waits_while_too_much_is_unfinished() -> None:
    async with connected() as session:
        for number in range(MAX_OPEN):
            await session.client.send("hello", message_id=str(number))
        waiting = asyncio.create_task(session.client.send("one more", message_id="more"))
        for number in range(MAX_OPEN):
            assert (await session.peer.hear_chat()).message_id == str(number)
        assert not waiting.done()
        await session.peer.send_chat("0", "done", attempt=1, offset=0)
        assert (await session.peer.hear_chat()).message_id == "more"
        await within(waiting)


# A new attempt


async def test_a_restart_voids_the_text_so_far() -> None:
    async with connected() as session:
        reply = await session.asked()
        pieces, events = aiter(reply), reply.events()
        assert await within(anext(events)) == Accepted(1)
        await session.peer.send_chat(reply.message_id, "delta", contents="wrong", attempt=1, offset=5)
        assert await within(anext(pieces)) == Piece("wrong", 1)
        assert await within(anext(events)) == Piece("wrong", 1)
        await session.peer.send_chat(reply.message_id, "restart", attempt=2, contents="again")
        assert await within(anext(events)) == Restarted(2)
        assert reply.so_far == ""
        await session.peer.send_chat(reply.message_id, "delta", contents="late", attempt=1, offset=9)
        await session.peer.send_chat(reply.message_id, "delta", contents="right", attempt=2, offset=5)
        await session.peer.send_chat(reply.message_id, "done", attempt=2, offset=5)
        assert await within(all_of(pieces)) == [Piece("right", 2, restarted=True)]
        result = Result(Outcome.DONE, "right", 2)
        assert await within(all_of(events)) == [Piece("right", 2), result]
        assert await within(all_of(reply.events())) == [Accepted(1), Restarted(2), Piece("right", 2), result]


async def test_a_delta_of_a_later_attempt_voids_the_text_even_without_a_word() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="wrong", attempt=1, offset=5)
        await session.peer.send_chat(reply.message_id, "delta", contents="right", attempt=3, offset=5)
        await session.peer.send_chat(reply.message_id, "done", attempt=3, offset=5)
        assert await within(reply.text()) == "right"
        assert Restarted(3) in await all_of(reply.events())


async def test_the_same_attempt_may_be_told_from_its_beginning() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="shown, not recorded", attempt=1, offset=19)
        await session.peer.send_chat(reply.message_id, "restart", attempt=1)
        await session.peer.send_chat(reply.message_id, "delta", contents="shown", attempt=1, offset=5)
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=5)
        assert await within(reply.text()) == "shown"


async def test_the_rest_of_an_answer_to_an_earlier_asking_is_not_taken_for_the_beginning() -> None:
    async with connected() as session:
        reply = await session.client.send("again", message_id="m1")  # recorded before although UNAVAILABLE was sent
        await session.peer.hear_chat()
        await session.peer.send_chat("m1", "delta", contents="answer", attempt=1, offset=10)
        await session.peer.send_chat("m1", "done", attempt=1, offset=10)
        await session.peer.send_chat("m1", "accepted", position=1)
        await session.peer.send_chat("m1", "delta", contents="the answer", attempt=1, offset=10)
        await session.peer.send_chat("m1", "done", attempt=1, offset=10)
        assert await within(reply.text()) == "the answer"
        assert reply.repeated == 2


async def test_an_answer_may_begin_before_it_is_said_that_the_message_was_accepted() -> None:
    async with connected() as session:
        reply = await session.client.send("hello", message_id="m1")
        await session.peer.hear_chat()
        await session.peer.send_chat("m1", "delta", contents="the ", attempt=1, offset=4)
        await session.peer.send_chat("m1", "delta", contents="answer", attempt=1, offset=10)
        await session.peer.send_chat("m1", "done", attempt=1, offset=10)
        assert await within(reply.text()) == "the answer"


async def test_after_it_is_accepted_the_whole_answer_follows_again() -> None:
    async with connected() as session:
        reply = await session.client.send("hello", message_id="m1")  # the node before had taken it, and gone away
        await session.peer.hear_chat()
        await session.peer.send_chat("m1", "delta", contents="the ", attempt=1, offset=4)
        await wait_until(lambda: reply.so_far == "the ", "another node's answer begins before the message is handled")
        await session.peer.send_chat("m1", "accepted", position=1)
        await session.peer.send_chat("m1", "delta", contents="the answer", attempt=1, offset=10)
        await session.peer.send_chat("m1", "done", attempt=1, offset=10)
        assert await within(reply.text()) == "the answer"
        assert reply.repeated == 0


# Violations of the protocol (I5)


async def test_a_repeated_delta_is_dropped_and_counted() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="ab", attempt=1, offset=2)
        await session.peer.send_chat(reply.message_id, "delta", contents="ab", attempt=1, offset=2)
        await session.peer.send_chat(reply.message_id, "delta", contents="c", attempt=1, offset=3)
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=3)
        assert await within(reply.text()) == "abc"
        assert reply.repeated == 1


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"event": "delta", "contents": "de", "attempt": 1, "offset": 5}, "begins at 3, the text known ends at 2"),
        ({"event": "delta", "contents": "bc", "attempt": 1, "offset": 3}, "begins at 1, the text known ends at 2"),
        ({"event": "delta", "contents": "b", "attempt": 2, "offset": 2}, "begins at 1, the text known ends at 0"),
        ({"event": "delta", "contents": "c"}, "no attempt or no offset"),
        ({"event": "restart"}, "no attempt"),
        ({"event": "done", "attempt": 1, "offset": 3}, "the answer ends at 3, the text known ends at 2"),
        ({"event": "done", "attempt": 2, "offset": 1}, "the answer ends at 1, the text known ends at 0"),
        ({"contents": "?"}, "neither an event nor a code"),
    ],
)
async def test_text_that_is_missing_or_repeated_ends_the_reply(fields: dict[str, Any], problem: str) -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.send_chat(reply.message_id, "delta", contents="ab", attempt=1, offset=2)
        await session.peer.send_frame("CHAT", message_id=reply.message_id, **fields)
        with pytest.raises(ProtocolViolation, match=problem):
            await within(reply.text())
        other = await session.asked()
        assert not other.ended, "one broken answer is no reason to give up the others"


async def test_a_client_with_the_want_status_receives_the_state_of_its_messages() -> None:
    async with scripted_server() as server:
        entering = asyncio.create_task(Client(server.url, USER, wants=["status"], timing=FAST).__aenter__())
        peer = await server.peer()
        assert (await peer.hear_init()).wants == ["status"]
        await peer.send_frame("INIT")
        client = await within(entering)
        reply = await client.send("hello", message_id="m1")
        events = reply.events()
        await peer.send_chat("m1", "accepted", position=2)
        assert await within(anext(events)) == Accepted(2)
        await peer.send_chat("m1", "status", state="queued", position=2, eta_ms=1500)
        assert await within(anext(events)) == Status("queued", 2, timedelta(seconds=1.5), None)
        await peer.send_chat("m1", "status", state="musing", reason="http_503")
        assert await within(anext(events)) == Status("musing", None, None, "http_503")
        await peer.send_chat("m1", "done", attempt=1, offset=0)
        assert isinstance(await within(anext(events)), Result)
        await client.__aexit__(None, None, None)


async def test_reasoning_so_far_is_reported_and_begins_again_with_that_of_the_server() -> None:
    async with connected() as session:
        reply, peer = await session.asked(), session.peer
        events = reply.events()

        async def thinks(contents: str, start: int, attempt: int = 1) -> Any:  # noqa: ANN401 - an event
            await peer.send_chat(reply.message_id, "thinking", contents=contents, attempt=attempt, start=start)
            return await within(anext(events))

        assert isinstance(await within(anext(events)), Accepted)
        assert await thinks("let ", 0) == Thinking("let ")
        assert await thinks("me", 4) == Thinking("let me")
        assert await thinks("again", 0) == Thinking("again")
        await peer.send_chat(reply.message_id, "restart", attempt=2, offset=0)
        assert await within(anext(events)) == Restarted(2)
        assert await thinks("again", 0, 2) == Thinking("again")
        await peer.send_chat(reply.message_id, "delta", contents="yes", attempt=2, offset=3)
        assert await within(anext(events)) == Piece("yes", 2)
        await peer.send_chat(reply.message_id, "done", attempt=2, offset=3)
        assert await within(reply.text()) == "yes"
        assert reply.thinking == "again"


async def test_a_status_is_no_acceptance() -> None:
    async with connected() as session:
        await session.client.send("hello", message_id="m1")
        await session.peer.send_chat("m1", "status", state="queued")
        await session.lose_connection()
        assert (await session.peer.hear_chat()).message_id == "m1"


async def test_questions_of_other_sockets_are_passed_on_with_their_answers() -> None:
    asked: list[Reply] = []
    async with connected(wants=["asked"], on_asked=asked.append) as session:
        own = await session.asked(message_id="m1")
        await session.peer.send_chat("m1", "asked", contents="hello")
        await session.peer.send_chat("m2", "asked", contents="Why is the sky blue?")
        await session.peer.send_chat("m2", "delta", attempt=1, offset=4, contents="Blue")
        await session.peer.send_chat("m1", "done", attempt=1, offset=0)
        await within(own.text())
        [other] = asked
        assert (other.message_id, other.frame.contents, other.so_far) == ("m2", "Why is the sky blue?", "Blue")
        await session.lose_connection()
        await session.peer.send_chat("m2", "done", attempt=1, offset=4)
        assert await within(other.text()) == "Blue"


async def test_frames_of_a_newer_server_are_left_out() -> None:
    async with connected() as session:
        reply = await session.asked()
        await session.peer.socket.send('{"msgType": "WEATHER", "contents": "sunny"}')
        await session.peer.socket.send("no JSON")
        await session.peer.send_chat(reply.message_id, "rated", attempt=1, offset=7, contents="well")
        await session.peer.send_frame("SYSTEM", code="SUNNY", contents="sunny")
        await session.peer.send_frame("HEARTBEAT")
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
        assert await within(reply.text()) == ""


# A message that failed and is retried by an operator


async def failed(session: Session, message_id: str) -> Reply:
    """A message whose first attempt has failed after some text."""
    reply = await session.asked(message_id=message_id)
    await session.peer.send_chat(message_id, "delta", contents="half", attempt=1, offset=4)
    await session.peer.send_chat(message_id, "failed", code="AI_FAILED", contents="sorry", attempt=1, offset=4)
    assert (await within(reply.result())).outcome is Outcome.FAILED
    return reply


@pytest.mark.parametrize("begins_with", ["restart", "delta"])
async def test_a_failed_message_that_is_answered_after_all_is_the_same_reply(begins_with: str) -> None:
    reopened = asyncio.Queue[Reply]()
    async with connected(on_reopened=reopened.put_nowait) as session:
        reply = await failed(session, "m1")
        await session.peer.send_chat("m1", "delta", contents="late", attempt=1, offset=8)  # of the attempt that failed
        if begins_with == "restart":
            await session.peer.send_chat("m1", "restart", attempt=2, offset=0)
        await session.peer.send_chat("m1", "delta", contents="Blue", attempt=2, offset=4)
        assert await within(reopened.get()) is reply
        session.peer.drop()
        session.peer = await session.server.peer()
        init = await session.peer.hear_init()
        await session.peer.send_frame("INIT")
        assert [(point.message_id, point.attempt) for point in init.resume] == [("m1", 2)]
        await session.peer.send_chat("m1", "done", attempt=2, offset=4)
        result = await within(reply.result())
        assert (result.outcome, result.text, result.attempt) == (Outcome.DONE, "Blue", 2)
        assert await within(all_of(reply.events())) == [Accepted(1), Restarted(2), Piece("Blue", 2), result]
        await session.peer.send_chat("m1", "restart", attempt=3, offset=0)  # no server does this
        other = await session.asked(message_id="m2")
        assert reply.ended
        assert not other.ended
        assert reopened.empty()


async def test_reopened_messages_take_no_place_of_others_and_may_fail_again() -> None:
    async with connected() as session:
        replies = [await failed(session, f"m{number}") for number in range(3)]
        for attempt in (2, 3):
            for reply in replies:
                await session.peer.send_chat(reply.message_id, "restart", attempt=attempt, offset=0)
                await session.peer.send_chat(reply.message_id, "failed", code="AI_FAILED", attempt=attempt, offset=0)
        await wait_until(lambda: all(reply.attempt == 3 and reply.has_failed for reply in replies), "all fail again")
        again = await session.asked(message_id="m0")  # as a new message
        waiting = [await session.asked(message_id=f"w{number}") for number in range(MAX_OPEN - 1)]
        assert all(not reply.ended for reply in [again, *waiting])
