"""Nobody but the operator speaks to the model as the system."""

from __future__ import annotations

from typing import ClassVar, Self

from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from imstream.wire import Code

_SENTENCE = Sentence(
    "不允许使用系统角色 (history.{number}.role: system)",
    "The role system is not allowed (history.{number}.role: system)",
)


class SystemRole(Guard):
    """Refuses a history with turns of the role system."""

    order: ClassVar[int] = 20

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """See `Guard.make`."""
        return None if supplies.settings.allow_system_role else cls()

    async def chat(self, request: ChatRequest) -> Allow | Reject:
        """See `Guard.chat`."""
        for number, (role, _) in enumerate(request.history):
            if role == "system":
                return Reject("system_role", Code.FORBIDDEN, _SENTENCE, {"number": number})
        return ALLOW
