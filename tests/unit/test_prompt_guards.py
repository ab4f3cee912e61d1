"""The guards of roles and length of a message."""

import pytest

from imstream.codes import Code
from imstream.guards.chat_limits import ContextLength, SystemRole
from imstream.guards.guard import ALLOW, Reject
from imstream.model import ChatRequest
from imstream.texts import localize
from tests.support.guard_deps import guard_deps


def asked(*roles: str, contents: str = "hello") -> ChatRequest:
    return ChatRequest(10001, "m", contents, tuple((role, "x") for role in roles), "en", 0, "trace")


async def test_a_system_turn_anywhere_in_the_history_is_refused_by_its_number() -> None:
    guard = SystemRole.create(guard_deps())
    assert guard is not None
    assert await guard.check_chat(asked("user", "assistant")) == ALLOW
    refused = await guard.check_chat(asked("user", "assistant", "system"))
    assert isinstance(refused, Reject)
    assert (refused.code, refused.violation, dict(refused.values)) == (Code.FORBIDDEN, False, {"number": 2})


def test_where_system_turns_are_allowed_nobody_looks() -> None:
    assert SystemRole.create(guard_deps(allow_system_role=True)) is None


@pytest.mark.parametrize("text", ["word " * 9000, "词" * 20_000, "😀" * 9000])
async def test_a_message_that_does_not_fit_is_refused_with_the_numbers(text: str) -> None:
    refused = await ContextLength.create(guard_deps()).check_chat(asked(contents=text))
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.code) == ("context_too_long", Code.BAD_REQUEST)
    possible = refused.values["possible"]
    assert isinstance(possible, int)
    assert 7000 < possible < 8192 - 1024
    assert f"at most {possible:,} are possible" in localize(refused.sentence, "en", **refused.values)
    assert f"最多 {possible:,} 个" in localize(refused.sentence, "zh", **refused.values)


@pytest.mark.parametrize("text", ["hello", "词" * 7000, "the " * 8000])
async def test_a_message_that_fits_passes_as_it_is(text: str) -> None:
    assert await ContextLength.create(guard_deps()).check_chat(asked("user", "assistant", contents=text)) == ALLOW


async def test_system_turns_that_are_allowed_count_with_the_message() -> None:
    guard = ContextLength.create(guard_deps(allow_system_role=True))
    full = ChatRequest(10001, "m", "hello", (("system", "word " * 9000),), "en", 0, "trace")
    assert isinstance(await guard.check_chat(full), Reject)
