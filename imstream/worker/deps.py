"""What the jobs of one worker work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imstream.ai.backend import Backend
from imstream.ai.breaker import Breaker
from imstream.ai.prompt.prompter import Prompter
from imstream.guards.chain import GuardChain
from imstream.reply_buffer import ReplyBuffer, ReplyBuffers
from imstream.settings import Settings
from imstream.store.inbox import Inbox
from imstream.store.replies import ReplyStore
from imstream.store.requests import RequestStream


@dataclass(frozen=True)
class WorkerDeps:
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
    buffers: ReplyBuffers
    backend: Backend
    prompter: Prompter
    breaker: Breaker
    guards: GuardChain
    inbox: Inbox
    begun: Callable[[ReplyBuffer], None]
