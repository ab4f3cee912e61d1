"""Guards in the worker: called before the AI, once per message, without delaying other messages."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.codes import Code
from imstream.errors import BackendError
from imstream.guards.chain import GuardChain
from imstream.guards.guard import ALLOW, Allow, AnswerFilter, Guard, GuardRejection, Reject
from imstream.model import ChatRequest
from imstream.texts import Sentence
from tests.redis.worker_harness import Call, run_worker
from tests.support.servers import RedisServer

ON_SERVERS = ["valkey"]


@dataclass
class _Asked(Guard):
    """Fails `silent` times on the message `m`, and rejects `bad`."""

    silent: int = 0
    asked: list[str] = field(default_factory=list)

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        self.asked.append(request.message_id)
        if request.message_id == "bad":
            return Reject("not_wanted", Code.FORBIDDEN, Sentence("不", "No"), detail="rudeness")
        if request.message_id == "m" and self.silent > 0:
            self.silent -= 1
            raise BackendError("guard_away", "nobody there")
        return ALLOW


class _Softens(Guard):
    """Rewrites a message."""

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        return Allow(text=f"please: {request.contents}")


def _answer(call: Call) -> None:
    call.done("x")


async def test_a_guard_that_cannot_tell_is_asked_again_and_the_ai_is_not_blamed(redis_server: RedisServer) -> None:
    guard = _Asked(silent=3)
    breaker: dict[str, Any] = {"ai_breaker_failures": 1, "ai_breaker_pause": "1h"}
    async with run_worker(redis_server, guards=GuardChain([guard]), max_attempts=4, **breaker) as worker:
        worker.backend.always = _answer
        client = worker.follow()
        await worker.ask()
        assert await client.end() == "done"
        await worker.ask("other")  # an open breaker would delay this one
        await worker.idle()
        assert guard.asked == ["m", "m", "m", "m", "other"]
        assert len(worker.backend.calls) == 2


async def test_a_guard_that_can_never_tell_ends_the_message_with_its_reason(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, guards=GuardChain([_Asked(silent=99)]), max_attempts=2) as worker:
        client = worker.follow()
        await worker.ask()
        assert await client.end() == "failed"
        await worker.idle()
        [letter] = worker.dead()
        assert (letter["reason"], letter["error"], letter["attempts"]) == ("guard_away", "nobody there", "2")
        assert worker.backend.calls == []


async def test_what_a_guard_let_pass_is_not_asked_about_again_when_the_ai_fails(redis_server: RedisServer) -> None:
    guard = _Asked()
    async with run_worker(redis_server, guards=GuardChain([guard])) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(BackendError("http_503"))
        (await worker.backend.call(2)).done("x")
        await worker.idle()
        assert guard.asked == ["m"]


async def test_the_ai_is_asked_what_the_guards_made_of_a_message(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, guards=GuardChain([_Softens()])) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        assert call.messages[-1].content == "please: 你好"
        call.done("x")
        await worker.idle()


async def test_a_refusal_is_counted_logged_and_recorded_and_is_no_dead_letter(redis_server: RedisServer) -> None:
    guards = GuardChain([_Asked()])
    async with run_worker(redis_server, guards=guards) as worker:
        client = worker.follow("bad")
        with capture_logs() as logs:
            await worker.ask("bad")
            assert await client.end() == "failed"
            await worker.idle()
        assert worker.dead() == []
        end = worker.entries("bad")[-1]
        assert (end["reason"], end["error"]) == ("not_wanted", "No (rudeness)")
        [line] = [line for line in logs if line["event"] == "message refused"]
        assert (line["reason"], line["message_id"], line["detail"]) == ("not_wanted", "bad", "rudeness")
        assert guards.rejections == {"not_wanted": 1}
        assert client.terminal is not None
        assert client.terminal.refusal is not None
        assert client.terminal.refusal.sentence in {"不", "No"}


class _Listens(Guard):
    """Rejects an answer at `stop` and the message `bad`; records which messages are refunded."""

    def __init__(self) -> None:
        self.given_back: list[str] = []

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        if request.contents == "bad":
            return Reject("moderation", Code.FORBIDDEN, Sentence("不", "No"), violation=True)
        return ALLOW

    def answer_filter(self, request: ChatRequest) -> AnswerFilter:  # noqa: ARG002 - the same for all
        return self

    def feed(self, text: str) -> str:
        if text == "stop":
            raise GuardRejection(Reject("words_answer", Code.FORBIDDEN, Sentence("不", "No")))
        return text

    def seed(self, shown: str) -> int | None:  # noqa: ARG002 - it changes nothing
        return 0

    def end(self) -> str:
        return ""

    async def on_failure(self, request: ChatRequest) -> None:
        self.given_back.append(request.message_id)


GIVEN_BACK: dict[str, tuple[list[str | Exception], bool]] = {
    "text, then a word": (["some", "stop"], False),
    "a word at once": (["stop"], True),
    "a failure at once": ([BackendError("http_503")], True),
    "text, then a failure": (["some", BackendError("cut")], False),
    "text, a failure, and a failure at once": (
        ["some", BackendError("cut"), BackendError("cut")],
        False,
    ),
    "text, a failure, and a word at once": (["some", BackendError("cut"), "stop"], False),
}


@pytest.mark.parametrize("what", GIVEN_BACK)
async def test_a_message_is_refunded_only_if_no_text_was_shown(what: str, redis_server: RedisServer) -> None:
    script, is_given_back = GIVEN_BACK[what]
    guard, failures = _Listens(), sum(isinstance(one, Exception) for one in script)
    async with run_worker(
        redis_server, guards=GuardChain([guard]), max_attempts=max(1, failures + ("stop" in script))
    ) as worker:
        client = worker.follow()
        await worker.ask()
        number, call = 1, await worker.backend.call(1)
        for step in script:
            if call.outcome.done():
                number += 1
                call = await worker.backend.call(number)
            if isinstance(step, str):
                try:
                    call.send(step)
                except GuardRejection as refused:
                    call.fail(refused)
            else:
                call.fail(step)
        assert await client.end() == "failed"
        await worker.idle()
        assert guard.given_back == ["m"] * is_given_back
        assert len(worker.dead()) == ("stop" not in script)


async def test_a_violation_is_not_refunded_even_if_the_worker_dies(
    redis_server: RedisServer,
) -> None:
    guard = _Listens()
    async with run_worker(redis_server, guards=GuardChain([guard])) as worker:
        client = worker.follow()
        await worker.ask(contents="bad")
        assert await client.end() == "failed"
        await worker.idle()
        terminal = worker.entries()[-1]
        worker.redis.delete(worker.keys.reply(10001, "m"))
        assert (terminal["event"], terminal["violation"]) == ("failed", "1")
    # As if the worker had died before it finished: the next one finds the end and whether it was a violation.
    async with run_worker(redis_server, guards=GuardChain([guard]), start=False) as worker:
        request = f"0/{await worker.ask(contents='bad')}"
        await worker.replies.open(10001, "m", request=request)
        worker.redis.xadd(worker.keys.reply(10001, "m"), terminal)
        worker.start()
        await worker.idle()
        assert worker.dead() == []
    assert guard.given_back == []
