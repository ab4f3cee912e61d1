"""The moderation guard with a scripted moderation service."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

from imstream.codes import Code
from imstream.errors import BackendError
from imstream.guards.guard import ALLOW, Allow, Reject
from imstream.guards.moderation import FAILURES, FLAGGED, FLAGGED_HISTORY, UNREADABLE, Moderation
from imstream.model import ChatRequest
from tests.support.guard_deps import guard_deps
from tests.support.moderating import chokes_on, flags_bad, moderated, result, results
from tests.support.scripted_backend import Exchange, Script, ScriptedBackend, hangs, refuses, scripted_backend
from tests.support.waiting import wait_until

BROKEN = refuses(500, '{"error": {"message": "out of order"}}')


@asynccontextmanager
async def guarded(*scripts: Script, always: Script = flags_bad, **settings: Any) -> AsyncIterator["_Guarded"]:  # noqa: ANN401 - any setting
    async with scripted_backend(always) as server:
        server.then(*scripts)
        given = {"moderation_url": server.url, "ai_breaker_pause": "100ms", **settings}
        guard = Moderation.create(guard_deps(**given))
        assert guard is not None
        async with guard.running():
            yield _Guarded(guard, server)


class _Guarded:
    def __init__(self, guard: Moderation, server: ScriptedBackend) -> None:
        self.guard = guard
        self.server = server

    async def ask(self, text: str) -> Allow | Reject:
        return await self.guard.check_ai_call(ChatRequest(10001, "m-1", text, (), "en", 0, "trace"))

    async def ask_all(self, texts: Iterable[str]) -> list[Allow | Reject | BaseException]:
        return await asyncio.gather(*map(self.ask, texts), return_exceptions=True)

    async def reason(self, text: str = "hello") -> str:
        """The error of a check that cannot decide."""
        with pytest.raises(BackendError) as caught:
            await self.ask(text)
        return f"{caught.value}"


def test_without_an_address_there_is_no_moderation() -> None:
    assert Moderation.create(guard_deps()) is None


async def test_what_is_flagged_is_refused_and_counts_as_a_violation() -> None:
    async with guarded() as it:
        assert await it.ask("hello") == ALLOW
        assert await it.ask("bad hate") == Reject("moderation", Code.FORBIDDEN, FLAGGED, violation=True, detail="hate")


async def test_only_the_contents_are_sent() -> None:
    async with guarded() as it:
        await it.guard.check_ai_call(ChatRequest(10001, "m-1", "hello", (("user", "earlier"),), "en", 0, "t"))
        assert it.server.requests[0].json == {"model": "omni-moderation-latest", "input": "hello"}


HISTORY = (("user", "asked"), ("assistant", "said"), ("user", "bad asked"), ("assistant", "said"), ("assistant", " "))


@pytest.mark.parametrize(
    ("which", "sent"), [("none", []), ("assistant", ["said"]), ("all", ["asked", "said", "bad asked"])]
)
async def test_earlier_turns_are_sent_by_the_setting_each_once(which: str, sent: list[str]) -> None:
    async with guarded(moderation_history=which) as it:
        verdicts = [
            await it.guard.check_ai_call(ChatRequest(10001, "m-1", "go on", HISTORY, "en", 0, "t")) for _ in range(2)
        ]
        refused = Reject("moderation_history", Code.FORBIDDEN, FLAGGED_HISTORY, detail="asked")
        assert verdicts == [refused if which == "all" else ALLOW] * 2
        again = ["bad asked"] if which == "all" else []  # texts that passed are not sent again
        assert [text for texts in moderated(it.server.requests) for text in texts] == ["go on", *sent, "go on", *again]


@pytest.mark.parametrize("mode", ["open", "closed"])
async def test_claimed_answers_of_the_model_are_refused_and_no_violation(mode: str) -> None:
    async with guarded(always=chokes_on("poison"), moderation_fail=mode) as it:
        for text, detail in (("bad hate", "hate"), ("poison", "http_400: cannot read that")):
            request = ChatRequest(10001, "m-1", "go on", (("assistant", text),), "en", 0, "t")
            refused = Reject("moderation_history", Code.FORBIDDEN, FLAGGED_HISTORY, detail=detail)
            assert await it.guard.check_ai_call(request) == refused
            assert not refused.violation


async def test_a_service_that_is_back_is_asked_about_a_message_and_its_history_at_once() -> None:
    async with guarded(*[BROKEN] * FAILURES) as it:
        for _ in range(FAILURES):
            await it.reason()
        request = ChatRequest(10001, "m-1", "go on", (("assistant", "one"), ("assistant", "two")), "en", 0, "t")

        async def passes() -> bool:
            try:
                return await it.guard.check_ai_call(request) == ALLOW
            except BackendError:
                return False

        await wait_until(passes, "it passes")
        assert moderated(it.server.requests)[-1] == ["go on", "one", "two"]


async def test_a_burst_is_a_few_calls_and_each_gets_its_own_verdict() -> None:
    async with guarded() as it:
        texts = [f"bad c{number}" if number % 3 == 0 else f"fine {number}" for number in range(96)]
        verdicts = await it.ask_all(texts)
        for number, verdict in enumerate(verdicts):
            assert getattr(verdict, "detail", None) == (f"c{number}" if number % 3 == 0 else None)
        assert len(it.server.requests) == 3


async def test_with_a_batch_of_one_no_list_is_ever_sent() -> None:
    async with guarded(moderation_batch=1) as it:
        assert await it.ask_all("abcdefghij") == [ALLOW] * 10
        assert all(isinstance(request.json["input"], str) for request in it.server.requests)


@pytest.mark.parametrize("mode", ["open", "closed"])
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_text_that_the_service_cannot_take_fails_alone_and_never_passes(mode: str, status: int) -> None:
    async with guarded(always=chokes_on("poison", status=status), moderation_fail=mode) as it:
        texts = [f"text {number}" for number in range(16)]
        texts[5] = "poison"
        texts[9] = "bad hate"
        verdicts = await it.ask_all(texts)
        refused = {text: verdict for text, verdict in zip(texts, verdicts, strict=True) if verdict != ALLOW}
        assert refused["bad hate"] == Reject("moderation", Code.FORBIDDEN, FLAGGED, violation=True, detail="hate")
        assert refused["poison"] == Reject(
            "moderation_impossible", Code.FORBIDDEN, UNREADABLE, detail=f"http_{status}: cannot read that"
        )
        assert len(refused) == 2
        assert len(it.server.requests) == 9  # 16, then each half that contains the poison


async def test_a_service_that_takes_no_lists_is_asked_about_each_text() -> None:
    async def only_the_first(exchange: Exchange) -> None:
        await results(result(flagged=False))(exchange)

    async with guarded(always=only_the_first) as it:
        assert await it.ask_all("abcd") == [ALLOW] * 4
        assert moderated(it.server.requests)[-1] == ["d"]


async def test_closed_an_outage_is_an_error_that_may_pass() -> None:
    async with guarded(BROKEN) as it:
        assert await it.reason() == "moderation_unavailable: http_500: out of order"
        assert await it.ask("hello") == ALLOW


@pytest.mark.parametrize("script", [BROKEN, refuses(401), refuses(404), results(), hangs(head=False)])
async def test_open_an_outage_lets_pass(script: Script) -> None:
    async with guarded(script, moderation_fail="open", moderation_timeout="2s") as it:
        assert await it.ask("bad") == ALLOW
        assert isinstance(await it.ask("bad"), Reject)


@pytest.mark.parametrize(
    ("mode", "what"), [("open", "messages pass without it"), ("closed", "messages wait, and fail")]
)
async def test_an_outage_is_logged_once_and_so_is_its_end(mode: str, what: str) -> None:
    async with guarded(BROKEN, BROKEN, flags_bad, BROKEN, moderation_fail=mode) as it:
        with structlog.testing.capture_logs() as logs:
            for _ in range(5):
                await it.ask_all(["hello"])
        assert [log["event"] for log in logs] == ["moderation is away", "moderation is back"] * 2
        assert (logs[0]["log_level"], logs[0]["error"], logs[0]["meanwhile"]) == (
            "error",
            "http_500: out of order",
            what,
        )


async def test_after_failures_in_a_row_it_is_left_alone_and_then_tried_with_one_message() -> None:
    async with guarded(*[BROKEN] * FAILURES, ai_breaker_pause="2s") as it:
        for _ in range(FAILURES):
            await it.reason()
        with pytest.raises(BackendError) as caught:
            await it.ask("hello")
        assert f"{caught.value}" == "moderation_unavailable: paused: after failures in a row"
        assert caught.value.retry_after is not None
        assert len(it.server.requests) == FAILURES
        await asyncio.sleep(caught.value.retry_after.total_seconds())
        one, *others = await it.ask_all(["hello"] * 4)
        assert one == ALLOW
        assert all(isinstance(other, BackendError) for other in others)
        assert await it.ask_all(["hello"] * 4) == [ALLOW] * 4


async def test_open_and_left_alone_all_pass_at_once() -> None:
    async with guarded(*[BROKEN] * FAILURES, moderation_fail="open", ai_breaker_pause="1h") as it:
        for _ in range(FAILURES + 5):
            assert await it.ask("bad") == ALLOW
        assert len(it.server.requests) == FAILURES


async def test_those_that_wait_for_a_call_are_told_when_it_is_left_alone() -> None:
    async with guarded(always=hangs(head=False), moderation_batch=1, moderation_timeout="200ms") as it:
        outcomes = await it.ask_all(["hello"] * 40)
        assert all(isinstance(outcome, BackendError) for outcome in outcomes)
        assert len(it.server.requests) < 2 * 8


async def test_a_service_that_wants_to_be_left_alone_is_left_alone() -> None:
    async with guarded(refuses(429, headers={"Retry-After": "20"})) as it:
        await it.reason()
        assert "paused" in await it.reason()
        assert len(it.server.requests) == 1


async def test_an_unreadable_text_is_no_failure_of_the_service() -> None:
    async with guarded(always=chokes_on("poison")) as it:
        for _ in range(3 * FAILURES):
            assert isinstance(await it.ask("poison"), Reject)
        assert await it.ask("hello") == ALLOW


async def test_who_is_cancelled_leaves_the_others_their_verdicts() -> None:
    async with guarded() as it:
        one, other = asyncio.create_task(it.ask("bad a")), asyncio.create_task(it.ask("bad b"))
        await it.server.request()
        one.cancel()
        assert isinstance(await other, Reject)
        assert moderated(it.server.requests) == [["bad a", "bad b"]]
