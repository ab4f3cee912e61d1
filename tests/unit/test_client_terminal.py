"""The terminal client, in its own process, with a scripted server."""

import asyncio
import fcntl
import os
import sys
import termios
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from imstream.cli.chat_terminal import INTERRUPTED, MAX_HISTORY
from imstream.cli.terminal import LineReader, isolate_direction
from imstream.client import Turn
from imstream.codes import CloseCode
from tests.support.scripted_ws import Peer, ScriptedServer, scripted_server, within
from tests.support.terminal import CTRL_C, CTRL_D, Terminal, at_terminal, command, piped
from tests.support.waiting import wait_until


async def answer(peer: Peer, text: str, **end: object) -> list[Turn]:
    """Answer the next message; returns its history. `end`: more fields of the last frame."""
    chat = await peer.hear_chat()
    await peer.send_chat(chat.message_id, "accepted", position=1)
    await peer.send_chat(chat.message_id, "delta", contents=text, attempt=1, offset=len(text))
    await peer.send_chat(chat.message_id, "done", attempt=1, offset=len(text), **end)
    return chat.history


async def greeted(server: ScriptedServer, terminal: Terminal) -> Peer:
    """Log the chat in and wait for its prompt; returns the server's end."""
    peer = await server.logged_in()
    await terminal.shows("Connected to ws://")
    await terminal.shows("> ")
    return peer


async def half_an_answer(peer: Peer, terminal: Terminal) -> str:
    """Send a message and half of its answer; returns the message id."""
    terminal.type("hello\n")
    message_id = (await peer.hear_chat()).message_id
    assert message_id is not None
    await peer.send_chat(message_id, "accepted", position=1)
    await peer.send_chat(message_id, "delta", contents="half", attempt=1, offset=4)
    await terminal.shows("half")
    return message_id


# With pipes


async def test_every_line_of_a_pipe_is_asked_and_only_answers_are_written() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\n\n  \nzwei 二\r\nthree", lang="zh"))
        peer = await server.logged_in()
        assert await answer(peer, "1") == []
        assert [turn.content for turn in await answer(peer, "2")] == ["one", "1"]
        assert [turn.content for turn in await answer(peer, "3")] == ["one", "1", "zwei 二", "2"]
        code, out, err = await within(chat)
        assert (code, out) == (0, "1\n2\n3\n")
        assert "已连接" in err


async def test_an_answer_that_was_cut_is_said_to_be() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\ntwo\nthree"))
        peer = await server.logged_in()
        await answer(peer, "1", finishReason="stop")
        await answer(peer, "2", finishReason="length")
        await answer(peer, "3", finishReason="content_filter")
        code, out, err = await within(chat)
    assert (code, out) == (0, "1\n2\n3\n")
    assert [line for line in err.splitlines() if "cut" in line] == [
        "The answer was cut at the length limit",
        "The answer was cut by the content filter",
    ]


async def test_a_file_is_read_like_a_pipe(tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    questions.write_text("one\ntwo\n")
    async with scripted_server() as server:
        with questions.open("rb") as file:
            process = await asyncio.create_subprocess_exec(
                *command(server.url), stdin=file, stdout=asyncio.subprocess.PIPE
            )
        peer = await server.logged_in()
        await answer(peer, "1")
        await answer(peer, "2")
        out, _ = await within(process.communicate())
        assert (process.returncode, out) == (0, b"1\n2\n")


async def test_a_pipe_gets_only_the_attempt_that_counts_and_an_exit_code() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\ntwo\n"))
        peer = await server.logged_in()
        first = (await peer.hear_chat()).message_id
        await peer.send_chat(first, "delta", contents="wrong", attempt=1, offset=5)
        await peer.send_chat(first, "restart", attempt=2)
        await peer.send_chat(first, "delta", contents="right", attempt=2, offset=5)
        await peer.send_chat(first, "done", attempt=2, offset=5)
        second = (await peer.hear_chat()).message_id
        await peer.send_chat(second, "delta", contents="half", attempt=1, offset=4)
        await peer.send_chat(second, "failed", contents="sorry", attempt=1, offset=4)
        code, out, err = await within(chat)
        assert (code, out) == (1, "right\n")
        assert "sorry" in err


async def test_nothing_from_the_wire_can_talk_to_the_terminal() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\n"))
        await answer(await server.logged_in(), "a\x1b[2Jb\x9bc\x7f\td\n")
        assert (await within(chat))[1] == "a[2Jbc\td\n\n"


async def test_nothing_from_the_wire_turns_a_line_of_the_terminal() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\n"))
        await answer(await server.logged_in(), "a\u202eb\u202dc\u202a\u202b\u202cd\u2066\u2067e \u200fשלום\n")
        assert (await within(chat))[1] == "abcde \u200fשלום\n\n"
    assert isolate_direction("שלום\u2069 3 s") == "\u2068שלום 3 s\u2069"
    assert isolate_direction("away, 稍后") == "away, 稍后"


async def test_says_why_there_is_no_connection() -> None:
    code, out, err = await piped("ws://127.0.0.1:9/nobody", "hello\n", patience=0.3)
    assert (code, out) == (1, "")
    assert "ws://127.0.0.1:9/nobody" in err


async def test_a_wrong_address_is_explained() -> None:
    code, _, err = await piped("http://127.0.0.1:8080", "")
    assert (code, err) == (
        1,
        "not a WebSocket address: 'http://127.0.0.1:8080'; it looks like ws://127.0.0.1:8080/ws\n",
    )


async def test_a_session_that_is_ended_for_good_ends_the_chat() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "hello\n"))
        peer = await server.logged_in()
        await peer.hear_chat()
        await peer.send_frame("SYSTEM", code="SYSTEM_ERROR", contents="you are somewhere else now")
        await peer.close(CloseCode.REPLACED)
        code, _, err = await within(chat)
        assert code == 1
        assert "you are somewhere else now (4502)" in err


