"""Between the body of a response and the reader of its answer: passes text on, and keeps the event loop free."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter

from imstream.ai.answer_reader import AnswerReader
from imstream.ai.held_connection import HeldConnection
from imstream.ai.rollup import RollUp
from imstream.ai.time_limits import TimeLimits
from imstream.errors import BackendError

CHUNK = 16 * 1024  # bytes that are parsed, and characters that are passed on, in one turn of the event loop
MAX_BLOCKING = 0.005  # seconds after which large reads leave the event loop to others for as long as they used it


class Turn(asyncio.Lock):
    """Held by the answer that parses a large read."""

    def __init__(self) -> None:
        super().__init__()
        self._used = 0.0

    async def rest(self, used: float) -> None:
        """Leave the event loop to others for as long as it was used (seconds), once that is long enough."""
        self._used += used
        if self._used > MAX_BLOCKING:
            used, self._used = self._used, 0.0
            await asyncio.sleep(used)


@dataclass(slots=True, eq=False)
class Intake:
    """Feeds the reads of one answer to its reader, and passes the text on.

    Expensive reads (large ones, and the ends of large events) are deferred, and fed by `feed_deferred` in chunks. The
    answers that share `turn` do so one at a time, and leave the event loop to others in between.
    """

    reader: AnswerReader
    limits: TimeLimits
    on_text: Callable[[str], None]
    idle_timeout: timedelta
    turn: Turn
    rollup: RollUp
    slot: int = 0
    _begun: bool = False
    _may_rest: bool = False
    _resting: HeldConnection | None = None
    _deferred: bytes | None = None
    _text: str = ""

    def feed(self, data: bytes, *, defer: bool = True) -> bool:
        """Feed a read, or `b""` at the end of the body; return whether it takes another before `feed_deferred`."""
        reader = self.reader
        if defer and (len(data) > CHUNK or (reader.large and (b"\n" in data or not data))):
            self._deferred = data
            return False
        text = reader.feed(data) if data else reader.end()
        self._may_rest = text != ""  # before its first text, an answer is not delayed
        if text:
            if len(text) <= CHUNK:
                self.on_text(text)
            else:
                self._text = text
        if reader.progressed:
            if self._begun:
                self.limits.renew()
            else:
                self._begun = True
                self.limits.expect("idle_timeout", within=self.idle_timeout)
        elif not self._begun:
            self.limits.renew()  # a sign of life, such as a comment
        return not (self._text or ((reader.done or reader.finish_reason is not None) and reader.complete))

    def rest(self, connection: HeldConnection) -> None:
        """After a read: make the next one in the turn of this answer, if the node is busy and text is coming."""
        if self._may_rest and self.rollup.rest(self):
            self._resting = connection
            connection.hold()

    def wake(self) -> None:
        """See `Sleeper`."""
        connection, self._resting = self._resting, None
        if connection is not None:
            connection.release()

    async def feed_deferred(self) -> None:
        """Feed a deferred read."""
        data, self._deferred = self._deferred, None
        if data is None:
            await self._pass_on_text()
            return
        for begin in range(0, len(data) or 1, CHUNK):
            if self.reader.done:
                break
            async with self.turn:
                start = perf_counter()  # uvloop's clock does not advance within a turn
                try:
                    self.feed(data[begin : begin + CHUNK], defer=False)
                except BackendError as error:
                    error.__context__ = None  # it and the traceback hold the value, of any number of objects
                    raise error.with_traceback(None) from None
                finally:  # also after an answer that cannot be read
                    await self.turn.rest(perf_counter() - start)
                await self._pass_on_text()

    async def _pass_on_text(self) -> None:
        text, self._text = self._text, ""
        for begin in range(0, len(text), CHUNK):
            if begin:
                await asyncio.sleep(0)
            self.on_text(text[begin : begin + CHUNK])
