"""The reply stream of a message: all that is recorded about it. Each append is checked against it (I4)."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from pydantic_core import to_json

from imstream.clock import milliseconds, time_of
from imstream.keys import Keys
from imstream.model import TERMINAL_EVENTS, Continued, Question, Record, Terminal, TerminalEvent, Usage, Waiting
from imstream.redis.client import RedisClient, to_dict
from imstream.redis.connection import Argument
from imstream.settings import Settings
from imstream.store.scripts import LUA, Step, run_both
from imstream.user_ids import UserId

CancelOutcome = Literal["cancelled", "too_late", "unknown"]
MAX_LISTED = 64  # maximum messages of a user that are listed: as many as one INIT can resume

_NO_QUESTION = Question("")
_KNOWN_EVENTS = frozenset({"queued", "opened", "reopened", "waiting", "text", *TERMINAL_EVENTS})


@dataclass(frozen=True, slots=True)
class Opened:
    """An attempt has begun, and the message belongs to its request."""

    attempt: int
    nodes: tuple[str, ...] = ()  # those with a socket of the user
    at: int = field(default=0, compare=False)  # when, in milliseconds since 1970 by the clock of Redis
    counted: int = field(default=0, compare=False)  # earlier attempts that did more than wait for their backend
    waited: timedelta | None = field(default=None, compare=False)  # since it first had to wait, on any node, if it had
    continued: Continued | None = None  # how it continues the recorded text; None: it begins again


class Beginning(NamedTuple):
    """When the first attempt was opened, and when the first text was recorded, in ms since 1970 by Redis' clock."""

    opened_at: int | None
    text_at: int | None


@dataclass(frozen=True, slots=True)
class Ended:
    """No attempt was begun: the reply has its terminal event. `owner`: the request that it belongs to."""

    event: TerminalEvent
    owner: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """No attempt was begun: the reply belongs to another request with the same message id."""

    owner: str


@dataclass(frozen=True, slots=True)
class OtherQuestion:
    """No attempt was begun: another question with the same message id is queued."""


Opening = Opened | Ended | Duplicate | OtherQuestion


@dataclass(frozen=True, slots=True)
class Appended:
    """The text or terminal event is recorded.

    Attributes:
        nodes: Those with a socket of the user.
        removed: Whether the request was in the stream, and is removed; None: that was not part of it.
    """

    nodes: tuple[str, ...] = field(default=(), compare=False)
    removed: bool | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """The reply accepts nothing from this attempt: it is `superseded` by a later one, `ended`, or `gone` from Redis.

    `gap`: text would be missing or repeated; the recorded text of this attempt ends at `offset`.
    """

    reason: Literal["superseded", "ended", "gone", "gap"]
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class WaitRecorded:
    """It is recorded that the message waits, and has since `waited`. `nodes`: see `Appended`."""

    waited: timedelta
    nodes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class CancelRecorded:
    """The reply has ended as cancelled. `nodes`: the one that worked on it, and those with a socket of the user.

    `repeated`: it was cancelled before.
    """

    nodes: tuple[str, ...]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class RunsElsewhere:
    """Nothing is recorded: `node` works on the message, and may have shown text that is not recorded yet."""

    node: str


def new_word() -> str:
    """A random word that identifies one opening."""
    return secrets.token_hex(4)


