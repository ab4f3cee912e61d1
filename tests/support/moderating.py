"""A scripted moderation service, and the calls that it received."""

import json
from collections.abc import Sequence

from tests.support.scripted_backend import Exchange, Request, Script, refuses, says


def texts_of(request: Request) -> list[str]:
    """The texts of a call."""
    given: str | list[str] = request.json["input"]
    return [given] if isinstance(given, str) else given


def result(*categories: str, flagged: bool = True) -> dict[str, object]:
    """One result with these categories."""
    return {"flagged": flagged, "categories": dict.fromkeys(categories, True) | {"harmless": False}}


def results(*each: object) -> Script:
    """A script: these results, whatever the texts."""
    return says(json.dumps({"id": "modr-1", "model": "m", "results": each}).encode(), content_type="application/json")


async def flags_bad(exchange: Exchange) -> None:
    """A script: flags each text that contains `bad`, with its other words as categories."""
    await results(*(_judge(text) for text in texts_of(exchange.request)))(exchange)


def chokes_on(word: str, *, status: int = 400) -> Script:
    """A script: refuses a call if any text contains this word; otherwise like `flags_bad`."""

    async def script(exchange: Exchange) -> None:
        if any(word in text for text in texts_of(exchange.request)):
            await refuses(status, '{"error": {"message": "cannot read that"}}')(exchange)
        else:
            await flags_bad(exchange)

    return script


def moderated(requests: Sequence[Request]) -> list[list[str]]:
    """The texts of each call."""
    return [texts_of(request) for request in requests]


def _judge(text: str) -> dict[str, object]:
    words = text.split()
    return result(*(word for word in words if word != "bad"), flagged="bad" in words)
