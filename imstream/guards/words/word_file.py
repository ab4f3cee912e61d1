"""The file that a list of words is kept in: one word a line, `#` begins a comment line, UTF-8."""

from __future__ import annotations

import codecs
import stat
from pathlib import Path

from imstream.errors import SettingsError
from imstream.guards.words.normalization import HEAVY, LIGHT, SPACE, normalise, seen
from imstream.guards.words.word_list import WordList
from imstream.settings import Settings

MAX_LETTERS = 200
"""Most letters of a word."""

MAX_SIZE = 16 << 20
"""Maximum size of the file in bytes: ten times a list of 100,000 words."""

_MOST_NAMED = 20
"""Most lines that one complaint names."""

Stamp = tuple[int, int, int]
"""What is another when a file has changed: time, size, inode."""


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file as it is now; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read(path: Path) -> WordList:
    """Read a list. Takes half a second for 100,000 words.

    Raises:
        SettingsError: The file cannot be read, is too large, is no UTF-8, has no word, or lines that are none. It names
            the lines, and never says what is in them.
    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe would be waited for, for ever
            raise _wrong(path, "it is not a regular file")
        if status.st_size > MAX_SIZE:
            raise _wrong(path, f"it has more than {MAX_SIZE} bytes")
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from None
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _wrong(path, f"line {number} is not UTF-8") from None
    words, wrong = list[str](), dict[str, list[int]]()
    for number, line in enumerate(lines, 1):
        if (text := line.strip()) and not text.startswith("#"):
            word = seen(normalise(text)).strip(SPACE)
            if problem := _problem(word):
                wrong.setdefault(problem, []).append(number)
            words.append(word)
    if wrong:
        raise _wrong(path, "; ".join(f"{_named(numbers)}: {problem}" for problem, numbers in wrong.items()))
    if not words:
        raise _wrong(path, "there is no word in it")
    return WordList(words)


def _problem(word: str) -> str | None:
    """Why a word, in normal form, cannot be on a list."""
    if not word.strip(HEAVY + LIGHT + SPACE):
        return "no letter and no digit"
    if word[0].isspace() or word[-1].isspace():
        return "begins or ends with a sign, but signs are skipped: without it, the word may be another"
    if len(word) > MAX_LETTERS:
        return f"longer than {MAX_LETTERS} characters"
    return None


def _named(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:_MOST_NAMED]))
    more = len(numbers) - _MOST_NAMED
    return ("line " if len(numbers) == 1 else "lines ") + named + (f" and {more} more" if more > 0 else "")


def _wrong(path: Path, problem: str) -> SettingsError:
    return SettingsError(f"{Settings.variable('words')}={str(path)!r} is not allowed: {problem}")
