"""Reads an answer from the bytes of a response body, without I/O: chat completion chunks, or one whole completion.

https://platform.openai.com/docs/api-reference/chat-streaming, and the dialects of other servers.
"""

import json
import re
from itertools import islice
from typing import Any

from pydantic_core import from_json

from imstream.ai import failures
from imstream.ai.error_report import ErrorReport
from imstream.ai.sse import BYTE_ORDER_MARK, EventParser, EventTooLong
from imstream.errors import BackendError, TransientBackendError

JSON_LIMIT = 1 << 20  # bytes of an event, or of an answer in one document; raised with the limit of an answer
BYTES_PER_CHARACTER = 256  # of a response, at most; an event with one character has about 250
LARGE_JSON = 16 * 1024  # bytes that take long to parse; its strings would displace others from the decoder's cache

FAILED_FINISHES = frozenset({"error", "insufficient_system_resource"})
"""Finish reasons of OpenRouter and DeepSeek for a model that was stopped and has not finished."""

OTHER_FINISH = "other"  # replaces a finish reason that is not a short word
MAX_TOKEN_COUNT = 2**53  # JavaScript's JSON represents no larger integers exactly

_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_MAX_COUNTS = 16  # kept of a usage; OpenAI sends 3, others up to 8
_MAX_USAGE_FIELDS = 4 * _MAX_COUNTS
_USAGE_DETAILS = (
    ("prompt_tokens_details", "cached_tokens"),
    ("completion_tokens_details", "reasoning_tokens"),
)


