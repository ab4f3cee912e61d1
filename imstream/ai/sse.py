"""Server-sent events from bytes, without I/O: what the HTML standard says in section 9.2, "Parsing an event stream".

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

Of an event only its data is kept. Names, ids and retry times mean nothing to a chat completion.
"""

from __future__ import annotations

import re

EVENT_LIMIT = 1 << 20
"""Most bytes kept of an event that has not ended. One event carries one token; a megabyte of it is no answer."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_ONE_EVENT = re.compile(rb"data: (.+)\n\n")
"""What the network mostly gives, if there is no carriage return in it: one event of one line, and all of it."""


class EventTooLong(Exception):  # noqa: N818 - reads as what happened
    """An event grew past the limit without an end. The parser is of no use any more."""


class EventParser:
    r"""Cuts a stream of bytes into the data of its events, wherever the network cut it.

    Bytes, not text: neither a line end nor `data:` can begin inside a UTF-8 character, so nothing has to be decoded
    to find them, and a character that is cut in two is whole again before anybody reads it.
    """

    __slots__ = ("_after_cr", "_begun", "_data", "_held", "_limit", "_line")

    def __init__(self, *, limit: int = EVENT_LIMIT) -> None:
        self._limit = limit
        self._line: list[bytes] = []
        """The parts of a line that has not ended."""
        self._data: list[bytes] = []
        """The data lines of an event that has not ended."""
        self._held = 0
        self._after_cr = False
        """The last byte was a carriage return: a line feed that follows belongs to it."""
        self._begun = False

    @property
    def held(self) -> int:
        """About how many bytes are held of an event that has not ended."""
        return self._held

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take what the network gave; return the data of every event that is complete with it.

        Raises:
            EventTooLong: An event that has not ended is longer than the limit.
        """
        held = self._line or self._data or self._after_cr or not self._begun
        if not held and (one := _ONE_EVENT.fullmatch(chunk)) and b"\r" not in chunk:
            return [one[1]]
        size = len(chunk)
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = chunk.split(b"\n")
        rest = lines.pop()
        if lines and self._line:
            lines[0] = b"".join((*self._line, lines[0]))
            self._line.clear()
        events = self._events(lines)
        if rest:
            self._line.append(rest)
        # What the network gives mostly ends where an event ends: then nothing is held, and there is nothing to count.
        if self._line or self._data:
            self._count(size, fresh=bool(events))
        else:
            self._held = 0
        return events

    def close(self) -> list[bytes]:
        """The stream has ended: return the data of an event that lacks its blank line, if there is one.

        The standard drops such an event. Servers exist that end with `data: [DONE]` and nothing behind it, so whoever
        reads must judge whether the event is whole.
        """
        return self.feed(b"\n\n")

    def _events(self, lines: list[bytes]) -> list[bytes]:
        if lines and not self._begun:
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            self._begun = True
        events = []
        data = self._data
        for line in lines:
            if not line:
                if data:
                    event = data[0] if len(data) == 1 else b"\n".join(data)
                    data.clear()
                    if event:
                        events.append(event)
            elif line.startswith(b"data:"):
                data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif line == b"data":
                data.append(b"")
        return events

    def _count(self, size: int, *, fresh: bool) -> None:
        """Keep count of what is held, without adding up all of it at each read."""
        self._held = sum(map(len, self._data)) + sum(map(len, self._line)) if fresh else self._held + size
        if self._held > self._limit:
            raise EventTooLong(f"an event of more than {self._limit} bytes")
