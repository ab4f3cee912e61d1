"""The client of a moderation service, over a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from imstream.ai.moderations import ANSWER_LIMIT, ModerationClient, ModerationResult
from imstream.errors import BackendError, SettingsError
from imstream.settings import Settings
from tests.support.asking import unaccepting_port
from tests.support.moderating import flags_bad, result, results
from tests.support.scripted_backend import Exchange, Script, ScriptedBackend, hangs, refuses, says, scripted_backend

CLEAN = ModerationResult(flagged=False)
KEY = "sk-very-secret"


@asynccontextmanager
async def service(*scripts: Script, **settings: Any) -> AsyncIterator[tuple[ModerationClient, ScriptedBackend]]:  # noqa: ANN401 - any setting
    async with scripted_backend() as backend:
        backend.then(*scripts)
        async with ModerationClient(Settings.load(**{"moderation_url": backend.url, **settings})) as client:
            yield client, backend


async def failure(script: Script, *texts: str, **settings: Any) -> BackendError:  # noqa: ANN401 - same
    async with service(script, **settings) as (client, _):
        with pytest.raises(BackendError) as caught:
            await client.moderate(texts or ["hello"])
        return caught.value


async def test_one_text_is_sent_as_a_string_with_model_and_key() -> None:
    async with service(flags_bad, moderation_key=KEY, moderation_model="strict") as (client, server):
        assert await client.moderate(["你好"]) == [CLEAN]
        [request] = server.requests
        assert (request.method, request.target) == ("POST", "/v1/moderations")
        assert request.json == {"model": "strict", "input": "你好"}
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["content-type"] == "application/json"


async def test_several_texts_are_sent_as_a_list_and_each_gets_its_own_result() -> None:
    async with service(flags_bad) as (client, server):
        found = await client.moderate(["good", "bad hate violence", "fine"])
        assert found == [CLEAN, ModerationResult(flagged=True, categories="hate, violence"), CLEAN]
        assert server.requests[0].json["input"] == ["good", "bad hate violence", "fine"]


async def test_calls_share_a_connection() -> None:
    async with service(flags_bad, flags_bad) as (client, server):
        await client.moderate(["a"])
        await client.moderate(["b", "c"])
        assert server.connections == 1


@pytest.mark.parametrize("categories", [None, [], "hate", {"hate": 1}, {"hate": None}])
async def test_strange_categories_flag_all_the_same(categories: object) -> None:
    async with service(results({"flagged": True, "categories": categories})) as (client, _):
        assert await client.moderate(["x"]) == [ModerationResult(flagged=True)]


async def test_names_of_categories_are_one_short_line_without_secrets() -> None:
    names = {f"a\nb {KEY}": True, "long" * 100: True}
    async with service(results({"flagged": True, "categories": names}), moderation_key=KEY) as (client, _):
        [found] = await client.moderate(["x"])
    assert found.categories.startswith("a b (hidden), long")
    assert len(found.categories) <= 200


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"no json", b"<html>", b"\xff\xfe", b"[]", b"7", b"[" * 9999),
        *(b"{}", b'{"results": {}}', b'{"results": [7]}', b'{"results": [{}]}'),
        *(b'{"results": [{"flagged": "no"}]}', b'{"results": [{"flagged": null}]}'),
    ],
)
async def test_what_is_no_answer_is_told_as_such(body: bytes) -> None:
    error = await failure(says(body, content_type="application/json"))
    assert error.kind in {"away", "broken"}
    assert error.reason == "bad_answer"


@pytest.mark.parametrize("number", [0, 1, 3])
async def test_another_number_of_results_than_of_texts_answers_none(number: int) -> None:
    error = await failure(results(*[result(flagged=False)] * number), "a", "b")
    assert (error.reason, error.detail) == ("wrong_number", f"{number} results for 2 texts")


async def test_a_huge_answer_is_not_read_to_its_end() -> None:
    taken = 0

    async def script(exchange: Exchange) -> None:
        nonlocal taken
        await exchange.start(content_type="application/json")
        while True:  # until the client disconnects
            await exchange.send(b" " * 65536)
            taken += 65536

    error = await failure(script)
    assert (error.reason, error.detail) == ("bad_answer", f"more than {ANSWER_LIMIT} bytes")
    assert taken < 20 * ANSWER_LIMIT


async def test_an_error_inside_an_answer_is_an_error() -> None:
    error = await failure(says(json.dumps({"error": {"message": "no capacity"}}).encode()))
    assert (error.reason, error.detail) == ("backend_error", "no capacity")


@pytest.mark.parametrize(("status", "kind"), [(500, "away"), (404, "misconfigured")])
async def test_statuses_are_told_apart(status: int, kind: str) -> None:
    error = await failure(refuses(status, '{"error": {"message": "no"}}'))
    assert (error.kind, error.reason, error.detail) == (kind, f"http_{status}", "no")


async def test_the_wait_that_it_asks_for_is_told() -> None:
    error = await failure(refuses(429, headers={"Retry-After": "7"}))
    assert error.kind in {"away", "broken"}
    assert error.retry_after == timedelta(seconds=7)


async def test_no_redirect_is_followed() -> None:
    error = await failure(refuses(302, headers={"Location": "http://127.0.0.1:1/"}))
    assert (error.reason, error.kind) == ("http_302", "misconfigured")


@pytest.mark.parametrize("script", [hangs(head=False), hangs(), hangs(b'{"results": [')])
async def test_silence_ends_at_the_time_limit_wherever_it_begins(script: Script) -> None:
    async with service(script, moderation_timeout="300ms") as (client, server):
        with pytest.raises(BackendError, match=r"timeout: after 0\.3 s"):
            await client.moderate(["x"])
        await (await server.request()).gone()


async def test_a_drip_of_bytes_does_not_lengthen_the_time_limit() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        while True:
            await exchange.send(b" ")
            await asyncio.sleep(0.01)

    assert (await failure(script, moderation_timeout="100ms")).reason == "timeout"


async def test_a_server_that_takes_no_connection_is_given_up_in_time() -> None:
    with unaccepting_port() as port:
        settings = Settings.load(moderation_url=f"http://127.0.0.1:{port}/v1", moderation_timeout="100ms")
        async with ModerationClient(settings) as client:
            with pytest.raises(BackendError, match="timeout"):
                await client.moderate(["x"])


async def test_nobody_there_and_a_cut_answer_are_told_apart() -> None:
    async with ModerationClient(Settings.load(moderation_url="http://127.0.0.1:1/v1")) as client:
        with pytest.raises(BackendError) as caught:
            await client.moderate(["x"])
        assert caught.value.reason == "connect_failed"

    async def cut(exchange: Exchange) -> None:
        await exchange.start(framing=100)
        await exchange.send(b'{"results"')
        exchange.close()

    assert (await failure(cut)).reason == "broken_stream"


async def test_half_a_character_is_nothing_that_can_be_sent() -> None:
    async with service() as (client, server):
        with pytest.raises(BackendError, match="bad_prompt"):
            await client.moderate(["fine", "\ud800"])
        assert server.requests == []


async def test_the_key_is_in_no_text() -> None:
    error = await failure(refuses(500, f'{{"error": {{"message": "bad key {KEY}"}}}}'), moderation_key=KEY)
    assert KEY not in f"{error} {error!r} {error.__cause__!r} {error.__context__!r}"
    client = ModerationClient(Settings.load(moderation_url="http://user:pass@host/v1", moderation_key=KEY))
    assert KEY not in repr(vars(client))
    with pytest.raises(SettingsError, match=r"IMSTREAM_MODERATION_KEY=\(hidden\)"):
        ModerationClient(Settings.load(moderation_url="http://host/v1", moderation_key="鍵"))


async def test_cancelling_closes_the_connection() -> None:
    async with service(hangs(head=False)) as (client, server):
        call = asyncio.create_task(client.moderate(["x"]))
        request = await server.request()
        call.cancel()
        await request.gone()
