"""The terminal client, `imstream chat`: one conversation, line by line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from datetime import timedelta

from imstream.cli.keyboard import Keyboard
from imstream.cli.screen import Screen, isolated
from imstream.client.client import Client
from imstream.client.connection import Connected, ConnectionChange
from imstream.client.errors import Busy, ClientError, RateLimited, SessionEnded, Unavailable
from imstream.client.reconnect import Timing
from imstream.client.reply import Accepted, Outcome, Piece, Reply, Restarted, Result
from imstream.texts import Lang, Text, localize
from imstream.wire import Turn

MAX_HISTORY = 32_768
"""Most bytes of earlier messages that are sent along; the oldest are left out. A node takes 64 KiB a frame."""

LONGEST_PAUSE = timedelta(minutes=2)
"""For longer nobody is kept waiting: a quota of the day, localize, that is used up."""

RETRY = timedelta(seconds=3)
"""Wait before a message is sent again when the server did not say how long."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 and the number of the signal."""


def run(url: str, user: int, token: str | None, lang: Lang, *, timing: Timing | None = None) -> int:
    """Chat until standard input ends; the exit code: 0, or 1 when there was no connection or a message no answer."""
    try:
        return asyncio.run(_chat(url, user, token, lang, timing))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ClientError, ValueError) as error:
        Screen().note(str(error))
        return 1
    except BrokenPipeError:  # nobody reads the answers any more, as in `… | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Leave(Exception):  # noqa: N818 - no error: Ctrl-C, twice
    """The person wants to be gone at once."""


async def _chat(url: str, user: int, token: str | None, lang: Lang, timing: Timing | None) -> int:
    screen = Screen()
    changes = _Changes(screen, lang)
    async with Client(url, user, token=token, lang=lang, timing=timing, on_change=changes.tell) as client:
        return await _Chat(client, screen, lang).run()


class _Chat:
    """One conversation with one person."""

    def __init__(self, client: Client, screen: Screen, lang: Lang) -> None:
        self._client = client
        self._screen = screen
        self._lang = lang
        self._keyboard = Keyboard(sys.stdin.fileno())
        self._history: list[Turn] = []
        self._interrupt = asyncio.Event()

    async def run(self) -> int:
        # Until here Ctrl-C ended the program; from here on its meaning depends on what is going on.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt.set)
        unanswered = 0
        try:
            while (line := await self._next_line()) is not None:
                unanswered += not await self._ask(line)
        except _Leave:
            return INTERRUPTED
        self._screen.goodbye()
        return 1 if unanswered and not sys.stdin.isatty() else 0

    async def _next_line(self) -> str | None:
        """The next line with something in it; None at the end of the input, or on Ctrl-C."""
        while True:
            self._screen.prompt()
            reading = asyncio.create_task(self._keyboard.line())
            line = reading.result() if await self._first(reading) else None
            if line is None or line.strip():
                return line

    async def _ask(self, line: str) -> bool:
        """Send a message, again while the server is busy, and show the answer. Whether there was a whole one."""
        message_id = uuid.uuid4().hex
        try:
            while True:
                reply = await self._client.send(line, history=self._history, message_id=message_id)
                try:
                    result = await self._follow(reply)
                    break
                except (Busy, RateLimited, Unavailable) as refusal:
                    if not await self._pause(refusal.retry_after or RETRY, str(refusal)):
                        return False
        except SessionEnded:
            raise
        except ClientError as error:
            self._screen.note(str(error))
            return False
        self._remember(line, result)
        return result.outcome is Outcome.DONE

    async def _pause(self, wait: timedelta, why: str) -> bool:
        """Wait before sending again; False when the person gives up, or would wait for too long."""
        if wait > LONGEST_PAUSE:
            self._screen.note(why)
            return False
        seconds = f"{wait.total_seconds():.0f}"
        self._screen.note(localize(Text.CHAT_RETRY, self._lang, why=isolated(why), seconds=seconds))
        return await self._first(asyncio.create_task(asyncio.sleep(wait.total_seconds())))

    async def _follow(self, reply: Reply) -> Result:
        """Show an answer until it ends. Ctrl-C cancels it, a second one leaves."""
        showing = asyncio.create_task(self._show(reply))
        tasks: list[asyncio.Task[object]] = [showing]
        try:
            while not await self._first(showing, keep=True):
                if len(tasks) > 1:
                    raise _Leave
                self._screen.note(localize(Text.CHAT_CANCELLING, self._lang))
                tasks.append(asyncio.create_task(self._cancel(reply)))
            return showing.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _show(self, reply: Reply) -> Result:
        async for event in reply.events():
            if isinstance(event, Accepted):
                if (event.position or 0) > 1:
                    self._screen.note(localize(Text.ACCEPTED, self._lang, position=event.position))
            elif isinstance(event, Restarted):
                self._screen.note(localize(Text.RESTART, self._lang))
            elif isinstance(event, Piece):
                self._screen.piece(event.text)
            elif event.outcome is Outcome.DONE:
                self._screen.whole(event.text)
            else:
                self._screen.note(event.why or event.outcome)
        return await reply.result()

    async def _cancel(self, reply: Reply) -> None:
        try:
            await reply.cancel()
        except ClientError as error:
            self._screen.note(str(error))

    async def _first(self, task: asyncio.Task[object], *, keep: bool = False) -> bool:
        """Wait for a task or for Ctrl-C; False when Ctrl-C came first. The task is cancelled then, unless kept."""
        interrupted = asyncio.create_task(self._interrupt.wait())
        try:
            await asyncio.wait({task, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            interrupted.cancel()
            if not task.done() and not keep:
                task.cancel()
                await asyncio.wait({task})
        self._interrupt.clear()
        return task.done() and not task.cancelled()

    def _remember(self, line: str, result: Result) -> None:
        """Keep what was said, as far as the next message may carry it along."""
        if result.outcome is Outcome.DONE or (result.outcome is Outcome.CANCELLED and result.text):
            self._history += [Turn(role="user", content=line), Turn(role="assistant", content=result.text)]
        while sum(len(turn.content.encode()) for turn in self._history) > MAX_HISTORY:
            del self._history[:2]


class _Changes:
    """Tells about the connection."""

    def __init__(self, screen: Screen, lang: Lang) -> None:
        self._screen = screen
        self._lang = lang
        self._greeted = False

    def tell(self, change: ConnectionChange) -> None:
        if isinstance(change, Connected):
            again = Text.CHAT_RESUMED if change.resumed else Text.CHAT_BACK
            text = localize(again if self._greeted else Text.CHAT_WELCOME, self._lang, url=isolated(change.url))
            self._greeted = True
        else:
            seconds = f"{change.retry_in.total_seconds():.1f}"
            text = localize(Text.CHAT_LOST, self._lang, why=isolated(change.why), seconds=seconds)
        self._screen.note(text)
