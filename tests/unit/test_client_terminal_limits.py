"""The terminal client where something is missing or wrong: streams, the history file, the terminal, a server."""

import asyncio
import base64
import os
import shutil
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from imstream.cli.chat_commands import COPIED, SENT_TO_TERMINAL, copy
from imstream.cli.chat_terminal import MAX_SENT, MAX_TURNS, drop_oldest
from imstream.cli.terminal import TerminalOutput
from imstream.client import Turn
from imstream.codes import CloseCode
from tests.support.scripted_ws import scripted_server, within
from tests.support.terminal import (
    CTRL_D,
    WITHOUT_EXTRA,
    answer,
    at_terminal,
    command,
    greeted,
    half_an_answer,
    piped,
)
from tests.support.waiting import wait_until


async def redirected(redirection: str, line: list[str]) -> asyncio.subprocess.Process:
    """Start a command as a shell does with a redirection."""
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *line]
    return await asyncio.create_subprocess_exec(*shell, stdout=PIPE, stderr=PIPE)


async def test_a_question_needs_no_standard_input() -> None:
    async with scripted_server() as server:
        process = await redirected("<&-", command(server.url, "hello"))
        await answer(await server.logged_in(), "1")
        assert await within(process.communicate()) == (b"1\n", b"")
        assert process.returncode == 0


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
async def test_a_question_needs_no_output(redirection: str) -> None:
    async with scripted_server() as server:
        process = await redirected(redirection, command(server.url, "hello"))
        await answer(await server.logged_in(), "1", finishReason="length")
        _, err = await within(process.communicate())
        assert (process.returncode, err in {b"", b"The answer was cut at the length limit\n"}) == (0, True)


async def test_without_standard_input_and_question_there_is_no_message() -> None:
    process = await redirected("<&-", command("ws://127.0.0.1:9/nobody"))
    assert await within(process.communicate()) == (b"", b"There is no message yet\n")
    assert process.returncode == 1


@pytest.mark.parametrize("env", [{}, WITHOUT_EXTRA], ids=["", "without extra"])
async def test_a_session_that_is_ended_while_a_message_is_typed_ends_the_chat(env: dict[str, str]) -> None:
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("a draft")
        await terminal.has("> a draft")
        await peer.send_frame("SYSTEM", code="SYSTEM_ERROR", contents="you are somewhere else now")
        await peer.close(CloseCode.REPLACED)
        await terminal.has("\nyou are somewhere else now (4502)")
        assert await terminal.exit_code() == 1


async def test_bytes_that_are_no_text_are_replaced() -> None:
    async with scripted_server() as server:
        chat = asyncio.create_task(piped(server.url, "", "caf\udce9"))
        peer = await server.logged_in()
        message = await peer.hear_chat()
        assert message.contents == "caf\N{REPLACEMENT CHARACTER}"
        await peer.send_chat(message.message_id, "done", attempt=1, offset=0)
        assert (await within(chat))[0] == 0


async def test_the_cause_of_a_lost_connection_is_shown_once() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        for _ in range(3):
            peer = await server.peer()
            await peer.hear_init()
            peer.drop()
        await greeted(server, terminal)
        assert terminal.text.count("No connection (the connection broke); connecting again in ") == 1


async def test_the_lost_connection_of_an_answer_is_shown() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        message_id = await half_an_answer(peer, terminal)
        peer.drop()
        await terminal.has("No connection (the connection broke); connecting again in ")
        await terminal.has("half\nConnecting again…")
        peer = await server.logged_in()
        await peer.send_chat(message_id, "done", attempt=1, offset=4)
        await terminal.has("the answer continues\nhalf\n>")


