"""A chat request as it stands in the requests stream."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic_core import from_json, to_json


class Malformed(Exception):  # noqa: N818 - their fault, not an error of ours
    """An entry of the stream is no request of ours: somebody added or changed it by hand."""


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
        )

    @classmethod
    def from_fields(cls, fields: dict[str, str]) -> ChatRequest:
        """Read a stream entry back.

        Raises:
            Malformed: A field is missing or has no sense.
        """
        try:
            return cls(
                user_id=int(fields["user"]),
                message_id=fields["message_id"],
                contents=fields["contents"],
                history=tuple((turn["role"], turn["content"]) for turn in from_json(fields["history"])),
                lang=fields["lang"],
                at=int(fields["at"]),
                trace=fields["trace"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None