class ReplyStore:
    """The reply streams, by user and message id."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.key_prefix)
        self._node = settings.node
        self._ttl = milliseconds(settings.reply_ttl)
        self._queued_ttl = milliseconds(settings.queued_ttl)
        self._retry_window = milliseconds(settings.retry_window)
        self._listed_ttl = milliseconds(settings.retry_window + settings.ai_total_timeout + settings.reply_ttl)
        """How long a message is listed after an attempt has begun: longer than its reply is kept."""

    async def mark_queued(
        self, user_id: UserId, message_id: str, question: Question = _NO_QUESTION, *, request: str = ""
    ) -> tuple[str, ...] | None:
        """Record that the message waits for a worker; the nodes with a socket of the user. None: its reply exists."""
        arguments = (self._queued_ttl, message_id, question.text, question.digest, MAX_LISTED, request)
        keys = self._keys_of(user_id, message_id)
        answer = await LUA["mark_queued"].run(self._redis, keys, arguments, urgent=False)
        return None if answer[0] == "known" else tuple(answer[1:])

    async def open(  # noqa: PLR0913 - the named arguments of one script
        self,
        user_id: UserId,
        message_id: str,
        question: Question = _NO_QUESTION,
        *,
        request: str,
        lost: str = "",
        after: int = 0,
        continues: int = 0,
        shown: int | None = None,
        usage: Usage | None = None,
        unused: bool = False,
        word: str = "",
        reopens: bool = False,
        resumed: timedelta | None = None,
    ) -> Opening:
        """Begin the next attempt at a message, which `request` owns from now on.

        Args:
            user_id: The user.
            message_id: The message.
            question: Its text.
            request: The request that opens.
            lost: A request known to be lost, from which the message may be taken over.
            after: The last attempt known to the caller, in case Redis has lost it: no number is given twice.
            continues: Recorded text of fewer characters is continued; 0: begin again.
            shown: Characters that the caller has shown as the writer of `after`.
            usage: Of the calls that wrote them.
            unused: The attempt `after` has made no call.
            word: Shared by all tries of this opening: if one, whose answer was lost, has begun the latest attempt, its
                answer is returned. Default: a new one.
            reopens: The request was made from a dead letter, and may continue after `failed`.
            resumed: How long ago a pause ended: no time before that counts as waited.
        """
        text = ("" if shown is None else shown, "" if usage is None else to_json(usage))
        word, pause_end = word or new_word(), "" if resumed is None else milliseconds(resumed)
        how = (continues, *text, int(unused), word, int(reopens), pause_end)
        return await self._opening(user_id, message_id, question, (request, lost, after), how).run(self._redis)

    def opening(  # noqa: PLR0913 - as `open`
        self, user_id: UserId, message_id: str, question: Question, *, request: str, after: int, word: str
    ) -> Step[Opening]:
        """The step that `open` makes for a request without earlier attempts."""
        return self._opening(user_id, message_id, question, (request, "", after), (0, "", "", 0, word, 0, ""))

    def _opening(
        self, user_id: UserId, message_id: str, question: Question, who: tuple[str, str, int], how: Sequence[Argument]
    ) -> Step[Opening]:
        request, lost, after = who
        asked = (message_id, question.text, question.digest, MAX_LISTED, self._listed_ttl)
        arguments = (request, self._ttl, lost, after, self._node, *asked, *how)
        return Step("open", self._keys_of(user_id, message_id), arguments, _opening_of)

    async def append(  # noqa: PLR0913 - the named arguments of one script
        self,
        user_id: UserId,
        message_id: str,
        *,
        attempt: int,
        before: int,
        after: int,
        text: str,
        terminal: Terminal | None = None,
        thinking: bool = False,
        removal: Step[bool] | None = None,
    ) -> Appended | Rejected:
        """Record the text between two offsets (in characters), and with `terminal` the end of the reply.

        `thinking`: instead of text, it is recorded that the model reasons, in a field that older releases ignore.
        `removal`: once it is recorded, the request is removed in the same round trip; in a cluster, it is not removed.
        """
        event = "text" if terminal is None else terminal.event
        arguments: tuple[Argument, ...] = (attempt, event, before, after, text, self._ttl)
        if terminal is not None:
            arguments += terminal.fields()
        elif thinking:
            arguments += ("thinking", 1)
        step = Step("append", self._reply_and_route(user_id, message_id), arguments, _append_result)
        if removal is None:
            return await step.run(self._redis)
        result, removed = await run_both("end", self._redis, step, removal)
        return replace(result, removed=removed) if isinstance(result, Appended) else result

    async def wait(  # noqa: PLR0913 - the named arguments of one script
        self, user_id: UserId, message_id: str, *, attempt: int, pause: timedelta, why: Waiting, counts: bool = True
    ) -> WaitRecorded | Rejected:
        """Record that an attempt without text waits for its backend. The reply is kept for the `pause` in addition.

        `counts`: in the retry window. Else an operator has paused it, text or not: its next attempt has a new window.
        """
        ttl = self._ttl + milliseconds(pause)
        arguments: tuple[Argument, ...] = (attempt, ttl, self._retry_window if counts else "", *why.fields())
        answer = await LUA["wait"].run(self._redis, self._reply_and_route(user_id, message_id), arguments)
        match answer:
            case ["waiting", waited, *nodes]:
                return WaitRecorded(_span(waited), tuple(nodes))
            case _:
                return Rejected(answer[0])

    async def cancel(
        self, user_id: UserId, message_id: str, *, unless_elsewhere: bool = False
    ) -> CancelRecorded | RunsElsewhere | Literal["too_late", "unknown"]:
        """End the reply as cancelled, `unless_elsewhere` another node works on it."""
        arguments = (self._ttl, self._node if unless_elsewhere else "")
        answer = await LUA["cancel"].run(self._redis, self._reply_and_route(user_id, message_id), arguments)
        match answer:
            case ["cancelled" | "repeated" as verdict, *nodes]:
                return CancelRecorded(tuple(nodes), repeated=verdict == "repeated")
            case ["elsewhere", node]:
                return RunsElsewhere(node)
            case ["too_late"]:
                return "too_late"
            case _:
                return "unknown"

    async def read(self, user_id: UserId, message_id: str, *, after: str = "") -> Record | None:
        """The record of the last attempt, or its entries `after` the position of an earlier record.

        None: there is no record, or Redis has lost that position, perhaps with all of it.
        """
        entries = await self._redis.execute("XRANGE", self._keys.reply(user_id, message_id), after or "-", "+")
        if not entries or (after and entries[0][0] != after):
            return None
        attempt, start, texts, terminal, question, waiting = 0, None, list[str](), None, None, None
        continued: Continued | None = None
        thinking, request = False, ""
        for entry_id, flat in entries:
            fields = to_dict(flat)
            attempt, text = int(fields["attempt"]), fields.get("text", "")
            if entry_id == after:
                start, waiting, thinking = int(fields["offset"]), waiting_of(fields), "thinking" in fields
                continue
            if fields["event"] not in _KNOWN_EVENTS:
                continue  # of a newer release, or written by hand
            if fields.get("question"):
                question = Question(fields["question"], fields.get("digest", ""))
            if fields["event"] in {"opened", "reopened"}:
                texts.clear()
                start, terminal = 0, None
                continued = Continued.parse(fields["wire"], fields.get("valid", "")) if "wire" in fields else None
            elif start is None:
                start = int(fields["offset"]) - len(text)
            texts.append(text)
            request = fields.get("request", request)
            waiting, thinking = waiting_of(fields), "thinking" in fields
            if fields["event"] in TERMINAL_EVENTS:
                terminal = Terminal.from_fields(fields)
        return Record(
            *(attempt, "".join(texts), terminal, start or 0, entries[-1][0], question, waiting, continued, thinking),
            request=request,
        )

    async def beginning(self, user_id: UserId, message_id: str) -> Beginning:
        """When a message was begun, on whichever node, and when its first text was recorded, restarted or not.

        Of a message that was reopened: since then.
        """
        entries = await self._redis.execute("XRANGE", self._keys.reply(user_id, message_id), "-", "+")
        rows = [(time_of(entry_id), to_dict(flat)) for entry_id, flat in entries]
        rows = rows[max((n for n, (_, fields) in enumerate(rows) if fields["event"] == "reopened"), default=0) :]
        opened = (at for at, fields in rows if fields["event"] == "opened")
        return Beginning(next(opened, None), next((at for at, fields in rows if fields.get("text")), None))

    async def messages(self, user_id: UserId) -> dict[str, str]:
        """The newest messages of a user that have a record, oldest first, each with its last event."""
        listed: list[str] = await self._redis.execute("ZRANGE", self._keys.messages(user_id), 0, -1)
        keys = [self._keys.reply(user_id, message_id) for message_id in listed]
        last = await asyncio.gather(*(self._redis.execute("XREVRANGE", key, "+", "-", "COUNT", 1) for key in keys))
        return {message_id: to_dict(rows[0][1])["event"] for message_id, rows in zip(listed, last, strict=True) if rows}

    def _keys_of(self, user_id: UserId, message_id: str) -> tuple[str, str, str]:
        return *self._reply_and_route(user_id, message_id), self._keys.messages(user_id)

    def _reply_and_route(self, user_id: UserId, message_id: str) -> tuple[str, str]:
        return self._keys.reply(user_id, message_id), self._keys.route(user_id)


def waiting_of(fields: dict[str, str]) -> Waiting | None:
    """Why a message waits for its backend, by the last entry of its record; None: it does not."""
    return Waiting.from_fields(fields) if fields["event"] == "waiting" else None


def _opening_of(answer: Sequence[Any]) -> Opening:
    match answer:
        case ["opened" | "continued" as verdict, entry_id, attempt, counted, waited, *rest]:
            continued = Continued.parse(*rest.pop(0)) if verdict == "continued" else None
            waiting = None if waited == "" else _span(waited)
            return Opened(int(attempt), tuple(rest), time_of(entry_id), int(counted), waiting, continued)
        case ["ended", event, owner]:
            return Ended(event, owner)
        case ["other_question"]:
            return OtherQuestion()
        case _:
            return Duplicate(answer[1])


def _append_result(answer: Sequence[Any]) -> Appended | Rejected:
    match answer:
        case ["appended" | "repeated", *nodes]:
            return Appended(tuple(nodes))
        case ["gap", offset]:
            return Rejected("gap", int(offset))
        case _:
            return Rejected(answer[0])


def _span(milliseconds_: int | str) -> timedelta:
    return timedelta(milliseconds=max(0, int(milliseconds_)))
