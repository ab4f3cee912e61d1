"""One user of a crowd: a session that is kept across connections, and the text of the answer under way.

As a client of imstream does, it resumes its message after a loss, tries the next node when one cannot be reached, waits
between two tries (exponential backoff with full jitter), and sends temporarily refused messages again.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ops.benchmark.websocket import WebSocket, encode

BACKOFF, BACKOFF_MAX = 0.5, 30.0
"""Upper bound of the first delay before a connection, in seconds; it doubles up to the second one."""

TERMINAL = frozenset({"done", "failed", "cancelled"})


@dataclass
class Seen:
    """The observations of all members of a crowd; times in seconds.

    Attributes:
        refusals: Tries to connect that failed, by their cause.
        codes: Frames with another code than SUCCESS.
        first: From CHAT to the first text.
        beats: From a heartbeat to its answer.
    """

    frames: int = 0
    bytes: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Answer:
    """One message of a member and the text of its answer so far. Times are of CLOCK_MONOTONIC.

    Attributes:
        before: Length of the text when the connection was lost.
        again: When it received new text after that.
        whole: When it had as much text as before, or more.
    """

    message_id: str
    contents: str
    asked: float
    stages: dict[str, asyncio.Future[None]]
    text: str = ""
    attempt: int | None = None
    offset: int | None = None
    accepted: bool = False
    end: str | None = None
    ended: float = 0.0
    before: int = -1
    again: float | None = None
    whole: float | None = None

    def reach(self, stage: str) -> None:
        """Note that the answer has come to this stage: `accepted`, `text` or `end`."""
        future = self.stages.pop(stage, None)
        if future is not None and not future.done():
            future.set_result(None)

    def apply(self, frame: dict[str, Any]) -> None:
        """Apply a CHAT frame about this message."""
        event = frame.get("event")
        if event in {"accepted", "restart"}:
            self.accepted, self.text = True, ""
        if event in {"delta", "restart"}:
            self.attempt, self.offset = frame["attempt"], frame["offset"]
        if event == "delta":
            self._on_text(frame["contents"])
        if event in TERMINAL or frame["code"] == "EXPIRED":
            self.end, self.ended = event or "expired", time.monotonic()
            self.reach("end")
        self.reach("accepted")

    def _on_text(self, text: str) -> None:
        self.text += text
        if self.before >= 0:
            now = time.monotonic()
            self.again = self.again or now
            if len(self.text) >= self.before:
                self.whole = self.whole or now
        self.reach("text")


class Member:
    """One user; `urls` are the nodes in the user's order of preference, `source` is the address it connects from."""

    def __init__(self, user: int, urls: Sequence[str], source: str, seen: Seen) -> None:
        self.user = user
        self.seen = seen
        self.answer: Answer | None = None
        self.lost_at: float | None = None
        self.back_at: float | None = None
        self.beat_at = 0.0
        self._urls = urls
        self._index = 0
        self._source = source
        self._connection: Connection | None = None
        self._welcome: asyncio.Future[None] | None = None
        self._stay: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Open a socket, log in, and resume the message under way. Raises OSError."""
        url = self._urls[self._index]
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(url, self), parts.hostname or "", parts.port or 80, local_addr=(self._source, 0)
        )
        await connection.opened
        self._connection, self._welcome = connection, loop.create_future()
        self._log_in()
        await self._welcome
        if self.answer is not None and self.answer.end is None and not self.answer.accepted:
            self._send_chat(self.answer)

    def _log_in(self) -> None:
        frame: dict[str, object] = {"msgType": "INIT", "userId": self.user}
        if self.answer is not None and self.answer.accepted and self.answer.end is None:
            point = {"messageId": self.answer.message_id}
            if self.answer.attempt is not None:
                point |= {"attempt": self.answer.attempt, "offset": self.answer.offset}  # type: ignore[dict-item]
            frame["resume"] = [point]
        self._send(frame)

    def ask(self, contents: str) -> Answer:
        """Send a message; the answer so far is forgotten."""
        loop = asyncio.get_running_loop()
        stages = {stage: loop.create_future() for stage in ("accepted", "text", "end")}
        message_id = f"s{self.user}-{time.monotonic_ns()}"
        self.answer = Answer(message_id, contents.format(user=self.user), time.monotonic(), stages)
        self._send_chat(self.answer)
        return self.answer

    def _send_chat(self, answer: Answer) -> None:
        frame = {"msgType": "CHAT", "userId": self.user, "messageId": answer.message_id, "contents": answer.contents}
        self._send(frame)

    def beat(self) -> None:
        """Send a heartbeat, if connected."""
        self.beat_at = time.monotonic()
        self._send({"msgType": "HEARTBEAT", "userId": self.user})

    def _send(self, frame: dict[str, object]) -> None:
        if self._connection is not None:
            self._connection.transport.write(encode(json.dumps(frame)))

    def close(self) -> None:
        """Close the socket without a closing handshake, for good."""
        if self._stay is not None:
            self._stay.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.transport.abort()

    def on_lost(self, connection: "Connection", reason: str) -> None:
        """The connection is lost: connect again."""
        if self._connection is not connection:
            return
        self._connection = None
        if self._welcome is not None and not self._welcome.done():  # `connect` waits for it
            self._welcome.set_exception(ConnectionError(reason))
            return
        self.seen.codes[reason] += 1
        self.lost_at = self.lost_at or time.monotonic()
        if self.answer is not None and self.answer.end is None and self.answer.before < 0:
            self.answer.before = len(self.answer.text)
        self._stay = asyncio.get_running_loop().create_task(self._connect_again())

    async def _connect_again(self) -> None:
        delay = BACKOFF
        while True:
            await asyncio.sleep(random.uniform(0, delay))  # noqa: S311 - spreading load
            try:
                await self.connect()
            except OSError as error:
                reason = "connection refused" if isinstance(error, ConnectionRefusedError) else str(error)
                self.seen.refusals[reason] += 1
                self._index = (self._index + 1) % len(self._urls)
                delay = min(2 * delay, BACKOFF_MAX)
            else:
                self.back_at = self.back_at or time.monotonic()
                return

    def apply(self, frame: dict[str, Any]) -> None:
        """Apply a frame of the server."""
        now = time.monotonic()
        kind, answer = frame["msgType"], self.answer
        if frame["code"] != "SUCCESS":
            self.seen.codes[frame["code"]] += 1
        if kind == "INIT":
            if self._welcome is not None and not self._welcome.done():
                self._welcome.set_result(None)
        elif kind == "HEARTBEAT":
            self.seen.beats.append(now - self.beat_at)
        elif answer is None or frame.get("messageId") != answer.message_id:
            return
        elif kind == "CHAT":
            if frame.get("event") == "delta" and "text" in answer.stages:
                self.seen.first.append(now - answer.asked)
            answer.apply(frame)
        elif "retryAfterMs" in frame:
            again = self._log_in if answer.accepted else lambda: self._send_chat(answer)
            asyncio.get_running_loop().call_later(frame["retryAfterMs"] / 1000, again)


class Connection(WebSocket):
    """A connection of a member."""

    def __init__(self, url: str, member: Member) -> None:
        super().__init__(url, member.user)
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._member = member

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._member.seen.bytes += len(data)
        super().data_received(data)

    def upgraded(self, error: str | None) -> None:
        """The handshake is complete."""
        if error is None:
            self.opened.set_result(None)
        else:
            self.opened.set_exception(ConnectionError(f"HTTP {error.split(' ', 2)[1]}"))
            self.transport.close()

    def received(self, payload: bytes) -> None:
        """Pass on a frame."""
        self._member.seen.frames += 1
        self._member.apply(json.loads(payload))

    def lost(self, reason: str) -> None:
        """Pass on the end of the connection."""
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(reason))
        self._member.on_lost(self, reason)
