"""The terminal client, `imstream chat`: a conversation at the keyboard, or one message from arguments or a pipe."""

import asyncio
import os
import re
import signal
import stat
import sys
import time
import uuid
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from imstream.cli import chat_commands as texts
from imstream.cli.chat_commands import StatusLine, copy
from imstream.cli.chat_input import Keyboard, LineKeyboard, open_keyboard, without_echo
from imstream.cli.racing import completes_first
from imstream.cli.terminal import TerminalOutput
from imstream.cli.terminal_text import isolate_direction, printable, shorten, valid
from imstream.client.client import Client
from imstream.client.connection import Connected, ConnectionChange
from imstream.client.errors import Busy, ClientError, NotConnected, RateLimited, Refused, SessionEnded, Unavailable
from imstream.client.reconnect import Timing
from imstream.client.reply import Accepted, Outcome, Piece, Reply, Restarted, Result
from imstream.texts import Lang, Sentence, Text, localize
from imstream.urls import is_loopback
from imstream.user_ids import UserId
from imstream.wire import Turn

MAX_SENT, MAX_TURNS = 64_000, 200
"""Maximum size of a message with its history in bytes, and of the history in turns: defaults of
a server. The oldest turns are dropped."""

MAX_PAUSE = timedelta(minutes=2)
"""Maximum wait before sending again. A used-up daily quota, for example, would take longer."""

RETRY = timedelta(seconds=3)  # wait before sending again unless the server sent one
INTERRUPTED = 130  # exit code after Ctrl-C: 128 and the number of the signal, as in shells
_TICK, _DRAW_INTERVAL = 0.25, 0.05  # seconds between looks at the status, and between pieces of text on a screen

_COMMAND = re.compile(r"/[a-z]+")
_SHOWN = 60  # columns of a question that a note names

CUTS = {"length": Text.CHAT_CUT, "content_filter": Text.CHAT_FILTERED}
"""Notes on answers that are not complete, by their finish reason."""


