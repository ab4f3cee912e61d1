"""What the model is given: the conversation so far, and what the person asks now."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from imstream.ai.backend import Message

if TYPE_CHECKING:
    from typing import Literal

    from imstream.store.chat_request import ChatRequest


def assemble(request: ChatRequest) -> list[Message]:
    """The messages of one AI call, oldest first."""
    turns = [
        Message(cast("Literal['user', 'assistant', 'system']", role), content) for role, content in request.history
    ]
    return [*turns, Message("user", request.contents)]
