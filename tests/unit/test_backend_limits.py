"""How long the first token of an answer is waited for, over a real socket: loading models, queues, and documents."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from imstream.ai.backend import Completion
from imstream.ai.backend_options import BackendOptions
from imstream.ai.time_limits import AnswerLimits
from imstream.errors import BackendError
from tests.support.asking import Asking, asking
from tests.support.scripted_backend import DONE, Exchange, Script, chunk, event, hangs, streams
from tests.support.virtual_time import in_virtual_time

LATE = 1.2
SHORT: dict[str, Any] = {"ai_first_token_timeout": "100ms"}
STOP = event(chunk(finish_reason="stop"))


def late(script: Script) -> Script:
    """A script after silence, without even a head."""

    async def run(exchange: Exchange) -> None:
        await asyncio.sleep(LATE)
        await script(exchange)

    return run


def document(*, pause: float = 0.0) -> Script:
    """A script: a document, at once or a time after the head."""

    async def run(exchange: Exchange) -> None:
        await exchange.start(content_type="application/json")
        await asyncio.sleep(pause)
        choice = '{"message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}'
        await exchange.send(f'{{"choices": [{choice}]}}'.encode())
        await exchange.end()

    return run


async def failure_of(asked: Asking) -> tuple[str, str]:
    with pytest.raises(BackendError) as failed:
        await asked.ask()
    return failed.value.reason, failed.value.detail.partition(" (")[0]


async def test_a_backend_that_may_be_loading_its_model_has_more_time() -> None:
    async with asking(late(streams("a")), hangs(head=False), ai_load_timeout="30s", **SHORT) as asked:
        assert await asked.ask() == Completion("stop", None)
        # It has answered, so the model is loaded.
        assert await failure_of(asked) == ("first_token_timeout", "after 0.1 s")


async def test_a_backend_that_did_not_answer_for_minutes_may_be_loading_its_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imstream.ai.time_limits.MODEL_IDLE", timedelta(milliseconds=10))
    async with asking(streams("a"), late(streams("b")), ai_load_timeout="30s", **SHORT) as asked:
        await asked.ask()
        await asyncio.sleep(0.02)  # the pause itself
        await asked.ask()
        assert asked.text == "ab"


async def test_a_load_that_takes_too_long_is_given_up() -> None:
    async with asking(hangs(head=False), ai_load_timeout="200ms", **SHORT) as asked:
        assert await failure_of(asked) == ("first_token_timeout", "after 0.2 s")


async def test_a_load_that_is_aborted_when_the_client_hangs_up_succeeds_in_the_end() -> None:
    async def loads(exchange: Exchange) -> None:
        done, _ = await asyncio.wait([asyncio.ensure_future(exchange.gone())], timeout=0.4)
        if not done:
            await streams("a")(exchange)

    async with asking(streams("a"), *[loads] * 6, **SHORT) as asked:
        await asked.ask()
        failures = 0
        while asked.text != "aa":
            try:
                await asked.ask()
            except BackendError as error:
                assert error.reason == "first_token_timeout"  # noqa: PT017 - it succeeds in the end
                failures += 1
        assert failures > 0  # the limits are 100, 200, 400, 800 ms


async def test_comments_while_a_request_is_queued_are_signs_of_life() -> None:
    async def queues(exchange: Exchange) -> None:
        await exchange.start()
        for _ in range(12):
            await exchange.send(b": keep-alive\n\n")
            await asyncio.sleep(0.1)
        await exchange.send(event(chunk("a")), STOP, DONE)
        await exchange.end()

    async with asking(queues, **{**SHORT, "ai_first_token_timeout": "1s"}, ai_load_timeout="1s") as asked:
        await asked.ask()
        assert asked.text == "a"


async def test_a_document_is_waited_for_after_its_head() -> None:
    async with asking(document(pause=LATE), ai_load_timeout="1s", **SHORT) as asked:
        await asked.ask()
        assert asked.text == "a"


async def test_a_backend_that_sends_documents_sends_nothing_before_the_answer_is_complete() -> None:
    async with asking(document(), late(document()), ai_load_timeout="1s", **SHORT) as asked:
        await asked.ask()
        await asked.ask()
        assert asked.text == "aa"


async def test_an_announced_document_that_never_comes_has_the_limit_of_the_queue() -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.start(content_type="application/json")
        await exchange.gone()

    async with asking(silent, ai_queue_timeout="200ms", ai_load_timeout="100ms", **SHORT) as asked:
        assert await failure_of(asked) == ("first_token_timeout", "after 0.2 s")


async def ended_after(limits: AnswerLimits, *, lives: bool = False) -> tuple[str, float]:
    """How and when a call to a backend without an answer ends, in virtual seconds. `lives`: it shows signs of life."""

    async def call() -> None:
        async with limits.start() as call_limits:
            limits.on_send(call_limits)
            while True:
                await asyncio.sleep(5)
                if lives:
                    call_limits.renew()

    with pytest.raises(BackendError) as failed:
        await call()
    return failed.value.reason, asyncio.get_running_loop().time()


def limits_of(**options: Any) -> AnswerLimits:  # noqa: ANN401 - any option
    return AnswerLimits(BackendOptions.model_validate({**options}))


OF_7_S = {"first_token_timeout": "7s"}


@in_virtual_time
async def test_loading_may_take_five_times_as_long_by_default() -> None:
    assert await ended_after(limits_of(**OF_7_S)) == ("first_token_timeout", 35)


@in_virtual_time
async def test_a_load_timeout_below_that_of_the_first_token_does_not_count() -> None:
    assert await ended_after(limits_of(**OF_7_S, load_timeout="1s")) == ("first_token_timeout", 7)


@in_virtual_time
async def test_a_backend_that_has_just_answered_has_the_limit_of_the_first_token() -> None:
    limits = limits_of(**OF_7_S)
    limits.on_answer(is_document=False)
    assert await ended_after(limits) == ("first_token_timeout", 7)


@in_virtual_time
async def test_signs_of_life_count_for_ten_minutes_by_default() -> None:
    assert await ended_after(limits_of(), lives=True) == ("first_token_timeout", 600)
