"""JSON from strangers: what is no JSON, or holds what only an attacker or a defect sends, is refused and named.

Python's decoder and not pydantic's, because it tells of each object and number while it reads. It takes 3 µs more for
a usual frame.

All work on a text is linear in its length, and a text with too many values is refused before it is decoded: a value
costs much more than a character.
"""

from __future__ import annotations

from json import JSONDecodeError, JSONDecoder
from math import isfinite
from typing import Any

from pydantic_core import from_json, to_json

MAX_NUMBER = 64
"""Most characters of a number. To read one with 10,000 digits takes longer than the whole frame may."""


_CONTAINERS = (dict, list)
_NO_MARKS = bytes(set(range(256)) - set(b",[{"))


class InvalidJson(ValueError):  # noqa: N818 - their fault, not an error of ours
    """A text is not JSON, or not of a kind that is taken. The text of the error is for a person."""


class InvalidNumber(InvalidJson):
    """It has a number that is none, or one that no program could use."""


def parse_json(text: str, *, max_depth: int, max_values: int) -> object:
    """The value that a JSON text stands for.

    Args:
        text: The text.
        max_depth: Most arrays and objects within each other.
        max_values: Most items of arrays and objects together, with the arrays and objects themselves.

    Raises:
        BadJson: It is not JSON; or it holds too many values, nests too deep, or has a key twice, NUL, or half of a
            surrogate pair.
        BadNumber: It has NaN, Infinity, or a number beyond all bounds.
    """
    if len(text) > max_values and _holds_more(text, max_values):
        raise InvalidJson(f"more than {max_values} values, or {_too_deep(max_depth)}")
    try:
        value: object = _DECODER.decode(text)
    except JSONDecodeError as error:
        raise InvalidJson(f"not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJson(_too_deep(max_depth)) from None
    if _is_deeper(value, max_depth):
        raise InvalidJson(_too_deep(max_depth))
    if "\\u" in text:  # otherwise it has no characters but those that a socket lets through
        _check_characters(value)
    return value


def _holds_more(text: str, limit: int) -> bool:
    """Whether there are more commas and opening brackets outside of strings; without decoding anything."""
    data = text.encode(errors="replace")
    if _count_marks(data) <= limit:
        return False
    # Each quote that is left begins or ends a string. To replace by as many bytes is quicker than to remove.
    plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    # A value has one string at most, and perhaps a name. To split at more quotes would take long, too.
    return plain.count(b'"') > 4 * (limit + 1) or _count_marks(b"".join(plain.split(b'"')[::2])) > limit


def _count_marks(data: bytes) -> int:
    return len(data.translate(None, _NO_MARKS))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJson(f"the key {twice[:64]!a} occurs more than once")
    return read


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER:
        raise InvalidNumber(f"a number has more than {MAX_NUMBER} digits")
    return int(digits)


def _fraction(digits: str) -> float:
    if len(digits) > MAX_NUMBER:
        raise InvalidNumber(f"a number has more than {MAX_NUMBER} digits")
    # Not float(): correct rounding takes it up to 5 µs for digits that are chosen so, and this a tenth.
    number: float = from_json(digits)
    if not isfinite(number):
        raise InvalidNumber(f"the number {digits} is too large")
    return number


def _no_number(name: str) -> float:
    raise InvalidNumber(f"not valid JSON: {name} is no number")


_DECODER = JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_fraction, parse_constant=_no_number)


def _is_deeper(value: object, limit: int) -> bool:
    """Whether it nests deeper, looked at level by level: no recursion that a client could exhaust."""
    level: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(limit):
        members = (one.values() if isinstance(one, dict) else one for one in level)
        level = [inner for some in members for inner in some if isinstance(inner, _CONTAINERS)]
        if not level:
            return False
    return True


def _check_characters(value: object) -> None:
    """See that there is neither NUL nor half of a surrogate pair. Neither can be written as JSON as it is."""
    try:
        written = to_json(value)
    except ValueError:
        raise InvalidJson("not valid Unicode: half of a surrogate pair") from None
    if b"\\u0000" in written.replace(b"\\\\", b""):
        raise InvalidJson("the character NUL is not taken")


def _too_deep(limit: int) -> str:
    return f"nested deeper than {limit} levels"
