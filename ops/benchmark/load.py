"""The load generator: many sockets in one process with little CPU.

It prints `ready` when all sockets are logged in. For a line on standard input, each socket gets one answer to warm up,
and `warm` is printed; for the next line, the load is applied and the measurements are printed as one line of JSON; and
so on. The sockets stay open until standard input ends.

Loads: `burst` and `paced` (each socket sends its next CHAT when the last is answered), `single` (one chat after the
other, with pauses), `idle` (logged in only).

A message is one word; with `--talk` it is a few sentences in the middle of a conversation.
"""

import argparse
import asyncio
import gc
import json
import random
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import jwt
import uvloop

from ops.benchmark.backend import DELTAS, PACE
from ops.benchmark.websocket import WebSocket, encode

FIRST_USER = 20_001
OPENING = 50
"""Maximum number of sockets that are opened concurrently."""

DEADLINE = 60.0
"""Time limit for each step, in seconds; then the run fails."""

SENTENCES = (
    "I would like to understand how a message finds its way from one machine to another, and what happens when one "
    "of them stops in the middle of it. 请用简单的话解释一下,最好举一个例子。 Please keep it short!"
)
HISTORY = [
    {"role": role, "content": f"{number}. {SENTENCES}"} for number in range(1, 4) for role in ("user", "assistant")
]
"""The history of a message with `--talk`."""

_RECEIVED = re.compile(rb"#(\d+)")
_WRITTEN = re.compile(rb"@(\d+)")
_EVENT = b'"event":"'


@dataclass
class Seen:
    """The measurements of one run; times in seconds."""

    chats: int = 0
    frames: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    first: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    to_backend: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{n}": ordered[min(len(ordered) - 1, len(ordered) * n // 100)] for n in (50, 95, 99)}


@dataclass(frozen=True)
class Client:
    """Options of all sockets.

    Attributes:
        secret: Signs their tokens (HS256); None: no tokens.
        talk: Whether messages are in the middle of a conversation.
    """

    url: str
    secret: str | None
    talk: bool


class Socket(WebSocket):
    """One socket of one user, with at most one chat at a time."""

    def __init__(self, user: int, client: Client, seen: Seen) -> None:
        super().__init__(client.url, user)
        self._user = user
        self._client = client
        self._seen = seen
        self._chats = 0
        self._sent_at = 0.0
        self._has_text = False
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def upgraded(self, error: str | None) -> None:
        """The handshake is complete."""
        self._end(error)

    def lost(self, reason: str) -> None:
        """Fail the chat under way."""
        if not self.answered.done():
            self.answered.set_exception(ConnectionError(f"socket of user {self._user} was closed: {reason}"))

    def log_in(self) -> asyncio.Future[None]:
        """Send INIT; the future is done when it is answered."""
        frame: dict[str, object] = {"msgType": "INIT", "userId": self._user}
        if self._client.secret is not None:
            claims = {"sub": str(self._user), "exp": int(time.time()) + 3600}
            frame["token"] = jwt.encode(claims, self._client.secret, algorithm="HS256")
        return self._send(frame)

    def chat(self, contents: str) -> asyncio.Future[None]:
        """Send CHAT; the future is done when the answer has ended."""
        self._chats += 1
        self._has_text = False
        message_id = f"b{self._user}-{time.monotonic_ns()}"
        frame = {"msgType": "CHAT", "userId": self._user, "messageId": message_id, "contents": contents}
        if self._client.talk:
            frame |= {"contents": f"{contents}: {SENTENCES}", "history": HISTORY}
        self._sent_at = time.monotonic()
        return self._send(frame)

    def _send(self, frame: dict[str, object]) -> asyncio.Future[None]:
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(encode(json.dumps(frame)))
        return self.answered

    def received(self, payload: bytes) -> None:
        """Apply a frame."""
        self._seen.frames += 1
        at = payload.find(_EVENT) + len(_EVENT)
        event = payload[at : at + 3] if at >= len(_EVENT) else b""
        if event == b"del":
            self._on_delta(payload)
        elif event == b"don":
            self._seen.chats += 1
            self._seen.done.append(time.monotonic() - self._sent_at)
            self._end(None)
        elif b'"msgType":"INIT"' in payload:
            self._end(None)
        elif event != b"acc":
            self._end(payload.decode())

    def _on_delta(self, payload: bytes) -> None:
        now = time.monotonic()
        if not self._has_text:
            self._has_text = True
            self._seen.first.append(now - self._sent_at)
            if received := _RECEIVED.search(payload):
                self._seen.to_backend.append(int(received[1]) / 1e6 - self._sent_at)
        for written in _WRITTEN.findall(payload):
            self._seen.late.append(now - int(written) / 1e6)

    def _end(self, error: str | None) -> None:
        if error is not None:
            self._seen.errors.append(error)
        if not self.answered.done():
            self.answered.set_result(None)


