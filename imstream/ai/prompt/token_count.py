"""Counts the tokens of a text: with the model's own tokenizer, or by an estimate.

The estimate adds up a weight for each character, by its kind. The weights were fitted to the vocabularies of Qwen3,
Llama 3.1, Gemma 3, GPT-4o and DeepSeek so that the estimate is rarely lower than any of them: measured on 2,680 other
texts of 67 kinds, see ops/docs/guards.md. Vocabularies of 32,000 tokens (Llama 2) need up to twice as many tokens for
text that is not English: configure the tokenizer.json of such a model.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from imstream.errors import SettingsError
from imstream.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # an optional dependency

_CACHE_SIZE = 2048  # texts whose counts are cached: a conversation sends the same turns with every message
_MAX_CACHED_LENGTH = 8192  # characters of a cached text: bounds the cache to 64 MB; 2 MB are typical


class TokenEstimate:
    """Estimates without a tokenizer: 10 µs for 2,000 characters. Thread-safe, as is `ModelTokenizer`."""

    slow = False  # else long texts should be counted in a thread: they take about 0.5 ms for each 1,000 characters
    special_tokens: frozenset[str] = frozenset()  # control tokens of the model, which users must not be able to send

    def count(self, text: str) -> int:
        """Estimate the tokens of a text, usually a little too high."""
        encoded = text.encode("utf-8", "surrogatepass")
        weights = encoded.translate(_TABLE, _CONTINUATION_BYTES)
        hundredths = sum(weights) + _RARE_REST * weights.count(_RARE) + _AFTER_SYMBOL * weights.count(_SYMBOL_LETTER)
        return min(-(-hundredths // 100), len(encoded))  # rounded up; no text has more tokens than bytes


class ModelTokenizer:
    """Counts with the tokenizer of the model."""

    slow = True

    def __init__(self, tokenizer: "Tokenizer") -> None:
        tokenizer.no_truncation()  # files written for training may truncate and pad
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = frozenset(token.content for token in added if token.special)
        self._count_cached = lru_cache(_CACHE_SIZE)(self._count)

    def count(self, text: str) -> int:
        """Count the tokens of a text."""
        return self._count_cached(text) if len(text) <= _MAX_CACHED_LENGTH else self._count(text)

    def _count(self, text: str) -> int:
        # A batch, because it releases the GIL; `encode` does not.
        [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoded)


TokenCounter = TokenEstimate | ModelTokenizer


def make_token_counter(settings: Settings) -> TokenCounter:
    """Make the configured counter. A tokenizer takes half a second to load and 100 MB. Raises `SettingsError`."""
    file = settings.tokenizer
    if file is None:
        return TokenEstimate()
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an optional dependency
    except ImportError:
        raise _rejected(file, "needs the package tokenizers: pip install 'imstream-server[tokenizer]'") from None
    try:
        return ModelTokenizer(Tokenizer.from_str(file.read_text("utf-8")))
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more precise
        raise _rejected(file, f"must be a tokenizer.json that can be read: {error}") from None


def _rejected(file: Path, why: str) -> SettingsError:
    return SettingsError(f"{Settings.variable('tokenizer')}={str(file)!r} is not allowed: {why}")


# The table of the estimate: for the first byte of each character in UTF-8 its weight, in hundredths of a token.

_LETTER, _SYMBOL, _MAX = 24, 50, 255

_WEIGHTS: list[tuple[int, Iterable[int]]] = [
    (_LETTER, b"abcdefghilmnoprstuy"),  # with the spaces, four to five to a token
    (140, b"jkqvwxz"),  # rare in words, frequent in other text (base64, keys, random letters)
    (65, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    (115, b"0123456789"),  # a token each in many models
    (10, b" "),  # part of the token of the word that follows
    (25, b"\n\r\t"),
    (180, range(0xC2, 0xCC)),  # Latin with accents, which split a word into more tokens
    (100, range(0xCC, 0xE0)),  # Greek, Hebrew, Arabic and other scripts of two bytes
    (60, range(0xD0, 0xD4)),  # Cyrillic
    (120, range(0xE0, 0xE2)),  # Indian and South-East Asian scripts, Georgian
    (70, (0xE2, 0xEE)),  # punctuation, mathematics, arrows, boxes
    (75, (0xE3, 0xEF)),  # kana, Chinese punctuation, full-width forms
    (95, range(0xE4, 0xEA)),  # Chinese
    (105, range(0xEA, 0xEE)),  # Korean
    (_MAX, range(0xF0, 0xF5)),  # emoji and other rare characters: 300, which does not fit a byte
]
"""Weights and their characters; any other ASCII character is a symbol. All weights differ."""

_RARE, _RARE_REST = bytes([_MAX]), 300 - _MAX
_SYMBOL_LETTER, _AFTER_SYMBOL = bytes([_SYMBOL, _LETTER]), 140  # a letter directly after a symbol begins another token

_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
_BY_FIRST_BYTE = {byte: weight for weight, characters in _WEIGHTS for byte in characters}
_TABLE = bytes(_BY_FIRST_BYTE.get(byte, _SYMBOL) for byte in range(256))