def test_the_history_of_a_message_has_the_size_and_number_that_a_server_accepts() -> None:
    pair = [Turn(role="user", content="x"), Turn(role="assistant", content="y")]
    many = pair * MAX_TURNS
    drop_oldest(many, "z")
    assert many == pair * (MAX_TURNS // 2)
    long = [*pair, Turn(role="user", content="x" * (MAX_SENT // 2)), Turn(role="assistant", content="\n")]
    kept = list(long)
    drop_oldest(kept, "y" * (MAX_SENT // 2 - 250))
    assert kept == long
    drop_oldest(kept, "y" * (MAX_SENT // 2 - 150))
    assert kept == long[2:]
    drop_oldest(kept, "\n" * MAX_SENT)
    assert kept == []


# The terminal


async def test_a_note_while_a_line_is_typed_without_a_line_editor_is_followed_by_the_prompt() -> None:
    async with scripted_server() as server, at_terminal(command(server.url), env=WITHOUT_EXTRA) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("a draft")
        await terminal.has("> a draft")
        peer.drop()
        peer = await server.logged_in()
        await terminal.shows("\nConnected again to ws://")
        await terminal.shows("\n>")
        terminal.type(", ended\n")
        assert (await peer.hear_chat()).contents == "a draft, ended"


async def test_a_terminal_without_escape_sequences_receives_none() -> None:
    async with scripted_server() as server, at_terminal(command(server.url), env={"TERM": "dumb"}) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        message_id = (await peer.hear_chat()).message_id
        await peer.send_chat(message_id, "accepted", position=3)
        await terminal.shows("\nMessage received, place 3 in the queue")
        await peer.send_chat(message_id, "delta", contents="**bold**", attempt=1, offset=8)
        await peer.send_chat(message_id, "done", attempt=1, offset=8)
        await terminal.shows("\n**bold**\n>")
        terminal.type("/copy\n")
        await terminal.shows("There is no clipboard here\n>")
        terminal.type(CTRL_D)
        assert await terminal.exit_code() == 0
        assert "\x1b" not in terminal.written


def test_lines_that_a_narrower_window_has_wrapped_are_erased_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    columns = 80
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    output = TerminalOutput()
    output.status("排队" * 10)
    columns = 30
    capsys.readouterr()
    output.status("")
    assert capsys.readouterr().out == "\x1b[2F\x1b[J"


# The clipboard


async def test_control_characters_of_an_answer_are_not_copied() -> None:
    async with scripted_server() as server, at_terminal(command(server.url)) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("hello\n")
        await answer(peer, "a\x1b[201~b\r\x07\u202e\nc")
        await terminal.shows("\n>")
        terminal.type("/copy\n")
        await terminal.shows("Sent 9 characters to the terminal's clipboard (OSC 52)\n>")
        copied = base64.b64encode(b"a[201~b\nc").decode()
        assert f"\x1b]52;c;{copied}\x07" in terminal.written


def test_within_tmux_its_clipboard_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = list[str]()

    def send(sequence: str) -> bool:
        sent.append(sequence)
        return True

    for variable in ("WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TMUX", "socket,1,0")
    program = tmp_path / "tmux"
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\nexec /bin/cat >{tmp_path}/copied\n')
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert copy("日本", send) is COPIED
    assert (tmp_path / "copied").read_text() == "日本"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert copy("日本", send) is SENT_TO_TERMINAL
    assert sent == [f"\x1b]52;c;{base64.b64encode('日本'.encode()).decode()}\x07"]


# The history file


async def test_a_history_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    history = tmp_path / "imstream/chat_history"
    history.parent.mkdir()
    history.write_text("\n# earlier\n+one\n")
    history.chmod(0o644)
    env = {"XDG_STATE_HOME": str(tmp_path)}
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        await greeted(server, terminal)
        assert history.stat().st_mode & 0o777 == 0o600
        assert "+one" in history.read_text()


async def test_a_history_that_cannot_be_opened_is_of_this_session(tmp_path: Path) -> None:
    history = tmp_path / "imstream/chat_history"
    history.parent.mkdir()
    os.mkfifo(history)
    env = {"XDG_STATE_HOME": str(tmp_path)}
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        await half_an_answer(await greeted(server, terminal), terminal)


async def test_a_message_that_cannot_be_kept_is_sent_all_the_same(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        peer = await greeted(server, terminal)
        terminal.type("caf\udce9\n")
        assert (await peer.hear_chat()).contents == "caf\N{REPLACEMENT CHARACTER}"
        assert "caf\N{REPLACEMENT CHARACTER}" in (tmp_path / "imstream/chat_history").read_text()
    async with scripted_server() as server, at_terminal(command(server.url), env=env) as terminal:
        peer = await greeted(server, terminal)
        await wait_until((tmp_path / "imstream/chat_history").exists, "the file")
        shutil.rmtree(tmp_path / "imstream")
        await half_an_answer(peer, terminal)
