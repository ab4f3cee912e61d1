"""What the jobs of one worker work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from imstream.ai.backend import Backend
    from imstream.ai.breaker import Breaker
    from imstream.ai.prompt import Prompter
    from imstream.guards.chain import Guards
    from imstream.reply import Reply, ReplyBoard
    from imstream.settings import Settings
    from imstream.store.inbox import Inbox
    from imstream.store.replies import ReplyStore
    from imstream.store.requests import RequestStream


@dataclass(frozen=True)
class Parts:
    """What jobs work with.

    Attributes:
        requests: The stream that the worker reads.
        prompter: Makes the prompt that the backend is given for a request.
        guards: What each request and answer must pass.
        inbox: The way to other nodes, which may have sockets of the same users.
        begun: Is told of every reply whose first attempt begins here.
    """

    settings: Settings
    requests: RequestStream
    replies: ReplyStore
    board: ReplyBoard
    backend: Backend
    prompter: Prompter
    breaker: Breaker
    guards: Guards
    inbox: Inbox
    begun: Callable[[Reply], None]
