"""The protocol of `/v1/chat/completions`, seen from the backend: what a call asks for, and its answer as bytes.

The shapes are those of https://platform.openai.com/docs/api-reference/chat (chat completions, and their streaming
chunks). No I/O here.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import uuid4

from pydantic_core import from_json

from imstream.demo.answer import canned_answer, pieces
from imstream.demo.http_server import event

MODEL = "demo"
"""The one model that is served; any name is accepted, and answered as this one."""

_HERE = "<delta>"


class BadAsk(Exception):  # noqa: N818 - their fault, not an error of ours
    """A call that is not one of this protocol; the text says why."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call asks for.

    Attributes:
        question: The text of the user's last message.
        context: The text of all messages.
        stream: Whether the answer comes as events.
        usage: Whether a stream ends with a chunk that carries the usage.
    """

    question: str
    context: str
    stream: bool
    usage: bool


def parse(body: bytes | bytearray) -> Ask:
    """Read the body of a call.

    Raises:
        BadAsk: It is not JSON, or has no messages, or they are of another shape.
    """
    try:
        asked = from_json(body)
        texts = [(str(message["role"]), _text(message.get("content"))) for message in asked["messages"]]
        options = asked.get("stream_options") or {}
        usage = bool(options.get("include_usage"))
        stream = bool(asked.get("stream"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadAsk(f"not a chat completion request: {type(error).__name__}: {error}") from None
    questions = [text for role, text in texts if role == "user"]
    if not questions:
        raise BadAsk("messages must hold at least one of the role user")
    return Ask(question=questions[-1], context="\n".join(text for _, text in texts), stream=stream, usage=usage)


def _text(content: object) -> str:
    """The text of a message's content, which may be a string, parts, or nothing."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


class Answer:
    """One answer to one call, rendered before its first byte is sent: what is left to do then is to write."""

    def __init__(self, ask: Ask, length: int) -> None:
        self._ask = ask
        self._length = length
        self._deltas = canned_answer(ask.question, length)
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time.time())

    @property
    def deltas(self) -> int:
        """How many deltas the answer has."""
        return len(self._deltas)

    def events(self) -> list[bytes]:
        """One event for each delta; the first one opens the message too, as models do."""
        head, tail = self._chunk({"content": _HERE}).split(_json(_HERE))
        first, *rest = [head + delta + tail for delta in _encoded(self._ask.question, self._length)]
        return [self._chunk({"role": "assistant", "content": ""}) + first, *rest]

    def ending(self) -> bytes:
        """What ends a stream: the finish reason, the usage when it was asked for, the end mark."""
        usage = self._event(choices=[], usage=self._usage()) if self._ask.usage else b""
        return self._chunk({}, "stop") + usage + event(b"[DONE]")

    def whole(self) -> bytes:
        """The answer as one JSON body."""
        message = {"role": "assistant", "content": "".join(self._deltas)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return _json(self._base("chat.completion") | {"choices": [choice], "usage": self._usage()})

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def _event(self, **fields: object) -> bytes:
        return event(_json(self._base("chat.completion.chunk") | fields))

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": MODEL}

    def _usage(self) -> dict[str, int]:
        prompt, completion = len(pieces(self._ask.context)), len(self._deltas)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error(kind: str, message: str) -> bytes:
    """The JSON body of an answer with an error status."""
    return _json({"error": {"message": message, "type": kind, "param": None, "code": kind}})


def models() -> bytes:
    """The JSON body of `/v1/models`."""
    entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": "imstream demo, not a model"}
    return _json({"object": "list", "data": [entry]})


def stats(counts: dict[str, int]) -> bytes:
    """The JSON body of `/stats`."""
    return _json(counts)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@lru_cache(maxsize=256)
def _encoded(question: str, length: int) -> tuple[bytes, ...]:
    return tuple(_json(delta) for delta in canned_answer(question, length))
