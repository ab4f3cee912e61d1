"""The demo backend: answers requests, and runs in an event loop or as a process."""

import asyncio
import math
import random
import signal
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import uvloop
from aiohttp import web
from pydantic_core import to_json

from imstream.demo import protocol
from imstream.demo.marker import Fault, Marker, parse_marker
from imstream.demo.settings import DemoSettings

MAX_BODY = 8 * 1024 * 1024  # bytes of a request
MAX_COUNTED = 1000  # questions whose calls are counted; the least recently asked one is forgotten
_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_HEADERS = {"Cache-Control": "no-store", "Server": "imstream-demo (canned answers, no model)"}

_BACKLOG = 2048
_GRACE = 1  # seconds that running answers get when the server stops
_EARLY = 0.002  # seconds that a delta may be early, as timers are: to wait for the rest of a ms doubles the CPU cost


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


class DemoBackend:
    """Answers the calls of the demo backend."""

    def __init__(self, settings: DemoSettings) -> None:
        self.stats = Stats()
        self._settings = settings
        self._random = random.Random(settings.seed)  # noqa: S311 - draws faults, no secrets
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request. It is cancelled when the client closes the connection."""
        try:
            return await self._answer(request)
        except protocol.InvalidRequest as error:
            return _json(400, protocol.error("invalid_request_error", str(error)))
        except web.HTTPRequestEntityTooLarge:
            return _json(413, protocol.error("invalid_request_error", "the body is too large"))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        match request.method, request.path:
            case "POST", "/v1/chat/completions":
                return await self._complete(request, protocol.parse_completion(await request.read()))
            case "POST", "/v1/moderations":
                return await self._moderate(request, protocol.parse_moderation(await request.read()))
            case "GET", "/v1/models":
                return _json(200, protocol.models())
            case "GET", "/stats":
                return _json(200, to_json(asdict(self.stats)))
            case _:
                paths = "served are /v1/chat/completions, /v1/moderations, /v1/models"
                return _json(404, protocol.error("not_found", paths))

    async def _complete(self, request: web.Request, asked: protocol.CompletionRequest) -> web.StreamResponse:
        self.stats.calls += 1
        self.stats.running += 1
        try:
            marker = parse_marker(asked.question)[1]
            fault = self._draw() if not marker.faults() else marker.fault_of(self._count(asked.question))
            if fault is not None:
                self.stats.faulty += 1
            if (failure := await self._fail(fault, marker)) is not None:
                return failure
            response = await self._send_answer(request, asked, marker, fault)
            if fault is None:
                self.stats.answered += 1
                self._counts.pop(asked.question, None)  # the same question fails again: good for demonstrations
        except (ConnectionError, asyncio.CancelledError):
            self.stats.abandoned += 1
            raise
        else:
            return response
        finally:
            self.stats.running -= 1

    async def _moderate(self, request: web.Request, texts: list[str]) -> web.StreamResponse:
        self.stats.moderations += 1
        fault = self._draw()
        if (failure := await self._fail(fault, Marker())) is not None:
            return failure
        await asyncio.sleep(self._settings.first.total_seconds())
        flagged = [protocol.flagged_categories(text) for text in texts]
        self.stats.flagged += sum(map(bool, flagged))
        return await _respond_or_break(request, protocol.moderations(flagged), fault)

    async def _fail(self, fault: Fault | None, marker: Marker) -> web.Response | None:
        """The failure before the answer begins, if the fault is one of these."""
        match fault:
            case Fault.FAIL:
                status = marker.status if marker.fail else self._random.choice((500, 503))
                return _json(status, protocol.error("demo_failure", "failed, as configured"))
            case Fault.BUSY:
                retry_after = str(math.ceil(_seconds(marker.after, self._settings.retry_after)))
                return _json(429, protocol.error("rate_limit_exceeded", "busy, as configured"), retry_after)
            case Fault.HANG:
                await asyncio.Event().wait()
        return None

    async def _send_answer(
        self, request: web.Request, asked: protocol.CompletionRequest, marker: Marker, fault: Fault | None
    ) -> web.StreamResponse:
        answer = protocol.Answer(asked, self._settings.length, continues=self._settings.continues)
        first, pace = _seconds(marker.first, self._settings.first), _seconds(marker.pace, self._settings.pace)
        if not asked.stream:
            body = answer.whole()
            await asyncio.sleep(first + pace * len(answer.deltas))
            return await _respond_or_break(request, body, fault)
        events = answer.events()
        if fault is None:
            events[-1] += answer.ending()
        else:
            del events[len(events) // 2 :]
        await asyncio.sleep(first)
        response = await _open(request, _EVENTS)
        await _send_paced(response, events, pace)
        return response if fault is None else await _break_off(request, response, fault)

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


def _json(status: int, body: bytes, retry_after: str | None = None) -> web.Response:
    headers = {**_HEADERS, "Content-Type": _JSON, **({} if retry_after is None else {"Retry-After": retry_after})}
    return web.Response(status=status, body=body, headers=headers)


async def _open(request: web.Request, content_type: str) -> web.StreamResponse:
    """Send the head of a response whose body is streamed."""
    response = web.StreamResponse(headers={**_HEADERS, "Content-Type": content_type})
    await response.prepare(request)
    return response


async def _send_paced(response: web.StreamResponse, events: list[bytes], pace: float) -> None:
    """Send one event every `pace` seconds; a late one is sent together with those that are due."""
    now = asyncio.get_running_loop().time
    begin, sent = now(), 0
    while sent < len(events):
        due = int((now() - begin + _EARLY) / pace) + 1 if pace else len(events)
        if due > sent:
            await response.write(b"".join(events[sent:due]))
            sent = due
        await asyncio.sleep(begin + sent * pace - now())


async def _respond_or_break(request: web.Request, body: bytes, fault: Fault | None) -> web.StreamResponse:
    """A whole JSON response, or half of one, which is sent."""
    if fault is None:
        return _json(200, body)
    response = await _open(request, _JSON)
    await response.write(body[: len(body) // 2])
    return await _break_off(request, response, fault)


async def _break_off(request: web.Request, response: web.StreamResponse, fault: Fault) -> web.StreamResponse:
    if fault is Fault.STALL:
        await asyncio.Event().wait()
    elif fault is not Fault.UNENDED and request.transport is not None:
        request.transport.close()
    return response


@asynccontextmanager
async def serving(settings: DemoSettings) -> AsyncIterator[str]:
    """Serve in this event loop while the context is open; yield the base URL, which ends in `/v1`."""
    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_route("*", "/{path:.*}", DemoBackend(settings).answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_GRACE)
    await runner.setup()
    try:
        listener = socket.create_server((settings.host, settings.port), backlog=_BACKLOG)
        await web.SockSite(runner, listener).start()
        host, port = listener.getsockname()[:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


def run(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; call `announce` with the base URL. Raises `OSError` as `serving`."""
    uvloop.run(_serve(settings, announce))


async def _serve(settings: DemoSettings, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as url:
        announce(url)
        await stop.wait()
