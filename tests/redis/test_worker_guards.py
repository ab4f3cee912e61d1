"""Guards in the worker: asked before the AI is, once for a message, and nobody else is held up by them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imstream.errors import TransientBackendError
from imstream.guards.chain import Guards
from imstream.guards.guard import PASS, Guard, Pass, Refuse
from imstream.texts import OwnSentence
from imstream.wire import Code
from tests.redis.workshop import workshop

if TYPE_CHECKING:
    from imstream.store.chat_request import ChatRequest
    from tests.redis.workshop import Call
    from tests.support.servers import RedisServer

ON_SERVERS = ["valkey"]


@dataclass
class _Asked(Guard):
    """Cannot tell about the message `m` so many times, and refuses `bad`."""

    silent: int = 0
    asked: list[str] = field(default_factory=list)

    async def request(self, request: ChatRequest) -> Pass | Refuse:
        self.asked.append(request.message_id)
        if request.message_id == "bad":
            return Refuse("not_wanted", Code.FORBIDDEN, OwnSentence("不", "No"), detail="rudeness")
        if request.message_id == "m" and self.silent > 0:
            self.silent -= 1
            raise TransientBackendError("guard_away", "nobody there")
        return PASS


class _Softens(Guard):
    """Writes a message anew."""

    async def request(self, request: ChatRequest) -> Pass | Refuse:
        return Pass(text=f"please: {request.contents}")


def _answer(call: Call) -> None:
    call.done("x")


async def test_a_guard_that_cannot_tell_is_asked_again_and_the_ai_is_not_blamed(redis_server: RedisServer) -> None:
    guard = _Asked(silent=3)
    breaker: dict[str, Any] = {"ai_breaker_failures": 1, "ai_breaker_pause": "1h"}
    async with workshop(redis_server, guards=Guards([guard]), max_attempts=4, **breaker) as shop:
        shop.backend.always = _answer
        client = shop.follow()
        await shop.ask()
        assert await client.end() == "done"
        await shop.ask("other")  # a breaker that had opened would keep this one waiting
        await shop.idle()
        assert guard.asked == ["m", "m", "m", "m", "other"]
        assert len(shop.backend.calls) == 2


async def test_a_guard_that_can_never_tell_ends_the_message_with_its_reason(redis_server: RedisServer) -> None:
    async with workshop(redis_server, guards=Guards([_Asked(silent=99)]), max_attempts=2) as shop:
        client = shop.follow()
        await shop.ask()
        assert await client.end() == "failed"
        await shop.idle()
        [letter] = shop.dead()
        assert (letter["reason"], letter["error"], letter["attempts"]) == ("guard_away", "nobody there", "2")
        assert shop.backend.calls == []


async def test_what_a_guard_let_pass_is_not_asked_about_again_when_the_ai_fails(redis_server: RedisServer) -> None:
    guard = _Asked()
    async with workshop(redis_server, guards=Guards([guard])) as shop:
        await shop.ask()
        (await shop.backend.call(1)).fail(TransientBackendError("http_503"))
        (await shop.backend.call(2)).done("x")
        await shop.idle()
        assert guard.asked == ["m"]


async def test_the_ai_is_asked_what_the_guards_made_of_a_message(redis_server: RedisServer) -> None:
    async with workshop(redis_server, guards=Guards([_Softens()])) as shop:
        await shop.ask()
        call = await shop.backend.call(1)
        assert call.messages[-1].content == "please: 你好"
        call.done("x")
        await shop.idle()


async def test_what_an_operator_should_know_of_a_refusal_is_in_the_dead_letter(redis_server: RedisServer) -> None:
    async with workshop(redis_server, guards=Guards([_Asked()])) as shop:
        client = shop.follow("bad")
        await shop.ask("bad")
        assert await client.end() == "failed"
        await shop.idle()
        [letter] = shop.dead()
        assert (letter["reason"], letter["error"]) == ("not_wanted", "No (rudeness)")
        assert client.terminal is not None
        assert client.terminal.refusal is not None
        assert client.terminal.refusal.sentence in {"不", "No"}
