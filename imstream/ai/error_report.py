"""What a backend says is wrong, read from whatever form it says it in: JSON of several makers, HTML, or plain text.

Only the fields that name the error are taken. The rest of such a body may repeat the prompt, which no log may show.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

from pydantic_core import from_json

DETAIL_LENGTH = 200
"""Maximum characters of a backend's own words in the detail of an error."""

TEXT_LIMIT = 8192
"""Maximum bytes of an error body, and characters of one text in it, that are looked at."""

WORD_LIMIT = 64
"""Maximum characters of a code, a type or a part of a path; a longer one is none."""

_MOST_FIELDS = 8
"""Maximum wrong fields, and parts of the path of one, that are told."""

_LARGEST_INDEX = 10**9

_TELLING = 4
"""Characters of a secret that tell something of it."""

_ERROR_STATUSES = range(400, 600)

# Each of these takes time that is linear in the text: what may be repeated has a bound, or is taken to its end.
_TITLE = re.compile(r"<title[^<>]{0,256}>", re.IGNORECASE)
_TITLE_END = re.compile(r"</title", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style|head)\b.*?(</\1\s*>|\Z)|<!--.*?(-->|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]*(>|\Z)")
_LONG_ENTITY = re.compile(r"&#[0-9]{9,}")
"""Python refuses to read a number with thousands of digits. None with nine is a character."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """What a backend says is wrong.

    Attributes:
        words: Its code and type, lower case, the more telling first.
        message: Its sentence for people, not shortened; empty when it has none.
        status: An HTTP status that it names inside an answer whose own status was a success.
    """

    words: tuple[str, ...] = ()
    message: str = ""
    status: int | None = None

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Read the beginning of an error body. Never fails: what is not understood becomes plain text, or nothing."""
        text = body[:TEXT_LIMIT].decode("utf-8", "replace").strip()
        if text.startswith(("{", "[")):
            try:
                return cls.from_value(from_json(text, allow_partial="trailing-strings"))
            except ValueError:
                return cls(message="the body looks like JSON and is none")
        return cls(message=_page_text(text) if text.startswith("<") else text)

    @classmethod
    def from_value(cls, value: Any) -> Self:  # noqa: ANN401 - JSON
        """Read an error from decoded JSON: the whole body, or what stood under `error`."""
        if isinstance(value, list) and value:  # Gemini wraps its errors in a list
            value = value[0]
        if isinstance(value, dict) and value.get("error"):
            value = value["error"]
        if isinstance(value, str):
            return cls(message=value[:TEXT_LIMIT])
        if not isinstance(value, dict):
            return cls()
        code, kind = value.get("code"), value.get("type")
        words = tuple(word.lower() for word in (code, kind) if _is_word(word) and _status(word) is None)
        return cls(words, _message(value), _status(code))

    def summary(self, secrets: tuple[str, ...] = ()) -> str:
        """One line for an operator: the words, then the sentence, shortened and without secrets."""
        return shorten(": ".join(part for part in (" ".join(dict.fromkeys(self.words)), self.message) if part), secrets)


def shorten(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Make one line of at most `DETAIL_LENGTH` printable characters, without the secrets. They go first: a cut could
    hide one from us and not from a reader."""  # noqa: D205, D209 - one thought
    text = text[:TEXT_LIMIT]
    for secret in secrets:
        text = text.replace(secret, "(hidden)")
        # Wherever the text was cut, here or before, it may end within a secret.
        for length in range(len(secret) - 1, _TELLING - 1, -1):
            text = text.removesuffix(secret[:length])
    line = " ".join("".join(map(_printable, text)).split())
    return line if len(line) <= DETAIL_LENGTH else line[: DETAIL_LENGTH - 1].rstrip() + "…"


def _printable(character: str) -> str:
    """No control characters, no marks of direction (they could reorder a log), no halves of characters."""
    if character.isprintable():
        return character
    return "?" if "\ud800" <= character <= "\udfff" else " "


def _status(code: Any) -> int | None:  # noqa: ANN401 - JSON
    """The HTTP status that a code names, as a number or in digits."""
    if isinstance(code, str) and len(code) == 3 and code.isascii() and code.isdecimal():  # noqa: PLR2004 - digits
        code = int(code)
    return code if type(code) is int and code in _ERROR_STATUSES else None


def _message(error: dict[str, Any]) -> str:
    message = error.get("message")
    if isinstance(message, str):
        return message[:TEXT_LIMIT]
    detail = error.get("detail")
    if isinstance(detail, str):
        return detail[:TEXT_LIMIT]
    if isinstance(detail, list):  # FastAPI: a list of fields that are wrong, each with what stood there
        fields = [_field_error(item) for item in detail[:_MOST_FIELDS] if isinstance(item, dict)]
        return "; ".join(filter(None, fields))[:TEXT_LIMIT]
    return ""


def _field_error(item: dict[str, Any]) -> str:
    place, problem = item.get("loc"), item.get("msg")
    path = ".".join(map(_path_part, place[:_MOST_FIELDS])) if isinstance(place, list) else ""
    return ": ".join(part for part in (path, problem) if isinstance(part, str) and part)


def _path_part(part: object) -> str:
    if _is_word(part):
        return part
    return str(part) if isinstance(part, int) and abs(part) <= _LARGEST_INDEX else "…"


def _is_word(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= WORD_LIMIT


def _page_text(page: str) -> str:
    """What a person would read first on an HTML page: its title, or else its text."""
    text = _title(page)
    if not text.strip():
        text = _TAG.sub(" ", _HIDDEN.sub(" ", page))
    return html.unescape(_LONG_ENTITY.sub(" ", _TAG.sub(" ", text)))


def _title(page: str) -> str:
    begin = _TITLE.search(page)
    end = begin and _TITLE_END.search(page, begin.end())
    return page[begin.end() : end.start()] if begin and end else ""
