"""The guards of the prompt: who may speak as the system, and how long a message may be."""

from __future__ import annotations

from typing import Any, cast

import pytest

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.guards.context_length import ContextLength
from imstream.guards.guard import ALLOW, GuardDeps, Reject
from imstream.guards.system_role import SystemRole
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.texts import localize
from imstream.wire import Code


def supplies(**settings: Any) -> GuardDeps:  # noqa: ANN401 - any setting
    nothing = cast("Any", None)
    known = Settings.load(**settings)
    return GuardDeps(known, nothing, nothing, PromptAssembler(known))


def asked(*roles: str, contents: str = "hello") -> ChatRequest:
    return ChatRequest(10001, "m", contents, tuple((role, "x") for role in roles), "en", 0, "trace")


async def test_a_system_turn_anywhere_in_the_history_is_refused_by_its_number() -> None:
    guard = SystemRole.make(supplies())
    assert guard is not None
    assert await guard.chat(asked("user", "assistant")) == ALLOW
    refused = await guard.chat(asked("user", "assistant", "system"))
    assert isinstance(refused, Reject)
    assert (refused.code, refused.violation, dict(refused.values)) == (Code.FORBIDDEN, False, {"number": 2})


def test_where_system_turns_are_allowed_nobody_looks() -> None:
    assert SystemRole.make(supplies(allow_system_role=True)) is None


@pytest.mark.parametrize("text", ["word " * 9000, "词" * 20_000, "😀" * 9000])
async def test_a_message_that_does_not_fit_is_refused_with_the_numbers(text: str) -> None:
    refused = await ContextLength.make(supplies()).chat(asked(contents=text))
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.code) == ("context_too_long", Code.BAD_REQUEST)
    possible = refused.values["possible"]
    assert isinstance(possible, int)
    assert 7000 < possible < 8192 - 1024
    assert f"at most {possible:,} are possible" in localize(refused.sentence, "en", **refused.values)
    assert f"最多 {possible:,} 个" in localize(refused.sentence, "zh", **refused.values)


@pytest.mark.parametrize("text", ["hello", "词" * 7000, "the " * 8000])
async def test_a_message_that_fits_passes_as_it_is(text: str) -> None:
    assert await ContextLength.make(supplies()).chat(asked("user", "assistant", contents=text)) == ALLOW


async def test_system_turns_that_are_allowed_count_with_the_message() -> None:
    guard = ContextLength.make(supplies(allow_system_role=True))
    full = ChatRequest(10001, "m", "hello", (("system", "word " * 9000),), "en", 0, "trace")
    assert isinstance(await guard.chat(full), Reject)
