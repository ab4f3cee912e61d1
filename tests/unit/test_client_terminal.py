"""The terminal client, in its own process, with a scripted server."""

import asyncio
import fcntl
import os
import sys
import termios
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from imstream.cli.chat_markdown import MarkdownRenderer
from imstream.cli.chat_terminal import INTERRUPTED, MAX_SENT
from imstream.cli.terminal import LineReader
from imstream.cli.terminal_text import isolate_direction, printable
from imstream.codes import CloseCode
from tests.support.scripted_ws import scripted_server, within
from tests.support.terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    ENTER,
    UP,
    WITHOUT_EXTRA,
    answer,
    at_terminal,
    command,
    greeted,
    half_an_answer,
    piped,
)
from tests.support.waiting import wait_until

# With pipes


async def test_piped_input_is_one_message_and_only_its_answer_is_written() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "\none\n\n  zwei 二\r\nthree\n", lang="zh"))
        peer = await server.logged_in()
        message = await peer.hear_chat()
        assert message.contents == "one\n\n  zwei 二\r\nthree"
        await peer.send_chat(message.message_id, "delta", contents="**1**", attempt=1, offset=5)
        await peer.send_chat(message.message_id, "done", attempt=1, offset=5)
        assert await within(chat) == (0, "**1**\n", "")


async def test_a_question_is_one_message_with_piped_input_appended() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "the text\n", "What does it say?"))
        peer = await server.logged_in()
        message = await peer.hear_chat()
        assert message.contents == "What does it say?\n\nthe text"
        await peer.send_chat(message.message_id, "delta", contents="1", attempt=1, offset=1)
        await peer.send_chat(message.message_id, "done", attempt=1, offset=1)
        assert await within(chat) == (0, "1\n", "")


async def test_nothing_is_asked_without_a_text() -> None:
    assert await piped("ws://127.0.0.1:9/nobody", " \n\n") == (1, "", "There is no message yet\n")


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("stop", ""),
        ("length", "The answer was cut at the length limit\n"),
        ("content_filter", "The answer was cut by the content filter\n"),
    ],
)
async def test_an_answer_that_was_cut_is_marked_as_cut(reason: str, told: str) -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one"))
        await answer(await server.logged_in(), "1", finishReason=reason)
        assert await within(chat) == (0, "1\n", told)


async def test_a_file_is_read_like_a_pipe(tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    questions.write_text("one\ntwo\n")
    async with scripted_server() as server:
        with questions.open("rb") as file:
            process = await asyncio.create_subprocess_exec(
                *command(server.url), stdin=file, stdout=asyncio.subprocess.PIPE
            )
        await answer(await server.logged_in(), "1")
        out, _ = await within(process.communicate())
        assert (process.returncode, out) == (0, b"1\n")


async def test_a_pipe_gets_only_the_attempt_that_counts() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\n"))
        peer = await server.logged_in()
        first = (await peer.hear_chat()).message_id
        await peer.send_chat(first, "delta", contents="wrong", attempt=1, offset=5)
        await peer.send_chat(first, "restart", attempt=2)
        await peer.send_chat(first, "delta", contents="right", attempt=2, offset=5)
        await peer.send_chat(first, "done", attempt=2, offset=5)
        code, out, _ = await within(chat)
        assert (code, out) == (0, "right\n")


async def test_the_exit_code_is_1_without_a_complete_answer() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "one\n"))
        peer = await server.logged_in()
        message_id = (await peer.hear_chat()).message_id
        await peer.send_chat(message_id, "delta", contents="half", attempt=1, offset=4)
        await peer.send_chat(message_id, "failed", contents="sorry", attempt=1, offset=4)
        assert await within(chat) == (1, "", "sorry\n")


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
    assert err.endswith("Is imstream running? Start it with imstream up\n")


async def test_a_wrong_address_is_explained() -> None:
    code, _, err = await piped("http://127.0.0.1:8080", "hello")
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
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        await peer.send_chat(message_id, "delta", contents=" whole", attempt=1, offset=10)
        await peer.send_chat(message_id, "done", attempt=1, offset=10)
        await terminal.shows(" whole\n>")
        terminal.type(CTRL_D)
        assert await terminal.exit_code() == 0


async def test_a_new_attempt_is_noted_and_begins_below() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        await peer.send_chat(message_id, "delta", contents="wrong", attempt=1, offset=5)
        await terminal.shows("wrong")
        await peer.send_chat(message_id, "restart", attempt=2)
        await terminal.shows("\nThe answer was interrupted and is being generated again\n")
        await peer.send_chat(message_id, "delta", contents="right", attempt=2, offset=5)
        await peer.send_chat(message_id, "done", attempt=2, offset=5)
        await terminal.shows("right\n>")