async def test_nobody_who_reads_the_answers_is_no_reason_for_a_traceback() -> None:
    async with scripted_server() as server:
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec(*command(server.url), stdin=PIPE, stdout=writing, stderr=PIPE)
        os.close(writing)
        asking = asyncio.create_task(process.communicate(b"one\ntwo\n"))
        peer = await server.logged_in()
        os.close(reading)
        await answer(peer, "1")
        _, err = await within(asking)
        assert process.returncode == 1
        assert b"Traceback" not in err


# On a terminal


async def test_an_answer_is_seen_as_it_comes_and_ctrl_d_leaves() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        await peer.send_chat(message_id, "delta", contents=" whole", attempt=1, offset=10)
        await peer.send_chat(message_id, "done", attempt=1, offset=10)
        await terminal.shows(" whole\n> ")
        terminal.type(CTRL_D)
        assert await terminal.exit_code() == 0


async def test_the_place_in_the_queue_and_a_new_attempt_are_told() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        await peer.send_chat(message_id, "accepted", position=7)
        await terminal.shows("place 7 in the queue\n")
        await peer.send_chat(message_id, "delta", contents="wrong", attempt=1, offset=5)
        await terminal.shows("wrong")
        await peer.send_chat(message_id, "restart", attempt=2)
        await terminal.shows("\nThe answer was interrupted and is being generated again\n")
        await peer.send_chat(message_id, "delta", contents="right", attempt=2, offset=5)
        await peer.send_chat(message_id, "done", attempt=2, offset=5)
        await terminal.shows("right\n> ")


async def test_a_busy_server_is_asked_again_after_telling() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        chat = await peer.hear_chat()
        await peer.send_frame("SYSTEM", code="BUSY", message_id=chat.message_id, contents="Full.", retry_after_ms=10)
        await terminal.shows("Full. Sent again in 0 s")
        assert await peer.hear_chat() == chat
        await peer.send_frame(
            "SYSTEM", code="BUSY", message_id=chat.message_id, contents="Full.", retry_after_ms=60_000
        )
        await terminal.shows("Sent again in 60 s")
        terminal.type(CTRL_C)
        await terminal.shows("> ")
        terminal.type("other\n")
        assert (await peer.hear_chat()).contents == "other"


async def test_a_newer_server_that_says_when_to_send_a_message_again_is_obeyed() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        chat = await peer.hear_chat()
        refusal = {"code": "TOO_HOT", "contents": "Cooling down.", "retry_after_ms": 10}
        await peer.send_frame("SYSTEM", message_id=chat.message_id, **refusal)
        await terminal.shows("Cooling down. Sent again in 0 s")
        assert await peer.hear_chat() == chat
        await peer.send_frame("SYSTEM", message_id=chat.message_id, code="TOO_HOT", contents="Burnt down.")
        await terminal.shows("Burnt down.\n> ")


async def test_a_message_that_would_have_to_wait_for_tomorrow_is_not_waited_for() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        chat = await peer.hear_chat()
        refusal = {"code": "RATE_LIMITED", "contents": "Used up.", "retry_after_ms": 3_600_000}
        await peer.send_frame("SYSTEM", message_id=chat.message_id, **refusal)
        await terminal.shows("Used up.\n> ")


