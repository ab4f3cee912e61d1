"""The AI backend of the benchmark: an answer of 32 deltas for next to no CPU, so that it is not what is measured.

It speaks the streaming part of OpenAI's protocol over HTTP/1.1 with keep-alive and chunked encoding, one chunk for each
event, as servers do. A question that contains `paced` gets a delta every 20 ms; any other gets all at once, in four
writes. Texts carry times of CLOCK_MONOTONIC, which is one clock for all processes: the first one when the request came
(`#` and microseconds), paced ones when they were written (`@` and microseconds).

It moderates, too, flags nothing, and counts the texts (`GET /v1/moderated`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from itertools import islice
from typing import TYPE_CHECKING, cast

import uvloop

if TYPE_CHECKING:
    from collections.abc import Iterator

DELTAS = 32
PACE = 0.020
"""Seconds between two deltas of a paced answer."""

WRITES = 4
"""Writes of an answer that is not paced."""

TICK = 0.001
"""Seconds between two looks at which paced answers are due: one timer for all of them."""

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_COMMON = '"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
_END = b"0\r\n\r\n"

_CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic"),
)
_CLEAN = json.dumps(
    {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.00012345678901),
        "category_applied_input_types": {name: ["text"] for name in _CATEGORIES},
    }
).encode()
"""What OpenAI answers for a text in which it finds nothing, in all its length."""


def _chunk(event: str) -> bytes:
    data = f"data: {event}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _choice(delta: str, finish_reason: str = "null") -> bytes:
    choice = f'{{"index":0,"delta":{{{delta}}},"finish_reason":{finish_reason}}}'
    return _chunk(f'{{{_COMMON}"choices":[{choice}]}}')


def _delta(text: str) -> bytes:
    return _choice(f'"content":"{text}"')


def _microseconds() -> int:
    return time.monotonic_ns() // 1000


_FINISH = _choice("", '"stop"')
_USAGE = _chunk(
    f'{{{_COMMON}"choices":[],"usage":{{"prompt_tokens":9,"completion_tokens":{DELTAS},"total_tokens":{9 + DELTAS}}}}}'
)
_DONE = _chunk("[DONE]")
_MIDDLE = [_delta(f" word{number:02}") for number in range(1, DELTAS)]


class Connection(asyncio.Protocol):
    """One connection; its requests come one after the other."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker
        self._received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(body) >= length:
            self._received = body[length:]
            match head.split(b" ", 2)[1]:
                case b"/v1/moderations":
                    self._moderate(body[:length])
                case b"/v1/moderated":
                    self._reply(b"%d" % self._ticker.moderated)
                case _:
                    self._answer(body[:length])

    def _moderate(self, body: bytes) -> None:
        given = json.loads(body)["input"]
        number = 1 if isinstance(given, str) else len(given)
        self._ticker.moderated += number
        self._reply(b'{"id":"modr-0","model":"bench","results":[%b]}' % b",".join([_CLEAN] * number))

    def _reply(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)

    def _answer(self, body: bytes) -> None:
        first = _delta(f"#{_microseconds()} ")
        last = _FINISH + (_USAGE if b"include_usage" in body else b"") + _DONE + _END
        if b"paced" in body:
            self.transport.write(_HEAD + first)
            self._ticker.add(self, last)
        else:
            self._write_rest(iter([_HEAD + first, *_MIDDLE]), last)

    def _write_rest(self, deltas: Iterator[bytes], last: bytes) -> None:
        """Write the next part, and the one after it in the next round of the event loop."""
        part = b"".join(islice(deltas, DELTAS // WRITES))
        if part:
            self.transport.write(part)
            asyncio.get_running_loop().call_soon(self._write_rest, deltas, last)
        else:
            self.transport.write(last)


class Ticker:
    """Writes the deltas of all paced answers when they are due; and what all connections count is here.

    Attributes:
        moderated: Texts that were moderated.
    """

    def __init__(self) -> None:
        self._due: list[list[tuple[Connection, int, bytes]]] = [[] for _ in range(round(PACE / TICK))]
        self._now = 0
        self.moderated = 0

    def add(self, connection: Connection, last: bytes) -> None:
        """The first delta of this answer has just been written."""
        self._due[self._now].append((connection, 1, last))

    async def run(self) -> None:
        """Tick until cancelled. A late tick is made up for by the next ones."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += TICK
            await asyncio.sleep(due - loop.time())
            self._now = (self._now + 1) % len(self._due)
            self._due[self._now] = [step for step in map(self._step, self._due[self._now]) if step is not None]

    @staticmethod
    def _step(answer: tuple[Connection, int, bytes]) -> tuple[Connection, int, bytes] | None:
        connection, written, last = answer
        if connection.transport.is_closing():
            return None
        delta = _delta(f" @{_microseconds()}")
        ended = written + 1 == DELTAS
        connection.transport.write(delta + last if ended else delta)
        return None if ended else (connection, written + 1, last)


async def serve(port: int) -> None:
    """Serve until the process is ended."""
    ticker = Ticker()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(ticker), "127.0.0.1", port, backlog=2048)
    async with server:
        await ticker.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
