"""Guards of the prompt: which roles a client may send, and how long a message may be."""

from __future__ import annotations

from typing import Self

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.wire import Code

_SYSTEM_ROLE = Sentence(
    "不允许使用系统角色 (history.{number}.role: system)",
    "The role system is not allowed (history.{number}.role: system)",
)
_TOO_LONG = Sentence(
    "消息过长:约 {tokens:,} 个 token,最多 {possible:,} 个",
    "This message is too long: it has about {tokens:,} tokens, at most {possible:,} are possible",
)


class SystemRole(Guard):
    """Rejects a history with turns of the role system: only the operator writes system prompts."""

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        """See `Guard.create`."""
        return None if deps.settings.allow_system_role else cls()

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard.check_chat`."""
        for number, (role, _) in enumerate(request.history):
            if role == "system":
                return Reject("system_role", Code.FORBIDDEN, _SYSTEM_ROLE, {"number": number})
        return ALLOW


class ContextLength(Guard):
    """Rejects a message that exceeds the model's context even without its history."""

    def __init__(self, assembler: PromptAssembler) -> None:
        self._assembler = assembler

    @classmethod
    def create(cls, deps: GuardDeps) -> Self:
        """See `Guard.create`."""
        return cls(deps.assembler)

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard.check_chat`."""
        excess = await self._assembler.excess(request)
        if excess is None:
            return ALLOW
        values = {"tokens": excess.tokens, "possible": excess.limit}
        return Reject("context_too_long", Code.BAD_REQUEST, _TOO_LONG, values)
