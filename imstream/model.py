"""The vocabulary of chat: a request, the end of its reply, and its record, with their schema version.

Nodes of two successive releases share one Redis during a rolling upgrade. A new field does not raise the version: older
releases ignore it, and newer ones have a default. Only entries that an older release must not touch have a higher
version; it leaves them to newer nodes.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic_core import from_json, to_json

from imstream.texts import DEFAULT_LANG
from imstream.tracing import read_traceparent
from imstream.user_ids import UserId, UserIds
from imstream.wire import MESSAGE_ID_PATTERN

TerminalEvent = Literal["done", "failed", "cancelled"]
TERMINAL_EVENTS: tuple[TerminalEvent, ...] = ("done", "failed", "cancelled")

Usage = dict[str, int]  # token counts of a backend, by their names
SCHEMA_FIELD = "v"  # the field of the version, also written by the scripts that append to replies
SCHEMA_VERSION = 1  # the version that this release writes; entries without the field have version 1
RETRIED_VERSION = 2  # the version of requests made from a dead letter, whose reply has ended (`retry.lua`)
NEWEST_VERSION = RETRIED_VERSION  # the newest version that this release reads

_MAX_DIGITS = 9
_MAX_TIME = 253_402_300_799_999  # the end of the year 9999


def version_of(fields: Mapping[str, str]) -> int:
    """The version of an entry; 1 when it is not a number of at most 9 digits."""
    return _count(fields.get(SCHEMA_FIELD, "")) or 1


def _count(text: str) -> int:
    """A number of at most 9 digits; 0 for anything else."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else 0


class MalformedEntry(Exception):  # noqa: N818 - their fault, not an error of ours
    """An entry is not a valid request: it was added or changed by hand. `partial`: its readable part, with the user."""

    def __init__(self, text: str, partial: "ChatRequest | None" = None) -> None:
        super().__init__(text)
        self.partial = partial


class NewerVersion(Exception):  # noqa: N818 - not an error
    """An entry has a schema version of a newer release."""

    def __init__(self, version: int) -> None:
        super().__init__(f"schema version {version}")
        self.version = version


MAX_KEPT_QUESTION = 8_192
"""Maximum characters of a question in the record of its reply. A longer one is cut, so that a user who asks and cancels
all the time fills Redis no faster than by short answers."""


@dataclass(frozen=True, slots=True)
class Question:
    """The question in the record of a reply. `digest`: of the whole text; empty if an older release has recorded it."""

    text: str
    digest: str = ""

    def differs_from(self, digest: str) -> bool:
        """Whether a message with this digest certainly has another text."""
        return "" not in {self.digest, digest} and self.digest != digest


def digest_of(text: str) -> str:
    """The digest of a client's text, to recognise another text with the same message id."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request of a client."""

    user_id: UserId
    message_id: str
    contents: str
    history: tuple[tuple[str, str], ...]  # earlier turns, oldest first, as `(role, content)`
    lang: str  # language of texts for the user: `zh` or `en`
    at: int  # when its node received it, in ms since 1970 by the clock of Redis; older releases: by their own
    traceparent: str  # its place in a trace. The trace id is in every log line about this request.
    digest: str = ""  # of the client's text, before any guard changed it; empty in requests of older releases
    reopens: int | None = None  # if it was made from a dead letter: the attempts before, which have failed

    @property
    def earlier_attempts(self) -> int:
        """Attempts that were made before it was admitted."""
        return self.reopens or 0

    @property
    def trace(self) -> str:
        """The trace id."""
        return self.traceparent[3:35]

    @property
    def ids(self) -> dict[str, UserId]:
        """The common fields of log lines about it."""
        return {"user": self.user_id, "message_id": self.message_id, "trace": self.trace}

    @property
    def question(self) -> Question:
        """The question as it is kept in the record of the reply."""
        text = self.contents
        return Question(text if len(text) <= MAX_KEPT_QUESTION else f"{text[: MAX_KEPT_QUESTION - 1]}…", self.digest)

    def fields(self) -> tuple[str, ...]:
        """The stream entry, as field, value, …."""
        history = to_json([{"role": role, "content": content} for role, content in self.history]).decode()
        return (
            *("user", str(self.user_id), "message_id", self.message_id, "contents", self.contents),
            *("history", history, "lang", self.lang, "at", str(self.at), "trace", self.traceparent),
            *("digest", self.digest, SCHEMA_FIELD, str(SCHEMA_VERSION)),
        )

    @classmethod
    def from_fields(cls, fields: dict[str, str], entry_id: str = "", *, user_ids: UserIds = UserIds.NUMBER) -> Self:
        """Read a stream entry. Only user, message id and contents are required; `at` defaults to the entry id's time.

        Raises:
            NewerVersion: Its schema version is not known here.
            MalformedEntry: A required field is missing, or a field is invalid.
        """
        if (version := version_of(fields)) > NEWEST_VERSION:
            raise NewerVersion(version)
        added_at = entry_id.partition("-")[0]
        known: dict[str, Any] = {"contents": "", "history": (), "lang": fields.get("lang") or DEFAULT_LANG}
        try:
            known |= {"user_id": _user_id(fields["user"], user_ids), "message_id": _message_id(fields["message_id"])}
            known["traceparent"] = read_traceparent(fields.get("trace", ""))
            known["digest"] = fields.get("digest", "")
            known["reopens"] = _count(fields["reopens"]) if "reopens" in fields else None
            known["at"] = int(added_at) if added_at.isdecimal() else 0
            known["at"] = _time(fields["at"]) if "at" in fields else known["at"]
            known["contents"] = fields["contents"]
            known["history"] = _history(fields.get("history", "[]"))
        except (KeyError, TypeError, ValueError) as error:
            partial = cls(**known) if "message_id" in known else None
            raise MalformedEntry(f"{type(error).__name__}: {error}", partial) from None
        return cls(**known)


