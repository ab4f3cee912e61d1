"""Reads an answer from the bytes of a response body, without I/O: chat completion chunks, or one whole completion.

https://platform.openai.com/docs/api-reference/chat-streaming, and the dialects of other servers.
"""

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

from pydantic_core import from_json

from imstream.ai import failures
from imstream.ai.chunk_template import ChunkTemplate
from imstream.ai.error_report import ErrorReport, shorten
from imstream.ai.failures import failure
from imstream.ai.reasoning import ReasoningFilter, reasoning_of
from imstream.ai.sse import BYTE_ORDER_MARK, EVENT_LIMIT, EventParser, EventTooLong, NamedEvent
from imstream.errors import BackendError
from imstream.option_types import ReasoningOption

JSON_LIMIT = EVENT_LIMIT  # bytes of an event, or of an answer in one document; raised with the limit of an answer
IDLE_LIMIT = 1 << 20  # bytes of small events and comments without a sign of progress
BYTES_PER_CHARACTER = 256  # of a response, at most; an event with one character has about 250
LARGE_JSON = 16 * 1024  # bytes that take long to parse; its strings would displace others from the decoder's cache

OTHER_FINISH = "other"  # replaces a finish reason that is not a short word
MAX_TOKEN_COUNT = 2**53  # JavaScript's JSON represents no larger integers exactly

_NOT_FINISHED = frozenset({"null", "none"})  # DashScope's word for no finish reason
_FILTERED = re.compile(
    "content.?filter|safety|recitation|prohibited|blocklist|spii|sensitive|toxic|guardrail", re.IGNORECASE
)
_CUT = re.compile("length|max.{0,8}tokens|context.window|token.limit|error.limit", re.IGNORECASE)
_FAILED = re.compile(
    "error|abort|fail|cancel|interrupt|time.?d?.?out|insufficient|exhausted|overload|malformed|unavailable",
    re.IGNORECASE,
)
"""Finish reasons of many servers: the answer was cut by a filter, or at a limit, or the model has not finished."""

_BRACE = ord("{")
_TEXT_TYPES = ("text", "output_text")

_MIN_REPEATED = 64
"""Characters of a beginning that an answer repeats by no chance."""

_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_MAX_COUNTS = 16  # kept of a usage; OpenAI sends 3, others up to 8
_MAX_USAGE_FIELDS = 4 * _MAX_COUNTS
_USAGE_DETAILS = (
    ("prompt_tokens_details", "cached_tokens"),
    ("completion_tokens_details", "reasoning_tokens"),
)


class _Unreadable(Exception):  # noqa: N818 - reads as what happened
    """An event is not JSON, or not of a chat completion. It is skipped."""


