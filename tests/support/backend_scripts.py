"""Scripts of the scripted backend for fault tests."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from tests.support.scripted_backend import DONE, Exchange, Framing, Request, Script, chunk, event


def question_of(request: Request) -> str:
    """The question of a request: the last message of its user."""
    questions: list[str] = [one["content"] for one in request.json["messages"] if one["role"] == "user"]
    return questions[-1]


def beginning_of(request: Request) -> str:
    """The beginning of the answer that is to be continued: the last message, if it is the assistant's."""
    last: dict[str, str] = request.json["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def continues(*texts: str, until: int | None = None, usage: Mapping[str, int] | None = None) -> Script:
    """A script: the rest of an answer, with one event per text. At a length, the connection breaks.

    Each event has the usage so far, as some servers send it.
    """

    async def script(exchange: Exchange) -> None:
        beginning, length = beginning_of(exchange.request), 0
        assert "".join(texts).startswith(beginning), beginning
        counts: dict[str, Any] = {} if usage is None else {"usage": usage}
        await exchange.start()
        for text in texts:
            begin, length = max(0, len(beginning) - length), length + len(text)
            end = None if until is None or length <= until else until - length
            if part := text[begin:end]:
                await exchange.send(event(chunk(part, **counts)))
            if end is not None or length == until:
                exchange.close()
                return
        await exchange.send(event(chunk(finish_reason="stop", **counts)), DONE)
        await exchange.end()

    return script


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
