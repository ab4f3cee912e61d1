"""Scripts of the scripted backend for fault tests."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count

from tests.support.scripted_backend import DONE, Exchange, Framing, Request, Script, chunk, event


def question_of(request: Request) -> str:
    """The question of a request: its last message."""
    question: str = request.json["messages"][-1]["content"]
    return question


def by_question(scripts: Mapping[str, Sequence[Script]], *, otherwise: Script | None = None) -> Script:
    """A script that chooses by question: its n-th script for the n-th call, then `otherwise`."""
    left = {question: deque(each) for question, each in scripts.items()}

    async def script(exchange: Exchange) -> None:
        question = question_of(exchange.request)
        chosen = left[question].popleft() if left.get(question) else otherwise
        assert chosen is not None, f"no script for {question!r}"
        await chosen(exchange)

    return script


def breaks_off(*parts: bytes, reset: bool = False, framing: Framing = "chunked") -> Script:
    """A script: these parts of a body, then a broken connection."""

    async def script(exchange: Exchange) -> None:
        await exchange.start(framing=framing)
        await exchange.send(*parts)
        if reset:
            exchange.reset()
        else:
            exchange.close()

    return script


def goes_on_until(finished: asyncio.Event, sent: dict[str, str], *, pace: float) -> Script:
    """A script: a number every `pace` seconds until the event is set. `sent` maps questions to texts."""

    async def script(exchange: Exchange) -> None:
        question = question_of(exchange.request)
        sent[question] = ""
        await exchange.start()
        for number in count():
            sent[question] += f"{number} "
            await exchange.send(event(chunk(f"{number} ")))
            if finished.is_set():
                break
            await asyncio.sleep(pace)
        await exchange.send(event(chunk(finish_reason="stop")), DONE)
        await exchange.end()

    return script
