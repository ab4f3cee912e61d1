"""The reply stream of one message: all that was said about it, and the one judge over who may say more (I4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from imstream.clock import milliseconds
from imstream.keys import Keys
from imstream.model import TERMINAL_EVENTS, Record, Terminal, TerminalEvent
from imstream.redis.client import Argument, RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

_MARK_QUEUED = load_script("mark_queued")
_OPEN = load_script("open")
_APPEND = load_script("append")
_CANCEL = load_script("cancel")

CancelOutcome = Literal["cancelled", "too_late", "unknown"]
_KNOWN = frozenset({"queued", "opened", "text", *TERMINAL_EVENTS})


@dataclass(frozen=True, slots=True)
class Opened:
    """An attempt has begun and belongs to the request that opened it. `nodes`: where sockets of the user are."""

    attempt: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """There is nothing to begin: the reply has its terminal event. `owner`: the request that it belongs to."""

    event: TerminalEvent
    owner: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """There is nothing to begin: another request with the same message id has the reply."""

    owner: str


@dataclass(frozen=True, slots=True)
class Appended:
    """The text, or the terminal event, is recorded. `nodes`: where sockets of the user are."""

    nodes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """The reply takes nothing more from this attempt.

    Attributes:
        reason: `superseded` by a later attempt; `ended`; `gone` from Redis; `gap`: text would be missing or repeated.
        offset: For a `gap`: up to where the text of this attempt is recorded.
    """

    reason: Literal["superseded", "ended", "gone", "gap"]
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class CancelRecorded:
    """The reply has ended as cancelled. `nodes`: the one that worked on it, and where sockets of the user are."""

    nodes: tuple[str, ...]


class ReplyStore:
    """The reply streams, each under its user and message id."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._node = settings.node
        self._ttl = milliseconds(settings.reply_ttl)
        self._queued_ttl = milliseconds(settings.queued_ttl)

    async def mark_queued(self, user_id: int, message_id: str) -> None:
        """Note that the message waits, unless anything is known of it already."""
        # No worker is free: the message waits, and its mark may wait for others to travel with.
        keys = self._keys_of(user_id, message_id)[:1]
        await _MARK_QUEUED.run(self._redis, keys, (self._queued_ttl,), urgent=False)

    async def open(
        self, user_id: int, message_id: str, *, request: str, lost: str = "", after: int = 0
    ) -> Opened | Ended | Duplicate:
        """Begin the next attempt at a message.

        Args:
            user_id: Whose message it is.
            message_id: The message.
            request: The request that opens it, and that it belongs to from now on.
            lost: Another request, known to be lost; what belongs to it may be taken over.
            after: An attempt that has been made, even if Redis has lost it: the next one has a later number.
        """
        arguments = (request, self._ttl, lost, after, self._node)
        answer = await _OPEN.run(self._redis, self._keys_of(user_id, message_id), arguments)
        match answer:
            case ["opened", attempt, *nodes]:
                return Opened(int(attempt), tuple(nodes))
            case ["ended", event, owner]:
                return Ended(event, owner)
            case _:
                return Duplicate(answer[1])

    async def append(  # noqa: PLR0913 - the named arguments of one script
        self,
        user_id: int,
        message_id: str,
        *,
        attempt: int,
        before: int,
        after: int,
        text: str,
        terminal: Terminal | None = None,
    ) -> Appended | Rejected:
        """Record the text between two offsets (in characters), and with `terminal` the end of the reply."""
        event = "text" if terminal is None else terminal.event
        arguments: tuple[Argument, ...] = (attempt, event, before, after, text, self._ttl)
        if terminal is not None:
            arguments += terminal.fields()
        answer = await _APPEND.run(self._redis, self._keys_of(user_id, message_id), arguments)
        match answer:
            case ["appended", *nodes]:
                return Appended(tuple(nodes))
            case ["gap", offset]:
                return Rejected("gap", int(offset))
            case _:
                return Rejected(answer[0])

    async def cancel(self, user_id: int, message_id: str) -> CancelRecorded | Literal["too_late", "unknown"]:
        """End the reply as cancelled, wherever it is worked on."""
        verdict, *nodes = await _CANCEL.run(self._redis, self._keys_of(user_id, message_id), (self._ttl,))
        return CancelRecorded(tuple(nodes)) if verdict == "cancelled" else verdict

    async def read(self, user_id: int, message_id: str, *, after: str = "") -> Record | None:
        """What is recorded of the last attempt; None when the reply has expired or never was.

        Args:
            user_id: Whose message it is.
            message_id: The message.
            after: Position of an earlier record: only what is new since then. None then means that nothing is.
        """
        begin = f"({after}" if after else "-"
        entries = await self._redis.execute("XRANGE", self._keys.reply(user_id, message_id), begin, "+")
        if not entries:
            return None
        attempt, start, texts, terminal = 0, None, list[str](), None
        for _, flat in entries:
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            attempt, text = int(fields["attempt"]), fields.get("text", "")
            if fields["event"] not in _KNOWN:
                continue  # of a newer release, or by hand
            if fields["event"] == "opened":
                texts.clear()
                start = 0
            elif start is None:
                start = int(fields["offset"]) - len(text)
            texts.append(text)
            if fields["event"] in TERMINAL_EVENTS:
                terminal = Terminal.from_fields(fields)
        return Record(attempt, "".join(texts), terminal, start or 0, entries[-1][0])

    async def has_shown_text(self, user_id: int, message_id: str) -> bool:
        """Whether any attempt has shown text, also one that was begun anew since."""
        entries = await self._redis.execute("XRANGE", self._keys.reply(user_id, message_id), "-", "+")
        texts = (dict(zip(flat[::2], flat[1::2], strict=True)).get("text") for _, flat in entries)
        return any(texts)

    def _keys_of(self, user_id: int, message_id: str) -> tuple[str, str]:
        return self._keys.reply(user_id, message_id), self._keys.route(user_id)
