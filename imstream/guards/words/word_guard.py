"""Words that are not wanted, by a list in a file: in what people write, and in what the model answers.

What clients send as history reaches the model like the message itself, whoever is said to have spoken; so all of it is
looked at. A message is not held against its user for what earlier turns say: these were allowed once, and would lock
out whoever goes on with a conversation after the list has grown.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import structlog

from imstream.errors import SettingsError
from imstream.guards.guard import ALLOW, Allow, AnswerFilter, Guard, GuardDeps, Reject
from imstream.guards.words.word_file import read, stamp_of
from imstream.guards.words.word_filter import WordFilter, has_word, mask
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.wire import Code

log = structlog.get_logger()

_MOST_REMEMBERED = 50_000
"""How many texts without a word are remembered: some 4 MB."""

LOOK = timedelta(seconds=1)
"""How often the file is looked at."""

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
    Sentence(
        "回答中出现了不允许的词语,已停止",
        "The answer was stopped, because it came to words that are not allowed here",
    ),
)


class WordGuard(Guard):
    """Refuses or masks what has words of the list in it. While it is at work, the list follows its file."""

    order: ClassVar[int] = 25  # before the budget, which counts what is left of the text

    def __init__(self, path: Path, *, masks: bool, look: timedelta = LOOK) -> None:
        self._path = path
        self._masks = masks
        self._look = look
        self._stamp = stamp_of(path)  # before it is read: what changes meanwhile is read again
        self._list = read(path)
        self._clean = set[int]()
        """Texts in which no word of the list is, by their hash, which nobody can foresee: what was looked at once comes
        again as history with each later message."""
        self._told = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """See `Guard.make`."""
        settings = supplies.settings
        return None if settings.words is None else cls(settings.words, masks=settings.words_action == "mask")

    async def __aenter__(self) -> Self:
        log.info("word list loaded", words=len(self._list))
        self._watch = asyncio.create_task(self._keep_up(), name="words")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._watch is not None  # noqa: S101 - entered before
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch

    async def reload(self) -> str:
        """See `Guard.reload`."""
        self._told.set()
        return "word list"

    async def chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard.chat`."""
        contents, history = request.contents, request.history
        clean = self._is_clean(contents)
        if clean and all(self._is_clean(text) for _, text in history):
            return ALLOW
        if self._masks:
            words = self._list
            return Allow(text=mask(contents, words), history=tuple((role, mask(text, words)) for role, text in history))
        return IN_HISTORY if clean else IN_MESSAGE

    def answer(self, request: ChatRequest) -> AnswerFilter | None:  # noqa: ARG002 - the same for all
        """See `Guard.answer`."""
        return WordFilter(self._list, None if self._masks else IN_ANSWER)

    def _is_clean(self, text: str) -> bool:
        known = hash(text)
        if known not in self._clean:
            if has_word(text, self._list):
                return False
            if len(self._clean) >= _MOST_REMEMBERED:
                self._clean.clear()
            self._clean.add(known)
        return True

    async def _keep_up(self) -> None:
        """Load the list whenever its file has changed, and when a SIGHUP asks for it."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look.total_seconds()):
                    await self._told.wait()
            told = self._told.is_set()
            self._told.clear()
            try:
                stamp = await asyncio.to_thread(stamp_of, self._path)
                if told or stamp != self._stamp:
                    self._stamp = stamp
                    self._list = await asyncio.to_thread(read, self._path)
                    self._clean.clear()
                    log.info("word list loaded", words=len(self._list))
            except SettingsError as error:
                log.error("word list not loaded, the one before stays", error=str(error))  # noqa: TRY400 - no defect
            except Exception:
                log.exception("word list not loaded, the one before stays")