async def open_sockets(client: Client, count: int, seen: Seen) -> list[Socket]:
    """Open and log in all sockets."""
    parts = urlsplit(client.url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    gate = asyncio.Semaphore(OPENING)
    loop = asyncio.get_running_loop()

    async def open_one(user: int) -> Socket:
        async with gate:
            _, socket = await loop.create_connection(lambda: Socket(user, client, seen), host, port)
            await socket.answered  # the upgrade
            await socket.log_in()
            return socket

    return await asyncio.gather(*(open_one(FIRST_USER + number) for number in range(count)))


async def make_load(sockets: Sequence[Socket], load: str, seconds: float) -> None:
    """Apply the load for about `seconds`, and wait for the last answers."""
    end = time.monotonic() + seconds

    async def closed_loop(socket: Socket) -> None:
        if load == "paced":  # users do not start in the same millisecond
            await asyncio.sleep(random.uniform(0, DELTAS * PACE))  # noqa: S311 - spreading load
        while time.monotonic() < end:
            await socket.chat(load)

    async def one_by_one(socket: Socket) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(random.uniform(0.01, 0.03))  # noqa: S311 - not in step with the service
            await socket.chat(load)

    one = one_by_one if load == "single" else closed_loop
    await asyncio.gather(*map(one, sockets))


def _summary(seen: Seen) -> str:
    summary = asdict(seen)
    for name in ("first", "done", "to_backend", "late"):
        summary[name] = quantiles(summary[name])
    summary["errors"] = {"count": len(seen.errors), "first": seen.errors[:1]}
    return json.dumps(summary)


async def _line() -> str:
    """Read a line of standard input; empty at its end."""
    return await asyncio.to_thread(sys.stdin.readline)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def run(client: Client, count: int, load: str, seconds: float) -> None:
    """Run; see the module docstring."""
    seen = Seen()
    async with asyncio.timeout(DEADLINE):
        sockets = await open_sockets(client, count, seen)
    gc.collect()
    gc.freeze()
    _print("ready")
    while await _line():
        if load != "idle":
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*(socket.chat("warm up") for socket in sockets))
        _print("warm")
        if not await _line():
            break
        for name, empty in asdict(Seen()).items():
            if name != "errors":
                setattr(seen, name, empty)
        began, cpu = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        if load != "idle":
            async with asyncio.timeout(seconds + DEADLINE):
                await make_load(sockets, load, seconds)
        seen.seconds = time.monotonic() - began
        seen.cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu
        _print(_summary(seen))
    for socket in sockets:
        socket.transport.abort()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sockets", type=int, required=True)
    parser.add_argument("--load", choices=["burst", "paced", "single", "idle"], required=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--secret")
    parser.add_argument("--talk", action="store_true")
    given = parser.parse_args()
    uvloop.run(run(Client(given.url, given.secret, given.talk), given.sockets, given.load, given.seconds))
