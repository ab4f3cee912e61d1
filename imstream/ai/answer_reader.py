"""Reads an answer from the bytes of a response body, without I/O: chat completion chunks, or one whole completion.

https://platform.openai.com/docs/api-reference/chat-streaming, and the dialects of other servers.
"""

from collections.abc import Callable, Iterator

from imstream.ai.chunk_template import ChunkTemplate
from imstream.ai.completion_reader import LARGE_JSON, CompletionReader, Unreadable, plain_text
from imstream.ai.error_report import ErrorReport
from imstream.ai.failures import failure
from imstream.ai.sse import BYTE_ORDER_MARK, EVENT_LIMIT, EventParser, EventTooLong, NamedEvent
from imstream.errors import BackendError
from imstream.option_types import ReasoningOption

JSON_LIMIT = EVENT_LIMIT  # bytes of an event, or of an answer in one document; raised with the limit of an answer
IDLE_LIMIT = 1 << 20  # bytes of small events and comments without a sign of progress
BYTES_PER_CHARACTER = 256  # of a response, at most; an event with one character has about 250

_BRACE = ord("{")


class AnswerReader(CompletionReader):
    """Is fed with a response body as it arrives, and returns the text.

    An answer is whole when it has text and a finish reason. Later events may add text, because some servers send a
    finish reason with every chunk; anything else cannot make the answer fail.

    Attributes:
        done: `[DONE]` or the end was received, or the answer is truncated: the rest is ignored.
        large: An incomplete event or document is large: the read that completes it takes long to parse.
        progressed: Whether there was progress in the last `feed`.
    """

    __slots__ = (
        "_begun", "_document", "_events", "_idle_bytes", "_json_limit", "_largest", "_remaining", "_template", "large",
        "truncated",
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
        """Read one answer of at most `limit` characters; errors do not show `secrets`, even if the backend does.

        `reasoning`: whether text in tags such as `<think>` at the beginning of the text is reasoning.
        `on_reasoning`: receives the reasoning before the text, at most `limit` characters, and `""` at its end.
        With a `beginning`, the rest of an answer is read. It may be empty. A whole message may repeat the beginning.
        """
        super().__init__(
            limit=limit, secrets=secrets, reasoning=reasoning, beginning=beginning, on_reasoning=on_reasoning
        )
        self.truncated = self.large = False
        self._remaining = limit - len(beginning)
        self._json_limit = max(JSON_LIMIT, 4 * limit)
        self._idle_bytes = 0  # since the last sign of progress
        self._largest = 0  # bytes of the largest event among them
        self._events = EventParser(limit=self._json_limit)
        self._template = ChunkTemplate()
        self._document: bytearray | None = None
        self._begun = False

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
            text = self._read_stream(data)
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

    def _give_up(self, error: BackendError) -> None:
        """Raise an error, unless the answer is whole: then it is only noted."""
        if not self.complete or self.resumed:
            raise error
        self.problem = self.problem or str(error)
        self.done = True

    def _bounded(self, text: str) -> str:
        """Truncate the answer at its limit, and replace NUL and single surrogates, which `history` does not allow."""
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

    def _read_stream(self, data: bytes) -> str:
        text = ""
        # In the middle of the text, events that differ in nothing else are read together.
        is_inside = self._has_text and self.finish_reason is None and self._tags is None
        if is_inside and self._events.is_between and (text := self._template.read_all(data)):
            self.progressed = True
            return text
        if is_inside and (line := self._events.take_line()) is not None:
            data = line + data
            text, size, _ = self._template.read(data)
            if text:
                self.progressed = True
                data = data[size:]
        return text + self._read_events(self._events.feed(data), data) if data else text

    def _read_events(self, events: list[bytes], data: bytes = b"", *, at_end: bool = False) -> str:
        """Read events, of this read. At the end of the body, one that cannot be read is incomplete."""
        texts = []
        remaining = iter(events)
        for event in remaining:
            try:
                if event.__class__ is bytes and event[0] == _BRACE:
                    text = self._read_chunk(event, data, remaining)
                else:
                    text = self._read_odd_event(event)
                if text:
                    texts.append(text)
            except Unreadable as problem:
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

    def _read_chunk(self, chunk: bytes, data: bytes, remaining: Iterator[bytes]) -> str:
        """Read an event; if the remaining ones can be read more quickly, these, too."""
        value = self._decode(chunk)
        is_inside = self._tags is None and self._has_text and self.finish_reason is None
        if is_inside and (text := plain_text(value)):
            if self._template.learn(data, chunk, text, plain_text):
                events = list(remaining)
                more, number = self._template.read_events(events)
                text += more + self._read_events(events[number:])
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
        except Unreadable:
            if name:
                return ""  # another event, such as a ping: its data may be anything
            raise

    def _read_document(self, body: bytes) -> str:
        if body.startswith(b"<"):
            summary = ErrorReport.from_body(body).summary(self._secrets)
            raise failure("misconfigured", "bad_stream", f"a page instead of an answer: {summary}")
        try:
            value = self._decode(body)
        except Unreadable as problem:
            # It may be a stream that begins with a line of JSON without `data:`, such as an error.
            self.skipped, self.problem = 1, str(problem)
            return self._read_events([*self._events.feed(body), *self._events.close()], at_end=True)
        try:
            text = self._read_value(value)
        except Unreadable as problem:
            raise failure("broken", "bad_stream", str(problem)) from None
        if not self._has_choice:
            summary = ErrorReport.from_body(body).summary(self._secrets)
            raise failure("broken", "bad_stream", f"JSON without an answer: {summary}".removesuffix(": "))
        text += self._rest()
        self._finish()
        return text
