"""A message must fit into the model's context, if need be without its history."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from imstream.ai.assembly import Assembly
from imstream.guards.guard import PASS, Guard, Refuse
from imstream.texts import OwnSentence
from imstream.wire import Code

if TYPE_CHECKING:
    from imstream.guards.guard import Pass, Supplies
    from imstream.store.chat_request import ChatRequest

_SENTENCE = OwnSentence(
    "消息过长:约 {tokens:,} 个 token,最多 {possible:,} 个",
    "This message is too long: it has about {tokens:,} tokens, at most {possible:,} are possible",
)


class Budget(Guard):
    """Refuses a message that is too long for the model."""

    order: ClassVar[int] = 30

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly

    @classmethod
    def make(cls, supplies: Supplies) -> Self:
        """See `Guard.make`."""
        return cls(Assembly(supplies.settings))

    async def chat(self, request: ChatRequest) -> Pass | Refuse:
        """See `Guard.chat`."""
        excess = await self._assembly.excess(request)
        if excess is None:
            return PASS
        values = {"tokens": excess.tokens, "possible": excess.possible}
        return Refuse("context_too_long", Code.BAD_REQUEST, _SENTENCE, values)
