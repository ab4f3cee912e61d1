"""What the model is given: the system prompt, as much of the conversation as fits, and what the person asks now."""

from __future__ import annotations

from imstream.ai.backend import Backend, PromptMessage
from imstream.ai.prompt.assembly import Assembly, Excess
from imstream.ai.prompt.summary import Summaries
from imstream.errors import PermanentBackendError
from imstream.model import ChatRequest
from imstream.settings import Settings


class Prompter:
    """Makes the prompt of each AI call."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        """Read the settings. Raises `SettingsError` as `Assembly` does."""
        self._assembly = Assembly(settings)
        self._summaries = Summaries(settings, backend, self._assembly) if settings.history == "summarise" else None

    async def messages(self, request: ChatRequest) -> list[PromptMessage]:
        """The messages of one AI call, oldest first. May call the AI before, for a summary of what does not fit.

        Raises:
            PermanentBackendError: The message does not fit even alone: it was admitted by a node with other settings.
        """
        plan = await self._assembly.plan(request)
        if isinstance(plan, Excess):
            detail = f"about {plan.tokens} tokens, at most {plan.possible} are possible"
            raise PermanentBackendError("context_too_long", detail)
        dropped = plan.cut(plan.room)
        if dropped > 0 and self._summaries is not None:
            instead = await self._summaries.of(request, plan)
            if instead is not None:
                return plan.without(instead.turns, instead.messages)
        return plan.without(dropped)
