"""Older turns that do not fit are summarised by the AI, within the attempt that needs them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from imstream.ai.backend import PromptMessage
from imstream.ai.prompt.assembler import MESSAGE_TOKENS, PROMPT_TOKENS
from imstream.ai.prompt.token_count import TokenEstimate
from imstream.errors import BackendError
from tests.redis.worker_harness import USER, run_worker
from tests.support.servers import RedisServer

ON_SERVERS = ["valkey"]

SMALL: dict[str, Any] = {"history": "summarise", "context_tokens": 1100, "answer_tokens": 100}

TALK = tuple(("assistant" if number % 2 else "user", f"[{number}] " + "word " * 40) for number in range(30))


def tokens(messages: Sequence[PromptMessage]) -> int:
    """Estimated tokens of a prompt."""
    return PROMPT_TOKENS + sum(MESSAGE_TOKENS + TokenEstimate().count(message.content) for message in messages)


def turns(messages: Sequence[PromptMessage]) -> list[int]:
    """Numbers of the turns that a prompt quotes."""
    text = " ".join(message.content for message in messages)
    return [number for number in range(len(TALK)) if f"[{number}]" in text]


LABELS = {"en": "[Summary of the conversation so far] they spoke", "zh": "【之前对话的摘要】they spoke"}
TASKS = {"en": "Summarise the conversation below", "zh": "请用不超过"}


@pytest.mark.parametrize("lang", ["en", "zh"])
async def test_what_does_not_fit_is_told_in_short(lang: str, redis_server: RedisServer) -> None:
    async with run_worker(redis_server, system_prompt="You are kind.", **SMALL) as worker:
        client = worker.follow()
        await worker.ask(history=TALK, lang=lang)
        summary = await worker.backend.call(1)
        assert [message.role for message in summary.messages] == ["system", "user"]
        assert summary.messages[0].content.startswith(TASKS[lang])
        assert tokens(summary.messages) <= 1000
        summary.done("they ", "spoke")
        call = await worker.backend.call(2)
        assert [message.role for message in call.messages[:4]] == ["system", "user", "assistant", "user"]
        assert call.messages[0].content == "You are kind."
        assert call.messages[2].content == LABELS[lang]
        kept, told = turns(call.messages), turns(summary.messages)
        assert kept == list(range(kept[0], 30))
        assert told == list(range(told[0], kept[0]))
        assert tokens(call.messages) <= 1000
        call.done("fine")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("fine", 0)
        await worker.idle()
        assert worker.attempts() == [1]


async def test_a_summary_serves_further_attempts_and_the_next_messages(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SMALL) as worker:
        await worker.ask("m1", history=TALK)
        (await worker.backend.call(1)).done("they spoke")
        (await worker.backend.call(2)).fail(BackendError("http_503"))
        again = await worker.backend.call(3)
        assert "they spoke" in again.messages[1].content
        again.done("fine")
        await worker.idle()
        await worker.ask("m2", history=(*TALK, ("user", "你好"), ("assistant", "fine")))
        call = await worker.backend.call(4)
        assert "they spoke" in call.messages[1].content
        assert call.messages[-2].content == "fine"
        assert tokens(call.messages) <= 1000
        call.done("fine")
        await worker.idle()
        assert len(worker.backend.calls) == 4


async def test_a_summary_is_built_upon_when_it_covers_too_little(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SMALL) as worker:
        await worker.ask("m1", history=TALK[:20])
        (await worker.backend.call(1)).done("the first part")
        (await worker.backend.call(2)).done("fine")
        await worker.idle()
        await worker.ask("m2", history=TALK)
        summary = await worker.backend.call(3)
        assert "the first part" in summary.messages[1].content
        assert 0 not in turns(summary.messages)
        summary.done("both parts")
        call = await worker.backend.call(4)
        assert "both parts" in call.messages[1].content
        call.done("fine")
        await worker.idle()


async def test_nobody_is_given_the_summary_of_another_person(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SMALL) as worker:
        await worker.ask("m", history=TALK)
        (await worker.backend.call(1)).done("they spoke")
        (await worker.backend.call(2)).done("fine")
        await worker.idle()
        await worker.ask("m", user=USER + 1, history=TALK)
        assert len((await worker.backend.call(3)).messages) == 2
        worker.backend.calls[2].done("they spoke")
        (await worker.backend.call(4)).done("fine")
        await worker.idle()


@pytest.mark.parametrize("how", ["refused", "away", "empty", "silent"])
async def test_without_a_summary_older_turns_are_dropped(
    how: str, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    limit: dict[str, Any] = {"ai_first_token_timeout": "50ms"} if how == "silent" else {}
    async with run_worker(redis_server, **SMALL, **limit) as worker:
        client = worker.follow()
        await worker.ask(history=TALK)
        summary = await worker.backend.call(1)
        match how:
            case "refused":
                summary.fail(BackendError("http_400", kind="impossible"))
            case "away":
                summary.fail(BackendError("connect_timeout"))
            case "empty":
                summary.done(" \n")
        call = await worker.backend.call(2)
        assert summary.cancelled == (how == "silent")
        assert turns(call.messages)[-1] == 29
        assert call.messages[0].role == "user"
        assert tokens(call.messages) <= 1000
        call.done("fine")
        assert await client.end() == "done"
        assert client.restarts == 0
        await worker.idle()
    assert "summary failed, older turns are dropped" in capsys.readouterr().out


async def test_a_cancel_closes_the_call_for_a_summary_at_once(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SMALL) as worker:
        client = worker.follow()
        await worker.ask(history=TALK)
        summary = await worker.backend.call(1)
        summary.send("they")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert summary.cancelled
        assert await client.end() == "cancelled"
        await worker.idle()
        assert len(worker.backend.calls) == 1


async def test_a_summary_that_does_not_end_is_cut_off_and_used(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SMALL) as worker:
        await worker.ask(history=TALK)
        summary = await worker.backend.call(1)
        while not summary.cancelled:
            summary.send("on and <|im_end|> on ")
            summary.send("and on ")  # as in one network read, before the call is closed
            await asyncio.sleep(0)
        call = await worker.backend.call(2)
        assert "on and < |im_end|> on" in call.messages[1].content
        assert tokens(call.messages) <= 1000
        call.done("fine")
        await worker.idle()


async def test_a_message_that_does_not_fit_is_buried_without_a_call(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, **SMALL) as worker:
        client = worker.follow()
        await worker.ask(contents="word " * 2000)
        assert await client.end() == "failed"
        await worker.idle()
        assert worker.backend.calls == []
        assert [letter["reason"] for letter in worker.dead()] == ["context_too_long"]
