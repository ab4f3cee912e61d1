"""The AI calls of one request, past all guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from imstream.ai.backend import Completion, PromptMessage
from imstream.errors import TransientBackendError
from imstream.guards.guard import GuardRejection, Reject
from imstream.model import ChatRequest, Refusal
from imstream.texts import DEFAULT_LANG, localize
from imstream.worker.deps import WorkerDeps
from imstream.worker.disposition import Decline


class AttemptRunner:
    """Asks the AI, as often as there are attempts."""

    __slots__ = ("_parts", "_passed", "_request")

    def __init__(self, request: ChatRequest, parts: WorkerDeps) -> None:
        self._request = request
        self._parts = parts
        self._passed: ChatRequest | None = None
        """What the guards made of the request. What they let pass once, they are not asked about again."""

    async def ask(self, write: Callable[[str], None]) -> Completion:
        """One AI call; `write` gets what may be shown of the answer.

        Raises:
            Refused: A guard lets the request, or the answer, go no further.
            BackendError: There is no whole answer.
        """
        parts = self._parts
        request = self._passed = self._passed or await parts.guards.check_ai_call(self._request)
        messages = await parts.prompter.messages(request)
        filtered = parts.guards.answer_filter(request, write)
        try:
            completion = await self._call(messages, write if filtered is None else filtered.feed)
            if filtered is not None:
                filtered.end()
        except GuardRejection as refused:
            await parts.guards.record_rejection(refused.verdict, request)
            raise
        return completion

    async def _call(self, messages: Sequence[PromptMessage], on_text: Callable[[str], None]) -> Completion:
        """The call itself; only what becomes of it concerns the breaker."""
        parts = self._parts
        try:
            completion = await parts.backend.answer(messages, on_text=on_text)
        except TransientBackendError as error:
            parts.breaker.record_failure(error.retry_after)
            raise
        parts.breaker.record_success()
        return completion


def refusal(verdict: Reject, lang: str) -> Decline:
    """What becomes of a request that a guard refused."""
    sentence = localize(verdict.sentence, "en" if lang == "en" else DEFAULT_LANG, **verdict.values)
    error = localize(verdict.sentence, "en", **verdict.values)
    if verdict.detail:
        error = f"{error} ({verdict.detail})"
    return Decline(verdict.reason, error, Refusal(verdict.code, sentence, verdict.violation))
