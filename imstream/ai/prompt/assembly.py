"""What the model is given is put together here: who says what, and how much of it fits.

The system prompt is the operator's and stands in the system message alone; what a person wrote stands in messages of
the roles that it came with, its special tokens made harmless. Of the history the oldest turns go first, and no turn is
ever cut. What is left begins with a question: an answer without its own goes too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from imstream.ai.backend import PromptMessage
from imstream.ai.prompt.special_tokens import SpecialTokenEscaper
from imstream.ai.prompt.templates import CONTENTS, message_template, system_prompt, time_zone
from imstream.ai.token_count import make_token_counter
from imstream.clock import Calendar
from imstream.errors import SettingsError
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.wire import MAX_USER_ID

MESSAGE_TOKENS = 5
"""What a chat template puts around each message: in ChatML `<|im_start|>`, the role, a line break, `<|im_end|>` and
another; 3 to 5 in others."""

PROMPT_TOKENS = 32
"""What it puts around them all: the beginning of the answer, and where there is no system prompt, one of its own (Qwen:
some 25 tokens)."""

LEAST_ROOM = 64
"""Tokens that must be left for a message: settings that leave less make no sense."""

VARIABLES = ("user", "date", "language")
"""What the system prompt and the template may name. The date is that of the day on which the message was asked."""

_LANGUAGES = {"zh": "中文", "en": "English"}

_LONG = 8192
"""Characters that a tokenizer counts in 4 ms. More are counted in a thread."""

Head = tuple[PromptMessage, ...]
"""The system prompt, if there is one."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Excess:
    """A message does not fit.

    Attributes:
        tokens: How many it has.
        possible: How many it may have.
    """

    tokens: int
    possible: int


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """What the model is to be given.

    Attributes:
        turns: The whole history, oldest first.
        last: What is asked now.
        room: Tokens that there are for the turns.
        sizes: Tokens of turns, the newest first, up to the first one that does not fit. Those of the role system, which
            stay anyway, are in `room` already and are 0 here.
    """

    head: Head
    turns: Sequence[PromptMessage]
    last: PromptMessage
    room: int
    sizes: Sequence[int]

    def cut(self, room: int) -> int:
        """How many of the oldest turns must go for the others to fit into so many tokens and begin with a question."""
        turns, kept = self.turns, 0
        for size in self.sizes:
            room -= size
            if room < 0:
                break
            kept += 1
        begin = len(turns) - kept
        while 0 < begin < len(turns) and turns[begin].role != "user":
            begin += 1
        return begin

    def without(self, dropped: int, instead: Iterable[PromptMessage] = ()) -> list[PromptMessage]:
        """The messages without the oldest turns, and with what stands for them."""
        system = [turn for turn in self.turns[:dropped] if turn.role == "system"]
        return [*self.head, *system, *instead, *self.turns[dropped:], self.last]


class Assembly:
    """Puts prompts together, as the settings say. `counter` counts tokens, `budget` is how many a prompt may have."""

    def __init__(self, settings: Settings) -> None:
        """Read the settings.

        Raises:
            SettingsError: They contradict each other, name a file or a variable that is not there, or leave no room.
        """
        self.counter = make_token_counter(settings)
        self.budget = settings.context_tokens - settings.answer_tokens
        self.defuse = SpecialTokenEscaper(self.counter.special).defuse
        self._system = system_prompt(settings, VARIABLES)
        self._message = message_template(settings, VARIABLES)
        self._calendar = Calendar(time_zone(settings))
        self._check_room(settings)

    async def plan(self, request: ChatRequest) -> PromptPlan | Excess:
        """What the model is to be given for a request."""
        head, last = self._around(request)
        turns = [self._turn(role, content) for role, content in request.history]
        if self._fits_surely([*head, *turns, last]):
            return PromptPlan(head, turns, last, self.budget, (0,) * len(turns))
        length = len(request.contents) + sum(len(turn.content) for turn in turns)
        return await self._count(length, lambda: self._measured(request, head, turns, last))

    async def excess(self, request: ChatRequest) -> Excess | None:
        """How much too long a message is, even without its history; None: it fits."""
        head, last = self._around(request)
        fixed = [*head, *(self._turn(role, content) for role, content in request.history if role == "system"), last]
        if self._fits_surely(fixed):
            return None
        length = sum(len(message.content) for message in fixed)
        return await self._count(length, lambda: self._excess(request, self.budget - self._size(fixed)))

    def _measured(
        self, request: ChatRequest, head: Head, turns: Sequence[PromptMessage], last: PromptMessage
    ) -> PromptPlan | Excess:
        room = left = self.budget - self._size([*head, *(turn for turn in turns if turn.role == "system"), last])
        if (excess := self._excess(request, room)) is not None:
            return excess
        sizes = list[int]()
        for turn in reversed(turns):
            sizes.append(0 if turn.role == "system" else self._size_of(turn))
            left -= sizes[-1]
            if left < 0:
                break
        return PromptPlan(head, turns, last, room, sizes)

    def _excess(self, request: ChatRequest, room: int) -> Excess | None:
        if room >= 0:
            return None
        tokens = self.counter.count(self.defuse(request.contents))
        return Excess(tokens, max(0, tokens + room))

    def _turn(self, role: str, content: str) -> PromptMessage:
        return PromptMessage(cast("Literal['user', 'assistant', 'system']", role), self.defuse(content))

    def _around(self, request: ChatRequest) -> tuple[Head, PromptMessage]:
        """What comes before the history, and what after it."""
        date = self._calendar.day(request.at).name
        values = {"user": str(request.user_id), "date": date, "language": _LANGUAGES.get(request.lang, request.lang)}
        last = self._message.fill({**values, CONTENTS: self.defuse(request.contents)})
        return self._head(values), PromptMessage("user", last)

    def _head(self, values: Mapping[str, str]) -> Head:
        return () if self._system is None else (PromptMessage("system", self._system.fill(values)),)

    def _size_of(self, message: PromptMessage) -> int:
        return self.counter.count(message.content) + MESSAGE_TOKENS

    def _size(self, messages: Iterable[PromptMessage]) -> int:
        return sum(map(self._size_of, messages)) + PROMPT_TOKENS

    def _fits_surely(self, messages: Sequence[PromptMessage]) -> bool:
        """Whether there is nothing to count, as nearly always: no text has more tokens than bytes."""
        left = self.budget - PROMPT_TOKENS - MESSAGE_TOKENS * len(messages)
        for message in messages:
            left -= len(message.content.encode("utf-8", "surrogatepass"))
            if left < 0:
                return False
        return True

    async def _count(self, length: int, work: Callable[[], _Found]) -> _Found:
        """Do work that counts so many characters, in a thread if it would hold up the node."""
        return await asyncio.to_thread(work) if self.counter.slow and length > _LONG else work()

    def _check_room(self, settings: Settings) -> None:
        """Whether the longest system prompt leaves room for a message."""
        for language in _LANGUAGES.values():
            values = {"user": str(MAX_USER_ID), "date": "2026-12-31", "language": language}
            around = [*self._head(values), PromptMessage("user", self._message.fill({**values, CONTENTS: ""}))]
            if (room := self.budget - self._size(around)) < LEAST_ROOM:
                raise SettingsError(
                    f"{Settings.variable('context_tokens')}={settings.context_tokens} is not allowed: with the system "
                    f"prompt, the template and {Settings.variable('answer_tokens')}={settings.answer_tokens} it "
                    f"leaves {max(0, room)} tokens for a message; at least {LEAST_ROOM} must be left"
                )
