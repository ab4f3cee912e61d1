"""The AI calls of one request, past all guards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imstream.disposition import Decline, Refusal
from imstream.errors import TransientBackendError
from imstream.guards.guard import Refused
from imstream.texts import DEFAULT_LANG, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from imstream.ai.backend import Completion, Message
    from imstream.guards.guard import Refuse
    from imstream.store.chat_request import ChatRequest
    from imstream.worker.parts import Parts


class Asking:
    """Asks the AI, as often as there are attempts."""

    __slots__ = ("_parts", "_passed", "_request")

    def __init__(self, request: ChatRequest, parts: Parts) -> None:
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
        request = self._passed = self._passed or await parts.guards.request(self._request)
        messages = await parts.prompter.messages(request)
        filtered = parts.guards.answer(request, write)
        try:
            completion = await self._call(messages, write if filtered is None else filtered.feed)
            if filtered is not None:
                filtered.end()
        except Refused as refused:
            await parts.guards.note(refused.verdict, request)
            raise
        return completion

    async def _call(self, messages: Sequence[Message], on_text: Callable[[str], None]) -> Completion:
        """The call itself; only what becomes of it concerns the breaker."""
        parts = self._parts
        try:
            completion = await parts.backend.answer(messages, on_text=on_text)
        except TransientBackendError as error:
            parts.breaker.failed(error.retry_after)
            raise
        parts.breaker.succeeded()
        return completion


def refusal(verdict: Refuse, lang: str) -> Decline:
    """What becomes of a request that a guard refused."""
    sentence = say(verdict.sentence, "en" if lang == "en" else DEFAULT_LANG, **verdict.values)
    error = say(verdict.sentence, "en", **verdict.values)
    if verdict.detail:
        error = f"{error} ({verdict.detail})"
    return Decline(verdict.reason, error, Refusal(verdict.code, sentence, verdict.violation))
