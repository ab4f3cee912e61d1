"""A chat request as it stands in the requests stream."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from imstream.store.schema import FIELD, VERSION, version_of
from imstream.texts import DEFAULT_LANG


class Malformed(Exception):  # noqa: N818 - their fault, not an error of ours
    """An entry of the stream is no valid request: somebody added or changed it by hand.

    Attributes:
        addressee: The request without what cannot be read, when its user and message id can be: the user is told.
    """

    def __init__(self, text: str, addressee: ChatRequest | None = None) -> None:
        super().__init__(text)
        self.addressee = addressee


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
            *(FIELD, str(VERSION)),
        )

    @classmethod
    def from_fields(cls, fields: dict[str, str], entry_id: str = "") -> ChatRequest:
        """Read a stream entry back. Only user, message id and contents are required; unknown fields are ignored.

        Args:
            fields: The entry.
            entry_id: Its id, which tells when it was added if nothing else does.

        Raises:
            NewerVersion: Its schema version is not known here.
            Malformed: A required field is missing, or one has no valid value.
        """
        if (version := version_of(fields)) > VERSION:
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
            addressee = cls(**known) if "message_id" in known else None
            raise Malformed(f"{type(error).__name__}: {error}", addressee) from None
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
