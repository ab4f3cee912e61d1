"""Reads one answer out of the bytes of a response body, without I/O: chunks of a chat completion, or a whole one.

https://platform.openai.com/docs/api-reference/chat-streaming, and what other servers make of it.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from imstream.ai import failures
from imstream.ai.error_report import ErrorReport
from imstream.ai.fields import OTHER_FINISH, short_word, token_counts
from imstream.ai.sse import BYTE_ORDER_MARK, EventParser, EventTooLong
from imstream.errors import BackendError, TransientBackendError

JSON_LIMIT = 1 << 20
"""Maximum bytes of one piece of JSON: an event, or an answer that comes as one document. Where answers may be longer
than usual it is higher, so that one document can hold them. An event carries one token, as a rule."""

BYTES_A_CHARACTER = 256
"""Maximum bytes on the wire for each character that an answer may have. An event with one character has about 250."""

FAILED_FINISHES = frozenset({"error", "insufficient_system_resource"})
"""Finish reasons by which OpenRouter and DeepSeek say that the model was stopped, not that it had finished."""

HEAVY = 16 * 1024
"""Bytes of JSON that take longer to read than is usual. Its strings are not cached: they would take the places of those
that come again."""


class AnswerReader:
    """Fed with a response body as it comes, gives the text as it comes.

    Attributes:
        finish_reason: Why the model stopped, once it has said so.
        usage: Tokens used, once the backend has told.
        done: `[DONE]` has come: nothing follows that matters.
        cut: Whether the answer was longer than the limit, and ends there.
        heavy: Whether an event that has not ended, or a document, is large: what ends it takes long to read.
        moved: Whether the last `feed` carried a sign of the model at work: text, hidden reasoning, an end. A comment
            or a bare role is none, servers send those while the request waits for its turn.
    """

    def __init__(self, *, limit: int, secrets: tuple[str, ...] = ()) -> None:
        """Begin one answer.

        Args:
            limit: Maximum characters of the answer.
            secrets: What no error may show, even when the backend repeats it.
        """
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self.done = False
        self.cut = False
        self.heavy = False
        self.moved = False
        self._left = limit
        self._secrets = secrets
        self._json_limit = max(JSON_LIMIT, 4 * limit)
        self._still = 0
        """Bytes since the model was last seen at work."""
        self._events = EventParser(limit=self._json_limit)
        self._document: bytearray | None = None
        self._begun = False
        self._surrogates: _SurrogateJoiner | None = None

    @property
    def whole(self) -> bool:
        """Whether all text has come. Usage may follow."""
        return self.done or self.finish_reason is not None

    def feed(self, data: bytes) -> str:
        """Take what the network gave; return the text in it, of all its events in one piece.

        Raises:
            TransientBackendError: `bad_stream`, or an error that the backend reports and that may pass.
            PermanentBackendError: An error that the backend reports and that will not.
        """
        self.moved = False
        size = len(data)
        if not self._begun and not (data := self._begin(data)):
            self._count_still(size)
            return ""
        if self._document is not None:
            self._collect(data)
            return ""
        try:
            text = self._read_events(self._events.feed(data))
        except EventTooLong as error:
            raise TransientBackendError("bad_stream", str(error)) from None
        if not self.moved:
            self._count_still(size)
        elif self._still:
            self._still = 0
            self.heavy = False
        return self._taken(text) if text else text

    def end(self) -> str:
        """The body has ended: return the text that was held back.

        Raises:
            TransientBackendError: `broken_stream` when the answer is not whole; else as `feed`.
            PermanentBackendError: As `feed`.
        """
        if self._document is not None:
            return self._taken(self._read_document(bytes(self._document)))
        try:
            text = self._read_events(self._events.close())
        except BackendError as error:
            if error.reason != "bad_stream":
                raise
            text = ""  # the end cut the last event in two
        if not self.whole:
            raise TransientBackendError("broken_stream", "the answer ended without [DONE] and without a finish reason")
        return self._taken(text)

    def _taken(self, text: str) -> str:
        """What is taken of a piece of text: all of it, or as much as the answer may still have.

        Characters that no client could send back as `history` are replaced: NUL, and halves of surrogate pairs.
        """
        if self._surrogates is not None:
            text = self._surrogates.join(text)
        if "\0" in text:
            text = text.replace("\0", "\ufffd")
        self._left -= len(text)
        if self._left < 0:
            text = text[: self._left]
            self._left = 0
            self.finish_reason = "length"
            self.cut = self.done = True
        return text

    def _count_still(self, size: int) -> None:
        """Count what comes while the model does nothing: comments, empty events, blanks."""
        self._still += size
        held = self._events.held
        self.heavy = held > HEAVY
        if self._still - held <= self._json_limit:
            return
        if not self.whole:
            raise TransientBackendError("bad_stream", f"{self._still} bytes without a sign of the model at work")
        self.done = True

    def _begin(self, data: bytes) -> bytes:
        """Tell by its first character what comes. Content types lie: JSON errors come labelled as event streams."""
        data = data.removeprefix(BYTE_ORDER_MARK).lstrip()
        if data:
            self._begun = True
            if data[:1] in (b"{", b"[", b"<"):
                self._document = bytearray()
        return data

    def _collect(self, data: bytes) -> None:
        assert self._document is not None  # noqa: S101 - only called with one
        self._document += data
        self.heavy = len(self._document) > HEAVY
        if len(self._document) > self._json_limit:
            raise TransientBackendError("bad_stream", f"a document of more than {self._json_limit} bytes")

    def _read_events(self, events: list[bytes]) -> str:
        texts = []
        for event in events:
            if event == b"[DONE]":
                self.done = True
                break
            try:
                chunk = from_json(event) if len(event) < HEAVY else from_json(event, cache_strings=False)
            except ValueError as error:
                chunk = self._decode_again(event, str(error))
            choice = self._read_envelope(chunk)
            if choice is not None and (text := self._read_delta(choice)):
                texts.append(text)
        if not texts:
            return ""
        self.moved = True
        return texts[0] if len(texts) == 1 else "".join(texts)

    def _read_document(self, body: bytes) -> str:
        if body.startswith(b"<"):
            report = ErrorReport.from_body(body)
            raise TransientBackendError("bad_stream", f"a page instead of an answer: {report.summary(self._secrets)}")
        try:
            completion = from_json(body, cache_strings=False)
        except ValueError as error:
            completion = self._decode_again(body, str(error))
        choice = self._read_envelope(completion)
        if choice is None:
            raise TransientBackendError("bad_stream", "JSON that holds no answer")
        text = _text_of(_object(choice.get("message")).get("content"))
        if choice.get("finish_reason"):
            self._read_finish(choice)
        self.done = True
        return text

    def _read_envelope(self, value: Any) -> dict[str, Any] | None:  # noqa: ANN401 - JSON
        """Read what a chunk and a whole completion share; return the choice in it, if any."""
        if not isinstance(value, dict):
            value = _object(value[0] if isinstance(value, list) and value else value)  # Gemini lists its errors
        if value.get("error") or value.get("object") == "error":
            raise failures.from_report(ErrorReport.from_value(value), secrets=self._secrets)
        if usage := value.get("usage"):
            self.usage = token_counts(_object(usage)) or self.usage
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
        # Hidden reasoning and whatever else is not shown: the model is at work.
        self.moved = self.moved or any(value for name, value in delta.items() if name != "role")
        return ""

    def _read_finish(self, choice: dict[str, Any]) -> None:
        reason = choice["finish_reason"]
        if not isinstance(reason, str):
            raise TransientBackendError("bad_stream", "a finish reason that is no text")
        if reason in FAILED_FINISHES:
            raise TransientBackendError("backend_error", f"finish reason {reason}")
        self.finish_reason = short_word(reason) or OTHER_FINISH
        self.moved = True

    def _decode_again(self, event: bytes, problem: str) -> Any:  # noqa: ANN401 - JSON
        """Decode what the fast decoder refuses, if it is only half a surrogate pair.

        Servers in JavaScript send such halves when they cut text by UTF-16 units, and JSON allows it (RFC 8259, 8.2).
        The standard library takes them; they are joined later.
        """
        if b"\\u" in event:
            try:
                value = json.loads(event.decode())
            except (ValueError, RecursionError):
                pass
            else:
                self._surrogates = self._surrogates or _SurrogateJoiner()
                return value
        raise TransientBackendError("bad_stream", f"an event that is no JSON: {problem}")


class _SurrogateJoiner:
    """Puts characters together whose two UTF-16 halves came in different events. A half without the other becomes �."""

    def __init__(self) -> None:
        self._half = ""

    def join(self, text: str) -> str:
        text, self._half = self._half + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return value
    raise TransientBackendError("bad_stream", "an event of another shape than a chat completion's")


def _text_of(content: Any) -> str:  # noqa: ANN401 - JSON
    """The text of `content`: a string, null, or a list of parts of which only the text is shown."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") for part in map(_object, content) if part.get("type") == "text"]
        return "".join(text for text in texts if isinstance(text, str))
    raise TransientBackendError("bad_stream", "content that is no text")
