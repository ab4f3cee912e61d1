"""The API of the demo backend, without I/O: requests parsed, and responses as bytes.

Chat completions: https://platform.openai.com/docs/api-reference/chat. Moderations:
https://platform.openai.com/docs/api-reference/moderations. A text is flagged if it contains `[[flag]]`, or
`[[flag violence hate]]`, which names the categories; no other text is ever flagged.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pydantic_core import from_json, to_json

from imstream.demo.answer import canned_answer, pieces, rest_of

MODEL = "demo"
"""The only model. Requests may name any model, and are answered by this one."""

CATEGORIES = ("demo", "harassment", "hate", "illicit", "self-harm", "sexual", "violence")
"""Categories of OpenAI, and `demo`, for a flag that names none of them."""

_PLACEHOLDER = "<delta>"
_FLAG = re.compile(r"\[\[flag\b(?P<categories>[^\]]*)\]\]")


class InvalidRequest(Exception):  # noqa: N818 - the client's error
    """The body of a request is not valid; the text is the reason."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request for a chat completion."""

    question: str  # the text of the user's last message
    context: str  # the text of all messages
    stream: bool
    usage: bool  # a stream ends with a chunk that carries the usage
    beginning: str = ""  # that of the answer, if the last message is one of the assistant


def parse_completion(body: bytes) -> CompletionRequest:
    """Parse the body of a chat completion request. Raises `InvalidRequest`."""
    try:
        request = from_json(body)
        texts = [(str(message["role"]), _text(message.get("content"))) for message in request["messages"]]
        usage = bool((request.get("stream_options") or {}).get("include_usage"))
        stream = bool(request.get("stream"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest(f"not a chat completion request: {type(error).__name__}: {error}") from None
    questions = [text for role, text in texts if role == "user"]
    if not questions:
        raise InvalidRequest("messages must hold at least one of the role user")
    context, beginning = "\n".join(text for _, text in texts), texts[-1][1] if texts[-1][0] == "assistant" else ""
    return CompletionRequest(questions[-1], context, stream=stream, usage=usage, beginning=beginning)


def _text(content: object) -> str:
    """The text of a message's content: a string, a list of parts, or null."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


class Answer:
    """The answer to a request. If the demo `continues` answers, it is the rest of one whose beginning was sent."""

    def __init__(self, request: CompletionRequest, length: int, *, continues: bool = False) -> None:
        self._request = request
        self.deltas = canned_answer(request.question, length)
        if continues:
            self.deltas = rest_of(self.deltas, request.beginning)
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time.time())

    def events(self) -> list[bytes]:
        """One event for each delta. The first also contains the chunk with the role, as models send it."""
        head, tail = self._chunk({"content": _PLACEHOLDER}).split(to_json(_PLACEHOLDER))
        first, *rest = [head + to_json(delta) + tail for delta in self.deltas] or [b""]
        return [self._chunk({"role": "assistant", "content": ""}) + first, *rest]

    def ending(self) -> bytes:
        """The events after the text: the finish reason, the usage if requested, and `[DONE]`."""
        usage = self._event(choices=[], usage=self._usage()) if self._request.usage else b""
        return self._chunk({}, "stop") + usage + b"data: [DONE]\n\n"

    def whole(self) -> bytes:
        """The answer as one JSON body."""
        message = {"role": "assistant", "content": "".join(self.deltas)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return to_json(self._base("chat.completion") | {"choices": [choice], "usage": self._usage()})

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def _event(self, **fields: object) -> bytes:
        return b"data: %b\n\n" % to_json(self._base("chat.completion.chunk") | fields)

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": MODEL}

    def _usage(self) -> dict[str, int]:
        prompt, completion = len(pieces(self._request.context)), len(self.deltas)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def parse_moderation(body: bytes) -> list[str]:
    """The texts of a moderation request. Raises `InvalidRequest`."""
    try:
        request = from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"not a moderation request: {error}") from None
    given = request.get("input") if isinstance(request, dict) else None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("input must be a text, or a list of at least one text")
    return texts


def flagged_categories(text: str) -> frozenset[str]:
    """The categories of a text; none if it is not flagged."""
    flag = _FLAG.search(text)
    if flag is None:
        return frozenset()
    return frozenset(CATEGORIES).intersection(flag["categories"].split()) or frozenset(("demo",))


def moderations(flagged: Sequence[frozenset[str]]) -> bytes:
    """The JSON body with the result for each text."""
    results = [
        {
            "flagged": bool(categories),
            "categories": {name: name in categories for name in CATEGORIES},
            "category_scores": {name: float(name in categories) for name in CATEGORIES},
        }
        for categories in flagged
    ]
    return to_json({"id": f"modr-{uuid4().hex}", "model": MODEL, "results": results})


def error(kind: str, message: str) -> bytes:
    """The JSON body of an error response."""
    return to_json({"error": {"message": message, "type": kind, "param": None, "code": kind}})


def models() -> bytes:
    """The JSON body of `/v1/models`."""
    entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": "imstream demo, not a model"}
    return to_json({"object": "list", "data": [entry]})