async def test_the_state_of_a_message_is_one_line_that_changes_and_goes_with_the_text() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        await terminal.has("> hello\nSending…")
        await peer.send_chat(message_id, "accepted", position=7)
        await peer.send_chat(message_id, "status", state="queued", position=7, etaMs=600_000)
        await terminal.has("> hello\nPlace 7 in the queue, about ")
        await peer.send_chat(message_id, "status", state="queued", position=1)
        await terminal.has("> hello\nPlace 1 in the queue")
        await peer.send_chat(message_id, "status", state="waiting", reason="http_503", retryAfterMs=600_000)
        await terminal.has("> hello\nThe AI service is away (http_503), trying again in ")
        await peer.send_chat(message_id, "status", state="started")
        await terminal.has("> hello\nWaiting for the answer… ")
        await peer.send_chat(message_id, "status", state="thinking")
        await terminal.has("> hello\nThinking… ")
        await peer.send_chat(message_id, "status", state="new in a newer server")
        await peer.send_chat(message_id, "delta", contents="text", attempt=1, offset=4)
        await peer.send_chat(message_id, "done", attempt=1, offset=4)
        await terminal.shows(" hello\ntext\n>")


async def test_the_place_of_an_older_server_without_states_is_shown() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        await peer.send_chat(message_id, "accepted", position=7)
        await terminal.has("> hello\nPlace 7 in the queue")


async def test_a_busy_server_is_asked_again_after_telling() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
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
        await terminal.shows("\n>")
        terminal.type("other\n")
        assert (await peer.hear_chat()).contents == "other"


async def test_retry_after_of_a_newer_server_is_obeyed() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        chat = await peer.hear_chat()
        refusal = {"code": "TOO_HOT", "contents": "Cooling down.", "retry_after_ms": 10}
        await peer.send_frame("SYSTEM", message_id=chat.message_id, **refusal)
        await terminal.shows("Cooling down. Sent again in 0 s")
        assert await peer.hear_chat() == chat
        await peer.send_frame("SYSTEM", message_id=chat.message_id, code="TOO_HOT", contents="Burnt down.")
        await terminal.shows("Burnt down.\n>")


async def test_a_message_that_would_have_to_wait_for_tomorrow_is_not_waited_for() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        chat = await peer.hear_chat()
        refusal = {"code": "RATE_LIMITED", "contents": "Used up.", "retry_after_ms": 3_600_000}
        await peer.send_frame("SYSTEM", message_id=chat.message_id, **refusal)
        await terminal.shows("Used up.\n>")


async def test_a_message_that_is_wrong_is_not_sent_again() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        await peer.hear_chat()
        await peer.send_frame("SYSTEM", code="BAD_REQUEST", contents="contents: too rude")
        await terminal.shows("contents: too rude\n>")


@pytest.mark.parametrize("env", [{}, WITHOUT_EXTRA], ids=["", "without extra"])
async def test_ctrl_c_cancels_an_answer_or_clears_the_line_and_never_ends_the_chat(env: dict[str, str]) -> None:
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        terminal.type(CTRL_C)
        await terminal.has("Stopping the answer")
        assert (await peer.hear_cancel()).message_id == message_id
        await peer.send_chat(message_id, "cancelled", contents="Cancelled", attempt=1, offset=4)
        await terminal.shows("Cancelled\n>")
        assert ("Stopping" in terminal.text) == bool(env), "a line that changes, if lines can change"
        terminal.type("not this")
        await terminal.has("> not this")
        terminal.type(CTRL_C)
        await wait_until(lambda: terminal.text.endswith("\n>"), "an empty line")
        terminal.type(CTRL_C)
        terminal.type("go on\n")
        chat = await peer.hear_chat()
        assert chat.contents == "go on"
        assert [turn.content for turn in chat.history] == ["hello", "half"]


async def test_after_a_second_ctrl_c_an_answer_is_left_alone() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        await half_an_answer(peer, terminal)
        terminal.type(CTRL_C)
        await peer.hear_cancel()
        terminal.type(CTRL_C)
        await terminal.shows("No longer waiting for this answer")
        await terminal.shows("\n>")
        terminal.type("other\n")
        assert (await peer.hear_chat()).contents == "other"


