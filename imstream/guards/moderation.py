"""Moderation by somebody else's service: the worker asks it about each message before the AI is asked."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar, Self

import structlog

from imstream.ai.batches import Batches
from imstream.ai.breaker import Breaker
from imstream.ai.moderations import WRONG_NUMBER, Moderated, Moderations
from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.guards.guard import PASS, Guard, Pass, Refuse
from imstream.texts import OwnSentence
from imstream.wire import Code

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from imstream.guards.guard import Supplies
    from imstream.settings import Settings
    from imstream.store.chat_request import ChatRequest

FAILURES = 3
"""Failed calls in a row after which the service is left alone, for as long as a failing AI backend would be."""

ABOUT_TEXTS = frozenset({"http_400", "http_413", "http_422", "context_too_long", "bad_prompt", WRONG_NUMBER})
"""Reasons that may concern one text of several: asked by themselves, the others may be answered."""

FLAGGED = OwnSentence(
    "抱歉,这条消息未通过内容审核,请修改后再发送!",
    "Sorry, this message did not pass moderation. Please change it and send it again!",
)
UNREADABLE = OwnSentence(
    "抱歉,这条消息无法通过内容审核服务检查,请修改后再发送!",
    "Sorry, this message cannot be moderated. Please change it and send it again!",
)

log = structlog.get_logger()


class Moderation(Guard):
    """Refuses what the service flags; without the service, lets all pass or none, as the settings say."""

    order: ClassVar[int] = 90  # it costs the most, so the others refuse first

    def __init__(self, settings: Settings) -> None:
        self._server = Moderations(settings)
        self._batches = Batches[Moderated | BackendError](self._ask, size=settings.moderation_batch)
        self._breaker = Breaker(settings, failures=FAILURES)
        self._open = settings.moderation_fail == "open"
        self._away = False

    @classmethod
    def make(cls, supplies: Supplies) -> Self | None:
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

    async def request(self, request: ChatRequest) -> Pass | Refuse:
        """Whether the service flags the message. Raises `TransientBackendError` when it is away and nothing passes."""
        answer: Moderated | BackendError | None = self._held_back()
        if answer is None:
            if self._breaker.tripped:
                self._breaker.probing()
            answer = await self._batches.ask(request.contents)
        if isinstance(answer, Moderated):
            if not answer.flagged:
                return PASS
            return Refuse("moderation", Code.FORBIDDEN, FLAGGED, violation=True, detail=answer.categories)
        if _blames_text(answer):
            return Refuse("moderation_impossible", Code.FORBIDDEN, UNREADABLE, detail=str(answer))
        if self._open:
            return PASS
        wait = answer.retry_after if isinstance(answer, TransientBackendError) else None
        raise TransientBackendError("moderation_unavailable", str(answer), retry_after=wait)

    async def _ask(self, texts: Sequence[str]) -> Sequence[Moderated | BackendError]:
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
        self._breaker.failed(error.retry_after if isinstance(error, TransientBackendError) else None)
        if (answer := self._held_back()) is not None:
            self._batches.answer_waiting(answer)
        if not self._away:
            self._away = True
            what = "messages pass without it" if self._open else "messages wait, and fail"
            log.error("moderation is away", error=str(error), meanwhile=what)

    def _answered(self) -> None:
        self._breaker.succeeded()
        if self._away:
            self._away = False
            log.info("moderation is back")


def _blames_text(error: BackendError) -> bool:
    """Whether the service is there, and does not take this very text."""
    return isinstance(error, PermanentBackendError) and error.reason in ABOUT_TEXTS
