"""What the demo backend does with a call."""

from __future__ import annotations

import asyncio
import math
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from imstream.demo import http_server, moderation, protocol
from imstream.demo.http_server import HttpConnection, head
from imstream.demo.marker import Fault, Marker, read
from imstream.demo.settings import DemoSettings

MAX_COUNTED = 1000
"""Questions whose calls are counted; of more, the one not asked for longest is forgotten and starts anew."""

_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_HEADERS = {"Cache-Control": "no-store", "Server": "imstream-demo (canned answers, no model)"}

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


class DemoCall(HttpConnection):
    """One call of the demo backend."""

    async def say(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole answer, which is JSON."""
        await self.raw(head(status, _JSON, len(body), {**_HEADERS, **(headers or {})}) + body * (self.method != "HEAD"))

    async def open(self, content_type: str) -> None:
        """Send the head of an answer whose body comes in pieces."""
        await self.start(content_type=content_type, headers=_HEADERS)

    async def pause(self, seconds: float | None) -> None:
        """Wait; without a limit until the caller leaves.

        Raises:
            ConnectionResetError: The caller left meanwhile.
        """
        if seconds is None or seconds > 0:
            await asyncio.wait((self.closed_by_peer,), timeout=seconds)
            await self.raw(b"")


class DemoBackend:
    """The demo backend."""

    def __init__(self, settings: DemoSettings) -> None:
        self.stats = Stats()
        self._settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311 - draws faults, no secrets
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def answer(self, caller: DemoCall) -> None:
        """Answer one HTTP request.

        Raises:
            ConnectionError: The caller left.
        """
        too_big = len(caller.body) > http_server.MAX_BODY
        try:
            match caller.method, caller.target.partition("?")[0]:
                case "POST", "/v1/chat/completions" | "/v1/moderations" if too_big:
                    await caller.say(413, protocol.error("invalid_request_error", "the body is too big"))
                case "POST", "/v1/chat/completions":
                    await self._chat(caller, protocol.parse(caller.body))
                case "POST", "/v1/moderations":
                    await self._moderate(caller, moderation.parse(caller.body))
                case "GET", "/v1/models":
                    await caller.say(200, protocol.models())
                case "GET", "/stats":
                    await caller.say(200, protocol.stats(asdict(self.stats)))
                case _:
                    await caller.say(404, protocol.error("not_found", _SERVED))
        except protocol.BadAsk as bad:
            await caller.say(400, protocol.error("invalid_request_error", str(bad)))

    async def _chat(self, caller: DemoCall, ask: protocol.Ask) -> None:
        self.stats.calls += 1
        self.stats.running += 1
        try:
            await self._attend(caller, ask)
        except ConnectionError:
            self.stats.abandoned += 1
            raise
        finally:
            self.stats.running -= 1

    async def _attend(self, caller: DemoCall, ask: protocol.Ask) -> None:
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

    async def _moderate(self, caller: DemoCall, texts: list[str]) -> None:
        self.stats.moderations += 1
        fault = self._draw()
        if await self._refuse(caller, fault, Marker()):
            return None
        await caller.pause(self._settings.first.total_seconds())
        found = [moderation.categories(text) for text in texts]
        self.stats.flagged += sum(map(bool, found))
        return await _tell(caller, moderation.answer(found), fault)

    async def _refuse(self, caller: DemoCall, fault: Fault | None, marker: Marker) -> bool:
        """Go wrong before there is an answer, if that is the fault; whether it was."""
        match fault:
            case Fault.FAIL:
                status = marker.status if marker.fail else self._random.choice((500, 503))
                await caller.say(status, protocol.error("demo_failure", "failed, as this demo was told to"))
            case Fault.BUSY:
                wait = marker.after if marker.after is not None else self._settings.retry_after
                header = {"Retry-After": str(math.ceil(wait.total_seconds()))}
                await caller.say(429, protocol.error("rate_limit_exceeded", "busy, as told to be"), header)
            case Fault.HANG:
                await caller.pause(None)
            case _:
                return False
        return True

    async def _stream(self, caller: DemoCall, ask: protocol.Ask, marker: Marker, fault: Fault | None) -> None:
        answer = protocol.Answer(ask, self._settings.length)
        events = answer.events()
        await caller.pause(self._first(marker))
        await caller.open(_EVENTS)
        pace = self._pace(marker)
        if fault is not None:
            await _send(caller, events[: len(events) // 2], pace)
            return await _go_wrong(caller, fault)
        if pace <= 0:  # a fast backend's whole answer arrives in a read or two
            return await caller.end(b"".join(events) + answer.ending())
        await _send(caller, events, pace)
        return await caller.end(answer.ending())

    async def _whole(self, caller: DemoCall, ask: protocol.Ask, marker: Marker, fault: Fault | None) -> None:
        answer = protocol.Answer(ask, self._settings.length)
        body = answer.whole()
        await caller.pause(self._first(marker) + self._pace(marker) * answer.deltas)
        await _tell(caller, body, fault)

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


async def _tell(caller: DemoCall, body: bytes, fault: Fault | None) -> None:
    """Send a whole answer, or half of it."""
    if fault is None:
        return await caller.say(200, body)
    await caller.open(_JSON)
    await caller.send(body[: len(body) // 2])
    return await _go_wrong(caller, fault)


async def _send(caller: DemoCall, events: list[bytes], pace: float) -> None:
    """Send the events by the clock: one that is late goes out together with those that are due."""
    if pace <= 0:
        return await caller.send(b"".join(events))
    now = asyncio.get_running_loop().time
    begin, sent = now(), 0
    while sent < len(events):
        due = min(len(events), int((now() - begin + _EARLY) / pace) + 1)
        if due > sent:
            await caller.send(b"".join(events[sent:due]))
            sent = due
        await asyncio.sleep(begin + sent * pace - now())
    return None


async def _go_wrong(caller: DemoCall, fault: Fault) -> None:
    """Half of the answer is out; break it off in the way asked for."""
    if fault is Fault.STALL:
        await caller.pause(None)
    elif fault is Fault.UNENDED:
        await caller.end()
    else:
        caller.drop()
