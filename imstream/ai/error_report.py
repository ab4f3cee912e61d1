"""Extracts the error from a response body in any format: the JSON of several vendors, HTML, or plain text.

Only the fields that name the error are read. The rest of a body may contain the prompt, which must not be logged.
"""

import html
import re
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

from pydantic_core import from_json

DETAIL_LENGTH = 200  # characters of a backend's message in the detail of an error
TEXT_LIMIT = 8192  # bytes of an error body, and characters of a text in it, that are read
WORD_LIMIT = 64  # characters of a code, a type or a part of a path; longer ones are ignored
_MAX_FIELDS = 8  # wrong fields, and parts of the path of one, in a detail
_MAX_INDEX = 10**9  # in the path of a wrong field
_MIN_SECRET_PREFIX = 4  # characters of a truncated secret that are hidden, too
_ERROR_STATUSES = range(400, 600)

# All of these run in linear time: repetitions are bounded, or match to the end.
_TITLE = re.compile(r"<title[^<>]{0,256}>", re.IGNORECASE)
_TITLE_END = re.compile(r"</title", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style|head)\b.*?(</\1\s*>|\Z)|<!--.*?(-->|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]*(>|\Z)")
_LONG_ENTITY = re.compile(r"&#[0-9]{9,}")  # no character; Python refuses to parse numbers of thousands of digits


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An error as the backend reports it."""

    words: tuple[str, ...] = ()  # code and type in lower case, the more specific one first
    message: str = ""  # not shortened
    status: int | None = None  # in an error object, which may be part of a successful response

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Read the beginning of an error body. Never fails: anything unknown is read as plain text."""
        text = body[:TEXT_LIMIT].decode("utf-8", "replace").strip()
        if text.startswith(("{", "[")):
            try:
                return cls.from_value(from_json(text, allow_partial="trailing-strings"))
            except ValueError:
                return cls(message="the body looks like JSON but is not")
        return cls(message=_page_text(text) if text.startswith("<") else text)

    @classmethod
    def from_value(cls, value: Any) -> Self:  # noqa: ANN401 - JSON
        """Read an error from decoded JSON: the whole body, or the value of `error`."""
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
        """The words and the message as one shortened line without secrets."""
        return shorten(": ".join(part for part in (" ".join(dict.fromkeys(self.words)), self.message) if part), secrets)


def shorten(text: str, secrets: tuple[str, ...] = ()) -> str:
    """One line of at most `DETAIL_LENGTH` printable characters without secrets, also without truncated ones."""
    text = text[:TEXT_LIMIT]
    for secret in secrets:
        text = text.replace(secret, "(hidden)")
        for length in range(len(secret) - 1, _MIN_SECRET_PREFIX - 1, -1):
            text = text.removesuffix(secret[:length])
    line = " ".join("".join(map(_printable, text)).split())
    return line if len(line) <= DETAIL_LENGTH else line[: DETAIL_LENGTH - 1].rstrip() + "…"


def _printable(character: str) -> str:
    """Replace control characters, marks of direction (they could reorder a log) and single surrogates."""
    if character.isprintable():
        return character
    return "?" if "\ud800" <= character <= "\udfff" else " "


def _status(code: Any) -> int | None:  # noqa: ANN401 - JSON
    """The HTTP status that a code names, as a number or in digits."""
    if isinstance(code, str) and len(code) == 3 and code.isascii() and code.isdecimal():  # noqa: PLR2004 - digits
        code = int(code)
    return code if type(code) is int and code in _ERROR_STATUSES else None


def _message(error: dict[str, Any]) -> str:
    detail = error.get("detail")
    for text in (error.get("message"), detail):
        if isinstance(text, str):
            return text[:TEXT_LIMIT]
    if isinstance(detail, list):  # FastAPI: a list of wrong fields, each with its input
        fields = [_field_error(item) for item in detail[:_MAX_FIELDS] if isinstance(item, dict)]
        return "; ".join(filter(None, fields))[:TEXT_LIMIT]
    return ""


def _field_error(item: dict[str, Any]) -> str:
    place, problem = item.get("loc"), item.get("msg")
    parts = place[:_MAX_FIELDS] if isinstance(place, list) else []
    path = ".".join(str(part) if _is_word(part) or _is_index(part) else "…" for part in parts)
    return ": ".join(part for part in (path, problem) if isinstance(part, str) and part)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and abs(value) <= _MAX_INDEX


def _is_word(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= WORD_LIMIT


def _page_text(page: str) -> str:
    """The title of an HTML page, or else its text."""
    begin = _TITLE.search(page)
    end = begin and _TITLE_END.search(page, begin.end())
    text = page[begin.end() : end.start()] if begin and end else ""
    if not text.strip():
        text = _TAG.sub(" ", _HIDDEN.sub(" ", page))
    return html.unescape(_LONG_ENTITY.sub(" ", _TAG.sub(" ", text)))
