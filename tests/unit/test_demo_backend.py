"""The demo backend over a real socket, with an independent client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from imstream.demo import backend
from imstream.demo.answer import canned_answer
from imstream.demo.backend import serving
from imstream.demo.settings import DemoSettings
from tests.support.waiting import wait_until


class Client:
    """A client of one demo backend."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url

    def ask(self, question: object, **fields: object) -> Any:  # noqa: ANN401 - aiohttp's context manager
        """Send a question, with `stream` unless `fields` override it."""
        body = {"model": "any", "stream": True, "messages": [{"role": "user", "content": question}], **fields}
        return self.http.post(f"{self.url}/chat/completions", json=body)

    async def events(self, question: str, **fields: object) -> list[Any]:
        """Send a question; return the events of the answer."""
        async with self.ask(question, **fields) as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            return parse(await answer.read())

    async def status(self, question: str, **fields: object) -> int:
        """Send a question, read the response, and return its status."""
        async with self.ask(question, **fields) as answer:
            await answer.read()
            status: int = answer.status
            return status

    async def stats(self) -> Any:  # noqa: ANN401 - JSON
        """The counters of the demo backend."""
        async with self.http.get(self.url.removesuffix("/v1") + "/stats") as answer:
            return await answer.json()


def parse(body: bytes) -> list[Any]:
    """The events of a stream; `[DONE]` as a string."""
    lines = [part.removeprefix("data: ") for part in body.decode().split("\n\n") if part]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(events: list[Any]) -> str:
    """The text of an answer."""
    chunks = [event for event in events if event != "[DONE]" and event["choices"]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@asynccontextmanager
async def demo(**settings: object) -> AsyncIterator[Client]:
    given = {"port": 0, "pace": 0, "first": 0, **settings}
    async with serving(DemoSettings.load(**given)) as url, aiohttp.ClientSession() as http:
        yield Client(http, url)


async def test_an_answer_streams_as_chunks_with_a_finish_reason_and_an_end_mark() -> None:
    async with demo() as client:
        events = await client.events("What is a stream?")
    assert text_of(events) == "".join(canned_answer("What is a stream?"))
    first, *_, last, done = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert done == "[DONE]"
    assert len({event["id"] for event in events[:-1]}) == 1


async def test_usage_comes_in_a_chunk_of_its_own_when_it_is_asked_for() -> None:
    async with demo(length=5) as client:
        *_, usage, done = await client.events("two words", stream_options={"include_usage": True})
        assert all("usage" not in event for event in await client.events("two words") if event != "[DONE]")
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert done == "[DONE]"


async def test_without_stream_the_answer_is_one_json_body() -> None:
    async with demo() as client, client.ask("什么是流?", stream=False) as answer:
        body = await answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "".join(canned_answer("什么是流?"))}
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_the_models_list_says_that_it_is_no_model() -> None:
    async with demo() as client, client.http.get(f"{client.url}/models") as answer:
        models = await answer.json()
        assert "no model" in answer.headers["server"]
    assert [model["id"] for model in models["data"]] == ["demo"]
    assert "not a model" in models["data"][0]["owned_by"]


