"""Extracts the error from a response body in any format: the JSON of several vendors, HTML, or plain text.

Only the fields that name the error are read. The rest of a body may contain the prompt, which must not be logged.
"""

import html
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Self, TypeGuard

from pydantic_core import from_json

DETAIL_LENGTH = 200  # characters of a backend's message in the detail of an error
SENTENCE_LIMIT = 1000  # characters of a message that are searched for sentences, which takes long
TEXT_LIMIT = 8192  # bytes of an error body, and characters of a text in it, that are read
WORD_LIMIT = 64  # characters of a code, a type or a part of a path; longer ones are ignored
_MAX_FIELDS = 8  # wrong fields, and parts of the path of one, in a detail
_MAX_INDEX = 10**9  # in the path of a wrong field, and of a code that is a number
_MAX_DEPTH = 6  # of errors in errors
_MIN_SECRET_PREFIX = 4  # characters of a truncated secret that are hidden, too
_ERROR_STATUSES = range(400, 600)

# All of these run in linear time: repetitions are bounded, or match to the end.
_TITLE = re.compile(r"<title[^<>]{0,256}>", re.IGNORECASE)
_TITLE_END = re.compile(r"</title", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style|head)\b.*?(</\1\s*>|\Z)|<!--.*?(-->|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]*(>|\Z)")
_LONG_ENTITY = re.compile(r"&#[0-9]{9,}")  # no character; Python refuses to parse numbers of thousands of digits


# Fields of several vendors
_WRAPPERS = ("error", "errors", "fault", "base_resp", "innererror", "details", "metadata", "message", "raw")
_TEXT = ""  # the name of a text that is an error of its own, or the `message` of one
_CODES = ("code", "error_code", "errorCode", "err_code", "errcode", "status_code")
_WORDS = (*_CODES, "reason", "type", "error_type", "status")
_MESSAGES = (
    *("msg", "error_msg", "errorMessage", "error_message", "err_msg", "errmsg", "status_msg"),
    *("faultstring", "error_description", "detail"),
)
_ERROR_FIELDS = frozenset({"error", "errors", "fault", "object", "base_resp", "success", "message", *_MESSAGES})
_WAITS = {"retryDelay": 1.0, "retry_after": 1.0, "retryAfter": 1.0, "retry_after_ms": 0.001, "retryAfterMs": 0.001}
_NO_ERROR = frozenset({"", "0", "200", "ok", "success", "none", "null"})  # as a code
_FAILED = frozenset({"error", "fail", "failed", "failure"})  # as a status or a type

