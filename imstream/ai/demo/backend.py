"""What the demo backend does with a call: as an ASGI application, without the server around it."""

from __future__ import annotations

import asyncio
import math
import random
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from imstream.ai.demo import moderation, protocol
from imstream.ai.demo.caller import EVENTS, JSON, BodyTooBig, Caller, Gone
from imstream.ai.demo.marker import Fault, Marker, read

if TYPE_CHECKING:
    from imstream.ai.demo.caller import Message, Receive, Send
    from imstream.ai.demo.settings import DemoSettings

MAX_COUNTED = 1000
"""Questions whose calls are counted; of more, the one not asked for longest is forgotten and starts anew."""

_SERVED = "served are /v1/chat/completions, /v1/moderations, /v1/models"

_EARLY = 0.002
"""Seconds that a delta may be early: timers are, and waiting for the rest of a millisecond doubles what it costs."""


@dataclass(slots=True)
class Stats:
    """What happened since the start.

    Attributes:
        calls: Chat completions that were asked for.
        running: Those being answered now.
        answered: Those answered in full.
        faulty: Those that went wrong as they were meant to.
        abandoned: Those whose caller left before the end.
        moderations: Calls of the moderation, of which each may be about several texts.
        flagged: Texts that it flagged.
    """

    calls: int = 0
    running: int = 0
    answered: int = 0
    faulty: int = 0
    abandoned: int = 0
    moderations: int = 0
    flagged: int = 0