async def test_the_last_user_message_is_the_question_whatever_its_form() -> None:
    async with demo() as client:
        parts = [{"type": "text", "text": "first "}, {"type": "image_url"}, {"type": "text", "text": "last"}]
        messages = [
            {"role": "user", "content": "earlier"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None},
        ]
        assert text_of(await client.events("", messages=messages)) == "".join(canned_answer("first last"))


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"messages": 3}', b'{"messages": [{"role": "system"}]}'])
async def test_what_is_no_chat_request_is_refused_with_400_and_a_reason(body: bytes) -> None:
    async with demo() as client, client.http.post(f"{client.url}/chat/completions", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["type"] == "invalid_request_error"


async def test_a_body_over_the_limit_is_refused_with_413(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MAX_BODY", 1000)
    async with demo() as client:
        assert await client.status("x" * 1000) == 413


async def test_another_path_is_not_found() -> None:
    async with demo() as client, client.http.get(f"{client.url}/nothing") as answer:
        assert answer.status == 404


async def test_deltas_come_at_the_pace_that_is_asked_for() -> None:
    async with demo(pace="1s") as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await client.events("x [[demo length=11 pace=20ms first=100ms]]")
        assert loop.time() - began >= 0.29  # 100 ms before the first of eleven, and ten times 20 ms
        async with client.ask("x [[demo length=11 pace=100ms]]") as answer:
            reads = [data async for data in answer.content.iter_any()]
    assert len(reads) > 1


async def test_at_pace_0_the_whole_stream_is_one_write() -> None:
    async with demo(length=50) as client, client.ask("x") as answer:
        chunk, _ = await answer.content.readchunk()
        assert parse(chunk)[-1] == "[DONE]"


async def test_a_question_that_fails_twice_is_answered_the_third_time_and_then_fails_again() -> None:
    async with demo() as client:
        question = "why? [[demo fail=2]]"
        assert [await client.status(question) for _ in range(4)] == [503, 503, 200, 503]
        assert await client.status("another [[demo fail=1 status=400]]") == 400
        stats = await client.stats()
    counts = {"calls": 5, "running": 0, "answered": 1, "faulty": 4, "abandoned": 0}
    assert stats == {**counts, "moderations": 0, "flagged": 0}


async def test_busy_is_429_with_retry_after_in_seconds() -> None:
    async with demo(retry_after="1500ms") as client:
        async with client.ask("x [[demo busy=2]]") as answer:
            assert (answer.status, answer.headers["retry-after"]) == (429, "2")
        async with client.ask("y [[demo busy=1 after=7s]]") as answer:
            assert (answer.status, answer.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_break_cuts_the_connection_in_the_middle(*, stream: bool) -> None:
    question = "x [[demo break=1 length=8]]"
    async with demo() as client:
        async with client.ask(question, stream=stream) as answer:
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        assert await client.status(question, stream=stream) == 200


async def test_an_unended_answer_stops_in_the_middle_as_if_it_were_whole() -> None:
    async with demo() as client:
        events = await client.events("x [[demo unended=1 length=8]]")
    assert text_of(events) == "".join(canned_answer("x", 4))
    assert events[-1] != "[DONE]"
    assert events[-1]["choices"][0]["finish_reason"] is None


async def test_a_hanging_call_gets_nothing_until_the_caller_leaves() -> None:
    async with demo() as client:
        asking = asyncio.create_task(client.status("x [[demo hang=1]]"))
        await wait_until(_running(client, 1), "the call to arrive")
        assert not asking.done()
        asking.cancel()
        await wait_until(_running(client, 0), "the call to be given up")
        assert (await client.stats())["abandoned"] == 1


async def test_a_stalling_answer_falls_silent_in_the_middle() -> None:
    async with demo() as client, client.ask("x [[demo stall=1 length=8]]") as answer:
        events = parse(await answer.content.readany())
        assert text_of(events) == "".join(canned_answer("x", 4))
        assert not answer.content.at_eof()
        assert (await client.stats())["running"] == 1


async def test_an_answer_ends_when_its_caller_leaves() -> None:
    async with demo(pace="5ms") as client:
        async with client.ask("x [[demo length=100000]]") as answer:
            await answer.content.readany()
        await wait_until(_running(client, 0), "the answer to be given up")
        assert (await client.stats())["abandoned"] == 1


async def test_rates_make_a_share_of_the_calls_go_wrong_and_a_seed_makes_it_repeatable() -> None:
    async def statuses(**settings: object) -> list[int]:
        async with demo(length=1, **settings) as client:
            return [await client.status(f"question {number}") for number in range(40)]

    mixed = await statuses(fail_rate=0.3, busy_rate=0.3, seed=7)
    assert set(mixed) == {200, 429, 500, 503}
    assert mixed == await statuses(fail_rate=0.3, busy_rate=0.3, seed=7)
    assert set(await statuses(busy_rate=1)) == {429}


async def test_only_so_many_questions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MAX_COUNTED", 2)
    async with demo() as client:
        questions = [f"{number} [[demo fail=1]]" for number in range(3)]
        assert [await client.status(question) for question in questions] == [503, 503, 503]
        assert await client.status(questions[2]) == 200
        assert await client.status(questions[0]) == 503  # its count was dropped


def _running(client: Client, count: int) -> Any:  # noqa: ANN401 - a predicate
    async def running() -> bool:
        return bool((await client.stats())["running"] == count)

    return running


async def test_a_text_with_the_flag_is_flagged_and_no_other_is() -> None:
    async with demo() as client:
        body = {"model": "any", "input": ["hello", "so [[flag]]", "[[flag violence hate nonsense]]", "a flag"]}
        async with client.http.post(f"{client.url}/moderations", json=body) as answer:
            results = (await answer.json())["results"]
        async with client.http.post(f"{client.url}/moderations", json={"input": "[[flag]]"}) as answer:
            [alone] = (await answer.json())["results"]
        stats = await client.stats()
    found = [[name for name, yes in result["categories"].items() if yes] for result in [*results, alone]]
    assert found == [[], ["demo"], ["hate", "violence"], [], ["demo"]]
    assert [result["flagged"] for result in [*results, alone]] == [False, True, True, False, True]
    assert (stats["moderations"], stats["flagged"]) == (2, 3)


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"{}", b'{"input": []}', b'{"input": 7}', b'{"input": [7]}'])
async def test_what_is_no_moderation_request_is_refused_with_400_and_a_reason(body: bytes) -> None:
    async with demo() as client, client.http.post(f"{client.url}/moderations", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("rate", "status"), [("fail_rate", {500, 503}), ("busy_rate", {429})])
async def test_the_moderation_fails_by_the_rates_as_well(rate: str, status: set[int]) -> None:
    async with (
        demo(**{rate: 1}) as client,
        client.http.post(f"{client.url}/moderations", json={"input": "x"}) as answer,
    ):
        assert answer.status in status


async def test_the_moderation_hangs_and_is_cut_by_the_rates_as_well() -> None:
    async with demo(hang_rate=1) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), client.http.post(f"{client.url}/moderations", json={"input": "x"}):
                pass
    async with demo(break_rate=1) as client:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with client.http.post(f"{client.url}/moderations", json={"input": "x"}) as answer:
                await answer.read()
