"""Parses server-sent events from bytes, without I/O, by the HTML standard (9.2, "Parsing an event stream").

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

Chat completions do not use ids and retry times, which are dropped. Names are kept: of other events, such as pings, the
data may be anything. Three things are read that are not of the standard, because servers send them: a field `error`,
lines of JSON without a field name, and events of JSON without a blank line between them.
"""

EVENT_LIMIT = 1 << 22  # bytes buffered of an incomplete event, which carries one token, as a rule
MAX_FOREIGN = 1024  # bytes
MAX_LINES = 1 << 16  # of data in an event
SHORT_LINE = 16 * 1024  # bytes

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_JSON_BEGINS = (b"{", b"[")
_JSON_GOES_ON = (b" ", b"\t", b"}", b"]", b'"')  # lines of an indented document


class EventTooLong(Exception):  # noqa: N818 - reads as what happened
    """An incomplete event is longer than the limit. The parser cannot be used after it."""


class NamedEvent(bytes):
    """The data of an event with a name, other than `message`, which is the default."""

    name: bytes


class EventParser:
    """Splits a stream of bytes, however it is fragmented, into the data of its events.

    It works on bytes: line ends and `data:` never occur inside a UTF-8 character, so nothing has to be decoded, and a
    fragmented character is complete before its event is.
    """

    __slots__ = ("_after_cr", "_begun", "_data", "_is_bare", "_limit", "_line", "_name", "buffered", "foreign")

    def __init__(self, *, limit: int = EVENT_LIMIT) -> None:
        self.buffered = 0  # bytes of an incomplete event, approximately
        self.foreign = b""  # the beginning of the first line that is no field, such as the text of a proxy
        self._limit = limit
        self._line: list[bytes] = []  # the fragments of an incomplete line
        self._data: list[bytes] = []  # the data lines of an incomplete event
        self._name = b""  # of an incomplete event
        self._is_bare = False  # the incomplete event is a JSON document without field names
        self._after_cr = False  # the last byte was a carriage return: a line feed that follows belongs to it
        self._begun = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Parse a read; return the data of the events that it completes. Raises `EventTooLong`."""
        if self.is_between and (events := _whole_events(chunk)):
            self._begun = True
            return events
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
        events = self._parse(lines)
        if rest:
            self._line.append(rest)
        if not (self._line or self._data):  # a read typically ends where an event ends
            self.buffered = 0
        elif events or (lines and not self._data):  # earlier lines are not kept, such as comments
            self.buffered = sum(map(len, self._data)) + sum(map(len, self._line))
        else:  # not summed up again for each read
            self.buffered += size
        if self.buffered > self._limit:
            raise EventTooLong(f"an event of more than {self._limit} bytes")
        if len(self._data) > MAX_LINES:
            raise EventTooLong(f"an event of more than {MAX_LINES} lines")
        return events

    @property
    def is_between(self) -> bool:
        """Whether the next byte begins an event."""
        return not (self._line or self._data or self._name or self._after_cr)

    def take_line(self) -> bytes | None:
        """Return the incomplete line and forget it: it is part of the next read. None: it is long, or not all."""
        if self._data or self._name or self._after_cr or self.buffered > SHORT_LINE:
            return None
        line, self.buffered = b"".join(self._line), 0
        self._line.clear()
        return line

    def close(self) -> list[bytes]:
        """Return the data of an event that lacks its blank line at the end of the stream, if any.

        The standard drops such an event, but some servers end with `data: [DONE]`: the caller must check it.
        """
        return self.feed(b"\n\n")

    def _parse(self, lines: list[bytes]) -> list[bytes]:
        if lines and not self._begun:
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            self._begun = True
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if not line:
                if len(data) == 1 and not (self._name or self._is_bare):  # the typical event
                    events += filter(None, data)
                    data.clear()
                elif data or self._name:
                    self._end_event(events)
            elif line.startswith(b"data:"):
                if data and (self._is_bare or _is_next(data[-1], line)):
                    self._end_event(events)
                data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line.startswith(b":"):
                self._parse_other(line, events)
        return events

    def _parse_other(self, line: bytes, events: list[bytes]) -> None:
        if line.startswith(_JSON_BEGINS):
            if self._data:
                self._end_event(events)
            self._data.append(line)
            self._is_bare = True
            if line.endswith((b"}", b"]")):
                self._end_event(events)
            return
        if self._is_bare:
            if line.startswith(_JSON_GOES_ON):
                self._data.append(line)
                return
            self._end_event(events)
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value
        elif field == b"error":  # llama.cpp
            self._name = field
            self._data.append(value)
        elif field not in {b"id", b"retry"}:
            self.foreign = self.foreign or line[:MAX_FOREIGN]

    def _end_event(self, events: list[bytes]) -> None:
        event, name = b"\n".join(self._data), self._name
        self._data.clear()
        self._name, self._is_bare = b"", False
        if not event:
            return
        if name not in {b"", b"message"}:
            event = NamedEvent(event)
            event.name = name
        events.append(event)


def _whole_events(chunk: bytes) -> list[bytes]:
    """The events of a typical read, each whole and of one line; empty for others."""
    if not (chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")) or b"\r" in chunk:
        return []
    events = chunk[6:-2].split(b"\n\ndata: ")
    return events if chunk.count(b"\n") == 2 * len(events) and b"" not in events else []


def _is_next(last: bytes, line: bytes) -> bool:
    """Whether a line begins another event than the last line of data: no JSON has an object behind an object."""
    return last.endswith(b"}") and line[5:].lstrip().startswith((b"{", b"[DONE]"))
