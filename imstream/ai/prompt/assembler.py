"""Assembles and measures prompts: the system prompt, the history that fits the context, and the user's message.

The system prompt is set by the operator and is the only content of the system message here; `ai/dialect.py` may merge
it with system turns of clients that may have them. Texts from users keep their roles, with special tokens escaped. The
oldest turns are dropped first; no turn is truncated. The remaining history begins with a user turn: an answer without
its question is dropped, too, as are empty answers.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast
from zoneinfo import ZoneInfo

from imstream.ai.backend import PromptMessage
from imstream.ai.prompt.special_tokens import SpecialTokenEscaper
from imstream.ai.prompt.token_count import make_token_counter
from imstream.ai.reasoning import without_reasoning
from imstream.clock import Calendar
from imstream.errors import SettingsError
from imstream.model import ChatRequest
from imstream.settings import Settings

MESSAGE_TOKENS = 5  # that a chat template adds to each message, in ChatML; 3 to 5 in others
PROMPT_TOKENS = 32  # that it adds to the prompt: the start of the answer, and a default system prompt (Qwen: 25)
MIN_MESSAGE_TOKENS = 64  # that the settings must leave for a message

VARIABLES = ("user", "date", "language")  # of system prompt and message template; the date is that of the message
CONTENTS = "contents"  # the variable of the message template that stands for the user's text

_LANGUAGES = {"zh": "中文", "en": "English"}
_THREAD_LENGTH = 8192  # characters that a tokenizer counts in 4 ms; longer texts are counted in a thread
_CERTAIN_EXCESS = 2
"""Estimate, in budgets, of a message that is rejected unescaped: escaping cannot halve it, but may take 40 ms."""

_PLACEHOLDER = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])")

T = TypeVar("T")


class Template:
    """A text with variables: `{user}` is replaced by a value, `{{` and `}}` by a brace. Values are not parsed."""

    def __init__(self, text: str, variables: Sequence[str], *, setting: str) -> None:
        """Parse the text of a setting. Raises `SettingsError` for an unknown variable or a single brace."""
        allowed = f"the variables are {', '.join(f'{{{name}}}' for name in variables)}; a brace is written {{{{ or }}}}"
        self.names = set[str]()
        self._parts = list[tuple[str, str]]()  # a text, and the variable behind it, if any
        end = 0
        for match in _PLACEHOLDER.finditer(text):
            name, brace = match["name"] or "", match["brace"] or ""
            if name in variables:
                self.names.add(name)
            elif not brace:
                line = text.count("\n", 0, match.start()) + 1
                raise SettingsError(f"{setting} is not allowed: {match[0]} in line {line}: {allowed}")
            self._parts.append((text[end : match.start()] + brace[:1], name))
            end = match.end()
        self._parts.append((text[end:], ""))

    def fill(self, values: Mapping[str, str]) -> str:
        """Replace the variables by values."""
        return "".join([text + values[name] if name else text for text, name in self._parts])


@dataclass(frozen=True, slots=True)
class Excess:
    """A message that is too long: its number of tokens, and the maximum."""

    tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """The parts of a prompt, and which of them fit."""

    system: Sequence[PromptMessage]
    turns: Sequence[PromptMessage]  # the whole history, oldest first
    question: PromptMessage
    budget: int  # tokens available for the turns of users and the assistant; system turns are never dropped
    sizes: Sequence[int]  # tokens of turns, newest first, including the first that does not fit; 0 for system turns

    def turns_to_drop(self, budget: int) -> int:
        """How many of the oldest turns to drop so that the others fit the budget and begin with a user turn."""
        turns, fitting = self.turns, 0
        for size in self.sizes:
            budget -= size
            if budget < 0:
                break
            fitting += 1
        begin = len(turns) - fitting
        while 0 < begin < len(turns) and turns[begin].role != "user":
            begin += 1
        return begin

    def messages(self, dropped: int, replacement: Iterable[PromptMessage] = ()) -> list[PromptMessage]:
        """The prompt without the oldest turns, with a replacement for them."""
        system = [turn for turn in self.turns[:dropped] if turn.role == "system"]
        return [*self.system, *system, *replacement, *self.turns[dropped:], self.question]


class PromptAssembler:
    """Assembles and measures prompts: one object with one tokenizer for the gateway and the worker of a node."""

    def __init__(self, settings: Settings) -> None:
        """Raises `SettingsError` if settings conflict, name a missing file or variable, or leave no tokens."""
        self.counter = make_token_counter(settings)
        self.budget = settings.context_tokens - settings.answer_tokens  # tokens of a prompt
        self._escaper = SpecialTokenEscaper(self.counter.special_tokens)
        self.escape = self._escaper.escape
        self._system = _system_prompt(settings)
        setting = Settings.variable("prompt_template")
        self._template = Template(settings.prompt_template, (CONTENTS, *VARIABLES), setting=setting)
        if CONTENTS not in self._template.names:
            raise SettingsError(f"{setting} is not allowed: {{{CONTENTS}}} must stand in it")
        self._calendar = Calendar(ZoneInfo(settings.quota_timezone))
        templates = [self._template] if self._system is None else [self._system, self._template]
        self._names_date = any("date" in template.names for template in templates)
        for language in _LANGUAGES.values():
            system, question = self._fill(
                user=settings.user_ids.longest, date="2026-12-31", language=language, contents=""
            )
            self._template_tokens = self.size(question)
            self._message_budget = self.budget - PROMPT_TOKENS - sum(map(self.size, system)) - self._template_tokens
            if self._message_budget < MIN_MESSAGE_TOKENS:
                raise SettingsError(
                    f"{Settings.variable('context_tokens')}={settings.context_tokens} is not allowed: with the system "
                    f"prompt, the template and {Settings.variable('answer_tokens')}={settings.answer_tokens} it leaves "
                    f"{max(0, self._message_budget)} tokens for a message; at least {MIN_MESSAGE_TOKENS} must be left"
                )

    async def plan(self, request: ChatRequest) -> PromptPlan | Excess:
        """Plan the prompt of a request, or report that even the message alone does not fit."""
        return await self._plan(request, request.history)

    async def excess(self, request: ChatRequest) -> Excess | None:
        """Tell if a message is too long even without its history."""
        limit = _CERTAIN_EXCESS * self.budget
        if len(request.contents) > limit and not self.counter.slow and self._escaper.may_match(request.contents):
            tokens = self.counter.count(request.contents)
            if tokens > limit:
                return Excess(tokens, self._message_budget)
        plan = await self._plan(request, [turn for turn in request.history if turn[0] == "system"])
        return plan if isinstance(plan, Excess) else None

    def size(self, message: PromptMessage) -> int:
        """Tokens of a message within a prompt."""
        return self.counter.count(message.content) + MESSAGE_TOKENS

    async def tokens(self, messages: Sequence[PromptMessage]) -> int:
        """Tokens of a prompt."""
        return await self._run(messages, lambda: PROMPT_TOKENS + sum(map(self.size, messages)))

    async def count(self, text: str) -> int:
        """Tokens of a text."""
        return await self._run([PromptMessage("assistant", text)], lambda: self.counter.count(text))

    async def _plan(self, request: ChatRequest, history: Iterable[tuple[str, str]]) -> PromptPlan | Excess:
        date = self._calendar.day(request.at).name if self._names_date else ""
        language = _LANGUAGES.get(request.lang, request.lang)
        system, question = self._fill(
            user=self.escape(str(request.user_id)), date=date, language=language, contents=self.escape(request.contents)
        )
        turns = self._turns(history)
        messages = [*system, *turns, question]
        if self._fits_in_bytes(messages):
            return PromptPlan(system, turns, question, self.budget, (0,) * len(turns))
        return await self._run(messages, lambda: self._measure(system, turns, question))

    def _fill(self, **values: str) -> tuple[list[PromptMessage], PromptMessage]:
        system = [] if self._system is None else [PromptMessage("system", self._system.fill(values))]
        return system, PromptMessage("user", self._template.fill(values))

    def _turns(self, history: Iterable[tuple[str, str]]) -> list[PromptMessage]:
        """The turns of a history, without the reasoning of the assistant, and without its empty turns."""
        turns: list[PromptMessage] = []
        for role, content in history:
            text = without_reasoning(content) if role == "assistant" else content
            if role != "assistant" or text.strip():
                turns.append(PromptMessage(cast("Literal['user', 'assistant', 'system']", role), self.escape(text)))
        return turns

    def _measure(
        self, system: Sequence[PromptMessage], turns: Sequence[PromptMessage], question: PromptMessage
    ) -> PromptPlan | Excess:
        fixed = [*system, *(turn for turn in turns if turn.role == "system")]
        size = self.size(question)
        budget = remaining = self.budget - PROMPT_TOKENS - sum(map(self.size, fixed)) - size
        if budget < 0:
            tokens = size - self._template_tokens
            return Excess(tokens, max(0, tokens + budget))
        sizes: list[int] = []
        for turn in reversed(turns):
            sizes.append(0 if turn.role == "system" else self.size(turn))
            remaining -= sizes[-1]
            if remaining < 0:
                break
        return PromptPlan(system, turns, question, budget, sizes)

    def _fits_in_bytes(self, messages: Sequence[PromptMessage]) -> bool:
        """Whether messages fit without counting, as nearly always: no text has more tokens than bytes."""
        remaining = self.budget - PROMPT_TOKENS - MESSAGE_TOKENS * len(messages)
        for message in messages:
            remaining -= len(message.content.encode("utf-8", "surrogatepass"))
            if remaining < 0:
                return False
        return True

    async def _run(self, messages: Iterable[PromptMessage], count: Callable[[], T]) -> T:
        """Count the tokens of messages, in a thread if it would block the event loop."""
        in_thread = self.counter.slow and sum(len(message.content) for message in messages) > _THREAD_LENGTH
        return await asyncio.to_thread(count) if in_thread else count()


def _system_prompt(settings: Settings) -> Template | None:
    text, file = settings.system_prompt, settings.system_prompt_file
    if file is None:
        return Template(text, VARIABLES, setting=Settings.variable("system_prompt")) if text else None
    setting = f"{Settings.variable('system_prompt_file')}={str(file)!r}"
    if text:
        raise SettingsError(f"{setting} is not allowed: {Settings.variable('system_prompt')} is set too, choose one")
    try:
        text = file.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{setting} is not allowed: it cannot be read: {why}") from None
    return Template(text, VARIABLES, setting=setting) if text else None