async def test_ctrl_c_ends_a_single_message_with_the_code_of_shells() -> None:
    async with scripted_server() as server, at_terminal(command(server.url, "hello")) as terminal:
        peer = await server.logged_in()
        message_id = (await peer.hear_chat()).message_id
        await terminal.has("Sending…")
        terminal.type(CTRL_C)
        await peer.hear_cancel()
        await peer.send_chat(message_id, "cancelled", contents="Cancelled")
        assert await terminal.exit_code() == INTERRUPTED


async def test_a_cancellation_that_is_refused_is_told_and_the_answer_goes_on() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        terminal.type(CTRL_C)
        await peer.hear_cancel()
        await peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id=message_id, contents="not now")
        await terminal.has("not now\nhalf")
        await peer.send_chat(message_id, "delta", contents=" whole", attempt=1, offset=10)
        await peer.send_chat(message_id, "done", attempt=1, offset=10)
        await terminal.shows(" whole\n>")


async def test_ctrl_c_before_the_login_leaves() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await server.peer()
        await peer.hear_init()
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == INTERRUPTED


async def test_a_lost_connection_is_told_and_the_answer_goes_on() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        await peer.send_frame("SYSTEM", code="DRAINING", contents="we restart")
        await peer.close(CloseCode.DRAINING)
        await terminal.has("\nNo connection (we restart); connecting again in ")
        peer = await server.logged_in()
        await terminal.has("the answer continues\nhalf")
        await peer.send_chat(message_id, "delta", contents=" whole", attempt=1, offset=10)
        await peer.send_chat(message_id, "done", attempt=1, offset=10)
        await terminal.shows("half whole\n>")
        terminal.type("a draft")
        await terminal.has("> a draft")
        peer.drop()
        await server.logged_in()
        await wait_until(
            lambda: "Connected again to ws://" in terminal.text and terminal.text.endswith("\n> a draft"),
            "the line that is being typed stays below what is told",
        )


async def test_an_answer_is_shown_as_markdown_while_it_arrives() -> None:
    answered = (
        "# Title\n\nSome **bold** text\n\n```python\nx = 1\n\ny = 2\n```\n\n1. one\n2. [two](http://x.example/)\n"
    )
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        cut = answered.index("\ny = 2")
        await peer.send_chat(message_id, "delta", contents=answered[:cut], attempt=1, offset=cut)
        await terminal.has("Title\n\nSome bold text\n\n x = 1")
        await peer.send_chat(message_id, "delta", contents=answered[cut:], attempt=1, offset=len(answered))
        await peer.send_chat(message_id, "done", attempt=1, offset=len(answered))
        await terminal.shows("\n 1 one\n 2 two (http://x.example/)\n>")
        assert "> hello\nTitle\n\nSome bold text\n\n x = 1\n\n y = 2\n\n 1 one\n" in terminal.text
        assert terminal.text.count("Some bold text") == 1


def test_entities_of_markdown_move_neither_the_cursor_nor_the_order_of_a_line() -> None:
    codes = (*range(1, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), 0x2066, 0x2067)
    entities = "a".join(f"&#{code};" for code in codes if chr(code) not in "\t\n")
    for text in (entities, f"[{entities}](http://x.example/{entities})", f"| {entities} |\n|-|\n| {entities} |"):
        lines = "\n".join(MarkdownRenderer().lines(text))
        assert printable(lines) == lines


