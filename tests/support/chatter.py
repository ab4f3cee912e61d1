"""A raw WebSocket client that keeps every frame, assembles answers, and retries nothing by itself."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from imstream.codes import Code, Event
from imstream.user_ids import UserId
from tests.support.schemas import check_frame
from tests.support.waiting import SLOW

LIMIT = 20.0 * SLOW
"""Default time limit in seconds."""

Frame = dict[str, Any]

_TERMINAL = (Event.DONE, Event.FAILED, Event.CANCELLED)


class Chatter:
    """One user on one socket.

    Attributes:
        asked: Questions by message id.
        accepted: Ids of the accepted messages.
        frames: Frames by message id; frames without one are under the empty id.
        close_code: The close code; None while the socket is open.
    """

    def __init__(self, user_id: UserId, socket: ClientConnection) -> None:
        self.user_id = user_id
        self.asked: dict[str, str] = {}
        self.accepted: set[str] = set()
        self.frames: dict[str, list[Frame]] = defaultdict(list)
        self.close_code: int | None = None
        self._socket = socket
        self._heard = asyncio.Condition()

    async def send_frame(self, **frame: object) -> None:
        """Send a frame."""
        await self._socket.send(json.dumps(frame))

    async def send(self, message_id: str, question: str) -> None:
        """Send a CHAT without waiting. A message that has ended is sent again as a new one."""
        self._forget_if_ended(message_id)
        self.asked[message_id] = question
        await self.send_frame(msgType="CHAT", userId=self.user_id, messageId=message_id, contents=question)

    def _forget_if_ended(self, message_id: str) -> None:
        if self.ends(message_id):
            self.frames[message_id].clear()

    async def ask(self, message_id: str, question: str) -> str:
        """Send a CHAT and return `accepted`, or the code of its refusal."""
        self._forget_if_ended(message_id)
        before = len(self.verdicts(message_id))
        await self.send(message_id, question)
        await self.until(lambda: len(self.verdicts(message_id)) > before, f"a word about {message_id}")
        return self.verdicts(message_id)[before]

    async def ask_until_accepted(self, message_id: str, question: str, limit: float = LIMIT) -> list[str]:
        """Send a CHAT until it is accepted, as clients do after UNAVAILABLE or BUSY. Return the refusals."""
        refusals = []
        async with asyncio.timeout(limit):
            while (verdict := await self.ask(message_id, question)) != Event.ACCEPTED:
                refusals.append(verdict)
                await asyncio.sleep(0.05)  # a client's retry interval
        return refusals

    async def grown(self, message_id: str, length: int = 1) -> str:
        """Wait until the answer has that many characters, and return it."""
        await self.until(lambda: len(self.text(message_id)) >= length, f"{length} characters of {message_id}")
        return self.text(message_id)

    async def ended(self, message_id: str, limit: float = LIMIT) -> str:
        """Wait for the end of an answer, and return its event."""
        await self.until(lambda: bool(self.ends(message_id)), f"the end of {message_id}", limit)
        return self.ends(message_id)[0]

    def ends(self, message_id: str) -> list[str]:
        """The terminal events since the message was last accepted.

        A CHAT that got UNAVAILABLE may have been executed anyway; sent again, its whole answer is sent again.
        """
        frames = self.frames[message_id]
        accepted = [number for number, frame in enumerate(frames) if frame.get("event") == Event.ACCEPTED]
        since = accepted[-1] if accepted else 0
        return [frame["event"] for frame in frames[since:] if frame.get("event") in _TERMINAL]

    def verdicts(self, message_id: str) -> list[str]:
        """The answers to each CHAT with this id: `accepted`, or the code of its refusal."""
        frames = self.frames[message_id]
        return [
            str(frame["event"] if frame["msgType"] == "CHAT" else frame["code"])
            for frame in frames
            if frame["msgType"] == "SYSTEM" or frame.get("event") == Event.ACCEPTED
        ]

    def is_expired(self, message_id: str) -> bool:
        """Whether the node has reported a message as unknown."""
        return any(frame["code"] == Code.EXPIRED for frame in self.frames[message_id])

    def text(self, message_id: str) -> str:
        """The answer so far. Fails if text is missing or repeated (I5)."""
        text, attempt = "", None
        for frame in self.frames[message_id]:
            match frame.get("event"):
                case Event.RESTART | Event.ACCEPTED:
                    text, attempt = "", None
                case Event.DELTA:
                    assert attempt in (None, frame["attempt"]), f"{message_id}: another attempt without restart"
                    attempt = frame["attempt"]
                    text += frame["contents"]
                    assert frame["offset"] == len(text), f"{message_id}: text is missing or repeated"
        return text

    async def until(self, condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
        """Wait until a condition on the received frames holds, at most `limit` seconds or until the socket closes."""
        try:
            async with asyncio.timeout(limit), self._heard:
                await self._heard.wait_for(lambda: condition() or self.close_code is not None)
        except TimeoutError:
            raise AssertionError(f"not within {limit} s: {what}") from None
        assert condition(), f"closed with {self.close_code} before: {what}"

    async def log_in(self, resume: list[dict[str, object]]) -> None:
        """Send INIT, repeatedly while Redis is unavailable."""
        while not any(frame["msgType"] == "INIT" for frame in self.frames[""]):
            self.frames[""].clear()
            await self.send_frame(msgType="INIT", userId=self.user_id, resume=resume)
            await self.until(lambda: bool(self.frames[""]), "an answer to the login")

    async def listen(self) -> None:
        """Collect frames until the socket is closed."""
        try:
            async for message in self._socket:
                frame = json.loads(message)
                check_frame(frame)
                message_id = frame.get("messageId", "")
                async with self._heard:
                    self.frames[message_id].append(frame)
                    if frame.get("event") == Event.ACCEPTED:
                        self.accepted.add(message_id)
                    self._heard.notify_all()
        except ConnectionClosed:
            pass
        async with self._heard:
            self.close_code = self._socket.close_code
            self._heard.notify_all()


@asynccontextmanager
async def chatter(
    url: str, user_id: UserId, *, resume: list[dict[str, object]] | None = None
) -> AsyncIterator[Chatter]:
    """Connect and log in. `url` is the node's WebSocket URL."""
    # Other clients of the test keep this process busy, which must not look like a node that does not answer.
    async with connect(url, compression=None, ping_interval=None, open_timeout=LIMIT) as socket:
        one = Chatter(user_id, socket)
        listening = asyncio.create_task(one.listen())
        try:
            await one.log_in(resume or [])
            yield one
        finally:
            await socket.close()
            await listening