def _user_id(text: str, user_ids: UserIds) -> UserId:
    if (user_id := user_ids.parse(text)) is None:
        raise ValueError("user is not a user id")
    return user_id


def _time(text: str) -> int:
    if not 0 <= (time := int(text)) <= _MAX_TIME:
        raise ValueError("at is not a time in milliseconds since 1970")
    return time


def _message_id(text: str) -> str:
    if re.fullmatch(MESSAGE_ID_PATTERN, text) is None:  # added by hand: no client waits for it
        raise ValueError("message_id has characters that are not allowed, or is too long")
    return text


def _history(text: str) -> tuple[tuple[str, str], ...]:
    turns = tuple((turn["role"], turn["content"]) for turn in from_json(text))
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise TypeError("a turn of the history is not text")
    return turns


@dataclass(frozen=True, slots=True)
class Refusal:
    """A guard's refusal: a code for programs, a sentence for the user. `violation`: it counts against the user."""

    code: str
    sentence: str
    violation: bool = False


_PLAIN_FIELDS = ("finish_reason", "reason", "error", "kind")  # of a terminal entry: texts, as in `Terminal`


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a reply ended.

    Attributes:
        reason: For `failed`: the reason, as in the dead stream.
        kind: For `failed` by the backend: whose fault it was, see `BackendError`. Older releases record none.
        refusal: For `failed`: the refusal of a guard, whose sentence replaces the general one.
    """

    event: TerminalEvent
    finish_reason: str | None = None
    usage: Usage | None = None
    reason: str | None = None
    error: str | None = None
    refusal: Refusal | None = None
    kind: str | None = field(default=None, compare=False)

    def fields(self) -> tuple[str, ...]:
        """The terminal entry without attempt, event, offset and text, as field, value, …."""
        named: dict[str, str | None] = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        named["usage"] = None if self.usage is None else to_json(self.usage).decode()
        if self.refusal is not None:
            violation = "1" if self.refusal.violation else None
            named |= {"code": self.refusal.code, "sentence": self.refusal.sentence, "violation": violation}
        return tuple(part for name, value in named.items() if value is not None for part in (name, value))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Read a terminal entry."""
        usage, refused = fields.get("usage"), "sentence" in fields
        refusal = Refusal(fields["code"], fields["sentence"], "violation" in fields) if refused else None
        plain = {name: fields.get(name) for name in _PLAIN_FIELDS}
        return cls(fields["event"], usage=from_json(usage or "null"), refusal=refusal, **plain)


@dataclass(frozen=True, slots=True)
class Continued:
    """How an attempt continues the text of earlier ones."""

    wire: int  # the attempt that clients see. It differs from the recorded one, which fences the writer.
    valid: Mapping[int, int]  # earlier such attempts, and up to which offset their text is that of this one
    usage: Usage | None = None  # that of the calls that wrote `text`, as far as they reported one
    text: str = ""  # all text so far

    @classmethod
    def parse(cls, wire: str, valid: str, usage: str = "", text: str = "") -> Self:
        """Read the fields of an entry."""
        pairs = (pair.split(":") for pair in valid.split())
        return cls(int(wire), {int(one): int(offset) for one, offset in pairs}, from_json(usage or "null"), text)


def usage_sum(one: Usage | None, other: Usage | None) -> Usage | None:
    """The sum of those that are known."""
    if one is None or other is None:
        return other if one is None else one
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a message waits, and for which backend."""

    backend: str
    reason: str  # a word for programs
    error: str = ""  # a line for an operator
    retry_after: int = 0  # milliseconds in which the backend is not called, if it is known; else 0

    def fields(self) -> tuple[str, ...]:
        """The part of the entry with the reason, as field, value, …."""
        why = ("backend", self.backend, "reason", self.reason, "error", self.error)
        return (*why, "retry_after", str(self.retry_after))

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Self:
        """Read an entry; missing and malformed fields have defaults."""
        pause = _count(fields.get("retry_after", ""))
        return cls(fields.get("backend", ""), fields.get("reason", ""), fields.get("error", ""), pause)


@dataclass(frozen=True, slots=True)
class Record:
    """The record of a reply, or the part after an earlier record.

    Attributes:
        text: Text of the last attempt, from the offset `start` on. That is 0 unless the record continues another one.
        position: Where this record ends; the next one may begin there.
        question: The question; None if it is before this part, or an older release has recorded the reply.
        waiting: Why the message waits for its backend, if it does.
        continued: How the attempt continues earlier ones, if it does and its beginning is in this part.
        thinking: The model reasons, and has not begun its text.
        request: The request that it belongs to; '' if that is before this part, or not recorded.
    """

    attempt: int
    text: str
    terminal: Terminal | None
    start: int = 0
    position: str = field(default="", compare=False)
    question: Question | None = field(default=None, compare=False)
    waiting: Waiting | None = field(default=None, compare=False)
    continued: Continued | None = field(default=None, compare=False)
    thinking: bool = field(default=False, compare=False)
    request: str = field(default="", compare=False)
