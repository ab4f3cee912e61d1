"""Texts of the same length that are refused, in all shapes that may be expensive to refuse."""

from collections.abc import Callable, Iterable
from itertools import count

PLAIN = "a long text with a wrong id"
"""The frame that the others are compared with."""

_WRONG = '{"msgType":"CHAT","userId":10001,"messageId":"",'
_UNKNOWN = _WRONG + '"contents":"a","x":'
_HISTORY = _WRONG + '"contents":"a","history":['
_RESUME = '{"msgType":"INIT","userId":10001,"resume":['


def _filled(size: int, head: str, units: Iterable[str], tail: str, between: str = ",") -> str:
    """Repeat a unit up to the length."""
    made, room = list[str](), size - len(head) - len(tail)
    for unit in units:
        room -= len(unit.encode()) + len(between)
        if room < 0:
            break
        made.append(unit)
    return head + between.join(made) + tail


def _same(head: str, unit: str, tail: str, between: str = ",") -> Callable[[int], str]:
    return lambda size: _filled(size, head, (unit for _ in count()), tail, between)


def _each(head: str, unit: Callable[[int], str], tail: str) -> Callable[[int], str]:
    return lambda size: _filled(size, head, map(unit, count()), tail)


_LONG = '{"msgType":"CHAT","userId":10001,"messageId":"long","contents":"'


def _text(unit: str, last: str = "") -> Callable[[int], str]:
    return _same(_WRONG + '"contents":"', unit, last + '"}', between="")


SHAPES: dict[str, Callable[[int], str]] = {
    PLAIN: _text("x"),
    "no JSON": _same("", "x", "", ""),
    "a string without end": _same(_WRONG + '"contents":"', "x", "", ""),
    "one key again and again": _same("{", '"a":1', "}"),
    "many keys, the last one twice": _each("{", lambda n: f'"k{n}":1', ',"z":1,"z":1}'),
    "many long keys, the last one twice": _each("{", lambda n: f'"{n:0100}":1', ',"z":1,"z":1}'),
    "many keys": _each(_UNKNOWN + "{", lambda n: f'"k{n}":1', "}}"),
    "many keys in a turn": _each(_HISTORY + '{"role":"x",', lambda n: f'"k{n}":1', "}]}"),
    "keys in escapes": _each(_UNKNOWN + "{", lambda n: f'"\\u{n + 0x4E00:04x}":1', "}}"),
    "one long key": _same(_WRONG + '"', "k", '":1}', ""),
    "one long key, twice": lambda size: f'{{"{"k" * (size // 2 - 8)}":1,"{"k" * (size // 2 - 8)}":1}}',
    "empty objects": _same(_UNKNOWN + "[", "{}", "]}"),
    "empty lists": _same(_UNKNOWN + "[", "[]", "]}"),
    "empty strings": _same(_UNKNOWN + "[", '""', "]}"),
    "small strings": _each(_UNKNOWN + "[", lambda n: f'"{n}"', "]}"),
    "nothings": _same(_UNKNOWN + "[", "null", "]}"),
    "digits": _same(_UNKNOWN + "[", "1", "]}"),
    "long whole numbers": _same(_UNKNOWN + "[", "9" * 64, "]}"),
    "whole numbers as long as Python takes them": _same(_UNKNOWN + "[", "9" * 900, "]}"),
    "fractions": _same(_UNKNOWN + "[", "1.5", "]}"),
    "very small numbers": _same(_UNKNOWN + "[", "1e-300", "]}"),
    "numbers that are hard to round": _same(_UNKNOWN + "[", "2.2250738585072012e-308", "]}"),
    "numbers that are long and hard to round": _same(
        _UNKNOWN + "[", "9007199254740993000000000000000000000000000000001e-310", "]}"
    ),
    "one number": _same(_UNKNOWN, "9", "}", ""),
    "one fraction": _same(_UNKNOWN + "0.", "3", "}", ""),
    "many turns, then no number": _same(_HISTORY, "{}", ",NaN]}"),
    "many resumed, then no number": _same(_RESUME, "{}", ',{"messageId":1e999}]}'),
    "empty turns": _same(_HISTORY, "{}", "]}"),
    "wrong turns": _same(_HISTORY, '{"role":"x","content":1}', "]}"),
    "too many turns": _same(_HISTORY, '{"role":"user","content":""}', "]}"),
    "numbers as turns": _same(_HISTORY, "1", "]}"),
    "empty ones resumed": _same(_RESUME, "{}", "]}"),
    "too many resumed": _same(_RESUME, '{"messageId":"m"}', "]}"),
    "texts resumed": _same(_RESUME, '"m"', "]}"),
    "deep lists": _same(_UNKNOWN, "[", "", ""),
    "deep objects": _same(_UNKNOWN, '{"a":', "", ""),
    "many deep lists": _same(_UNKNOWN + "[", "[" * 300 + "]" * 300, "]}"),
    "many nearly deep lists": _same(_UNKNOWN + "[", "[[[[[]]]]]", "]}"),
    "letters as escapes": _text("\\u0041"),
    "pairs of surrogates": _text("\\ud83d\\ude00"),
    "pairs of surrogates, and then half of one": _text("\\ud83d\\ude00", "\\ud83d"),
    "strings with half of a surrogate pair": _same(_UNKNOWN + "[", '"\\ud83d"', "]}"),
    "escapes, and then NUL": _text("\\u0041", "\\u0000"),
    "strings, and then NUL": _same(_UNKNOWN + "[", '"a"', ',"\\u0000"]}'),
    "line breaks": _text("\\n"),
    "backslashes": _text("\\\\"),
    "quotes": _text('\\"'),
    "quotes and commas": _text('\\",'),
    "commas in a text": _text(","),
    "brackets in a text": _text("[{"),
    "Chinese": _text("字"),
    "spaces": _same(_WRONG, " ", '"contents":"a"}', ""),
    "lines": _same("", "\n", "x", ""),
    "a long type": _same('{"msgType":"', "x", '"}', ""),
    "a list as type": _same('{"msgType":[', '""', "]}"),
    "a long id": _same('{"msgType":"CANCEL","messageId":"', "m", '"}', ""),
    "a long role": _same(_HISTORY + '{"content":"","role":"', "r", '"}]}', ""),
    "a number as long text": _same(
        '{"msgType":"INIT","userId":10001,"resume":[{"messageId":"m","offset":"', "9", '"}]}', ""
    ),
    "a list as text": _same(_WRONG + '"contents":[', "1", "]}"),
}
"""Functions that make a text of about that many bytes. The socket stays open after it."""

TOO_LONG: dict[str, Callable[[int], str]] = {
    what: _same(_LONG, unit, '"}', between="")
    for what, unit in {
        "letters": "x",
        "words": "hello ",
        "Chinese": "字",
        "the start of a special token": "<",
        "special tokens": "<|a|>",
        "almost special tokens": "<|" + "a" * 65,
    }.items()
}
"""Valid messages of 64 KiB that do not fit the context of the model."""