async def test_a_block_longer_than_the_screen_is_shown_once() -> None:
    lines = [f"line {number}" for number in range(60)]
    answered = "\n".join(["```", *lines, "```", "", "end"])
    async with scripted_server() as server, at_terminal(command(server.url), size=(40, 10)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        for start in range(0, len(answered), 50):
            piece = answered[start : start + 50]
            await peer.send_chat(message_id, "delta", contents=piece, attempt=1, offset=start + len(piece))
        await peer.send_chat(message_id, "done", attempt=1, offset=len(answered))
        await terminal.shows("end\n>")
        shown = [line.strip() for line in terminal.text.splitlines()]
        assert [line for line in shown if line.startswith("line")] == lines


async def test_a_message_may_have_several_lines_and_is_found_again(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        peer = await greeted(server, terminal)
        terminal.type(f"one{ALT_ENTER}two\\{ENTER}three{ENTER}")
        assert (await peer.hear_chat()).contents == "one\ntwo\nthree"
    history = tmp_path / "imstream/chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        peer = await greeted(server, terminal)
        terminal.type(UP)
        await terminal.has("> one\n… two\n… three")
        terminal.type(ENTER)
        assert (await peer.hear_chat()).contents == "one\ntwo\nthree"


async def test_input_during_an_answer_is_the_next_message() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        terminal.type("typed ahead\n")
        await peer.send_chat(message_id, "done", attempt=1, offset=4)
        assert (await peer.hear_chat()).contents == "typed ahead"
        await terminal.has("half\n> typed ahead\n")


async def test_commands_forget_repeat_and_copy() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        for name in ("/retry", "/copy"):
            terminal.type(f"{name}\n")
            await terminal.shows("There is no message yet\n>")
        terminal.type("/help\n")
        await terminal.shows("/retry  answers the last message again")
        terminal.type("hello\n")
        await answer(peer, "one")
        await terminal.shows("one\n>")
        terminal.type("/copy\n")
        await terminal.shows("Sent 3 characters to the terminal's clipboard (OSC 52)\n>")
        assert "\x1b]52;c;b25l\x07" in terminal.written
        terminal.type("/retry\n")
        assert await answer(peer, "two") == []
        await terminal.shows("two\n>")
        terminal.type("/etc is a folder\n")
        assert [turn.content for turn in await answer(peer, "yes")] == ["hello", "two"]
        await terminal.shows("yes\n>")
        terminal.type("/nonsense\n")
        await terminal.shows("There is no command /nonsense: see /help\n>")
        terminal.type("/new\n")
        await terminal.shows("A new conversation")
        terminal.type("again\n")
        assert await answer(peer, "three") == []
        await terminal.shows("three\n>")
        terminal.type("/quit\n")
        assert await terminal.exit_code() == 0


async def test_a_failed_message_that_an_operator_retries_is_shown_when_it_is_answered() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        await peer.send_chat(message_id, "failed", contents="sorry", attempt=1, offset=4)
        await terminal.shows("\nsorry\n>")
        terminal.type("a draft")
        await terminal.has("> a draft")
        await peer.send_chat(message_id, "restart", attempt=2)
        await peer.send_chat(message_id, "delta", contents="late", attempt=2, offset=4)
        await peer.send_chat(message_id, "done", attempt=2, offset=4)
        await terminal.has("A message that had failed is answered: hello\nlate\n> a draft")
        terminal.type("\n")
        chat = await peer.hear_chat()
        assert (chat.contents, [turn.content for turn in chat.history]) == ("a draft", ["hello", "late"])


async def test_without_the_extra_packages_lines_are_read_and_text_is_written_as_it_is() -> None:
    async with scripted_server() as server, at_terminal(command(server.url), env=WITHOUT_EXTRA) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("one\\\n")
        await terminal.shows("\n…")
        terminal.type("two\n")
        message = await peer.hear_chat()
        assert message.contents == "one\ntwo"
        await peer.send_chat(message.message_id, "accepted", position=2)
        await terminal.has("Place 2 in the queue")
        await peer.send_chat(message.message_id, "delta", contents="# so **it** ", attempt=1, offset=12)
        await terminal.has("\n# so **it**")
        await peer.send_chat(message.message_id, "delta", contents="is", attempt=1, offset=14)
        await peer.send_chat(message.message_id, "done", attempt=1, offset=14)
        await terminal.shows(" two\n# so **it** is\n>")
        terminal.type(CTRL_D)
        assert await terminal.exit_code() == 0


async def test_a_terminal_that_cannot_show_a_character_gets_a_replacement() -> None:
    async with scripted_server() as server:
        env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
        process = await asyncio.create_subprocess_exec(
            *command(server.url, "hello"), env=env, stdin=DEVNULL, stdout=PIPE
        )
        await answer(await server.logged_in(), "日")
        out, _ = await within(process.communicate())
        assert (process.returncode, out) == (0, b"?\n")


async def test_the_oldest_of_a_long_conversation_is_left_out() -> None:
    long = "x" * (MAX_SENT // 2)
    async with scripted_server() as server, at_terminal(command(server.url), env=WITHOUT_EXTRA) as terminal:
        peer = await greeted(server, terminal)

        async def ask(text: str, answered: str) -> list[str]:
            terminal.type(f"{text}\n")
            history = await answer(peer, answered)
            await terminal.shows("\n>")
            return [turn.content for turn in history]

        await ask("one", "1")
        assert await ask("two", long) == ["one", "1"]
        assert await ask("three", long) == ["one", "1", "two", long]
        assert await ask("four", "4") == ["three", long]


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
