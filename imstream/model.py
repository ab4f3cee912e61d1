"""The vocabulary of chat: a request, the end of its reply, and what is recorded of it, with their schema version.

Nodes of two successive releases share one Redis during a rolling upgrade. A new field does not raise the version: a
release that does not know it ignores it, and one that needs it has a default. The version is raised only for entries
that an older release must not touch; it leaves them to a node that knows them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json, to_json

from imstream.texts import DEFAULT_LANG

TerminalEvent = Literal["done", "failed", "cancelled"]
TERMINAL_EVENTS: tuple[TerminalEvent, ...] = ("done", "failed", "cancelled")

SCHEMA_FIELD = "v"
"""The field that holds the version. The scripts that write reply events name it, too."""

SCHEMA_VERSION = 1
"""What this release writes, and the newest that it knows. Entries without the field are of version 1."""

_DIGITS = 9
"""Digits of a version at most: what is longer was written by hand."""


def version_of(fields: Mapping[str, str]) -> int:
    """The version of an entry; 1 also for what is no number."""
    version = fields.get(SCHEMA_FIELD, "")
    return int(version) if version.isdecimal() and len(version) <= _DIGITS else 1


class MalformedEntry(Exception):  # noqa: N818 - their fault, not an error of ours
    """An entry of the stream is no valid request: somebody added or changed it by hand.

    Attributes:
        partial: The request without what cannot be read, when its user and message id can be: the user is told.
    """

    def __init__(self, text: str, partial: ChatRequest | None = None) -> None:
        super().__init__(text)
        self.partial = partial


class NewerVersion(Exception):  # noqa: N818 - nobody's fault
    """An entry was written by a newer release, in a schema that this one does not know."""

    def __init__(self, version: int) -> None:
        super().__init__(f"schema version {version}")
        self.version = version


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client asked.

    Attributes:
        history: Earlier turns, oldest first, as `(role, content)`.
        lang: `zh` or `en`: the language of texts for this person.
        at: When it was accepted, in milliseconds since 1970.
        trace: An id for logs, the same in every log line about this request.
    """

    user_id: int
    message_id: str
    contents: str
    history: tuple[tuple[str, str], ...]
    lang: str
    at: int
    trace: str

    def fields(self) -> tuple[str, ...]:
        """The stream entry, as field, value, …: readable as it stands in redis-cli."""
        history = to_json([{"role": role, "content": content} for role, content in self.history]).decode()
        return (
            *("user", str(self.user_id), "message_id", self.message_id, "contents", self.contents),
            *("history", history, "lang", self.lang, "at", str(self.at), "trace", self.trace),
            *(SCHEMA_FIELD, str(SCHEMA_VERSION)),
        )

    @classmethod
    def from_fields(cls, fields: dict[str, str], entry_id: str = "") -> ChatRequest:
        """Read a stream entry back. Only user, message id and contents are required; unknown fields are ignored.

        Args:
            fields: The entry.
            entry_id: Its id, which tells when it was added if nothing else does.

        Raises:
            NewerVersion: Its schema version is not known here.
            MalformedEntry: A required field is missing, or one has no valid value.
        """
        if (version := version_of(fields)) > SCHEMA_VERSION:
            raise NewerVersion(version)
        known: dict[str, Any] = {"contents": "", "history": (), "lang": DEFAULT_LANG}
        try:
            known |= {"user_id": int(fields["user"]), "message_id": fields["message_id"]}
            known |= {"trace": fields.get("trace") or secrets.token_hex(8), "at": _added_at(entry_id)}
            known["lang"] = fields.get("lang") or DEFAULT_LANG
            if "at" in fields:
                known["at"] = int(fields["at"])
            known["contents"] = fields["contents"]
            known["history"] = _history(fields.get("history", "[]"))
        except (KeyError, TypeError, ValueError) as error:
            partial = cls(**known) if "message_id" in known else None
            raise MalformedEntry(f"{type(error).__name__}: {error}", partial) from None
        return cls(**known)


def _history(text: str) -> tuple[tuple[str, str], ...]:
    turns = tuple((turn["role"], turn["content"]) for turn in from_json(text))
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise TypeError("a turn of the history that is no text")
    return turns


def _added_at(entry_id: str) -> int:
    """The first part of the id of an entry is when it was added, in milliseconds since 1970."""
    added = entry_id.partition("-")[0]
    return int(added) if added.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told of a message that a guard refused: a code for programs, a sentence in its language.

    Attributes:
        violation: The user is to blame.
    """

    code: str
    sentence: str
    violation: bool = False


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a reply ended.

    Attributes:
        reason: For `failed`: why, as in the dead stream.
        refusal: For `failed`: what to tell instead of the usual, when a guard refused the message.
    """

    event: TerminalEvent
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    reason: str | None = None
    error: str | None = None
    refusal: Refusal | None = None

    def fields(self) -> tuple[str, ...]:
        """What the terminal entry carries beside attempt, event, offset and text, as field, value, …."""
        named = {
            "finish_reason": self.finish_reason,
            "usage": None if self.usage is None else to_json(self.usage).decode(),
            "reason": self.reason,
            "error": self.error,
            "code": None if self.refusal is None else self.refusal.code,
            "sentence": None if self.refusal is None else self.refusal.sentence,
            "violation": "1" if self.refusal is not None and self.refusal.violation else None,
        }
        return tuple(part for name, value in named.items() if value is not None for part in (name, value))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Terminal:
        """Read a terminal entry back."""
        return cls(
            event=fields["event"],
            finish_reason=fields.get("finish_reason"),
            usage=from_json(fields["usage"]) if "usage" in fields else None,
            reason=fields.get("reason"),
            error=fields.get("error"),
            refusal=Refusal(fields["code"], fields["sentence"], "violation" in fields)
            if "sentence" in fields
            else None,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """What is recorded of one reply, or what of it is new since an earlier record.

    Attributes:
        text: Text of the last attempt, from `start` on.
        start: Offset of that text: 0, unless the record goes on where an earlier one ended.
        position: Where this record ends; the next one may begin there.
    """

    attempt: int
    text: str
    terminal: Terminal | None
    start: int = 0
    position: str = field(default="", compare=False)
