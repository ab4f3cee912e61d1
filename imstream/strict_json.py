"""Strict parser for untrusted JSON. All work is linear in the length of the text.

It uses Python's decoder and not pydantic's, because its hooks see each object and number (3 µs more for a usual frame).
A text with too many values is rejected before it is decoded, because a value costs much more than a character.
"""

from json import JSONDecodeError, JSONDecoder
from math import isfinite
from typing import Any

from pydantic_core import from_json, to_json

MAX_NUMBER = 64  # characters; converting 10,000 digits takes too long

_CONTAINERS = (dict, list)
_NOT_COUNTED = bytes(set(range(256)) - set(b",[{"))


class InvalidJson(ValueError):  # noqa: N818 - the client's fault
    """The text is not JSON, or not accepted here. The error text is for a person.

    `value` is the value of the text, where that is known: it is JSON, but nested too deeply or with bad characters.
    """

    def __init__(self, problem: str, value: object = None) -> None:
        super().__init__(problem)
        self.value = value


class InvalidNumber(InvalidJson):
    """NaN, Infinity, or a number that is too long or too large."""


def parse_json(text: str, *, max_depth: int, max_values: int) -> object:
    """Parse a text with at most `max_depth` nested containers and `max_values` items and containers.

    Raises `InvalidJson` also for duplicate keys, NUL and halves of surrogate pairs.
    """
    if len(text) > max_values and _has_more_values(text, max_values):
        raise InvalidJson(f"more than {max_values} values, or nested deeper than {max_depth} levels")
    try:
        value: object = _DECODER.decode(text)
    except JSONDecodeError as error:
        raise InvalidJson(f"not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJson(f"nested deeper than {max_depth} levels") from None
    if _is_deeper(value, max_depth):
        raise InvalidJson(f"nested deeper than {max_depth} levels", value)
    if "\\u" in text:  # else every character came through the UTF-8 check of the socket
        _check_characters(value)
    return value


def _has_more_values(text: str, limit: int) -> bool:
    """Count commas and opening brackets outside of strings, without decoding."""
    data = text.encode(errors="replace")
    if len(data.translate(None, _NOT_COUNTED)) <= limit:
        return False
    # Now each quote begins or ends a string. Replacing by the same number of bytes is faster than removing.
    plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    # A value has at most one string and one name, so more quotes are too many values; splitting there would be slow.
    if plain.count(b'"') > 4 * (limit + 1):
        return True
    outside = b"".join(plain.split(b'"')[::2])
    return len(outside.translate(None, _NOT_COUNTED)) > limit


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
    # float() rounds correctly, up to 5 µs for adversarial digits; this takes a tenth.
    number: float = from_json(digits)
    if not isfinite(number):
        raise InvalidNumber(f"the number {digits} is too large")
    return number


def _reject_constant(name: str) -> float:
    raise InvalidNumber(f"not valid JSON: {name} is no number")


_DECODER = JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_fraction, parse_constant=_reject_constant
)


def _is_deeper(value: object, limit: int) -> bool:
    """Check the nesting level by level, without recursion."""
    level: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(limit):
        members = (one.values() if isinstance(one, dict) else one for one in level)
        level = [inner for some in members for inner in some if isinstance(inner, _CONTAINERS)]
        if not level:
            return False
    return True


def _check_characters(value: object) -> None:
    """Reject NUL and halves of surrogate pairs."""
    try:
        written = to_json(value)
    except ValueError:
        raise InvalidJson("not valid Unicode: half of a surrogate pair", value) from None
    if b"\\u0000" in written.replace(b"\\\\", b""):
        raise InvalidJson("the character NUL is not taken", value)