_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_UNIT = r"(?:(?:ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?)(?![a-z])|秒|分钟|小时)"
_DURATION = rf"(?:{_NUMBER}\s?{_UNIT}\s?){{1,4}}"
_WAIT = re.compile(
    rf"(?:retry|try again|wait|重试|再试)[^\d.]{{0,30}}({_DURATION})|({_DURATION})(?:之?后)", re.IGNORECASE
)
"""A wait in a sentence: "retry in 6.07s", "try again in 1m2.5s", "retry after 20 seconds"."""
_PART = re.compile(rf"({_NUMBER})\s?({_UNIT})", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "mil": 0.001, "s": 1.0, "秒": 1.0, "m": 60.0, "分": 60.0, "h": 3600.0, "小": 3600.0}
"""By the beginning of the unit; the first match counts."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An error as the backend reports it."""

    words: tuple[str, ...] = ()  # codes and types in lower case, the more specific ones first
    message: str = ""  # not shortened
    status: int | None = None  # in an error object, which may be part of a successful response
    retry_after: timedelta | None = None  # the wait that the error requests

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Read the beginning of an error body. Never fails: anything unknown is read as plain text."""
        text = body[:TEXT_LIMIT].decode("utf-8", "replace").strip()
        if text.startswith(("{", "[")):
            try:
                return cls.from_value(_partial_json(text))
            except ValueError:
                return cls(message="the body looks like JSON but is not")
        return cls.from_value(_page_text(text) if text.startswith("<") else text)

    @classmethod
    def from_value(cls, value: Any) -> Self:  # noqa: ANN401 - JSON
        """Read an error from decoded JSON: the whole body, or the value of `error`."""
        layers = list(islice(_layers(value, _MAX_DEPTH), 2 * _MAX_FIELDS))
        codes = [code for layer in layers for name in _WORDS if _is_code(code := layer.get(name))]
        words = [str(code).lower() for code in codes if _status(code) is None]
        message = ": ".join(dict.fromkeys(filter(None, map(_message, layers))))[:TEXT_LIMIT]
        waits = (_wait(layer[name], unit) for layer in layers for name, unit in _WAITS.items() if name in layer)
        return cls(
            tuple(dict.fromkeys(word for word in words if word not in _NO_ERROR | _FAILED)),
            message,
            next(filter(None, map(_status, codes)), None),
            next(filter(None, waits), None) or _wait_in(message),
        )

    @staticmethod
    def is_error(value: dict[str, Any]) -> bool:
        """Whether JSON without an answer reports an error, such as `{"code": "InvalidApiKey", "message": "…"}`."""
        if _ERROR_FIELDS.isdisjoint(value):
            return False
        if any(value.get(name) for name in ("error", "errors", "fault")) or value.get("object") == "error":
            return True
        base = value.get("base_resp")  # MiniMax
        if value.get("success") is False or (isinstance(base, dict) and base.get("status_code")):
            return True
        if not any(isinstance(value.get(name), str) for name in ("message", *_MESSAGES)):
            return False
        codes = [str(value[name]).lower() for name in _CODES if _is_code(value.get(name))]
        states = {value.get("status"), value.get("type")} if _is_code(value.get("status", "")) else set[object]()
        return any(code not in _NO_ERROR for code in codes) or not _FAILED.isdisjoint(states)

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


def _layers(value: Any, depth: int) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - JSON
    """The objects that describe an error, each before the one that contains it."""
    if isinstance(value, list):  # Gemini wraps its errors in a list
        for item in value[:_MAX_FIELDS]:
            yield from () if isinstance(item, list) else _layers(item, depth)
    elif isinstance(value, str):
        text = value[:TEXT_LIMIT].strip()
        inner = None
        if depth and text.startswith(("{", "[")):  # gateways quote the errors of others
            with suppress(ValueError):
                inner = _partial_json(text)
        yield from _layers(inner, depth - 1) if isinstance(inner, dict | list) else iter([{_TEXT: text}])
    elif isinstance(value, dict):
        for name in _WRAPPERS if depth else ():
            yield from _layers(value.get(name), depth - 1)
        yield value


def _message(layer: dict[str, Any]) -> str:
    for name in (_TEXT, *_MESSAGES):
        if isinstance(text := layer.get(name), str):
            return text[:TEXT_LIMIT]
    detail = layer.get("detail")
    if isinstance(detail, list):  # FastAPI: a list of wrong fields, each with its input
        fields = [_field_error(item) for item in detail[:_MAX_FIELDS] if isinstance(item, dict)]
        return "; ".join(filter(None, fields))[:TEXT_LIMIT]
    return ""


def _wait(value: Any, unit: float) -> timedelta | None:  # noqa: ANN401 - JSON
    """A wait in a field: a number, a duration such as "6s", or protobuf's object."""
    if isinstance(value, dict):
        value = value.get("seconds")
    if isinstance(value, str) and (match := re.fullmatch(_DURATION, value.strip(), re.IGNORECASE)):
        return _duration(match[0])
    try:
        return timedelta(seconds=float(value) * unit) if _is_code(value) or isinstance(value, float) else None
    except (ValueError, OverflowError):
        return None


def _wait_in(message: str) -> timedelta | None:
    match = _WAIT.search(message, 0, SENTENCE_LIMIT)
    return None if match is None else _duration(match[1] or match[2])


def _duration(text: str) -> timedelta:
    seconds = 0.0
    for number, unit in _PART.findall(text.lower()):
        seconds += float(number) * next(value for start, value in _SECONDS.items() if unit.startswith(start))
    return timedelta(seconds=seconds)


def _field_error(item: dict[str, Any]) -> str:
    place, problem = item.get("loc"), item.get("msg")
    parts = place[:_MAX_FIELDS] if isinstance(place, list) else []
    path = ".".join(str(part) if _is_code(part) else "…" for part in parts)
    return ": ".join(part for part in (path, problem) if isinstance(part, str) and part)


def _is_code(value: object) -> TypeGuard[str | int]:
    return _is_word(value) or (type(value) is int and abs(value) <= _MAX_INDEX)


def _is_word(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= WORD_LIMIT


def _partial_json(text: str) -> Any:  # noqa: ANN401 - JSON
    return from_json(text, allow_partial="trailing-strings")


def _page_text(page: str) -> str:
    """The title of an HTML page, or else its text."""
    begin = _TITLE.search(page)
    end = begin and _TITLE_END.search(page, begin.end())
    text = page[begin.end() : end.start()] if begin and end else ""
    if not text.strip():
        text = _TAG.sub(" ", _HIDDEN.sub(" ", page))
    return html.unescape(_LONG_ENTITY.sub(" ", _TAG.sub(" ", text)))