class AnswerReader:
    """Is fed with a response body as it arrives, and returns the text.

    An answer is whole when it has text and a finish reason. What follows may be more text, because some servers send a
    finish reason with every chunk; anything else can no longer make the answer fail.

    Attributes:
        done: `[DONE]` or the end was received, or the answer is truncated: the rest is ignored.
        resumed: Text followed a finish reason: the next finish reason does not mean much either.
        may_resume: The finish reason came with text, as in servers that send one with every chunk.
        large: An incomplete event or document is large: the read that completes it takes long to parse.
        progressed: The last `feed` contained a sign of progress of the model: text, hidden reasoning, a finish reason.
            Comments and a bare role do not count; servers send them while a request is queued.
        skipped: The number of events that could not be read.
        problem: Why the first of them could not be read, or what happened after the answer was whole.
    """

    # With 30 attributes, an instance without slots has a dictionary of its own, and CPython 3.11 specialises no access.
    # fmt: off
    __slots__ = (
        "_beginning", "_begun", "_calls_tools", "_document", "_events", "_has_choice", "_has_text", "_high",
        "_idle_bytes", "_is_refusal", "_json_limit", "_largest", "_messages", "_on_reasoning", "_reasons",
        "_remaining", "_remaining_reasoning", "_secrets", "_tags", "_template", "done", "finish_reason", "large",
        "may_resume", "problem", "progressed", "resumed", "skipped", "truncated", "usage",
    )
    # fmt: on

    def __init__(
        self,
        *,
        limit: int,
        secrets: tuple[str, ...] = (),
        reasoning: ReasoningOption = "tags",
        beginning: str = "",
        on_reasoning: Callable[[str], None] | None = None,
    ) -> None:
        """Read one answer of at most `limit` characters; errors do not show `secrets`, even if the backend does.

        `reasoning`: whether what stands in tags such as `<think>` at the beginning of the text is reasoning.
        `on_reasoning`: receives the reasoning before the text, at most `limit` characters, and `""` at its end.
        With a `beginning`, the rest of an answer is read. It may be empty. A whole message may repeat the beginning.
        """
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self.done = self.resumed = self.may_resume = self.truncated = self.large = self.progressed = False
        self.skipped = 0
        self.problem = ""
        self._remaining, self._remaining_reasoning = limit - len(beginning), limit
        self._on_reasoning = on_reasoning  # None: reasoning is not reported, or no longer
        self._secrets = secrets
        self._json_limit = max(JSON_LIMIT, 4 * limit)
        self._idle_bytes = 0  # since the last sign of progress
        self._largest = 0  # bytes of the largest event among them
        self._events = EventParser(limit=self._json_limit)
        self._template = ChunkTemplate()
        self._document: bytearray | None = None
        self._begun = False
        self._high: str | None = None  # first half of a surrogate pair, or empty; None until a surrogate was received
        self._has_text = self._has_choice = self._is_refusal = self._calls_tools = self._reasons = False
        has_tags = reasoning in {"tags", "open_tags"}
        opened = reasoning == "open_tags" and not beginning  # the template opens reasoning before an answer only
        self._tags = ReasoningFilter(opened=opened) if has_tags else None  # None: all text passes
        self._beginning = self._messages = beginning  # text of whole messages in place of deltas

    @property
    def complete(self) -> bool:
        """Whether the answer is whole. More text, and usage, may follow."""
        if self.done or self.finish_reason is None:
            return self.done
        return self._has_text or (self._beginning != "" and not self._reasons)

    def feed(self, data: bytes) -> str:
        """Read a part of the body; return the text of all its events.

        Raises `BackendError`: `too_large`, an error that the backend reports, or an answer that ends without text.
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
                raise failure("impossible", "too_large", f"a document of more than {self._json_limit} bytes")
            return ""
        try:
            text = self._read_events(self._events.feed(data))
        except EventTooLong as error:
            self._give_up(failure("impossible", "too_large", str(error)))
            return ""
        if not self.progressed:
            self._count_idle(size)
        elif self._idle_bytes:
            self._idle_bytes = 0
            self.large = False
        return self._bounded(text) if text else text

    def end(self) -> str:
        """Return the rest of the text at the end of the body.

        Raises as `feed`, also `bad_stream` or `broken_stream` if the answer is not whole.
        """
        if self.done:
            return ""
        if self._document is None:
            text = self._read_events(self._events.close(), at_end=True)
        else:
            text = self._read_document(bytes(self._document))
        if not self.done:
            text += self._rest()
            if self.finish_reason is None and self.skipped:
                raise failure("broken", "bad_stream", self.problem)
            if self.finish_reason is None:
                said = ErrorReport.from_body(self._events.foreign).summary(self._secrets)
                said = said or "the answer ended without [DONE] and without a finish reason"
                raise failure("broken", "broken_stream", said)
            self._finish()
        return self._bounded(text)

    def _finish(self) -> None:
        """Nothing follows. Raises `BackendError` if there is no text."""
        if self._beginning and self._reasons and not self._has_text and self.finish_reason == "length":
            raise failure("impossible", "not_continued", "only reasoning, up to the limit of its length")
        if self._has_text or (self._beginning and self.finish_reason is not None):
            self.done = True
            if self._is_refusal and self.finish_reason is None:
                self.finish_reason = "refusal"
            return
        if self.finish_reason in {"content_filter", "refusal"}:
            raise failure("impossible", self.finish_reason, "an answer without text")
        if self._calls_tools:
            raise failure("impossible", "tool_calls", "the model calls a tool, and none was offered")
        if not self._has_choice and self.skipped:
            raise failure("broken", "bad_stream", self.problem)
        what = "only reasoning" if self._reasons else "no text"
        raise failure("broken", "empty_answer", f"{what}, finish reason {self.finish_reason}")

    def _give_up(self, error: BackendError) -> None:
        """Raise an error, unless the answer is whole: then it is only noted."""
        if not self.complete or self.resumed:
            raise error
        self.problem = self.problem or str(error)
        self.done = True

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
        self._largest = max(self._largest, buffered)
        self.large = buffered > LARGE_JSON
        if self._idle_bytes - buffered > IDLE_LIMIT + self._largest:
            self._give_up(failure("impossible", "too_large", f"{self._idle_bytes} bytes without a sign of progress"))

    def _read_events(self, events: list[bytes], *, at_end: bool = False) -> str:
        """Read events. At the end of the body, one that cannot be read is incomplete."""
        texts = []
        for event in events:
            try:
                if event.__class__ is bytes and event[0] == _BRACE:
                    text = self._read_chunk(event)
                else:
                    text = self._read_odd_event(event)
                if text:
                    texts.append(text)
            except _Unreadable as problem:
                if not at_end:
                    self.skipped += 1
                    self.problem = self.problem or str(problem)
            except BackendError as error:
                self._give_up(error)
            if self.done:
                break
        if not texts:
            return ""
        self.progressed = True
        return texts[0] if len(texts) == 1 else "".join(texts)

    def _read_chunk(self, chunk: bytes) -> str:
        """Read an object. One with nothing but text in the middle of the text, as is typical, takes few steps."""
        is_inside = self._tags is None and self._has_text and self.finish_reason is None
        if is_inside and (text := self._template.read(chunk)):
            return text
        value = self._decode(chunk)
        if is_inside and (text := _plain_text(value)):
            self._template.learn(chunk, text, _plain_text)
            return text
        return self._read_object(value)

    def _read_odd_event(self, event: bytes) -> str:
        name = event.name if isinstance(event, NamedEvent) else b""
        event = event.strip()
        while event.startswith(b"data:"):  # gateways that frame events twice
            event = event[5:].strip()
        if event.strip(b'"').upper() == b"[DONE]":
            text = self._rest()
            self._finish()
            return text
        if name == b"error":
            raise self._error(ErrorReport.from_body(event))
        try:
            return self._read_value(self._decode(event)) if event else ""
        except _Unreadable:
            if name:
                return ""  # another event, such as a ping: its data may be anything
            raise

    def _read_document(self, body: bytes) -> str:
        if body.startswith(b"<"):
            summary = ErrorReport.from_body(body).summary(self._secrets)
            raise failure("misconfigured", "bad_stream", f"a page instead of an answer: {summary}")
        try:
            value = self._decode(body)
        except _Unreadable as problem:
            # It may be a stream that begins with a line of JSON without `data:`, such as an error.
            self.skipped, self.problem = 1, str(problem)
            return self._read_events([*self._events.feed(body), *self._events.close()], at_end=True)
        try:
            text = self._read_value(value)
        except _Unreadable as problem:
            raise failure("broken", "bad_stream", str(problem)) from None
        if not self._has_choice:
            summary = ErrorReport.from_body(body).summary(self._secrets)
            raise failure("broken", "bad_stream", f"JSON without an answer: {summary}".removesuffix(": "))
        text += self._rest()
        self._finish()
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
        raise _Unreadable(f"an event that is not JSON: {problem}")

    def _read_value(self, value: Any) -> str:  # noqa: ANN401 - JSON
        """Read JSON: an object, or a list of them, as Gemini sends errors."""
        return "".join(map(self._read_object, value)) if isinstance(value, list) else self._read_object(value)

    def _read_object(self, value: Any) -> str:  # noqa: ANN401 - JSON
        """Read a chunk or a whole completion; return the text of its first choice."""
        if not isinstance(value, dict):
            raise _Unreadable("JSON of another shape than a chat completion's")
        choices, usage = value.get("choices"), value.get("usage")
        is_odd = not (choices or usage)
        if value.get("error") or (is_odd and (value.get("object") == "error" or ErrorReport.is_error(value))):
            raise self._error(ErrorReport.from_value(value))
        if usage:
            self.usage = (_token_counts(usage) if isinstance(usage, dict) else None) or self.usage
        if not choices:
            return ""
        choice = choices[0] if isinstance(choices, list) else None
        return self._read_choice(choice if isinstance(choice, dict) else _object(choice))

    def _read_choice(self, choice: dict[str, Any]) -> str:
        finish = choice.get("finish_reason")
        delta = choice.get("delta")
        if self._on_reasoning is not None and isinstance(message := delta or choice.get("message"), dict):
            self._report(reasoning_of(message))
        text = delta.get("content") if isinstance(delta, dict) else delta and _object(delta)
        if not isinstance(text, str):
            text = _text_of(text)
        if not text:
            self._has_choice = True
            text = (delta and self._read_other(delta)) or self._read_whole(choice)
        if text and self._tags is not None:
            self._has_choice = True
            text = self._without_reasoning(text, self._tags)
        if text and (self.finish_reason is not None or not self._has_text):
            self._note_text(text, finish)
        if finish:
            if choice.get("error"):  # OpenRouter
                raise self._error(ErrorReport.from_value(choice))
            self._read_finish(finish)
            self.may_resume = bool(text)
        return text

    def _without_reasoning(self, text: str, tags: ReasoningFilter) -> str:
        text = tags.feed(text)
        self._report(tags.reasoning)
        if tags.passed:
            self._tags = None
        else:
            self.progressed = self._reasons = True
        return text

    def _report(self, reasoning: str) -> None:
        """Report reasoning, with the same replacements as text."""
        if reasoning and self._on_reasoning is not None:
            self._reasons = True
            if self._high is not None:
                reasoning = reasoning.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            if reasoning := reasoning[: self._remaining_reasoning].replace("\0", "\ufffd"):
                self._remaining_reasoning -= len(reasoning)
                self._on_reasoning(reasoning)

    def _rest(self) -> str:
        """The end of the text, which could have become a tag."""
        text = self._tags.end() if self._tags is not None else ""
        self._tags = None
        if text:
            self._note_text(text, finish=True)
        return text

    def _note_text(self, text: str, finish: object) -> None:
        """Note the first text, or text that follows a finish reason."""
        if text.isspace():
            return
        if self._has_text:
            self.resumed = True
        elif not finish:
            self.finish_reason = None  # what was finished is the reasoning
        self._has_text = True
        on_reasoning, self._on_reasoning = self._on_reasoning, None
        if on_reasoning is not None and self._reasons:
            on_reasoning("")

    def _read_other(self, delta: dict[str, Any]) -> str:
        """Read what a message has beside its content; return a refusal, which is shown."""
        if delta.get("tool_calls") or delta.get("function_call"):
            self._calls_tools = True
        refusal = delta.get("refusal")
        if refusal and isinstance(refusal, str):
            self._is_refusal = True
            return refusal
        # Hidden reasoning and other fields that are not shown are signs of progress.
        if any(value for name, value in delta.items() if name != "role"):
            self.progressed = True
            self._reasons = self._reasons or any("reason" in name or "think" in name for name in delta)
        return ""

    def _read_whole(self, choice: dict[str, Any]) -> str:
        """Read a whole message, or another part of one, which some servers send in place of a delta."""
        message = choice.get("message")
        if message is None:
            content = choice.get("text")
        else:
            content = _object(message).get("content") or self._read_other(message)
        text = _text_of(content)
        if not text or (self._has_text and self._messages == self._beginning):
            return ""  # the text was sent as deltas before
        is_short = 0 < len(self._beginning) < _MIN_REPEATED
        if is_short and self._messages == self._beginning and text.startswith(self._beginning):
            raise failure("impossible", "not_continued", "it repeats the short beginning, or goes on in the same words")
        before, self._messages = self._messages, text if text.startswith(self._messages) else self._messages + text
        return self._messages[len(before) :]

    def _read_finish(self, finish: object) -> None:
        reason = finish[:LARGE_JSON] if isinstance(finish, str) else OTHER_FINISH
        if reason in _NOT_FINISHED:
            return
        if reason != "stop" or self._is_refusal:  # nearly always it is `stop`
            reason = self._classified(reason)
        self.finish_reason = reason if _WORD.fullmatch(reason) else OTHER_FINISH
        self.progressed = True

    def _classified(self, reason: str) -> str:
        """The finish reason of this service for that of a server."""
        if _FILTERED.search(reason):
            return "content_filter"
        if _CUT.search(reason):
            return "length"
        if _FAILED.search(reason):
            raise failure("broken", "aborted", f"finish reason {shorten(reason, self._secrets)}")
        return "refusal" if self._is_refusal else reason

    def _error(self, report: ErrorReport) -> BackendError:
        error = failures.from_report(report, secrets=self._secrets)
        if self._has_text and error.kind == "away":
            error.kind = "broken"  # it is there, and broke the answer
        return error


def _plain_text(value: Any) -> str | None:  # noqa: ANN401 - JSON
    """The text of a typical chunk, in one step; None for chunks with anything else to read."""
    try:
        [choice] = value["choices"]
        text = choice["delta"]["content"]
        is_plain = not (choice.get("finish_reason") or value.get("error") or value.get("usage"))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return text if is_plain and text.__class__ is str else None


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return value
    raise _Unreadable("JSON of another shape than a chat completion's")


def _text_of(content: Any) -> str:  # noqa: ANN401 - JSON
    """The text of `content`: a string, null, or a list of parts, of which only the texts are shown."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        texts = [part.get("text") for part in map(_object, content) if part.get("type", "text") in _TEXT_TYPES]
        return "".join(text for text in texts if isinstance(text, str))
    raise _Unreadable("content that is not text")


def _token_counts(usage: dict[str, Any]) -> dict[str, int]:
    """The token counts of a usage, with the cached and the reasoning tokens out of its details."""
    counts: dict[str, int] = {}
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
