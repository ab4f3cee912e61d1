"""Moderation by an external service, which the worker calls for each message before its first AI call.

History is moderated as well, each text once: it reaches the model, and clients can claim any. It is never a violation.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Self

import structlog

from imstream.ai.call_gate import Breaker
from imstream.ai.moderations import WRONG_NUMBER, Batcher, ModerationClient, ModerationResult
from imstream.codes import Code
from imstream.errors import BackendError
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.texts import Sentence

FAILURES = 3  # consecutive ones that open the circuit breaker; it pauses as long as that of the AI backend
_CACHE_SIZE = 50_000  # texts that are known to have passed: 4 MB

# Reasons of errors that one text of a batch may cause: sent alone, the others may succeed.
TEXT_ERRORS = frozenset({"http_400", "http_413", "http_422", "context_too_long", "bad_prompt", WRONG_NUMBER})

FLAGGED = Sentence(
    "抱歉,这条消息未通过内容审核,请修改后再发送!",
    "Sorry, this message did not pass moderation. Please change it and send it again!",
)
UNREADABLE = Sentence(
    "抱歉,这条消息无法通过内容审核服务检查,请修改后再发送!",
    "Sorry, this message cannot be moderated. Please change it and send it again!",
)
FLAGGED_HISTORY = Sentence(
    "之前的对话未通过内容审核,请开始新的对话!",
    "Earlier in this conversation there is something that did not pass moderation. Please begin a new one!",
)

log = structlog.get_logger()

Result = ModerationResult | BackendError


class Moderation(Guard):
    """Rejects flagged messages. When the service is down, it allows all or none, by `moderation_fail`."""

    def __init__(self, settings: Settings) -> None:
        self._service = ModerationClient(settings)
        self._batches = Batcher[Result](self._moderate_batch, size=settings.moderation_batch)
        self._breaker = Breaker(settings, failures=FAILURES)
        self._fails_open = settings.moderation_fail == "open"
        self._is_down = False
        self._history = settings.moderation_history
        # Hashes of history turns that passed: they come again with later messages. Collisions cannot be forged, because
        # Python randomizes the hashes of strings.
        self._passed = set[int]()

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        return None if deps.settings.moderation_url is None else cls(deps.settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._service:
            try:
                yield
            finally:
                await self._batches.aclose()

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        turns = dict.fromkeys(text for role, text in request.history if self._history in {"all", role})  # each once
        history = [text for text in turns if text.strip() and hash(text) not in self._passed]
        message, *others = results = await self._moderate([request.contents, *history])
        if isinstance(message, ModerationResult) and message.flagged:
            return Reject("moderation", Code.FORBIDDEN, FLAGGED, violation=True, detail=message.categories)
        if _is_text_error(message):
            return Reject("moderation_impossible", Code.FORBIDDEN, UNREADABLE, detail=str(message))
        for text, turn in zip(history, others, strict=True):
            if isinstance(turn, ModerationResult) and not turn.flagged:
                if len(self._passed) >= _CACHE_SIZE:
                    self._passed.clear()
                self._passed.add(hash(text))
            elif isinstance(turn, ModerationResult) or _is_text_error(turn):
                detail = turn.categories if isinstance(turn, ModerationResult) else str(turn)
                return Reject("moderation_history", Code.FORBIDDEN, FLAGGED_HISTORY, detail=detail)
        error = next((result for result in results if isinstance(result, BackendError)), None)
        if error is None or self._fails_open:
            return ALLOW
        raise BackendError("moderation_unavailable", str(error), kind="away", retry_after=error.retry_after)

    async def _moderate(self, texts: Sequence[str]) -> Sequence[Result]:
        if (paused := self._paused()) is not None:
            return [paused] * len(texts)
        if self._breaker.tripped:
            self._breaker.record_probe()
        return await asyncio.gather(*map(self._batches.submit, texts))

    async def _moderate_batch(self, texts: Sequence[str]) -> Sequence[Result]:
        try:
            results: Sequence[Result] = await self._service.moderate(texts)
        except BackendError as error:
            if len(texts) > 1 and error.reason in TEXT_ERRORS:
                # Split the batch, so that one unreadable text does not decide about the texts of other users.
                half = len(texts) // 2
                return [*await self._moderate_batch(texts[:half]), *await self._moderate_batch(texts[half:])]
            results = [error] * len(texts)
            if not _is_text_error(error):
                self._on_service_failure(error)
                return results
        self._breaker.record_success()
        if self._is_down:
            self._is_down = False
            log.info("moderation is back")
        return results

    def _on_service_failure(self, error: BackendError) -> None:
        self._breaker.record_failure(error.retry_after)
        if (paused := self._paused()) is not None:
            self._batches.resolve_queued(paused)
        if not self._is_down:
            self._is_down = True
            meanwhile = "messages pass without it" if self._fails_open else "messages wait, and fail"
            log.error("moderation is away", error=str(error), meanwhile=meanwhile)

    def _paused(self) -> BackendError | None:
        """The error for all texts while the breaker is open."""
        if not (seconds := self._breaker.remaining()):
            return None
        wait = timedelta(seconds=seconds)
        return BackendError("paused", "after failures in a row", kind="away", retry_after=wait)


def _is_text_error(result: Result) -> bool:
    """Whether the service works, but rejects this text."""
    return isinstance(result, BackendError) and result.kind == "impossible" and result.reason in TEXT_ERRORS