async def test_a_message_that_is_wrong_is_not_sent_again() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        await peer.hear_chat()
        await peer.send_frame("SYSTEM", code="BAD_REQUEST", contents="contents: too rude")
        await terminal.shows("contents: too rude\n> ")


async def test_ctrl_c_cancels_an_answer_and_leaves_at_the_prompt() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        terminal.type(CTRL_C)
        await terminal.shows("Stopping the answer")
        assert (await peer.hear_cancel()).message_id == message_id
        await peer.send_chat(message_id, "cancelled", contents="Cancelled", attempt=1, offset=4)
        await terminal.shows("Cancelled\n> ")
        terminal.type("go on\n")
        assert [turn.content for turn in (await peer.hear_chat()).history] == ["hello", "half"]
        terminal.type(CTRL_C)
        await peer.hear_cancel()
        await peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id=None, contents="not now")
        peer = await server.logged_in()
        cancelled = (await peer.hear_chat()).message_id
        await peer.hear_cancel()
        await peer.send_chat(cancelled, "cancelled", contents="Cancelled")
        await terminal.shows("Cancelled\n> ")
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == 0


async def test_a_second_ctrl_c_leaves_at_once() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        await half_an_answer(peer, terminal)
        terminal.type(CTRL_C)
        await peer.hear_cancel()
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == INTERRUPTED


async def test_a_cancellation_that_is_refused_is_told_and_the_answer_goes_on() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        terminal.type(CTRL_C)
        await peer.hear_cancel()
        await peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id=message_id, contents="not now")
        await terminal.shows("not now\n")
        await peer.send_chat(message_id, "delta", contents=" whole", attempt=1, offset=10)
        await peer.send_chat(message_id, "done", attempt=1, offset=10)
        await terminal.shows(" whole\n> ")


async def test_ctrl_c_before_the_login_leaves() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await server.peer()
        await peer.hear_init()
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == INTERRUPTED


async def test_a_lost_connection_is_told_and_the_answer_goes_on() -> None:
    async with scripted_server() as server, at_terminal(server.url) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        await peer.send_frame("SYSTEM", code="DRAINING", contents="we restart")
        await peer.close(CloseCode.DRAINING)
        await terminal.shows("\nNo connection (we restart); connecting again in ")
        peer = await server.logged_in()
        await terminal.shows("the answer goes on\n")
        await peer.send_chat(message_id, "delta", contents=" whole", attempt=1, offset=10)
        await peer.send_chat(message_id, "done", attempt=1, offset=10)
        await terminal.shows(" whole\n> ")
        peer.drop()
        await server.logged_in()
        await terminal.shows("Connected again to ws://")


async def test_the_oldest_of_a_long_conversation_is_left_out() -> None:
    long = "x" * (MAX_HISTORY // 2)
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\ntwo\nthree\nfour\n"))
        peer = await server.logged_in()
        await answer(peer, "1")
        assert [turn.content for turn in await answer(peer, long)] == ["one", "1"]
        assert [turn.content for turn in await answer(peer, long)] == ["one", "1", "two", long]
        assert [turn.content for turn in await answer(peer, "4")] == ["three", long]
        assert (await within(chat))[0] == 0


# Reading lines


def unread(descriptor: int) -> int:
    """Number of unread bytes in a pipe."""
    count = fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(count, sys.byteorder)


@pytest.fixture
def pipe() -> Iterator[tuple[int, BinaryIO]]:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as end:
        yield reading, end
    os.close(reading)


async def test_a_line_may_come_in_any_pieces(pipe: tuple[int, BinaryIO]) -> None:
    reading, end = pipe
    waiting = asyncio.create_task(LineReader(reading).readline())
    for byte in "日本\n".encode():
        end.write(bytes([byte]))
        await wait_until(lambda: unread(reading) == 0, "the byte was read")
    assert await within(waiting) == "日本"


async def test_waiting_for_a_line_may_be_given_up(pipe: tuple[int, BinaryIO]) -> None:
    reading, end = pipe
    reader = LineReader(reading)
    waiting = asyncio.create_task(reader.readline())
    end.write(b"be")
    await wait_until(lambda: unread(reading) == 0, "the beginning was read")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    end.write(b"gun\nnext")
    assert await within(reader.readline()) == "begun"
    end.close()
    assert await within(reader.readline()) == "next"
    assert await within(reader.readline()) is None
