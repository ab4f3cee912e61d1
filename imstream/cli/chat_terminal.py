"""The terminal client, `imstream chat`: one conversation, line by line."""

import asyncio
import os
import signal
import sys
import uuid
from datetime import timedelta

from imstream.cli.terminal import LineReader, TerminalOutput, isolate_direction
from imstream.client.client import Client
from imstream.client.connection import Connected, ConnectionChange
from imstream.client.errors import Busy, ClientError, RateLimited, Refused, SessionEnded, Unavailable
from imstream.client.reconnect import Timing
from imstream.client.reply import Accepted, Outcome, Piece, Reply, Restarted, Result
from imstream.texts import Lang, Text, localize
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


def run(  # noqa: PLR0913 - the options of the command
    url: str,
    user: UserId,
    token: str | None,
    lang: Lang,
    traceparent: str | None = None,
    *,
    timing: Timing | None = None,
) -> int:
    """Chat until standard input ends. Exit code 1: no connection, or a message without a complete answer."""
    try:
        return asyncio.run(_chat(url, user, token, lang, traceparent, timing))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ClientError, ValueError) as error:
        TerminalOutput().note(str(error))
        return 1
    except BrokenPipeError:  # the reader of the answers has ended, as in `… | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


async def _chat(  # noqa: PLR0913, PLR0917 - the same
    url: str, user: UserId, token: str | None, lang: Lang, traceparent: str | None, timing: Timing | None
) -> int:
    output = TerminalOutput()
    is_first = True

    def on_change(change: ConnectionChange) -> None:
        nonlocal is_first
        if isinstance(change, Connected):
            again = Text.CHAT_RESUMED if change.resumed else Text.CHAT_BACK
            text = Text.CHAT_WELCOME if is_first else again
            is_first = False
            output.note(localize(text, lang, url=isolate_direction(change.url)))
        else:
            seconds = f"{change.retry_in.total_seconds():.1f}"
            output.note(localize(Text.CHAT_LOST, lang, why=isolate_direction(change.why), seconds=seconds))

    async with Client(url, user, token=token, lang=lang, timing=timing, on_change=on_change) as client:
        return await _Chat(client, output, lang, traceparent).run()


CUTS = {"length": Text.CHAT_CUT, "content_filter": Text.CHAT_FILTERED}
"""What to say about answers that are not complete, by their finish reason."""


class _Chat:
    """One conversation with one user."""

    def __init__(self, client: Client, output: TerminalOutput, lang: Lang, traceparent: str | None) -> None:
        self._client = client
        self._traceparent = traceparent
        self._output = output
        self._lang = lang
        self._input = LineReader(sys.stdin.fileno())
        self._history: list[Turn] = []
        self._ctrl_c = asyncio.Event()
        self._interrupted = False  # by a second Ctrl-C during one answer

    async def run(self) -> int:
        # Before this point Ctrl-C ends the program; from here on its meaning depends on the state of the chat.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._ctrl_c.set)
        unanswered = 0
        while (line := await self._next_line()) is not None:
            unanswered += not await self._ask(line)
            if self._interrupted:
                return INTERRUPTED
        self._output.end()
        return 1 if unanswered and not sys.stdin.isatty() else 0

    async def _next_line(self) -> str | None:
        """The next line that is not blank; None at the end of the input or after Ctrl-C."""
        while True:
            self._output.prompt()
            reading = asyncio.create_task(self._input.readline())
            line = reading.result() if await self._wait(reading) else None
            if line is None or line.strip():
                return line

    async def _ask(self, line: str) -> bool:
        """Send a message, again while the server is busy, and show the answer. Returns whether it is complete."""
        message_id, result = uuid.uuid4().hex, None
        try:
            while result is None and not self._interrupted:
                reply = await self._client.send(
                    line, history=self._history, message_id=message_id, traceparent=self._traceparent
                )
                try:
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
            self._history += [Turn(role="user", content=line), Turn(role="assistant", content=result.text)]
        while sum(len(turn.content.encode()) for turn in self._history) > MAX_HISTORY:
            del self._history[:2]
        return result.outcome is Outcome.DONE

    async def _pause(self, wait: timedelta, why: str) -> bool:
        """Wait before sending again; False after Ctrl-C, or if the wait would exceed `MAX_PAUSE`."""
        if wait > MAX_PAUSE:
            self._output.note(why)
            return False
        seconds = f"{wait.total_seconds():.0f}"
        self._output.note(localize(Text.CHAT_RETRY, self._lang, why=isolate_direction(why), seconds=seconds))
        return await self._wait(asyncio.create_task(asyncio.sleep(wait.total_seconds())))

    async def _follow(self, reply: Reply) -> Result | None:
        """Show an answer until it ends. The first Ctrl-C cancels the answer, the second one interrupts the program."""
        showing = asyncio.create_task(self._show(reply))
        tasks: list[asyncio.Task[object]] = [showing]
        try:
            if await self._wait(showing, keep=True):
                return showing.result()
            self._output.note(localize(Text.CHAT_CANCELLING, self._lang))
            tasks.append(asyncio.create_task(self._cancel(reply)))
            if await self._wait(showing, keep=True):
                return showing.result()
            self._interrupted = True
            return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _show(self, reply: Reply) -> Result:
        async for event in reply.events():
            if isinstance(event, Accepted):
                if (event.position or 0) > 1:
                    self._output.note(localize(Text.ACCEPTED, self._lang, position=event.position))
            elif isinstance(event, Restarted):
                self._output.note(localize(Text.RESTART, self._lang))
            elif isinstance(event, Piece):
                self._output.write_piece(event.text)
            elif isinstance(event, Result) and event.outcome is Outcome.DONE:
                self._output.end_answer(event.text)
                if (cut := CUTS.get(event.finish_reason or "")) is not None:
                    self._output.note(localize(cut, self._lang))
            elif isinstance(event, Result):
                self._output.note(event.why or event.outcome)
        return await reply.result()

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