class DemoBackend:
    """The demo backend as an ASGI application."""

    def __init__(self, settings: DemoSettings) -> None:
        self.stats = Stats()
        self._settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311 - draws faults, no secrets
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        caller = Caller(receive, send)
        try:
            match scope["method"], scope["path"]:
                case "POST", "/v1/chat/completions":
                    await self._chat(caller)
                case "POST", "/v1/moderations":
                    await self._moderate(caller)
                case "GET", "/v1/models":
                    await caller.reply(200, protocol.models())
                case "GET", "/stats":
                    await caller.reply(200, protocol.stats(asdict(self.stats)))
                case _:
                    await caller.reply(404, protocol.error("not_found", _SERVED))
        except Gone:
            pass  # nobody is left to be told
        finally:
            caller.close()

    async def _chat(self, caller: Caller) -> None:
        try:
            ask = protocol.parse(await caller.body())
        except BodyTooBig:
            return await caller.reply(413, protocol.error("invalid_request_error", "the body is too big"))
        except protocol.BadAsk as bad:
            return await caller.reply(400, protocol.error("invalid_request_error", str(bad)))
        self.stats.calls += 1
        self.stats.running += 1
        try:
            await self._attend(caller, ask)
        except Gone:
            self.stats.abandoned += 1
        finally:
            self.stats.running -= 1
        return None

    async def _attend(self, caller: Caller, ask: protocol.Ask) -> None:
        marker = read(ask.question)[1]
        fault = self._draw() if not marker.faults() else marker.fault_of(self._count(ask.question))
        if fault is not None:
            self.stats.faulty += 1
        if await self._refuse(caller, fault, marker):
            return
        await (self._stream if ask.stream else self._whole)(caller, ask, marker, fault)
        if fault is None:
            self.stats.answered += 1
            self._counts.pop(ask.question, None)  # asked again, it goes wrong again: good for showing

    async def _moderate(self, caller: Caller) -> None:
        try:
            texts = moderation.parse(await caller.body())
        except BodyTooBig:
            return await caller.reply(413, protocol.error("invalid_request_error", "the body is too big"))
        except protocol.BadAsk as bad:
            return await caller.reply(400, protocol.error("invalid_request_error", str(bad)))
        self.stats.moderations += 1
        fault = self._draw()
        if await self._refuse(caller, fault, Marker()):
            return None
        await caller.pause(self._settings.first.total_seconds())
        found = [moderation.categories(text) for text in texts]
        self.stats.flagged += sum(map(bool, found))
        body = moderation.answer(found)
        if fault is None:
            return await caller.reply(200, body)
        await caller.start(200, JSON)
        await caller.write(body[: len(body) // 2])
        return await _go_wrong(caller, fault)

    async def _refuse(self, caller: Caller, fault: Fault | None, marker: Marker) -> bool:
        """Go wrong before there is an answer, if that is the fault; whether it was."""
        match fault:
            case Fault.FAIL:
                status = marker.status if marker.fail else self._random.choice((500, 503))
                await caller.reply(status, protocol.error("demo_failure", "failed, as this demo was told to"))
            case Fault.BUSY:
                wait = marker.after if marker.after is not None else self._settings.retry_after
                header = (b"retry-after", b"%d" % math.ceil(wait.total_seconds()))
                await caller.reply(429, protocol.error("rate_limit_exceeded", "busy, as told to be"), header)
            case Fault.HANG:
                await caller.silence()
            case _:
                return False
        return True

    async def _stream(self, caller: Caller, ask: protocol.Ask, marker: Marker, fault: Fault | None) -> None:
        answer = protocol.Answer(ask, self._settings.length)
        events = answer.events()
        await caller.pause(self._first(marker))
        await caller.start(200, EVENTS)
        pace = self._pace(marker)
        if fault is not None:
            await _send(caller, events[: len(events) // 2], pace)
            return await _go_wrong(caller, fault)
        if pace <= 0:  # a fast backend's whole answer arrives in a read or two
            return await caller.write(b"".join(events) + answer.ending(), more=False)
        await _send(caller, events, pace)
        return await caller.write(answer.ending(), more=False)

    async def _whole(self, caller: Caller, ask: protocol.Ask, marker: Marker, fault: Fault | None) -> None:
        answer = protocol.Answer(ask, self._settings.length)
        body = answer.whole()
        await caller.pause(self._first(marker) + self._pace(marker) * answer.deltas)
        if fault is None:
            return await caller.reply(200, body)
        await caller.start(200, JSON)
        await caller.write(body[: len(body) // 2])
        return await _go_wrong(caller, fault)

    def _first(self, marker: Marker) -> float:
        return (self._settings.first if marker.first is None else marker.first).total_seconds()

    def _pace(self, marker: Marker) -> float:
        return (self._settings.pace if marker.pace is None else marker.pace).total_seconds()

    def _draw(self) -> Fault | None:
        """A fault by the rates. Each rate is the share of the calls that no earlier rate took."""
        given = self._settings
        rates = {
            Fault.FAIL: given.fail_rate,
            Fault.BUSY: given.busy_rate,
            Fault.HANG: given.hang_rate,
            Fault.BREAK: given.break_rate,
        }
        return next((fault for fault, rate in rates.items() if rate and self._random.random() < rate), None)

    def _count(self, question: str) -> int:
        """How often this very question was called before, since it was last answered."""
        before = self._counts.pop(question, 0)
        self._counts[question] = before + 1
        if len(self._counts) > MAX_COUNTED:
            self._counts.popitem(last=False)
        return before


async def _send(caller: Caller, events: list[bytes], pace: float) -> None:
    """Send the events by the clock: one that is late goes out together with those that are due."""
    if pace <= 0:
        return await caller.write(b"".join(events))
    now = asyncio.get_running_loop().time
    begin, sent = now(), 0
    while sent < len(events):
        due = min(len(events), int((now() - begin + _EARLY) / pace) + 1)
        if due > sent:
            await caller.write(b"".join(events[sent:due]))
            sent = due
        await caller.pace(begin + sent * pace - now())
    return None


async def _go_wrong(caller: Caller, fault: Fault) -> None:
    """Half of the answer is out; break it off in the way asked for."""
    if fault is Fault.STALL:
        await caller.silence()
    if fault is Fault.UNENDED:
        await caller.write(b"", more=False)
    # BREAK: an answer that is never ended is cut by the server.