class AnswerReader:
    """Is fed with a response body as it arrives, and returns the text.

    Attributes:
        done: `[DONE]` was received, or the answer is truncated: the rest is ignored.
        large: An incomplete event or document is large: the read that completes it takes long to parse.
        progressed: The last `feed` contained a sign of progress of the model: text, hidden reasoning, a finish reason.
            Comments and a bare role do not count; servers send them while a request is queued.
    """

    def __init__(self, *, limit: int, secrets: tuple[str, ...] = ()) -> None:
        """Read one answer of at most `limit` characters; errors do not show `secrets`, even if the backend does."""
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self.done = self.truncated = self.large = self.progressed = False
        self._remaining = limit
        self._secrets = secrets
        self._json_limit = max(JSON_LIMIT, 4 * limit)
        self._idle_bytes = 0  # since the last sign of progress
        self._events = EventParser(limit=self._json_limit)
        self._document: bytearray | None = None
        self._begun = False
        self._high: str | None = None  # first half of a surrogate pair, or empty; None until a surrogate was received

    @property
    def complete(self) -> bool:
        """Whether all text was received. Usage may follow."""
        return self.done or self.finish_reason is not None

    def feed(self, data: bytes) -> str:
        """Read a part of the body; return the text of all its events.

        Raises `BackendError`: `bad_stream`, or an error that the backend reports.
        """
        self.progressed = False
        size = len(data)
        if not self._begun:
            data = data.removeprefix(BYTE_ORDER_MARK).lstrip()
            if not data:
                self._count_idle(size)
                return ""
            self._begun = True
            # Content types are not reliable: JSON errors are sent as event streams.
            if data.startswith((b"{", b"[", b"<")):
                self._document = bytearray()
        if self._document is not None:
            self._document += data
            self.large = len(self._document) > LARGE_JSON
            if len(self._document) > self._json_limit:
                raise TransientBackendError("bad_stream", f"a document of more than {self._json_limit} bytes")
            return ""
        try:
            text = self._read_events(self._events.feed(data))
        except EventTooLong as error:
            raise TransientBackendError("bad_stream", str(error)) from None
        if not self.progressed:
            self._count_idle(size)
        elif self._idle_bytes:
            self._idle_bytes = 0
            self.large = False
        return self._bounded(text) if text else text

    def end(self) -> str:
        """Return the rest of the text at the end of the body. Raises as `feed`, also `broken_stream` if incomplete."""
        if self._document is not None:
            return self._bounded(self._read_document(bytes(self._document)))
        try:
            text = self._read_events(self._events.close())
        except BackendError as error:
            if error.reason != "bad_stream":
                raise
            text = ""  # the last event is incomplete
        if not self.complete:
            raise TransientBackendError("broken_stream", "the answer ended without [DONE] and without a finish reason")
        return self._bounded(text)

    def _bounded(self, text: str) -> str:
        """Truncate the answer at its limit, and replace what `history` does not allow: NUL and single surrogates."""
        if self._high is not None:  # joins pairs that are split over two events
            text, self._high = self._high + text, ""
            if text and "\ud800" <= text[-1] <= "\udbff":
                text, self._high = text[:-1], text[-1]
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if "\0" in text:
            text = text.replace("\0", "\ufffd")
        self._remaining -= len(text)
        if self._remaining < 0:
            text = text[: self._remaining]
            self._remaining = 0
            self.finish_reason = "length"
            self.truncated = self.done = True
        return text

    def _count_idle(self, size: int) -> None:
        """Bound the bytes without progress: comments, empty events, blanks."""
        self._idle_bytes += size
        buffered = self._events.buffered
        self.large = buffered > LARGE_JSON
        if self._idle_bytes - buffered > self._json_limit:
            if not self.complete:
                raise TransientBackendError("bad_stream", f"{self._idle_bytes} bytes without a sign of progress")
            self.done = True

    def _read_events(self, events: list[bytes]) -> str:
        texts = []
        for event in events:
            if event == b"[DONE]":
                self.done = True
                break
            choice = self._read_envelope(self._decode(event))
            if choice is not None and (text := self._read_delta(choice)):
                texts.append(text)
        if not texts:
            return ""
        self.progressed = True
        return texts[0] if len(texts) == 1 else "".join(texts)

    def _read_document(self, body: bytes) -> str:
        if body.startswith(b"<"):
            report = ErrorReport.from_body(body)
            raise TransientBackendError("bad_stream", f"a page instead of an answer: {report.summary(self._secrets)}")
        choice = self._read_envelope(self._decode(body))
        if choice is None:
            raise TransientBackendError("bad_stream", "JSON without an answer")
        text = _text_of(_object(choice.get("message")).get("content"))
        if choice.get("finish_reason"):
            self._read_finish(choice)
        self.done = True
        return text

    def _decode(self, text: bytes) -> Any:  # noqa: ANN401 - JSON
        try:
            return from_json(text) if len(text) < LARGE_JSON else from_json(text, cache_strings=False)
        except ValueError as error:
            problem = str(error)
        # Servers in JavaScript split text into UTF-16 units, and JSON allows single surrogates (RFC 8259, 8.2). The
        # standard library accepts them; they are joined later.
        if b"\\u" in text:
            try:
                value = json.loads(text.decode())
            except (ValueError, RecursionError):
                pass
            else:
                self._high = self._high or ""
                return value
        raise TransientBackendError("bad_stream", f"an event that is not JSON: {problem}")

    def _read_envelope(self, value: Any) -> dict[str, Any] | None:  # noqa: ANN401 - JSON
        """Read the fields that chunks and whole completions share; return the first choice, if any."""
        if not isinstance(value, dict):
            value = _object(value[0] if isinstance(value, list) and value else value)  # Gemini sends errors in a list
        if value.get("error") or value.get("object") == "error":
            raise failures.from_report(ErrorReport.from_value(value), secrets=self._secrets)
        if usage := value.get("usage"):
            self.usage = _token_counts(_object(usage)) or self.usage
        choices = value.get("choices")
        if not choices:
            return None
        choice = choices[0] if isinstance(choices, list) else None
        return choice if isinstance(choice, dict) else _object(choice)

    def _read_delta(self, choice: dict[str, Any]) -> str:
        if choice.get("finish_reason"):
            self._read_finish(choice)
        delta = choice.get("delta")
        if not delta:
            return ""
        content = delta.get("content") if isinstance(delta, dict) else _object(delta)
        if content:
            return content if isinstance(content, str) else _text_of(content)
        # Hidden reasoning and other fields that are not shown are signs of progress.
        self.progressed = self.progressed or any(value for name, value in delta.items() if name != "role")
        return ""

    def _read_finish(self, choice: dict[str, Any]) -> None:
        reason = choice["finish_reason"]
        if not isinstance(reason, str):
            raise TransientBackendError("bad_stream", "a finish reason that is not text")
        if reason in FAILED_FINISHES:
            raise TransientBackendError("backend_error", f"finish reason {reason}")
        self.finish_reason = reason if _WORD.fullmatch(reason) else OTHER_FINISH
        self.progressed = True


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return value
    raise TransientBackendError("bad_stream", "JSON of another shape than a chat completion's")


def _text_of(content: Any) -> str:  # noqa: ANN401 - JSON
    """The text of `content`: a string, null, or a list of parts, of which only the texts are shown."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") for part in map(_object, content) if part.get("type") == "text"]
        return "".join(text for text in texts if isinstance(text, str))
    raise TransientBackendError("bad_stream", "content that is not text")


def _token_counts(usage: dict[str, Any]) -> dict[str, int]:
    """The token counts of a usage, with the cached and the reasoning tokens out of its details."""
    counts = dict[str, int]()
    for name, value in islice(usage.items(), _MAX_USAGE_FIELDS):
        if _is_count(value) and len(counts) < _MAX_COUNTS and _WORD.fullmatch(name):
            counts[name] = value
    for group, name in _USAGE_DETAILS:
        details = usage.get(group)
        if isinstance(details, dict) and _is_count(value := details.get(name)):
            counts[name] = value
    return counts


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_COUNT
