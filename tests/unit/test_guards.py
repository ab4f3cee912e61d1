"""Guards, in a chain: who is asked, in which order, and what becomes of what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, cast

import pytest
from pydantic_settings import SettingsConfigDict

from imstream.errors import StoreUnavailable
from imstream.guards import chain
from imstream.guards.chain import ChatAllowed, GuardChain
from imstream.guards.guard import ALLOW, Allow, AnswerFilter, Guard, GuardDeps, GuardRejection, LoginAttempt, Reject
from imstream.model import ChatRequest
from imstream.settings import SettingsGroup
from imstream.texts import Sentence
from imstream.wire import Code
from tests.support.guard_deps import guard_deps

NO = Reject("no", Code.FORBIDDEN, Sentence("不", "No"))
ASKED = ChatRequest(10001, "m-1", "hello", (), "en", 0, "trace")


@dataclass
class _Played(Guard):
    """Says what it is told to say, and notes what it was asked."""

    name: str = "one"
    says: Allow | Reject = ALLOW
    asked: list[str] = field(default_factory=list)

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:
        self.asked.append(f"login {login.user_id}")
        return self.says

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        self.asked.append(request.contents)
        return self.says

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        self.asked.append(request.contents)
        return self.says

    async def check_session(self, user_id: int) -> Reject | None:
        self.asked.append(f"stay {user_id}")
        return self.says if isinstance(self.says, Reject) else None

    async def on_violation(self, user_id: int) -> None:
        self.asked.append(f"violated {user_id}")


async def test_guards_are_asked_in_their_order_until_one_refuses() -> None:
    late, early = _Played(), _Played(says=NO)
    assert await GuardChain([early, late]).check_chat(ASKED) == NO
    assert (early.asked, late.asked) == (["hello"], [])


async def test_each_guard_sees_what_the_one_before_made_of_the_text() -> None:
    late, early = _Played(says=Allow(text="h****")), _Played(says=Allow(text="HELLO"))
    passed = await GuardChain([early, late]).check_chat(ASKED)
    assert isinstance(passed, ChatAllowed)
    assert (late.asked, passed.request.contents) == (["HELLO"], "h****")
    assert (await GuardChain([early, late]).check_ai_call(ASKED)).contents == "h****"


async def test_a_login_holds_as_long_as_the_shortest_pass_and_tells_the_least_that_remains() -> None:
    guards = GuardChain(
        [_Played(says=Allow(expires_at=10.0, remaining=5)), _Played(says=Allow(expires_at=20.0, remaining=3))]
    )
    assert await guards.check_login(LoginAttempt(10001)) == Allow(expires_at=10.0, remaining=3)


async def test_a_user_may_stay_when_no_guard_says_otherwise() -> None:
    assert await GuardChain([_Played(), _Played()]).check_session(10001) is None
    late, early = _Played(), _Played(says=NO)
    assert await GuardChain([early, late]).check_session(10001) == NO
    assert (early.asked, late.asked) == (["stay 10001"], [])


async def test_a_refusal_takes_back_what_earlier_guards_have_counted() -> None:
    taken_back: list[str] = []

    async def undo() -> None:
        taken_back.append("counted")

    assert await GuardChain([_Played(says=Allow(undo=undo)), _Played(says=NO)]).check_chat(ASKED) == NO
    assert taken_back == ["counted"]


async def test_without_redis_a_refused_message_stays_counted() -> None:
    async def undo() -> None:
        raise StoreUnavailable("away")

    assert await GuardChain([_Played(says=Allow(undo=undo)), _Played(says=NO)]).check_chat(ASKED) == NO


@pytest.mark.parametrize("violation", [True, False])
async def test_a_violation_is_told_to_all_guards(violation: bool) -> None:  # noqa: FBT001 - a parameter of pytest
    listens, refuses = _Played(), _Played(says=Reject("no", Code.FORBIDDEN, NO.sentence, violation=violation))
    with pytest.raises(GuardRejection):
        await GuardChain([refuses, listens]).check_ai_call(ASKED)
    assert listens.asked == (["violated 10001"] if violation else [])


class _Shouting:
    """Holds back the last character, and shows the others in capitals."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, text: str) -> str:
        text, self.held = self.held + text[:-1], text[-1:]
        return text.upper()

    def end(self) -> str:
        return self.held.upper()


class _Listener(Guard):
    def answer_filter(self, request: ChatRequest) -> AnswerFilter | None:
        return _Shouting() if request.lang == "en" else None


def test_an_answer_passes_all_who_listen_and_nothing_is_lost() -> None:
    said: list[str] = []
    filtered = GuardChain([_Listener(), _Listener()]).answer_filter(ASKED, said.append)
    assert filtered is not None
    for piece in ("a", "bc", "d"):
        filtered.feed(piece)
    filtered.end()
    assert "".join(said) == "ABCD"
    assert "" not in said


def test_an_answer_that_nobody_listens_to_goes_its_way() -> None:
    write = cast("Callable[[str], None]", [].append)
    assert GuardChain([_Played()]).answer_filter(ASKED, write) is None


class _Questions(SettingsGroup):
    model_config = SettingsConfigDict(env_prefix="IMSTREAM_QUESTIONS_")
    end: str = "?"


class _NoQuestions(Guard):
    def __init__(self, end: str) -> None:
        self._end = end

    @classmethod
    def create(cls, deps: GuardDeps) -> Self:
        del deps
        return cls(_Questions.load().end)

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        if request.contents.endswith(self._end):
            return Reject("question", Code.FORBIDDEN, Sentence("请勿提问", "No questions, please"))
        return ALLOW


async def test_a_class_in_the_list_is_a_guard_with_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "GUARDS", (*chain.GUARDS, _NoQuestions))
    monkeypatch.setenv("IMSTREAM_QUESTIONS_END", "吗")
    guards = GuardChain.create(guard_deps())
    refused = await guards.check_chat(ChatRequest(10001, "m-1", "可以吗", (), "en", 0, "trace"))
    assert isinstance(refused, Reject)
    assert refused.reason == "question"
    assert isinstance(await guards.check_chat(ASKED), ChatAllowed)
