"""The terminal client, `imstream chat`: a conversation at the keyboard, or one message from arguments or a pipe."""

import asyncio
import os
import re
import signal
import stat
import sys
import uuid
from contextlib import nullcontext, suppress
from datetime import timedelta

from imstream.cli import chat_commands as texts
from imstream.cli.chat_commands import StatusLine, copy
from imstream.cli.chat_input import EditingKeyboard, open_keyboard, without_echo
from imstream.cli.terminal import TerminalOutput
from imstream.cli.terminal_text import isolate_direction, shorten
from imstream.client.client import Client
from imstream.client.connection import Connected, ConnectionChange
from imstream.client.errors import Busy, ClientError, RateLimited, Refused, SessionEnded, Unavailable
from imstream.client.reconnect import Timing
from imstream.client.reply import Accepted, Outcome, Piece, Reply, Restarted, Result
from imstream.texts import Lang, Sentence, Text, localize
from imstream.user_ids import UserId
from imstream.wire import Turn

MAX_HISTORY = 32_768
"""Maximum size of the history sent with a message, in bytes; the oldest turns are dropped. A frame has up to 64 KiB."""

MAX_PAUSE = timedelta(minutes=2)
"""Maximum wait before sending again. A used-up daily quota, for example, would take longer."""

RETRY = timedelta(seconds=3)
"""Wait before sending again unless the server sent one."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal, as in shells."""

_TICK, _DRAW_INTERVAL = 0.25, 0.05
"""Seconds between two looks at the status, and between two pieces of text on a screen."""

_COMMAND = re.compile(r"/[a-z]+")
_SHOWN = 60
"""Columns of a question that a note names."""

CUTS = {"length": Text.CHAT_CUT, "content_filter": Text.CHAT_FILTERED}
"""What to say about answers that are not complete, by their finish reason."""


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
    """Chat until the input ends, or send one message: the question, what is piped, or both.

    Exit code 1: no connection, or the one message has no complete answer.
    """
    try:
        message = _single_message(question)
        if message == "":
            TerminalOutput().note(localize(texts.NOTHING_YET, lang))
            return 1
        return asyncio.run(_chat(url, user, token, lang, traceparent, message, timing))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ClientError, ValueError) as error:
        TerminalOutput().note(str(error))
        return 1
    except BrokenPipeError:  # the reader of the answers has ended, as in `… | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _single_message(question: str | None) -> str | None:
    """The question and what is piped; None if a person types. Beside a question, only pipes and files are read."""
    is_piped = not sys.stdin.isatty()
    if is_piped and question is not None:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    piped = sys.stdin.buffer.read().decode("utf-8", "replace") if is_piped else None
    given = [text.strip("\r\n") for text in (question, piped) if text is not None]
    return "\n\n".join(text for text in given if text.strip()) if given else None


async def _chat(  # noqa: PLR0913, PLR0917 - the same
    url: str,
    user: UserId,
    token: str | None,
    lang: Lang,
    traceparent: str | None,
    message: str | None,
    timing: Timing | None,
) -> int:
    output = TerminalOutput()
    is_first = True

    def on_change(change: ConnectionChange) -> None:
        nonlocal is_first
        if isinstance(change, Connected):
            again = Text.CHAT_RESUMED if change.resumed else Text.CHAT_BACK
            text = Text.CHAT_WELCOME if is_first else again
            if message is None or not is_first:
                output.note(localize(text, lang, url=isolate_direction(change.url)))
            is_first = False
        else:
            seconds = f"{change.retry_in.total_seconds():.1f}"
            output.note(localize(Text.CHAT_LOST, lang, why=isolate_direction(change.why), seconds=seconds))

    wants = ("status",) if output.is_live else ()
    client = Client(
        url,
        user,
        token=token,
        wants=wants,
        lang=lang,
        timing=timing,
        on_change=on_change,
        on_reopened=lambda reply: chat.on_reopened(reply),  # noqa: PLW0108 - `chat` follows
    )
    async with client:
        chat = _Chat(client, output, lang, traceparent)
        return await (chat.converse() if message is None else chat.ask_once(message))


