"""A message must fit into the model's context, if need be without its history."""

from __future__ import annotations

from typing import ClassVar, Self

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.wire import Code

_SENTENCE = Sentence(
    "消息过长:约 {tokens:,} 个 token,最多 {possible:,} 个",
    "This message is too long: it has about {tokens:,} tokens, at most {possible:,} are possible",
)


class ContextLength(Guard):
    """Refuses a message that is too long for the model."""

    order: ClassVar[int] = 30

    def __init__(self, assembler: PromptAssembler) -> None:
        self._assembler = assembler

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self:
        """See `Guard.make`."""
        return cls(supplies.assembler)

    async def chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard.chat`."""
        excess = await self._assembler.excess(request)
        if excess is None:
            return ALLOW
        values = {"tokens": excess.tokens, "possible": excess.limit}
        return Reject("context_too_long", Code.BAD_REQUEST, _SENTENCE, values)
