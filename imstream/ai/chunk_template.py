"""Reads the text of events that equal an earlier one in everything else, as nearly all events of a stream do."""

from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

MAX_EXAMPLES = 3
"""Chunks of one answer that are taken as an example. Some servers put other numbers into each, or random padding."""

_MEMBER = b'"content":'
_BEFORE, _AFTER = (b"data: ", b"data:"), (b"\n\n", b"\r\n\r\n")


class ChunkTemplate:
    """The bytes before and after the text of an event. The texts of a read are parsed together, and nothing else is."""

    __slots__ = ("_after", "_before", "_begin", "_between", "_close", "_end", "_joint", "_open", "_remaining")

    def __init__(self) -> None:
        self._before = self._after = self._begin = self._between = self._end = b""
        self._open = self._joint = self._close = b""  # the same with the quotes of the text
        self._remaining = MAX_EXAMPLES

    def learn(self, data: bytes, chunk: bytes, text: str, text_of: Callable[[Any], str | None]) -> bool:
        """Take a chunk of a read with this text as the example; return whether it is one.

        `text_of` reads the text of a parsed chunk, if there is one.
        """
        if not self._remaining:
            return False
        self._remaining -= 1
        before, _, after = data.partition(chunk)
        before, after = before.rpartition(b"\n")[2], after[: len(after) - len(after.lstrip(b"\r\n"))]
        head, member, rest = chunk.partition(_MEMBER)
        blanks, _, rest = rest.partition(b'"')
        value, _, tail = rest.partition(b'"')
        head += member + blanks
        is_plain = value == text.encode("utf-8", "surrogatepass") and not blanks.strip(b" ")
        if not is_plain or before not in _BEFORE or after not in _AFTER:
            return False
        try:
            changed = text_of(from_json(b'%b"%b?"%b' % (head, value, tail)))
        except ValueError:
            return False  # a single surrogate, which only the standard library accepts
        if changed != text + "?":
            return False  # it is not the value of this member, or also of another one
        self._before, self._after = before, after
        self._begin, self._end = before + head, tail + after
        self._between = self._end + self._begin
        self._open, self._close = self._begin + b'"', b'"' + self._end
        self._joint = self._close + self._open
        return True

    def read_all(self, data: bytes) -> str:
        """The text of a read of such events only, whose texts are printable without escapes; empty for others."""
        if not self._open or not data.startswith(self._open) or not data.endswith(self._close):
            return ""
        value = data[len(self._open) : -len(self._close)].replace(self._joint, b"")
        if b'"' in value or b"\\" in value:
            return ""
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return ""
        return text if text.isprintable() else ""

    def read(self, data: bytes) -> tuple[str, int, int]:
        """The text of the events at the beginning of a read that equal the example, their size and number."""
        end = data.rfind(self._end)
        if self._begin and end > 0 and data.startswith(self._begin):
            values = data[len(self._begin) : end].split(self._between)
            try:
                texts = from_json(b"[%b]" % b"\n,".join(values))  # no value continues after a line feed
                if len(texts) == len(values):  # each of them is one value
                    return "".join(texts), end + len(self._end), len(texts)
            except (TypeError, ValueError):  # a value is not a string, or not valid
                pass
        return "", 0, 0

    def read_events(self, events: list[bytes]) -> tuple[str, int]:
        """The same for parsed events."""
        if any(event.__class__ is not bytes for event in events):  # one has a name
            return "", 0
        text, _, number = self.read(b"".join([self._before + event + self._after for event in events]))
        return text, number
