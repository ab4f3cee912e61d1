"""The guard of listed words in messages and answers. The list is a UTF-8 file with one word a line and `#` comments.

The whole history is checked, since all of it reaches the model, whatever the client claims about its roles. A listed
word in it is not a violation: it may have been allowed when it was sent, and would lock out users who continue.
"""

import asyncio
import codecs
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self

import structlog

from imstream.codes import Code
from imstream.errors import SettingsError
from imstream.guards.guard import ALLOW, Allow, AnswerFilter, Guard, GuardDeps, Reject
from imstream.guards.words.normalization import SEPARATORS, SPACE, normalize, strip_ignored
from imstream.guards.words.word_filter import WordFilter, has_word, mask
from imstream.guards.words.word_list import WordList
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.texts import Sentence

MAX_WORD = 200  # characters
MAX_FILE_SIZE = 16 << 20  # bytes: ten times a list of 100,000 words
POLL_INTERVAL = timedelta(seconds=1)  # for changes of the file
_MAX_REPORTED_LINES = 20  # of one problem
_CACHE_SIZE = 50_000  # texts that are known to contain no word: 4 MB

IN_MESSAGE = Reject(
    "words",
    Code.FORBIDDEN,
    Sentence(
        "消息中含有不允许的词语,请修改后再发送!",
        "The message contains words that are not allowed here. Please change it and send it again!",
    ),
    violation=True,
)
IN_HISTORY = Reject(
    "words_history",
    Code.FORBIDDEN,
    Sentence(
        "之前的对话中含有不允许的词语,请开始新的对话!",
        "Earlier in this conversation there are words that are not allowed here. Please begin a new one!",
    ),
)
IN_ANSWER = Reject(
    "words_answer",
    Code.FORBIDDEN,
    Sentence("回答中出现了不允许的词语,已停止", "The answer was stopped because of words that are not allowed here"),
)

log = structlog.get_logger()


class WordGuard(Guard):
    """Rejects or masks text with listed words. While it runs, it reloads the list when its file changes."""

    def __init__(self, path: Path, *, masks: bool, poll_interval: timedelta = POLL_INTERVAL) -> None:
        self._path = path
        self._masks = masks
        self._poll_interval = poll_interval
        self._version = file_version(path)  # before the file is read: a change in between is read again
        self._list = read(path)
        # Hashes of texts without words: history comes again with each message. Collisions cannot be forged, because
        # Python randomizes the hashes of strings.
        self._clean = set[int]()
        self._reload = asyncio.Event()

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        settings = deps.settings
        return None if settings.words is None else cls(settings.words, masks=settings.words_action == "mask")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        log.info("word list loaded", words=len(self._list))
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch_file(), name="words")
            yield
            watching.cancel()

    async def _watch_file(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval.total_seconds()):
                    await self._reload.wait()
            requested = self._reload.is_set()
            self._reload.clear()
            try:
                version = await asyncio.to_thread(file_version, self._path)
                if requested or version != self._version:
                    self._version = version
                    self._list = await asyncio.to_thread(read, self._path)
                    self._clean.clear()
                    log.info("word list loaded", words=len(self._list))
            except SettingsError as error:
                log.error("word list not loaded, the previous one stays", error=str(error))  # noqa: TRY400 - no defect
            except Exception:
                log.exception("word list not loaded, the previous one stays")

    async def reload(self) -> str:
        self._reload.set()
        return "word list"

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        contents, history = request.contents, request.history
        clean = self._is_clean(contents)
        if clean and all(self._is_clean(text) for _, text in history):
            return ALLOW
        if self._masks:
            masked = tuple((role, mask(text, self._list)) for role, text in history)
            return Allow(text=mask(contents, self._list), history=masked)
        return IN_HISTORY if clean else IN_MESSAGE

    def answer_filter(self, request: ChatRequest) -> AnswerFilter | None:  # noqa: ARG002 - the same for all
        return WordFilter(self._list, None if self._masks else IN_ANSWER)

    def _is_clean(self, text: str) -> bool:
        key = hash(text)
        if key not in self._clean:
            if has_word(text, self._list):
                return False
            if len(self._clean) >= _CACHE_SIZE:
                self._clean.clear()
            self._clean.add(key)
        return True


def file_version(path: Path) -> tuple[int, int, int] | None:
    """Modification time, size and inode of a file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read(path: Path) -> WordList:
    """Read a word list: 0.5 s for 100,000 words. Raises `SettingsError`, which names lines without their content."""
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # reading a pipe could block forever
            raise _invalid(path, "it is not a regular file")
        if status.st_size > MAX_FILE_SIZE:
            raise _invalid(path, f"it has more than {MAX_FILE_SIZE} bytes")
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _invalid(path, f"cannot be read: {error.strerror}") from None
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _invalid(path, f"line {number} is not UTF-8") from None
    words, problems = list[str](), dict[str, list[int]]()
    for number, line in enumerate(lines, 1):
        if (text := line.strip()) and not text.startswith("#"):
            word = strip_ignored(normalize(text)).strip(SPACE)
            if problem := _problem(word):
                problems.setdefault(problem, []).append(number)
            words.append(word)
    if problems:
        raise _invalid(path, "; ".join(f"{_lines(numbers)}: {problem}" for problem, numbers in problems.items()))
    if not words:
        raise _invalid(path, "it contains no word")
    return WordList(words)


def _problem(word: str) -> str | None:
    if not word.strip(SEPARATORS):
        return "no letter and no digit"
    if word[0].isspace() or word[-1].isspace():
        return "begins or ends with a sign, but signs are ignored: without it, the word may be another"
    if len(word) > MAX_WORD:
        return f"longer than {MAX_WORD} characters"
    return None


def _lines(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:_MAX_REPORTED_LINES]))
    more = len(numbers) - _MAX_REPORTED_LINES
    return ("line " if len(numbers) == 1 else "lines ") + named + (f" and {more} more" if more > 0 else "")


def _invalid(path: Path, problem: str) -> SettingsError:
    return SettingsError(f"{Settings.variable('words')}={str(path)!r} is not allowed: {problem}")
