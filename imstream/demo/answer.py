"""The canned answer of the demo backend, delta by delta. Pure, so that tests can predict the text."""

import re
from functools import lru_cache
from importlib import resources
from itertools import chain, cycle, islice

from imstream.demo.marker import parse_marker

_MAX_QUOTE = 200

# Line breaks, a word with the blanks before it, two characters of a script without blanks, or any other character:
# about the size of a model's tokens.
_PIECE = re.compile(r"\n+|[ \t]*[!-~]+|[^\x00-~]{1,2}|.", re.DOTALL)
_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff]")

_EN, _ZH = (
    (resources.files("imstream.demo") / f"answer.{lang}.txt").read_text("utf-8").rstrip("\n") for lang in ("en", "zh")
)
_MORE_EN = "\n\nThis answer was asked to be longer, so it goes on: the words are filler, the stream is real."
_MORE_ZH = "\n\n这个回答需要更长一些,所以继续:文字只是填充,流式传输却是真的。"


def pieces(text: str) -> list[str]:
    """Split a text into pieces of about the size of a model's tokens."""
    return _PIECE.findall(text)


@lru_cache(maxsize=256)  # benchmarks repeat questions
def canned_answer(question: str, length: int = 0) -> tuple[str, ...]:
    """The deltas of the answer to a question; deterministic.

    Args:
        question: The user's last message. Its marker is not quoted, and its `length` is used.
        length: Number of deltas if the marker has none; 0 for the natural length.
    """
    plain, marker = parse_marker(question)
    length = length if marker.length is None else marker.length
    chinese = _CHINESE.search(plain) is not None
    quote = " ".join(plain.split())
    if len(quote) > _MAX_QUOTE:
        quote = quote[:_MAX_QUOTE] + "…"
    natural = pieces((_ZH if chinese else _EN).format(quote=quote))
    filler = cycle(pieces(_MORE_ZH if chinese else _MORE_EN))
    return tuple(islice(chain(natural, filler), length or len(natural)))


def rest_of(deltas: tuple[str, ...], beginning: str) -> tuple[str, ...]:
    """The deltas after the beginning of their text; all of them if it begins otherwise."""
    if not "".join(deltas).startswith(beginning):
        return deltas
    skipped = len(beginning)
    for number, delta in enumerate(deltas):
        if skipped < len(delta):
            return (delta[skipped:], *deltas[number + 1 :])
        skipped -= len(delta)
    return ()
