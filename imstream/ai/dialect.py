"""The form of a request to one backend: messages, parameters and token counts, by its options. No I/O."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Protocol, cast

from pydantic import JsonValue

from imstream.ai.backend_options import BackendOptions
from imstream.errors import BackendError

OPENING = "…"  # the user's turn before an assistant's greeting, for backends whose conversations begin with the user

_SEPARATOR = "\n\n"
_NAMES_IT = re.compile(r"stream_options|include_usage")
_VAGUE_REASONS = frozenset({"http_400", "http_422"})
_VAGUE = re.compile(r"does not say why|(?:bad|invalid) (?:request|input|body|json)|validation", re.IGNORECASE)
_LOST, _END = "connection_lost", "broken_stream"
_ENDS_THAT_CONVINCE = 2

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """The beginning of an answer that is to be continued. `tokens`: about how many it has."""

    text: str
    tokens: int


class _Turn(Protocol):
    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


def adapt(turns: Sequence[_Turn], options: BackendOptions) -> list[Message]:
    """The messages of a request: a prompt as this backend accepts it."""
    messages = [_message(turn.role, turn.content) for turn in turns]
    if options.roles == "merge":
        *others, last = messages
        messages = _system_first([*(one for one in others if one["content"].strip()), last])
    if options.system == "user":
        messages = _without_system(messages)
    return _alternating(messages) if options.roles == "merge" else messages


def parameters(options: BackendOptions, extra: Mapping[str, JsonValue], *, answer_tokens: int) -> dict[str, JsonValue]:
    """All parameters of a request except its messages. `extra`: those of the option `body`, which take precedence."""
    own: dict[str, JsonValue] = {"model": options.model, "stream": True}
    if options.max_tokens != "none":
        own[options.max_tokens] = answer_tokens
    return merged(own, extra)


def continued(request: Mapping[str, JsonValue], options: BackendOptions, written: Written) -> dict[str, JsonValue]:
    """A request for the rest of an answer: its beginning is the last message, and leaves fewer tokens for the rest."""
    beginning: dict[str, JsonValue] = {"role": "assistant", "content": written.text}
    result = dict(request)
    match options.continues:
        case "prefix":
            beginning["prefix"] = True
        case "vllm":
            result |= {"continue_final_message": True, "add_generation_prompt": False}
    result["messages"] = [*cast("list[JsonValue]", request["messages"]), beginning]
    if isinstance(limit := request.get(options.max_tokens), int):
        result[options.max_tokens] = max(1, limit - written.tokens)
    return result


def merged(base: Mapping[str, JsonValue], extra: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """`base` with the values of `extra`; objects that both have are merged, too."""
    result = dict(base)
    for name, value in extra.items():
        known = result.get(name)
        result[name] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


class UsageRequest:
    """Whether token counts are requested, which some servers refuse, by an error or by closing the connection.

    With `auto`, they are requested until a call has failed with them and succeeded without. Once a call has succeeded
    with them, only an error that names the parameter counts. A call after a lost connection does not request them.
    """

    PARAMETERS: Mapping[str, JsonValue] = {"stream_options": {"include_usage": True}}

    def __init__(self, options: BackendOptions) -> None:
        self.wanted = options.usage != "no"
        self._may_end = options.usage == "auto"
        self._is_supported = False
        self._ends = 0
        self._skip = False

    def next(self) -> bool:
        """Whether the next call requests them."""
        skip, self._skip = self._skip, False
        return self.wanted and not skip

    def may_be_refused(self, error: BackendError, *, received: int | None) -> bool:
        """Whether to repeat a failed call without. `received`: bytes of the answer; None: not even its head."""
        if not self._may_end:
            return False
        if _NAMES_IT.search(error.detail):
            return True
        if self._is_supported:
            return False
        self._skip = error.reason == _LOST
        if error.reason in _VAGUE_REASONS:
            return _VAGUE.search(error.detail) is not None
        return error.reason == "misconfigured" or (error.reason == _END and received == 0)

    def record_success(self) -> None:
        """A call has succeeded with the parameter."""
        self._is_supported = True

    def record_success_without(self) -> None:
        """A call has succeeded without the parameter; if it was skipped, after one that had failed with it."""
        if self.wanted:
            self.record_refusal(_END)

    def record_refusal(self, reason: str) -> None:
        """A call has failed with the parameter, and succeeded without. A lost connection alone may be chance."""
        self._ends += 1
        self.wanted = reason == _END and self._ends < _ENDS_THAT_CONVINCE


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _joined(messages: Iterable[Message]) -> str:
    return _SEPARATOR.join(message["content"] for message in messages)


def _system_first(messages: list[Message]) -> list[Message]:
    """All system messages as one, at the beginning."""
    system = [message for message in messages if message["role"] == "system"]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return messages
    return [_message("system", _joined(system)), *(message for message in messages if message["role"] != "system")]


def _without_system(messages: list[Message]) -> list[Message]:
    """System messages as the beginning of the user's turn that follows, or as such a turn."""
    result = list[Message]()
    waiting = list[Message]()
    for message in messages:
        if message["role"] == "system":
            waiting.append(message)
            continue
        if waiting and message["role"] == "user":
            message = _message("user", _joined([*waiting, message]))  # noqa: PLW2901 - replaced as a whole
        elif waiting:
            result.append(_message("user", _joined(waiting)))
        result.append(message)
        waiting = []
    return [*result, _message("user", _joined(waiting))] if waiting else result


def _alternating(messages: list[Message]) -> list[Message]:
    """Turns of users and the assistant in alternation, beginning with a user."""
    result = [_message(role, _joined(run)) for role, run in groupby(messages, itemgetter("role"))]
    begin = 1 if result and result[0]["role"] == "system" else 0
    if len(result) > begin and result[begin]["role"] == "assistant":
        result.insert(begin, _message("user", OPENING))
    return result
