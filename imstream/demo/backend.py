"""The demo backend: answers requests, and runs in an event loop or as a process."""

import asyncio
import math
import random
import signal
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import uvloop
from pydantic_core import to_json

from imstream.demo import http_server, protocol
from imstream.demo.http_server import HttpConnection, HttpServer, head
from imstream.demo.marker import Fault, Marker, parse_marker
from imstream.demo.settings import DemoSettings

MAX_COUNTED = 1000  # questions whose calls are counted; the least recently asked one is forgotten
_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_HEADERS = {"Cache-Control": "no-store", "Server": "imstream-demo (canned answers, no model)"}

_GRACE = 1  # seconds that running answers get when the server stops
_EARLY = 0.002
"""Seconds that a delta may be early: timers are, and waiting for the rest of a millisecond doubles the CPU cost."""


@dataclass(slots=True)
class Stats:
    """Calls of chat completions and moderations since the start, and texts flagged.

    `faulty` calls failed as configured; the client of `abandoned` ones closed the connection.
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

    async def respond(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole JSON response."""
        response_head = head(status, _JSON, len(body), {**_HEADERS, **(headers or {})})
        await self.write(response_head + body * (self.method != "HEAD"))

    async def open(self, content_type: str) -> None:
        """Send the head of a response whose body is streamed."""
        await self.start(content_type=content_type, headers=_HEADERS)

    async def sleep(self, seconds: float | None) -> None:
        """Sleep; None: until the client closes the connection. Raises `ConnectionResetError` if it does."""
        if seconds is None or seconds > 0:
            await asyncio.wait((self.closed_by_peer,), timeout=seconds)
            await self.write(b"")

    async def send_paced(self, events: list[bytes], pace: float) -> None:
        """Send one event every `pace` seconds; a late one is sent together with those that are due."""
        if pace <= 0:
            return await self.send(b"".join(events))
        now = asyncio.get_running_loop().time
        begin, sent = now(), 0
        while sent < len(events):
            due = min(len(events), int((now() - begin + _EARLY) / pace) + 1)
            if due > sent:
                await self.send(b"".join(events[sent:due]))
                sent = due
            await asyncio.sleep(begin + sent * pace - now())
        return None

    async def respond_or_break(self, body: bytes, fault: Fault | None) -> None:
        """Send a whole JSON response, or half of one."""
        if fault is None:
            return await self.respond(200, body)
        await self.open(_JSON)
        await self.send(body[: len(body) // 2])
        return await self.break_off(fault)

    async def break_off(self, fault: Fault) -> None:
        """Stop in the middle of a response."""
        if fault is Fault.STALL:
            await self.sleep(None)
        elif fault is Fault.UNENDED:
            await self.end()
        else:
            self.close()


class DemoBackend:
    """Answers the calls of the demo backend."""

    def __init__(self, settings: DemoSettings) -> None:
        self.stats = Stats()
        self._settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311 - draws faults, no secrets
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def answer(self, call: DemoCall) -> None:
        """Answer a request. Raises `ConnectionError` if the client closes the connection."""
        too_large = len(call.body) > http_server.MAX_BODY
        try:
            match call.method, call.target.partition("?")[0]:
                case "POST", "/v1/chat/completions" | "/v1/moderations" if too_large:
                    await call.respond(413, protocol.error("invalid_request_error", "the body is too large"))
                case "POST", "/v1/chat/completions":
                    await self._complete(call, protocol.parse_completion(call.body))
                case "POST", "/v1/moderations":
                    await self._moderate(call, protocol.parse_moderation(call.body))
                case "GET", "/v1/models":
                    await call.respond(200, protocol.models())
                case "GET", "/stats":
                    await call.respond(200, to_json(asdict(self.stats)))
                case _:
                    paths = "served are /v1/chat/completions, /v1/moderations, /v1/models"
                    await call.respond(404, protocol.error("not_found", paths))
        except protocol.InvalidRequest as error:
            await call.respond(400, protocol.error("invalid_request_error", str(error)))

    async def _complete(self, call: DemoCall, request: protocol.CompletionRequest) -> None:
        self.stats.calls += 1
        self.stats.running += 1
        try:
            marker = parse_marker(request.question)[1]
            fault = self._draw() if not marker.faults() else marker.fault_of(self._count(request.question))
            if fault is not None:
                self.stats.faulty += 1
            if await self._fail(call, fault, marker):
                return
            await self._send_answer(call, request, marker, fault)
            if fault is None:
                self.stats.answered += 1
                self._counts.pop(request.question, None)  # the same question fails again: good for demonstrations
        except ConnectionError:
            self.stats.abandoned += 1
            raise
        finally:
            self.stats.running -= 1

    async def _moderate(self, call: DemoCall, texts: list[str]) -> None:
        self.stats.moderations += 1
        fault = self._draw()
        if await self._fail(call, fault, Marker()):
            return
        await call.sleep(self._settings.first.total_seconds())
        flagged = [protocol.flagged_categories(text) for text in texts]
        self.stats.flagged += sum(map(bool, flagged))
        await call.respond_or_break(protocol.moderations(flagged), fault)

    async def _fail(self, call: DemoCall, fault: Fault | None, marker: Marker) -> bool:
        """Fail before the answer begins, if the fault is one of these; return whether it was."""
        match fault:
            case Fault.FAIL:
                status = marker.status if marker.fail else self._random.choice((500, 503))
                await call.respond(status, protocol.error("demo_failure", "failed, as this demo was told to"))
            case Fault.BUSY:
                header = {"Retry-After": str(math.ceil(_seconds(marker.after, self._settings.retry_after)))}
                await call.respond(429, protocol.error("rate_limit_exceeded", "busy, as told to be"), header)
            case Fault.HANG:
                await call.sleep(None)
            case _:
                return False
        return True

    async def _send_answer(
        self, call: DemoCall, request: protocol.CompletionRequest, marker: Marker, fault: Fault | None
    ) -> None:
        answer = protocol.Answer(request, self._settings.length)
        first, pace = _seconds(marker.first, self._settings.first), _seconds(marker.pace, self._settings.pace)
        if not request.stream:
            body = answer.whole()
            await call.sleep(first + pace * len(answer.deltas))
            return await call.respond_or_break(body, fault)
        events = answer.events()
        await call.sleep(first)
        await call.open(_EVENTS)
        if fault is not None:
            await call.send_paced(events[: len(events) // 2], pace)
            return await call.break_off(fault)
        if pace <= 0:  # in one write, as a fast backend's answer arrives in a read or two
            return await call.end(b"".join(events) + answer.ending())
        await call.send_paced(events, pace)
        return await call.end(answer.ending())

    def _draw(self) -> Fault | None:
        """Draw a fault by the configured rates, each a share of the calls that no earlier rate has drawn."""
        rates = {
            Fault.FAIL: self._settings.fail_rate,
            Fault.BUSY: self._settings.busy_rate,
            Fault.HANG: self._settings.hang_rate,
            Fault.BREAK: self._settings.break_rate,
        }
        return next((fault for fault, rate in rates.items() if rate and self._random.random() < rate), None)

    def _count(self, question: str) -> int:
        """Count a call of this question; return the number of calls before, since it was last answered."""
        before = self._counts.pop(question, 0)
        self._counts[question] = before + 1
        if len(self._counts) > MAX_COUNTED:
            self._counts.popitem(last=False)
        return before


def _seconds(own: timedelta | None, default: timedelta) -> float:
    """Seconds of a time in a marker, or of the configured one."""
    return (default if own is None else own).total_seconds()


@asynccontextmanager
async def serving(settings: DemoSettings) -> AsyncIterator[str]:
    """Serve in this event loop while the context is open; yield the base URL, which ends in `/v1`."""
    server = HttpServer(DemoCall, DemoBackend(settings).answer)
    async with server.listening(settings.host, settings.port, grace=_GRACE) as (host, port):
        yield f"http://{host}:{port}/v1"


def run(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; call `announce` with the base URL. Raises `OSError` as `serving`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, announce))


async def _serve(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as url:
        announce(url)
        await stop.wait()
