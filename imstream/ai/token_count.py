"""How many tokens a text has: as the model's own tokenizer counts them, or estimated without one.

The estimate looks at the kinds of characters, and weighs them as a table says. The weights were fitted to the
vocabularies of Qwen3, Llama 3.1, Gemma 3, GPT-4o and DeepSeek, so that it hardly ever says less than any of them.
Measured with each of the five on 2,680 other pieces, of 200 to 4,000 characters, of 67 kinds of text:

    estimate / tokens                          least    median      most
    ───────────────────────────────────────────────────────────────────
    English                                     0.93      1.25      2.43
    other European languages                    0.88      1.30      2.49
    Chinese                                     0.91      1.29      1.88
    Chinese with English, code or emoji         1.06      1.30      1.64
    Japanese, Korean                            1.01      1.23      1.51
    Arabic, Hebrew, Persian, Thai, Hindi        0.90      1.91      3.73
    code, JSON, logs, addresses                 0.84      1.30      2.11
    ───────────────────────────────────────────────────────────────────
    numbers, base64, hex, random letters        0.83      1.08      3.45
    emoji                                       0.91      1.43      2.52
    formulas, boxes                             0.75      1.31      3.23
    classical Chinese                           0.83      0.93      1.02
    Tamil, Bengali, Georgian                    0.58      1.85      3.96
    Chinese characters at random                0.44      0.50      0.61

Of the measurements above the second line 0.8 % are too low, most of these on pieces of 200 characters; of longer ones
none is by over 10 %. Vocabularies of 32,000 tokens (Llama 2) make up to twice as much of what is not English: such a
model should be given its tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imstream.errors import SettingsError
from imstream.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REMEMBERED = 2048
"""Texts whose tokens are remembered: a conversation sends the same turns again with every message."""

_LONGEST_REMEMBERED = 8192
"""Characters of the longest text that is: so what is remembered stays below 64 MB, and is about 2 MB usually."""


class TokenCounter(Protocol):
    """Counts tokens.

    Attributes:
        slow: Whether a long text takes milliseconds, so that it should be counted in a thread: about 0.5 ms for each
            1,000 characters.
        special: The tokens that mean something of their own to the model, and must not come from a person.
    """

    slow: bool
    special: frozenset[str]

    def count(self, text: str) -> int:
        """How many tokens a text has. May be called in several threads."""
        ...


class TokenEstimate:
    """Counts without a tokenizer: 20 µs for 2,000 characters."""

    slow = False
    special: frozenset[str] = frozenset()

    def count(self, text: str) -> int:
        """See `TokenCounter.count`; a little too high, most of the time."""
        encoded = text.encode("utf-8", "surrogatepass")
        kinds = encoded.translate(_KINDS, _CONTINUATION)
        estimate = ceil(sum(weight * kinds.count(kind) for kind, weight in _WEIGHTS.items()))
        return min(estimate, len(encoded))  # no tokenizer makes more of it


class ModelTokenizer:
    """Counts with the tokenizer of the model."""

    slow = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        # The file may say to cut texts or to fill them up, as those want that train a model.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self.special = frozenset(token.content for token in added if token.special)
        self._remembered = lru_cache(_REMEMBERED)(self._count)

    def count(self, text: str) -> int:
        """See `TokenCounter.count`."""
        return self._remembered(text) if len(text) <= _LONGEST_REMEMBERED else self._count(text)

    def _count(self, text: str) -> int:
        # A batch of one: unlike `encode`, it lets other threads run meanwhile.
        [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoded)


def make_token_counter(settings: Settings) -> TokenCounter:
    """The counter that the settings ask for.

    Raises:
        SettingsError: There is no such tokenizer, or the package that reads it is not installed.
    """
    return TokenEstimate() if settings.tokenizer is None else _load(settings.tokenizer)


@lru_cache(maxsize=1)  # it takes half a second and 100 MB or more, and the guard counts as the worker does
def _load(file: Path) -> ModelTokenizer:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an extra that most do without
    except ImportError:
        raise _refused(file, "needs the package tokenizers: pip install 'imstream-server[tokenizer]'") from None
    try:
        return ModelTokenizer(Tokenizer.from_str(file.read_text("utf-8")))
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more precise
        raise _refused(file, f"must be a tokenizer.json that can be read: {error}") from None


def _refused(file: Path, why: str) -> SettingsError:
    return SettingsError(f"{Settings.variable('tokenizer')}={str(file)!r} is not allowed: {why}")


# What the estimate sees of a text: each character as one letter that names its kind, told by its first byte in UTF-8.

_WEIGHTS = {
    b"a": 0.24,  # a small Latin letter: with the spaces, four to five to a token
    b"q": 1.4,  # j, k, q, v, w, x, z: few in words, many in what is none (base64, keys, noise)
    b"A": 0.65,  # a capital
    b"0": 1.15,  # a digit: a token each for many models
    b" ": 0.1,  # a space: part of the word after it
    b"\n": 0.25,  # a line break or tab
    b".": 0.5,  # any other ASCII character
    b".a": 1.4,  # and a word right after it
    b"l": 1.8,  # Latin with accents: it breaks its word up
    b"c": 0.6,  # Cyrillic
    b"g": 1.0,  # Greek, Hebrew, Arabic and other scripts of two bytes
    b"i": 1.2,  # Indian and South-East Asian scripts, Georgian
    b"s": 0.7,  # punctuation, mathematics, arrows, boxes
    b"k": 0.75,  # kana, Chinese punctuation, full-width forms
    b"h": 0.95,  # a Chinese character
    b"K": 1.05,  # a Korean syllable
    b"e": 3.0,  # emoji, and characters as rare
}
"""Tokens for each occurrence, of one kind or of one after another."""

_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes that begin no character."""


def _kinds(kinds: Iterable[tuple[bytes, Iterable[int]]], otherwise: bytes) -> bytes:
    table = bytearray(otherwise * 256)
    for kind, those in kinds:
        for byte in those:
            table[byte] = kind[0]
    return bytes(table)


_KINDS = _kinds(
    [
        (b"a", b"abcdefghilmnoprstuy"),
        (b"q", b"jkqvwxz"),
        (b"A", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        (b"0", b"0123456789"),
        (b" ", b" "),
        (b"\n", b"\n\r\t"),
        (b"l", range(0xC2, 0xCC)),
        (b"g", range(0xCC, 0xE0)),
        (b"c", range(0xD0, 0xD4)),
        (b"i", range(0xE0, 0xE2)),
        (b"s", (0xE2, 0xEE)),
        (b"k", (0xE3, 0xEF)),
        (b"h", range(0xE4, 0xEA)),
        (b"K", range(0xEA, 0xEE)),
        (b"e", range(0xF0, 0xF5)),
    ],
    otherwise=b".",
)
