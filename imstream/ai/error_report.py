"""What a backend says is wrong, read from whatever form it says it in: JSON of several makers, HTML, or plain text.

Only the fields that name the error are taken. The rest of such a body may repeat the prompt, which no log may show.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any, Self

from pydantic_core import from_json

DETAIL_LENGTH = 200
"""Most characters of a backend's own words in the detail of an error."""

_ERROR_STATUSES = range(400, 600)

_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(r"<(script|style|head)\b.*?(</\1\s*>|\Z)|<!--.*?(-->|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]*(>|\Z)")
_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


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
        text = body.decode("utf-8", "replace").strip()
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
            return cls(message=value)
        if not isinstance(value, dict):
            return cls()
        code, kind = value.get("code"), value.get("type")
        words = tuple(word.lower() for word in (code, kind) if isinstance(word, str) and _status(word) is None)
        return cls(words, _message(value), _status(code))

    def summary(self, secrets: tuple[str, ...] = ()) -> str:
        """One line for an operator: the words, then the sentence, shortened and without secrets."""
        return shorten(": ".join(part for part in (" ".join(dict.fromkeys(self.words)), self.message) if part), secrets)


def shorten(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Make one line of at most `DETAIL_LENGTH` characters, without the secrets. They go first: a cut could hide one."""
    for secret in secrets:
        text = text.replace(secret, "(hidden)")
    line = _UNPRINTABLE.sub(" ", text).strip().encode("utf-8", "replace").decode()
    return line if len(line) <= DETAIL_LENGTH else line[: DETAIL_LENGTH - 1].rstrip() + "…"


def _status(code: Any) -> int | None:  # noqa: ANN401 - JSON
    """The HTTP status that a code names, as a number or in digits."""
    if isinstance(code, str) and len(code) == 3 and code.isascii() and code.isdecimal():  # noqa: PLR2004 - digits
        code = int(code)
    return code if type(code) is int and code in _ERROR_STATUSES else None


def _message(error: dict[str, Any]) -> str:
    message = error.get("message")
    if isinstance(message, str):
        return message
    detail = error.get("detail")
    if isinstance(detail, str):
        return detail
    if isinstance(detail, list):  # FastAPI: a list of fields that are wrong, each with what stood there
        return "; ".join(filter(None, (_field_error(item) for item in detail if isinstance(item, dict))))
    return ""


def _field_error(item: dict[str, Any]) -> str:
    place, problem = item.get("loc"), item.get("msg")
    path = ".".join(str(part) for part in place) if isinstance(place, list) else ""
    return ": ".join(part for part in (path, problem) if isinstance(part, str) and part)


def _page_text(page: str) -> str:
    """What a person would read first on an HTML page: its title, or else its text."""
    title = _TITLE.search(page)
    text = title[1] if title else ""
    if not text.strip():
        text = _TAG.sub(" ", _HIDDEN.sub(" ", page))
    return html.unescape(_TAG.sub(" ", text))