def run(  # noqa: PLR0913 - the options of the command
    url: str,
    user: UserId,
    token: str | None,
    lang: Lang,
    traceparent: str | None = None,
    *,
    question: str | None = None,
    timing: Timing | None = None,
) -> int:
    """Chat until the input ends, or send one message: the question, piped input, or both.

    Exit code 1: no connection, or the one message has no complete answer.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `<&-`
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
    output = TerminalOutput()
    try:
        message = _single_message(question)
        if message == "":
            output.note(localize(texts.NOTHING_YET, lang))
            return 1
        chat = _Chat(output, lang, message, traceparent)
        client = Client(
            url,
            user,
            token=token,
            wants=("status",) if output.can_redraw else (),
            lang=lang,
            timing=timing,
            on_change=chat.on_change,
            on_reopened=chat.on_reopened,
        )
        return asyncio.run(chat.run(client))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ClientError, ValueError) as error:
        is_here = isinstance(error, NotConnected) and is_loopback(urlsplit(url).hostname or "")
        output.note(localize(texts.NO_SERVER, lang, why=error) if is_here else str(error))
        return 1
    except BrokenPipeError:  # the reader of the answers has ended, as in `… | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _single_message(question: str | None) -> str | None:
    """The question and piped input; None if a person types. Beside a question, only pipes and files are read."""
    is_piped = not sys.stdin.isatty()
    if is_piped and question is not None:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    piped = sys.stdin.buffer.read().decode("utf-8", "replace") if is_piped else None
    given = [text.strip("\r\n") for text in (question, piped) if text is not None]
    return "\n\n".join(text for text in given if text.strip()) if given else None


def drop_oldest(history: list[Turn], message: str) -> None:
    """Drop the oldest turns until the rest can be sent with a message; see `MAX_SENT`."""
    sizes = [len(turn.model_dump_json().encode()) for turn in (*history, Turn(role="user", content=message))]
    while history and (sum(sizes) > MAX_SENT or len(history) > MAX_TURNS):
        del history[:2], sizes[:2]


class _Chat:
    """One conversation with one user, or one `message`."""

    def __init__(self, output: TerminalOutput, lang: Lang, message: str | None, traceparent: str | None) -> None:
        self._output = output
        self._lang = lang
        self._message = message
        self._traceparent = traceparent
        self._history: list[Turn] = []
        self._last = ""  # question
        self._answer = ""
        self._of_conversation = set[str]()  # message ids
        self._ctrl_c = asyncio.Event()
        self._interrupted = self._is_stopping = False
        self._was_connected = False
        self._why_lost = ""
        self._screen = asyncio.Lock()  # held while an answer is shown
        self._late = set[asyncio.Task[None]]()

    async def run(self, client: Client) -> int:
        """Hold a conversation, or send the one message; returns the exit code."""
        async with client:
            self._client = client
            # Before this point Ctrl-C ends the program.
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._ctrl_c.set)
            if self._message is None:
                return await self._converse()
            is_answered = await self._ask(self._message)
            return INTERRUPTED if self._interrupted else 1 - is_answered

    def on_change(self, change: ConnectionChange) -> None:
        """Show that the client is connected, or once the reason why it is not."""
        if isinstance(change, Connected):
            again = Text.CHAT_RESUMED if change.resumed else Text.CHAT_BACK
            if self._message is None or self._was_connected:
                self._note(again if self._was_connected else Text.CHAT_WELCOME, url=isolate_direction(change.url))
            self._was_connected, self._why_lost = True, ""
        elif change.why != self._why_lost:
            self._why_lost = change.why
            seconds = f"{change.retry_in.total_seconds():.1f}"
            self._note(Text.CHAT_LOST, why=isolate_direction(change.why), seconds=seconds)

    async def _converse(self) -> int:
        keyboard = open_keyboard(self._output, self._ctrl_c.set)
        with nullcontext() if isinstance(keyboard, LineKeyboard) else without_echo():
            while (line := await self._read(keyboard)) is not None:
                self._ctrl_c.clear()
                if line.strip() == "/quit":
                    return 0
                message = self._obey(line.strip()) if _COMMAND.fullmatch(line.strip()) else line
                if message.strip():
                    await self._ask(message)
        self._output.end_line()
        return 0

    async def _read(self, keyboard: Keyboard) -> str | None:
        """Read a message; raises the error of a session that ends meanwhile."""
        reading = asyncio.create_task(keyboard.read())
        if not await completes_first(reading, self._client.ended()) and (error := await self._client.ended()):
            raise error
        return await reading

    def on_reopened(self, reply: Reply) -> None:
        """Show the answer to a message that had failed: an operator has retried it."""
        task = asyncio.create_task(self._show_late(reply))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    def _note(self, sentence: Sentence, **values: object) -> None:
        self._output.note(localize(sentence, self._lang, **values))

    def _obey(self, command: str) -> str:
        """Carry out a command; returns the message that is to be sent, if any."""
        match command:
            case "/help":
                self._note(texts.HELP)
            case "/new":
                self._history, self._last, self._answer, self._of_conversation = [], "", "", set()
                self._note(texts.NEW)
            case "/retry" if self._last:
                if len(self._history) > 1 and self._history[-2].content == self._last:
                    del self._history[-2:]
                return self._last
            case "/copy" if self._answer:
                text = printable(self._answer)  # it may be pasted into a shell
                self._note(copy(text, self._output.command), count=len(text))
            case "/retry" | "/copy":
                self._note(texts.NOTHING_YET)
            case _:
                self._note(texts.UNKNOWN, name=command)
        return ""

    async def _ask(self, line: str) -> bool:
        """Send a message, again while the server is busy, and show the answer. Returns whether it is complete."""
        self._interrupted = self._is_stopping = False
        self._last = line = valid(line)
        drop_oldest(self._history, line)
        message_id, result = uuid.uuid4().hex, None
        self._of_conversation.add(message_id)
        try:
            while result is None and not self._interrupted:
                reply = await self._client.send(
                    line, history=self._history, message_id=message_id, traceparent=self._traceparent
                )
                try:
                    async with self._screen:
                        result = await self._follow(reply)
                except Refused as refusal:
                    if refusal.retry_after is None and not isinstance(refusal, Busy | RateLimited | Unavailable):
                        raise
                    if not await self._pause(refusal.retry_after or RETRY, str(refusal)):
                        return False
        except SessionEnded:
            raise
        except ClientError as error:
            self._output.note(str(error))
        if result is None:
            return False
        if result.outcome in {Outcome.DONE, Outcome.CANCELLED} and result.text.strip():
            self._remember(line, result.text)
        return result.outcome is Outcome.DONE

    def _remember(self, question: str, answer: str) -> None:
        self._answer = answer
        self._history += [Turn(role="user", content=question), Turn(role="assistant", content=answer)]

    async def _pause(self, wait: timedelta, why: str) -> bool:
        """Wait before sending again; False after Ctrl-C, or if the wait would exceed `MAX_PAUSE`."""
        if wait > MAX_PAUSE:
            self._output.note(why)
            return False
        self._note(Text.CHAT_RETRY, why=isolate_direction(why), seconds=f"{wait.total_seconds():.0f}")
        self._interrupted = not await self._wait(asyncio.create_task(asyncio.sleep(wait.total_seconds())))
        return not self._interrupted

    async def _follow(self, reply: Reply) -> Result | None:
        """Show an answer until it ends. The first Ctrl-C cancels it; the second one ends the wait."""
        showing = asyncio.create_task(self._show(reply))
        tasks: list[asyncio.Task[Any]] = [showing, asyncio.create_task(self._show_status(reply))]
        try:
            if await self._wait(showing, keep=True):
                return showing.result()
            self._interrupted = True
            text = localize(Text.CHAT_CANCELLING, self._lang)
            self._is_stopping = self._output.status(text)
            if not self._is_stopping:
                self._output.note(text)
            tasks.append(asyncio.create_task(self._cancel(reply)))
            if await self._wait(showing, keep=True):
                return showing.result()
            self._interrupted = True
            self._output.end_answer()
            self._note(texts.LEFT)
            return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._output.end_answer()

    async def _show(self, reply: Reply) -> Result:
        async for event in reply.events():
            if isinstance(event, Accepted):
                if (event.position or 0) > 1 and not self._output.can_redraw:
                    self._note(Text.ACCEPTED, position=event.position)
            elif isinstance(event, Restarted):
                self._output.end_answer()
                self._note(Text.RESTART)
            elif isinstance(event, Piece):
                began = time.monotonic()
                self._output.write_piece(event.text)
                if self._output.is_live:  # the next piece has all text of this time; long code is drawn slowly
                    await asyncio.sleep(max(_DRAW_INTERVAL, 3 * (time.monotonic() - began)))
            elif isinstance(event, Result):
                self._end(event)
        return await reply.result()

    def _end(self, result: Result) -> None:
        is_done = result.outcome is Outcome.DONE
        self._output.end_answer(result.text if is_done else "")
        if not is_done:
            self._output.note(result.why or result.outcome)
        elif (cut := CUTS.get(result.finish_reason or "")) is not None:
            self._note(cut)

    async def _show_status(self, reply: Reply) -> None:
        line = StatusLine(reply, self._lang)
        while True:
            state = texts.OFFLINE if self._why_lost else Text.CHAT_CANCELLING if self._is_stopping else None
            text = line.text() if state is None else localize(state, self._lang)
            self._output.status("" if reply.ended else text)
            await asyncio.sleep(_TICK)

    async def _show_late(self, reply: Reply) -> None:
        with suppress(ClientError):  # the session reports its own error
            result = await reply.result()
            question = reply.frame.contents
            shown = isolate_direction(shorten(question, _SHOWN))
            async with self._screen:
                if result.outcome is not Outcome.DONE:
                    self._note(texts.FAILED_AGAIN, question=shown, why=result.why or result.outcome)
                    return
                self._note(texts.ANSWERED_LATE, question=shown)
                self._output.write_piece(result.text)
                self._end(result)
            if reply.message_id in self._of_conversation:
                self._remember(question, result.text)

    async def _cancel(self, reply: Reply) -> None:
        try:
            await reply.cancel()
        except ClientError as error:
            self._interrupted = self._is_stopping = False
            self._output.note(str(error))

    async def _wait(self, task: asyncio.Task[Any], *, keep: bool = False) -> bool:
        """Wait for a task or Ctrl-C; False if Ctrl-C came first, which cancels the task unless `keep`."""
        is_completed = await completes_first(task, self._ctrl_c.wait(), keep=keep)
        self._ctrl_c.clear()
        return is_completed
