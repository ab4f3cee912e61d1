"""The chain of guards: order, verdicts, notifications and answer filters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, cast

import pytest
from pydantic_settings import SettingsConfigDict

from imstream.codes import Code
from imstream.errors import StoreUnavailable
from imstream.guards import chain
from imstream.guards.chain import ChatAllowed, GuardChain
from imstream.guards.guard import ALLOW, Allow, AnswerFilter, Guard, GuardDeps, GuardRejection, LoginAttempt, Reject
from imstream.model import ChatRequest
from imstream.settings_group import SettingsGroup
from imstream.texts import Sentence
from imstream.user_ids import UserId
from tests.support.guard_deps import guard_deps

NO = Reject("no", Code.FORBIDDEN, Sentence("不", "No"))
ASKED = ChatRequest(10001, "m-1", "hello", (), "en", 0, "trace")


@dataclass
class _FakeGuard(Guard):
    """Returns the given verdict, and records the calls."""

    name: str = "one"
    verdict: Allow | Reject = ALLOW
    calls: list[str] = field(default_factory=list)

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:
        self.calls.append(f"login {login.user_id}")
        return self.verdict

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        self.calls.append(request.contents)
        return self.verdict

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        self.calls.append(request.contents)
        return self.verdict

    async def check_session(self, user_id: UserId) -> Reject | None:
        self.calls.append(f"stay {user_id}")
        return self.verdict if isinstance(self.verdict, Reject) else None

    async def on_violation(self, user_id: UserId) -> None:
        self.calls.append(f"violated {user_id}")


async def test_guards_are_asked_in_their_order_until_one_refuses() -> None:
    late, early = _FakeGuard(), _FakeGuard(verdict=NO)
    assert await GuardChain([early, late]).check_chat(ASKED) == NO
    assert (early.calls, late.calls) == (["hello"], [])


async def test_each_guard_sees_what_the_one_before_made_of_the_text() -> None:
    late, early = _FakeGuard(verdict=Allow(text="h****")), _FakeGuard(verdict=Allow(text="HELLO"))
    passed = await GuardChain([early, late]).check_chat(ASKED)
    assert isinstance(passed, ChatAllowed)
    assert (late.calls, passed.request.contents) == (["HELLO"], "h****")
    assert (await GuardChain([early, late]).check_ai_call(ASKED)).contents == "h****"


async def test_a_login_holds_as_long_as_the_shortest_pass_and_tells_the_least_that_remains() -> None:
    guards = GuardChain(
        [
            _FakeGuard(verdict=Allow(expires_at=10.0, remaining=5)),
            _FakeGuard(verdict=Allow(expires_at=20.0, remaining=3)),
        ]
    )
    assert await guards.check_login(LoginAttempt(10001)) == Allow(expires_at=10.0, remaining=3)


async def test_a_user_may_stay_when_no_guard_says_otherwise() -> None:
    assert await GuardChain([_FakeGuard(), _FakeGuard()]).check_session(10001) is None
    late, early = _FakeGuard(), _FakeGuard(verdict=NO)
    assert await GuardChain([early, late]).check_session(10001) == NO
    assert (early.calls, late.calls) == (["stay 10001"], [])


async def test_a_refusal_takes_back_what_earlier_guards_have_counted() -> None:
    undone: list[str] = []

    async def undo() -> None:
        undone.append("counted")

    assert await GuardChain([_FakeGuard(verdict=Allow(undo=undo)), _FakeGuard(verdict=NO)]).check_chat(ASKED) == NO
    assert undone == ["counted"]


async def test_without_redis_a_refused_message_stays_counted() -> None:
    async def undo() -> None:
        raise StoreUnavailable("away")

    assert await GuardChain([_FakeGuard(verdict=Allow(undo=undo)), _FakeGuard(verdict=NO)]).check_chat(ASKED) == NO


@pytest.mark.parametrize("violation", [True, False])
async def test_a_violation_is_told_to_all_guards(violation: bool) -> None:  # noqa: FBT001 - a parameter of pytest
    listens, refuses = _FakeGuard(), _FakeGuard(verdict=Reject("no", Code.FORBIDDEN, NO.sentence, violation=violation))
    with pytest.raises(GuardRejection):
        await GuardChain([refuses, listens]).check_ai_call(ASKED)
    assert listens.calls == (["violated 10001"] if violation else [])


class _Shouting:
    """Buffers the last character, and shows the others in capitals."""

    def __init__(self) -> None:
        self.buffer = ""

    def feed(self, text: str) -> str:
        text, self.buffer = self.buffer + text[:-1], text[-1:]
        return text.upper()

    def seed(self, shown: str) -> int | None:
        return 0 if shown == shown.upper() else None

    def end(self) -> str:
        return self.buffer.upper()


class _Listener(Guard):
    def answer_filter(self, request: ChatRequest) -> AnswerFilter | None:
        return _Shouting() if request.lang == "en" else None


def test_an_answer_passes_all_who_listen_and_nothing_is_lost() -> None:
    shown: list[str] = []
    filtered = GuardChain([_Listener(), _Listener()]).answer_filter(ASKED, shown.append)
    assert filtered is not None
    for piece in ("a", "bc", "d"):
        filtered.feed(piece)
    filtered.end()
    assert "".join(shown) == "ABCD"
    assert "" not in shown


def test_an_answer_that_nobody_listens_to_goes_its_way() -> None:
    write = cast("Callable[[str], None]", [].append)
    assert GuardChain([_FakeGuard()]).answer_filter(ASKED, write) is None


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
