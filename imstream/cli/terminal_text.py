"""Text from the wire for a terminal: without control characters, in one direction, cut to a width."""

import re
import unicodedata

_SEQUENCE = re.compile(r"\x1b\[[0-9;]*m")
_DIRECTIONS = (*range(0x202A, 0x202F), 0x2066, 0x2067)
"""Characters that embed or override text directions (Unicode Standard Annex 9), and so reorder the rest of the line."""

_DIRECTIONS_REMOVED = dict.fromkeys(_DIRECTIONS)
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS) if chr(code) not in "\n\t"}
"""Control characters. Text from the wire must not move the cursor, reorder a line or send commands to the terminal."""

_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROL}

_FIRST_STRONG_ISOLATE, _POP_DIRECTIONAL_ISOLATE = "\u2068", "\u2069"
_ISOLATES = {ord(_FIRST_STRONG_ISOLATE): None, ord(_POP_DIRECTIONAL_ISOLATE): None}


def printable(text: str) -> str:
    """Text without control characters."""
    return text.translate(_CONTROL)


def valid(text: str) -> str:
    """Text that can be encoded: bytes of the keyboard or the command line that are not UTF-8 are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def printable_line(text: str) -> str:
    """Text without control characters, in one line."""
    return printable(text).replace("\n", " ").replace("\t", " ")


def printable_json(text: str) -> str:
    """A JSON document with its control characters escaped, also those that JSON allows in strings."""
    return text.translate(_ESCAPED)


def without_directions(text: str) -> str:
    """Text without characters that reorder a line. Escape sequences stay."""
    return text.translate(_DIRECTIONS_REMOVED)


def isolate_direction(text: str) -> str:
    """Enclose text for the middle of a line so that right-to-left text does not reorder the rest of the line."""
    if all(unicodedata.bidirectional(char) not in {"R", "AL"} for char in text):
        return text
    return f"{_FIRST_STRONG_ISOLATE}{text.translate(_ISOLATES)}{_POP_DIRECTIONAL_ISOLATE}"


def rows(line: str, columns: int) -> int:
    """The number of rows that a line with escape sequences takes on a terminal with so many columns."""
    return max(1, -(-sum(map(_width, _SEQUENCE.sub("", line))) // columns))


def shorten(text: str, columns: int) -> str:
    """The first line of a text, cut to so many columns of a terminal."""
    text, used = printable(text).partition("\n")[0].replace("\t", " "), 0
    for index, char in enumerate(text):
        used += _width(char)
        if used > columns:
            return text[: max(0, index - 1)] + "…"
    return text


def _width(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1
