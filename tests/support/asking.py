"""Calls an AI backend as the worker does, for tests of the client and of backends."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from imstream.ai.backend import Completion, OpenAIBackend, PromptMessage
from imstream.errors import BackendError
from imstream.settings import Settings
from tests.support.scripted_backend import Script, ScriptedBackend, scripted_backend

PROMPT = (PromptMessage("system", "Be brief."), PromptMessage("user", "你好"))


@dataclass
class Asking:
    """A client and its backend.

    Attributes:
        pieces: The text of all answers so far, as `on_text` received it.
    """

    client: OpenAIBackend
    backend: ScriptedBackend
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.pieces)

    async def ask(self) -> Completion:
        """Send a question and wait for the whole answer."""
        return await self.client.answer(PROMPT, on_text=self.pieces.append)


@asynccontextmanager
async def asking(*scripts: Script, always: Script | None = None, **settings: Any) -> AsyncIterator[Asking]:  # noqa: ANN401 - any setting may be given
    """Run a client and a backend that answers by these scripts."""
    async with scripted_backend(always) as backend:
        backend.then(*scripts)
        async with OpenAIBackend(Settings.load(**{"ai_url": backend.url, **settings})) as client:
            yield Asking(client, backend)


def cause(error: BackendError) -> str:
    """The detail of an error, without the address that was asked and a hint."""
    detail, address, _ = error.detail.partition(" (http")
    assert address, detail
    return detail


@contextmanager
def unaccepting_port() -> Iterator[int]:
    """The port of a server whose backlog is full: new connections are neither accepted nor refused."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for filler in (first, second):
            filler.setblocking(False)  # noqa: FBT003 - the socket's own signature
            filler.connect_ex(server.getsockname())
        yield server.getsockname()[1]
