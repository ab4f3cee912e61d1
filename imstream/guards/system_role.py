"""Nobody but the operator speaks to the model as the system."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from imstream.guards.guard import PASS, Guard, Refuse
from imstream.texts import OwnSentence
from imstream.wire import Code

if TYPE_CHECKING:
    from imstream.guards.guard import Pass, Supplies
    from imstream.store.chat_request import ChatRequest

_SENTENCE = OwnSentence(
    "不允许使用系统角色 (history.{number}.role: system)",
    "The role system is not allowed (history.{number}.role: system)",
)


class SystemRole(Guard):
    """Refuses a history with turns of the role system."""

    order: ClassVar[int] = 20

    @classmethod
    def make(cls, supplies: Supplies) -> Self | None:
        """See `Guard.make`."""
        return None if supplies.settings.allow_system_role else cls()

    async def chat(self, request: ChatRequest) -> Pass | Refuse:
        """See `Guard.chat`."""
        for number, (role, _) in enumerate(request.history):
            if role == "system":
                return Refuse("system_role", Code.FORBIDDEN, _SENTENCE, {"number": number})
        return PASS
