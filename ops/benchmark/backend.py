"""The AI backend of the benchmark: answers of 32 deltas that cost very little CPU.

It implements the streaming part of OpenAI's protocol over HTTP/1.1 with keep-alive and chunked encoding, one chunk for
each event. A question that contains `paced` gets a delta every 20 ms; others get all deltas in four writes. Texts carry
times of CLOCK_MONOTONIC, which all processes share: the first delta the time of the request (`#` and microseconds),
paced deltas the time of their write (`@` and microseconds).

The question itself can ask for another answer: `counted KEY DELTAS MILLISECONDS` for numbered deltas at this interval,
whose text the client can check; `broken` for an answer that ends in the middle; `silent` for none.

It also moderates: it flags nothing and counts the texts (`GET /v1/moderated`).
"""

import argparse
import asyncio
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import uvloop

from ops.http_server import LAST_CHUNK, HttpConnection, HttpServer, chunked, event, head

DELTAS = 32
PACE = 0.020
"""Interval between two deltas of a paced answer, in seconds."""

WRITES = 4
"""Number of writes of an answer that is not paced."""

TICK = 0.001
"""Interval of the one timer that writes all paced answers, in seconds."""

SLOTS = 4096
"""Maximum interval between two deltas, in ticks."""

_COUNTED = re.compile(rb"counted (\d+) (\d+) (\d+)")

_HEAD = head(200, "text/event-stream; charset=utf-8", "chunked", {"Cache-Control": "no-cache"})
_COMMON = '"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"bench",'

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
"""OpenAI's complete result for a text without findings."""


def _chunk(data: str) -> bytes:
    return chunked(event(data.encode()))


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
_DONE = _chunk("[DONE]") + LAST_CHUNK
_MIDDLE = [_delta(f" word{number:02}") for number in range(1, DELTAS)]


@dataclass(slots=True)
class PacedAnswer:
    """An answer under way: `deltas` are left, the last of them together with `last`."""

    connection: HttpConnection
    deltas: Iterator[bytes]
    left: int
    last: bytes
    interval: int

    def step(self) -> bool:
        """Write the next delta; whether another one follows."""
        if self.connection.transport.is_closing():
            return False
        self.left -= 1
        delta = next(self.deltas)
        self.connection.transport.write(delta if self.left else delta + self.last)
        if not self.left:
            self.connection.finish()
        return self.left > 0


class Backend:
    """Answers the requests of the services. One timer writes the deltas of all paced answers."""

    def __init__(self) -> None:
        self._due: list[list[PacedAnswer]] = [[] for _ in range(SLOTS)]
        self._now = 0
        self._moderated = 0

    def answer(self, connection: HttpConnection) -> None:
        """Begin the answer to a request."""
        match connection.target:
            case "/v1/moderations":
                given = json.loads(connection.body)["input"]
                number = 1 if isinstance(given, str) else len(given)
                self._moderated += number
                _reply(connection, b'{"id":"modr-0","model":"bench","results":[%b]}' % b",".join([_CLEAN] * number))
            case "/v1/moderated":
                _reply(connection, b"%d" % self._moderated)
            case _:
                self._chat(connection)

    def _chat(self, connection: HttpConnection) -> None:
        body = connection.body
        last = _FINISH + (_USAGE if b"include_usage" in body else b"") + _DONE
        if counted := _COUNTED.search(body):
            key, count, milliseconds = map(int, counted.groups())
            deltas = map(_delta, counted_deltas(key, count))
            connection.transport.write(_HEAD)
            self._begin(PacedAnswer(connection, deltas, count, last, milliseconds), now=True)
        elif b"broken" in body:
            connection.transport.write(_HEAD + _MIDDLE[0])
            connection.close()
        elif b"paced" in body:
            connection.transport.write(_HEAD + _delta(f"#{_microseconds()} "))
            times = (_delta(f" @{_microseconds()}") for _ in range(1, DELTAS))
            self._begin(PacedAnswer(connection, times, DELTAS - 1, last, round(PACE / TICK)))
        elif b"silent" not in body:
            _write_rest(connection, iter([_HEAD + _delta(f"#{_microseconds()} "), *_MIDDLE]), last)

    def _begin(self, answer: PacedAnswer, *, now: bool = False) -> None:
        if not now or answer.step():
            self._due[(self._now + answer.interval) % SLOTS].append(answer)

    async def run(self) -> None:
        """Write due deltas until cancelled. Late ticks are caught up with."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += TICK
            await asyncio.sleep(due - loop.time())
            self._now = (self._now + 1) % SLOTS
            answers, self._due[self._now] = self._due[self._now], []
            for answer in answers:
                self._begin(answer, now=True)


def _reply(connection: HttpConnection, body: bytes) -> None:
    connection.transport.write(head(200, "application/json", len(body)) + body)
    connection.finish()


def _write_rest(connection: HttpConnection, deltas: Iterator[bytes], last: bytes) -> None:
    """Write the next part, and schedule the one after it for the next iteration of the event loop."""
    part = b"".join(islice(deltas, DELTAS // WRITES))
    connection.transport.write(part or last)
    if part:
        asyncio.get_running_loop().call_soon(_write_rest, connection, deltas, last)
    else:
        connection.finish()


def counted_deltas(key: int, count: int) -> Iterator[str]:
    """The deltas of a counted answer."""
    return (f" {number:04}" if number else f"{key}:" for number in range(count))


async def serve(port: int) -> None:
    """Serve until the process ends."""
    backend = Backend()
    async with HttpServer(HttpConnection, backend.answer).listening("127.0.0.1", port):
        await backend.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
