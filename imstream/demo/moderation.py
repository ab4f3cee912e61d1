"""The demo's moderation: `/v1/moderations` with one rule, which says that it is one. No I/O.

A text is flagged when it holds `[[flag]]`, or `[[flag violence hate]]`, which names the categories. Whoever wants to
see what becomes of a flagged message writes that; nothing else is ever flagged.

The shapes are those of https://platform.openai.com/docs/api-reference/moderations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from uuid import uuid4

from pydantic_core import from_json

from imstream.demo.protocol import MODEL, BadAsk

CATEGORIES = ("demo", "harassment", "hate", "illicit", "self-harm", "sexual", "violence")
"""What may be found: `demo` when the marker names none of the others, which are OpenAI's."""

_FLAG = re.compile(r"\[\[flag\b(?P<categories>[^\]]*)\]\]")


def parse(body: bytes | bytearray) -> list[str]:
    """The texts that a call is about.

    Raises:
        BadAsk: It is not JSON, or its `input` is neither a text nor a list of texts.
    """
    try:
        asked = from_json(body)
    except ValueError as error:
        raise BadAsk(f"not a moderation request: {error}") from None
    given = asked.get("input") if isinstance(asked, dict) else None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadAsk("input must be a text, or a list of at least one text")
    return texts


def categories(text: str) -> frozenset[str]:
    """What is found in a text; nothing: it is not flagged."""
    marker = _FLAG.search(text)
    if marker is None:
        return frozenset()
    return frozenset(CATEGORIES).intersection(marker["categories"].split()) or frozenset(("demo",))


def answer(found: Sequence[frozenset[str]]) -> bytes:
    """The JSON body that says what was found in each text."""
    results = [
        {
            "flagged": bool(one),
            "categories": {name: name in one for name in CATEGORIES},
            "category_scores": {name: float(name in one) for name in CATEGORIES},
        }
        for one in found
    ]
    return json.dumps({"id": f"modr-{uuid4().hex}", "model": MODEL, "results": results}).encode()