class _Chat:
    """One conversation with one user."""

    def __init__(self, client: Client, output: TerminalOutput, lang: Lang, traceparent: str | None) -> None:
        self._client = client
        self._traceparent = traceparent
        self._output = output
        self._lang = lang
        self._history: list[Turn] = []
        self._last = ""  # question
        self._answer = ""
        self._of_conversation = set[str]()  # message ids
        self._ctrl_c = asyncio.Event()
        self._interrupted = False
        self._screen = asyncio.Lock()  # held while an answer is shown
        self._late = set[asyncio.Task[None]]()
        # Before this point Ctrl-C ends the program.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._ctrl_c.set)

    async def converse(self) -> int:
        """Answer what is typed, until the end of the input."""
        keyboard = open_keyboard(self._output, self._ctrl_c.set)
        with without_echo() if isinstance(keyboard, EditingKeyboard) else nullcontext():
            while (line := await keyboard.read()) is not None:
                self._ctrl_c.clear()
                if line.strip() == "/quit":
                    return 0
                message = self._obey(line.strip()) if _COMMAND.fullmatch(line.strip()) else line
                if message.strip():
                    await self._ask(message)
        self._output.end_line()
        return 0

    async def ask_once(self, message: str) -> int:
        """Ask one message; returns the exit code."""
        is_answered = await self._ask(message)
        return INTERRUPTED if self._interrupted else 1 - is_answered

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
                self._note(copy(self._answer, self._output.command), count=len(self._answer))
            case "/retry" | "/copy":
                self._note(texts.NOTHING_YET)
            case _:
                self._note(texts.UNKNOWN, name=command)
        return ""

    async def _ask(self, line: str) -> bool:
        """Send a message, again while the server is busy, and show the answer. Returns whether it is complete."""
        self._interrupted, self._last = False, line
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
        while sum(len(turn.content.encode()) for turn in self._history) > MAX_HISTORY:
            del self._history[:2]

    async def _pause(self, wait: timedelta, why: str) -> bool:
        """Wait before sending again; False after Ctrl-C, or if the wait would exceed `MAX_PAUSE`."""
        if wait > MAX_PAUSE:
            self._output.note(why)
            return False
        self._note(Text.CHAT_RETRY, why=isolate_direction(why), seconds=f"{wait.total_seconds():.0f}")
        self._interrupted = not await self._wait(asyncio.create_task(asyncio.sleep(wait.total_seconds())))
        return not self._interrupted

    async def _follow(self, reply: Reply) -> Result | None:
        """Show an answer until it ends. The first Ctrl-C cancels it; after the second one, it is left alone."""
        showing = asyncio.create_task(self._show(reply))
        tasks: list[asyncio.Task[object]] = [showing, asyncio.create_task(self._show_status(reply))]
        try:
            if await self._wait(showing, keep=True):
                return showing.result()
            self._interrupted = True
            self._note(Text.CHAT_CANCELLING)
            tasks.append(asyncio.create_task(self._cancel(reply)))
            if await self._wait(showing, keep=True):
                return showing.result()
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
                if (event.position or 0) > 1 and not self._output.is_live:
                    self._note(Text.ACCEPTED, position=event.position)
            elif isinstance(event, Restarted):
                self._output.end_answer()
                self._note(Text.RESTART)
            elif isinstance(event, Piece):
                self._output.write_piece(event.text)
                if self._output.is_live:  # then the next piece has all that arrives meanwhile
                    await asyncio.sleep(_DRAW_INTERVAL)
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
            self._output.status("" if reply.ended else line.text())
            await asyncio.sleep(_TICK)

    async def _show_late(self, reply: Reply) -> None:
        with suppress(ClientError):  # of the session, which tells it
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
            self._output.note(str(error))

    async def _wait(self, task: asyncio.Task[object], *, keep: bool = False) -> bool:
        """Wait for a task or Ctrl-C; False if Ctrl-C came first, which cancels the task unless `keep`."""
        ctrl_c = asyncio.create_task(self._ctrl_c.wait())
        try:
            await asyncio.wait({task, ctrl_c}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ctrl_c.cancel()
            if not task.done() and not keep:
                task.cancel()
                await asyncio.wait({task})
        self._ctrl_c.clear()
        return task.done() and not task.cancelled()
