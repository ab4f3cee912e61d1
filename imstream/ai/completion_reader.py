"""Reads the JSON of chat completions: chunks of a stream, or one whole completion, in the dialects of many servers."""

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

from pydantic_core import from_json

from imstream.ai import failures
from imstream.ai.error_report import ErrorReport, shorten
from imstream.ai.failures import failure
from imstream.ai.reasoning import ReasoningFilter, reasoning_of
from imstream.errors import BackendError
from imstream.option_types import ReasoningOption

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


class Unreadable(Exception):  # noqa: N818 - reads as what happened
    """An event is not JSON, or not of a chat completion. It is skipped."""


class CompletionReader:
    """Is given the values of one answer, one after the other, and returns the text of each.

    Attributes:
        resumed: Text followed a finish reason: the next finish reason does not mean much either.
        may_resume: The finish reason came with text, as in servers that send one with every chunk.
        progressed: There was a sign of progress of the model: text, hidden reasoning, a finish reason.
            Comments and a bare role do not count; servers send them while a request is queued.
        done: Nothing follows.
        skipped: The number of events that could not be read.
        problem: Why the first of them could not be read, or the problem after the answer was whole.
    """

    # With 30 attributes, an instance without slots has a dictionary of its own, and CPython 3.11 specialises no access.
    __slots__ = (
        "_beginning", "_calls_tools", "_has_choice", "_has_text", "_high", "_is_refusal", "_messages", "_on_reasoning",
        "_reasons", "_remaining_reasoning", "_secrets", "_tags", "done", "finish_reason", "may_resume", "problem",
        "progressed", "resumed", "skipped", "usage",
    )  # fmt: skip

    def __init__(
        self,
        *,
        limit: int,
        secrets: tuple[str, ...] = (),
        reasoning: ReasoningOption = "tags",
        beginning: str = "",
        on_reasoning: Callable[[str], None] | None = None,
    ) -> None:
        """See `AnswerReader`."""
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self.done = self.resumed = self.may_resume = self.progressed = False
        self.skipped = 0
        self.problem = ""
        self._remaining_reasoning = limit
        self._on_reasoning = on_reasoning  # None: reasoning is not reported, or not any more
        self._secrets = secrets
        self._high: str | None = None  # first half of a surrogate pair, or empty; None until a surrogate was received
        self._has_text = self._has_choice = self._is_refusal = self._calls_tools = self._reasons = False
        has_tags = reasoning in {"tags", "open_tags"}
        opened = reasoning == "open_tags" and not beginning  # the template opens reasoning before an answer only
        self._tags = ReasoningFilter(opened=opened) if has_tags else None  # None: all text passes
        self._beginning = self._messages = beginning  # text of whole messages in place of deltas

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
        raise Unreadable(f"an event that is not JSON: {problem}")

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

    def _read_value(self, value: Any) -> str:  # noqa: ANN401 - JSON
        """Read JSON: an object, or a list of them, as Gemini sends errors."""
        return "".join(map(self._read_object, value)) if isinstance(value, list) else self._read_object(value)

    def _read_object(self, value: Any) -> str:  # noqa: ANN401 - JSON
        """Read a chunk or a whole completion; return the text of its first choice."""
        if not isinstance(value, dict):
            raise Unreadable("JSON of another shape than a chat completion's")
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
            self.finish_reason = None  # only the reasoning has ended
        self._has_text = True
        on_reasoning, self._on_reasoning = self._on_reasoning, None
        if on_reasoning is not None and self._reasons:
            on_reasoning("")

    def _read_other(self, delta: dict[str, Any]) -> str:
        """Read the other fields of a message, beside its content; return a refusal, which is shown."""
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
            raise failure("impossible", "not_continued", "it repeats the short beginning, or begins in the same words")
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


def plain_text(value: Any) -> str | None:  # noqa: ANN401 - JSON
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
    raise Unreadable("JSON of another shape than a chat completion's")


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
    raise Unreadable("content that is not text")


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
