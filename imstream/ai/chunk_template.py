"""Reads the text of chunks that equal an earlier one in everything else, as nearly all chunks of a stream do."""

from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

MAX_EXAMPLES = 3
"""Chunks of one answer that are taken as an example. Some servers put other numbers into each, or random padding."""

_MEMBER = b'"content":'


class ChunkTemplate:
    """The bytes before and after the text of a chunk. Parsing only the text takes a fifth of the time."""

    __slots__ = ("_head", "_is_set", "_remaining", "_tail")

    def __init__(self) -> None:
        self._head = self._tail = b""
        self._is_set = False
        self._remaining = MAX_EXAMPLES

    def learn(self, chunk: bytes, text: str, text_of: Callable[[Any], str | None]) -> None:
        """Take a chunk with this text as the example. `text_of` reads the text of a parsed chunk, if it has one."""
        if not self._remaining:
            return
        self._remaining -= 1
        head, member, rest = chunk.partition(_MEMBER)
        blanks, _, rest = rest.partition(b'"')
        value, _, tail = rest.partition(b'"')
        head += member + blanks
        if value != text.encode("utf-8", "surrogatepass") or blanks.strip():
            return
        try:
            changed = text_of(from_json(b'%b"%b?"%b' % (head, value, tail)))
        except ValueError:
            return  # a single surrogate, which only the standard library accepts
        if changed == text + "?":  # it is the value of this member, and of no other
            self._head, self._tail, self._is_set = head, tail, True

    def read(self, chunk: bytes) -> str | None:
        """The text of a chunk that equals the example in everything else; None for any other."""
        if self._is_set and chunk.startswith(self._head) and chunk.endswith(self._tail):
            try:
                text = from_json(chunk[len(self._head) : len(chunk) - len(self._tail)])
            except ValueError:
                return None
            if text.__class__ is str:
                return text
        return None
