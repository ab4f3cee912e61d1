"""Moderation by somebody else's service: the worker asks it about each message before the AI is asked.

What clients send as history reaches the model, too, and what a client says that the model has said is its own claim: so
these turns are moderated as well, each once. A message is not held against its user for what earlier turns say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import ClassVar, Self

import structlog

from imstream.ai.batches import Batcher
from imstream.ai.breaker import Breaker
from imstream.ai.moderations import WRONG_NUMBER, ModerationClient, ModerationResult
from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.texts import Sentence
from imstream.wire import Code

FAILURES = 3
"""Failed calls in a row after which the service is left alone, for as long as a failing AI backend would be."""

ABOUT_TEXTS = frozenset({"http_400", "http_413", "http_422", "context_too_long", "bad_prompt", WRONG_NUMBER})
"""Reasons that may concern one text of several: asked by themselves, the others may be answered."""

FLAGGED = Sentence(
    "抱歉,这条消息未通过内容审核,请修改后再发送!",
    "Sorry, this message did not pass moderation. Please change it and send it again!",
)
UNREADABLE = Sentence(
    "抱歉,这条消息无法通过内容审核服务检查,请修改后再发送!",
    "Sorry, this message cannot be moderated. Please change it and send it again!",
)

EARLIER = Sentence(
    "之前的对话未通过内容审核,请开始新的对话!",
    "Earlier in this conversation there is something that did not pass moderation. Please begin a new one!",
)

_MOST_REMEMBERED = 50_000
"""How many texts that passed are remembered: some 4 MB."""

log = structlog.get_logger()


class Moderation(Guard):
    """Refuses what the service flags; without the service, lets all pass or none, as the settings say."""

    order: ClassVar[int] = 90  # it costs the most, so the others refuse first

    def __init__(self, settings: Settings) -> None:
        self._server = ModerationClient(settings)
        self._batches = Batcher[ModerationResult | BackendError](self._ask, size=settings.moderation_batch)
        self._breaker = Breaker(settings, failures=FAILURES)
        self._open = settings.moderation_fail == "open"
        self._away = False
        self._history = settings.moderation_history
        self._passed = set[int]()
        """Earlier turns that passed, by their hash, which nobody can foresee. They come again with later messages."""

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """None without an address. Raises `SettingsError`."""
        return None if supplies.settings.moderation_url is None else cls(supplies.settings)

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._batches.aclose()
        await self._server.__aexit__(kind, error, traceback)

    async def request(self, request: ChatRequest) -> Allow | Reject:
        """Whether the service flags the message. Raises `TransientBackendError` when it is away and nothing passes."""
        earlier = self._earlier(request)
        answer, *others = await self._judge([request.contents, *earlier])
        if isinstance(answer, ModerationResult) and answer.flagged:
            return Reject("moderation", Code.FORBIDDEN, FLAGGED, violation=True, detail=answer.categories)
        if isinstance(answer, BackendError) and _blames_text(answer):
            return Reject("moderation_impossible", Code.FORBIDDEN, UNREADABLE, detail=str(answer))
        for text, one in zip(earlier, others, strict=True):
            if isinstance(one, ModerationResult) and not one.flagged:
                self._remember(text)
            elif isinstance(one, ModerationResult) or _blames_text(one):
                detail = one.categories if isinstance(one, ModerationResult) else str(one)
                return Reject("moderation_history", Code.FORBIDDEN, EARLIER, detail=detail)
        away = next((one for one in (answer, *others) if isinstance(one, BackendError)), None)
        if away is None or self._open:
            return ALLOW
        wait = away.retry_after if isinstance(away, TransientBackendError) else None
        raise TransientBackendError("moderation_unavailable", str(away), retry_after=wait)

    def _earlier(self, request: ChatRequest) -> list[str]:
        """The texts of earlier turns that are to be moderated, each once."""
        wanted = {"none": (), "assistant": ("assistant",)}.get(self._history)
        turns = (text for role, text in request.history if wanted is None or role in wanted)
        return [text for text in dict.fromkeys(turns) if text.strip() and hash(text) not in self._passed]

    def _remember(self, text: str) -> None:
        if len(self._passed) >= _MOST_REMEMBERED:
            self._passed.clear()
        self._passed.add(hash(text))

    async def _judge(self, texts: Sequence[str]) -> Sequence[ModerationResult | BackendError]:
        """What the service says about each text, or why it says nothing."""
        if (answer := self._held_back()) is not None:
            return [answer] * len(texts)
        if self._breaker.tripped:
            self._breaker.record_probe()
        return await asyncio.gather(*map(self._batches.submit, texts))

    async def _ask(self, texts: Sequence[str]) -> Sequence[ModerationResult | BackendError]:
        try:
            answers = await self._server.moderate(texts)
        except BackendError as error:
            if len(texts) > 1 and error.reason in ABOUT_TEXTS:
                # One text that the service cannot take must not decide over those that came at the same time.
                half = len(texts) // 2
                return [*await self._ask(texts[:half]), *await self._ask(texts[half:])]
            if _blames_text(error):
                self._answered()
            else:
                self._failed(error)
            return [error] * len(texts)
        self._answered()
        return answers

    def _held_back(self) -> TransientBackendError | None:
        """Why the service is not asked right now."""
        left = self._breaker.remaining()
        if not left:
            return None
        return TransientBackendError("paused", "after failures in a row", retry_after=timedelta(seconds=left))

    def _failed(self, error: BackendError) -> None:
        self._breaker.record_failure(error.retry_after if isinstance(error, TransientBackendError) else None)
        if (answer := self._held_back()) is not None:
            self._batches.resolve_queued(answer)
        if not self._away:
            self._away = True
            what = "messages pass without it" if self._open else "messages wait, and fail"
            log.error("moderation is away", error=str(error), meanwhile=what)

    def _answered(self) -> None:
        self._breaker.record_success()
        if self._away:
            self._away = False
            log.info("moderation is back")


def _blames_text(error: BackendError) -> bool:
    """Whether the service is there, and does not take this very text."""
    return isinstance(error, PermanentBackendError) and error.reason in ABOUT_TEXTS
