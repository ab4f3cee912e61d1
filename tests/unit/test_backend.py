"""The client of an AI backend: requests, cancellation, and secrets."""

import asyncio
import gc
import logging
import traceback
from base64 import b64encode

import pytest

from imstream.ai.backend import Backend, Completion, OpenAIBackend, PromptMessage
from imstream.ai.http_response import Response
from imstream.errors import BackendError, SettingsError
from imstream.settings import Settings
from imstream.tracing import parse_traceparent
from tests.support.asking import PROMPT, asking, unaccepting_port
from tests.support.scripted_backend import (
    Exchange,
    Script,
    chunk,
    event,
    hangs,
    refuses,
    says,
    scripted_backend,
    streams,
)
from tests.support.waiting import SLOW, wait_until

KEY = "sk-very-secret"


# The request


async def test_the_request_is_a_streamed_chat_completion() -> None:
    async with asking(streams("Hi"), ai_model="model-1", ai_key=KEY) as asked:
        assert await asked.ask() == Completion("stop", None)
        request = asked.backend.requests[0]
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.json == {
        "model": "model-1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "你好".encode() in request.body
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_each_call_has_a_traceparent_of_its_own_unless_the_operator_sends_another() -> None:
    async with asking(always=streams("Hi")) as asked:
        await asked.ask()
        await asked.ask()
        sent = [request.headers["traceparent"] for request in asked.backend.requests]
    assert [parse_traceparent(one) for one in sent] == sent
    assert len(set(sent)) == 2
    async with asking(streams("Hi"), ai_headers={"TraceParent": "of the operator"}) as asked:
        await asked.ask()
        assert asked.backend.requests[0].headers["traceparent"] == "of the operator"


async def test_without_a_key_nothing_is_claimed() -> None:
    async with asking(streams("Hi")) as asked:
        await asked.ask()
        assert "authorization" not in asked.backend.requests[0].headers


@pytest.mark.parametrize(
    ("base", "target"),
    [
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("", "/chat/completions"),
        ("/a%2Fb/v1", "/a%2Fb/v1/chat/completions"),
        ("/v1?api-version=7", "/v1/chat/completions?api-version=7"),
    ],
)
async def test_any_base_url_is_continued(base: str, target: str) -> None:
    async with scripted_backend(streams("Hi")) as backend:
        url = backend.url.removesuffix("/v1") + base
        async with OpenAIBackend(Settings.load(ai_url=url)) as client:
            await client.answer(PROMPT, on_text=lambda _: None)
        assert backend.requests[0].target == target


@pytest.mark.parametrize(
    ("key", "authorization"), [(None, "Basic " + b64encode(b"me:pass").decode()), (KEY, f"Bearer {KEY}")]
)
async def test_a_key_wins_over_credentials_in_the_url(key: str | None, authorization: str) -> None:
    async with scripted_backend(streams("Hi")) as backend:
        url = backend.url.replace("//", "//me:pass@")
        async with OpenAIBackend(Settings.load(ai_url=url, ai_key=key)) as client:
            await client.answer(PROMPT, on_text=lambda _: None)
        assert backend.requests[0].headers["authorization"] == authorization


async def test_a_line_end_behind_the_key_is_no_part_of_it() -> None:
    async with asking(streams("Hi"), ai_key=f"{KEY}\n") as asked:
        await asked.ask()
        assert asked.backend.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_a_large_prompt_is_sent_whole() -> None:
    text = "语" * 300_000
    async with asking(streams("Hi")) as asked:
        await asked.client.answer([PromptMessage("user", text)], on_text=lambda _: None)
        assert asked.backend.requests[0].json["messages"][0]["content"] == text


async def test_a_prompt_that_cannot_be_written_is_refused_without_a_request() -> None:
    async with asking() as asked:
        with pytest.raises(BackendError, match="bad_prompt"):
            await asked.client.answer([PromptMessage("user", "half \ud83d")], on_text=lambda _: None)
        assert asked.backend.connections == 0


async def test_proxies_of_the_environment_and_cookies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with scripted_backend(says(TEXT, b"data: [DONE]\n\n", headers={"Set-Cookie": "a=b"})) as backend:
        url = backend.url.replace("127.0.0.1", "localhost")  # cookies are never sent to an IP address
        async with OpenAIBackend(Settings.load(ai_url=url)) as client:
            for _ in range(2):
                await client.answer(PROMPT, on_text=lambda _: None)
        assert ["cookie" in request.headers for request in backend.requests] == [False, False]


# Settings


@pytest.mark.parametrize("url", ["http://", "https:///v1", "http://[::1/v1", "http://a:99999999/v1"])
def test_a_url_without_a_host_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(SettingsError, match=r"IMSTREAM_AI_URL='.*' is not allowed: must be a URL with a host"):
        OpenAIBackend(Settings.load(ai_url=url))


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(SettingsError) as caught:
        OpenAIBackend(Settings.load(ai_url="http://me:pass@/v1"))
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-1\nX-Header: 1", "sk-ключ"])
def test_a_key_that_fits_in_no_header_is_refused_at_the_start_and_not_shown(key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        OpenAIBackend(Settings.load(ai_key=key))
    assert str(caught.value) == "IMSTREAM_AI_KEY=(hidden) is not allowed: must be printable ASCII"


def test_the_client_is_a_backend() -> None:
    backend: Backend = OpenAIBackend(Settings.load())
    assert isinstance(backend, OpenAIBackend)


async def test_outside_its_context_the_client_does_nothing() -> None:
    with pytest.raises(RuntimeError, match="outside its context"):
        await OpenAIBackend(Settings.load()).answer(PROMPT, on_text=lambda _: None)


# Cancelling

TEXT = event(chunk("a"))


async def half_a_refusal(exchange: Exchange) -> None:
    await exchange.start(503, framing=10)
    await exchange.send(b"half")
    await exchange.gone()


@pytest.mark.parametrize(
    ("script", "pieces"),
    [
        pytest.param(hangs(head=False), 0, id="before the head"),
        pytest.param(hangs(), 0, id="before the first token"),
        pytest.param(hangs(TEXT), 1, id="between tokens"),
        pytest.param(hangs(TEXT, event(chunk(finish_reason="stop"))), 1, id="after the finish reason"),
        pytest.param(half_a_refusal, 0, id="within an error"),
    ],
)
async def test_cancelling_closes_the_connection_at_once(script: Script, pieces: int) -> None:
    async with asking(script) as asked:
        task = asyncio.create_task(asked.ask())
        request = await asked.backend.request()
        await wait_until(lambda: len(asked.pieces) == pieces, "the text has come")
        cancelled_at = asyncio.get_running_loop().time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await request.gone() - cancelled_at < SLOW


async def test_cancelling_while_it_connects_ends_at_once() -> None:
    with unaccepting_port() as port:
        async with OpenAIBackend(Settings.load(ai_url=f"http://127.0.0.1:{port}/v1")) as client:
            task = asyncio.create_task(client.answer(PROMPT, on_text=lambda _: None))
            await asyncio.sleep(0.05)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=SLOW)
            assert done
            assert task.cancelled()


async def test_cancelling_a_call_in_full_flow_stops_its_text_at_once() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        while True:
            await exchange.send(TEXT)

    async with asking(script) as asked:
        task = asyncio.create_task(asked.ask())
        await wait_until(lambda: len(asked.pieces) > 10, "text flows")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = len(asked.pieces)
        await asked.backend.requests[0].gone()
        assert len(asked.pieces) == count


async def test_cancelling_one_call_leaves_another_alone() -> None:
    go_on = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(TEXT)
        await go_on.wait()
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.end()

    async with asking(script, script) as asked:
        first, second = asyncio.create_task(asked.ask()), asyncio.create_task(asked.ask())
        await wait_until(lambda: len(asked.pieces) == 2, "both have begun")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go_on.set()
        assert await second == Completion("stop", None)


async def test_an_error_of_whoever_takes_the_text_is_theirs_and_closes_the_connection() -> None:
    def take(_: str) -> None:
        raise TimeoutError("own")

    async with asking(hangs(TEXT)) as asked:
        with pytest.raises(TimeoutError, match="own"):
            await asked.client.answer(PROMPT, on_text=take)
        await asked.backend.requests[0].gone()


async def test_a_call_leaves_nothing_on_a_connection_that_is_used_again() -> None:
    async with asking(streams("a"), streams("b"), streams("c")) as asked:
        for _ in range(3):
            await asked.ask()
        assert [request.connection for request in asked.backend.requests] == [0, 0, 0]
        gc.collect()
        left = [one for one in gc.get_objects() if type(one) is Response]
        assert left == []


async def test_a_call_leaves_no_task_behind() -> None:
    async with asking(streams("a"), refuses(500), hangs(TEXT)) as asked:
        await asked.ask()
        with pytest.raises(BackendError):
            await asked.ask()
        task = asyncio.create_task(asked.ask())
        await wait_until(lambda: len(asked.pieces) == 2, "the text has come")
        task.cancel()
        await asyncio.wait([task])
        names = [str(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()}]
        assert [name for name in names if "ScriptedBackend" not in name] == []


# Secrets


async def test_the_key_is_in_no_error_no_log_and_no_representation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}'

    async def no_http(exchange: Exchange) -> None:
        await exchange.write(b"nonsense\r\n\r\n")

    async def drops(exchange: Exchange) -> None:
        exchange.close()

    async with asking(
        *(refuses(401, echo), says(b"data: " + echo.encode() + b"\n\n"), says(echo.encode()), no_http, drops),
        says(f"<title>{KEY}</title>".encode()),
        ai_key=KEY,
    ) as asked:
        shown = [repr(asked.client)]
        for _ in range(6):
            with pytest.raises(BackendError) as caught:
                await asked.ask()
            shown += [repr(caught.value), *traceback.format_exception(caught.value)]
            # Exceptions of the HTTP client contain the request headers.
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "(hidden)" in "".join(shown)
    assert KEY not in "".join(shown)
    assert KEY not in caplog.text
