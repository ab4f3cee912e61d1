"""Failed calls over a real socket: error responses, lost connections, time limits."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from imstream.ai.backend import Completion, OpenAIBackend
from imstream.ai.endpoint import ERROR_BODY_LIMIT
from imstream.errors import BackendError
from imstream.settings import Settings
from tests.support.asking import PROMPT, Asking, asking, cause, unaccepting_port
from tests.support.scripted_backend import (
    DONE,
    Exchange,
    Script,
    chunk,
    event,
    hangs,
    refuses,
    says,
    streams,
    usage_chunk,
)
from tests.support.waiting import wait_until

STOP = event(chunk(finish_reason="stop"))
ROLE = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
FIRST_TOKEN: dict[str, Any] = {"ai_first_token_timeout": "1s", "ai_load_timeout": "1s"}
REASONING = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})


async def failure_of(asked: Asking) -> BackendError:
    with pytest.raises(BackendError) as caught:
        await asked.ask()
    return caught.value


async def failure(script: Script, **settings: Any) -> BackendError:  # noqa: ANN401 - any setting
    async with asking(script, **settings) as asked:
        return await failure_of(asked)


# Error responses


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *[(status, "away") for status in (401, 402, 403, 408, 409, 425, 429, 500, 502, 503, 504)],
        *[
            (404, "misconfigured"),
            (405, "misconfigured"),
            (400, "impossible"),
            (413, "impossible"),
            (422, "impossible"),
        ],
    ],
)
async def test_a_status_has_the_class_of_its_cause(status: int, kind: str) -> None:
    error = await failure(refuses(status, '{"error": {"message": "no"}}'))
    assert (error.kind, error.reason, error.retry_after) == (kind, f"http_{status}", None)
    assert cause(error).startswith("no")


@pytest.mark.parametrize("status", [429, 503])
async def test_the_wait_that_a_backend_asks_for_is_told_in_seconds_or_as_a_date(status: int) -> None:
    seconds = await failure(refuses(status, headers={"Retry-After": "7"}))
    assert seconds.kind in {"away", "broken"}
    assert seconds.retry_after == timedelta(seconds=7)
    moment = datetime.now(UTC) + timedelta(minutes=10)
    date = await failure(refuses(status, headers={"Retry-After": format_datetime(moment, usegmt=True)}))
    assert date.kind in {"away", "broken"}
    assert date.retry_after is not None
    assert timedelta(minutes=9) < date.retry_after <= timedelta(minutes=10)


async def test_a_page_is_told_by_its_title() -> None:
    page = "<html><head><title>502 Bad Gateway</title></head><body>" + "<hr>nginx" * 5000
    error = await failure(refuses(502, page, content_type="text/html"))
    assert (error.reason, cause(error)) == ("http_502", "502 Bad Gateway")


async def test_no_redirect_is_followed() -> None:
    async with asking() as other:
        error = await failure(refuses(307, headers={"Location": f"{other.backend.url}/chat/completions"}))
        assert error.kind in {"impossible", "misconfigured"}
        assert (error.reason, cause(error)) == ("http_307", "a redirect, which is not followed")
        assert other.backend.connections == 0


async def test_only_the_beginning_of_an_error_body_is_read() -> None:
    sent = 0

    async def script(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.start(500, content_type="text/plain")
        while exchange.request.closed_by_peer_at is None:
            await exchange.send(b"x" * ERROR_BODY_LIMIT)
            sent += ERROR_BODY_LIMIT

    assert (await failure(script)).reason == "http_500"
    assert sent < 100 * ERROR_BODY_LIMIT


async def test_the_limit_to_the_first_token_is_not_one_of_errors() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start(503, framing=5)
        await asyncio.sleep(1.5)
        await exchange.send(b"later")

    error = await failure(script, **FIRST_TOKEN)
    assert (error.reason, cause(error)) == ("http_503", "later")


@pytest.mark.parametrize("ending", ["hang", "reset"])
async def test_an_error_body_that_never_comes_does_not_hide_the_status(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imstream.ai.endpoint.ERROR_BODY_WAIT", timedelta(milliseconds=50))

    async def script(exchange: Exchange) -> None:
        await exchange.start(503, framing=100, headers={"Retry-After": "3"})
        await exchange.send(b"part of")
        if ending == "hang":
            await exchange.gone()
        else:
            exchange.reset()

    error = await failure(script)
    assert error.kind in {"away", "broken"}
    assert (error.reason, error.retry_after) == ("http_503", timedelta(seconds=3))


# Servers without support for usage


async def test_usage_is_requested_until_a_server_refuses_it() -> None:
    refusal = '{"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]}'
    async with asking(refuses(422, refusal), always=streams("a")) as asked:
        for _ in range(2):
            assert await asked.ask() == Completion("stop", None)
        first, *others = (request.json for request in asked.backend.requests)
        assert first.pop("stream_options") == {"include_usage": True}
        assert others == [first, first]


async def test_calls_that_requested_it_at_the_same_time_are_repeated_too() -> None:
    async def script(exchange: Exchange) -> None:
        await wait_until(lambda: len(asked.backend.requests) >= 3, "all have asked")
        await refuses(400, '{"error": "unknown argument: stream_options"}')(exchange)

    async with asking(script, script, script, *[streams("a")] * 3) as asked:
        await asyncio.gather(*(asked.ask() for _ in range(3)))
        assert ["stream_options" in request.json for request in asked.backend.requests] == [True] * 3 + [False] * 3
        asked.backend.then(refuses(400, '{"error": "stream_options are still wrong"}'))
        await failure_of(asked)
        assert len(asked.backend.requests) == 7


async def closes_after_the_head(exchange: Exchange) -> None:
    await exchange.start()
    exchange.close()


@pytest.mark.parametrize(
    ("script", "until"),
    [
        pytest.param(
            refuses(400, '{"error": {"message": "Param Incorrect"}}'), 1, id="which parameter it does not say"
        ),
        pytest.param(refuses(400), 1, id="a status alone"),
        pytest.param(refuses(422, "Bad Request"), 1, id="no reason"),
        pytest.param(closes_after_the_head, 2, id="the end after the head"),
    ],
)
async def test_an_error_that_may_be_about_usage_is_no_failure(script: Script, until: int) -> None:
    async def strict(exchange: Exchange) -> None:
        await (script if "stream_options" in exchange.request.json else streams("a"))(exchange)

    async with asking(always=strict) as asked:
        for _ in range(4):
            assert await asked.ask() == Completion("stop", None)
        assert asked.text == "aaaa"
        # A lost connection alone may be chance: it counts from the second time.
        assert len(asked.backend.requests) == 4 + until


async def test_a_server_that_closes_the_connection_without_a_word_is_asked_without_usage_the_next_time() -> None:
    async def strict(exchange: Exchange) -> None:
        if "stream_options" in exchange.request.json:
            exchange.close()
        else:
            await streams("a")(exchange)

    async with asking(always=strict) as asked:
        for _ in range(2):
            assert (await failure_of(asked)).reason == "connection_lost"
            await asked.ask()
        await asked.ask()
        assert ["stream_options" in request.json for request in asked.backend.requests] == [
            *(True, False, True, False, False)
        ]


@pytest.mark.parametrize(
    ("option", "script", "requests"),
    [
        pytest.param("auto", refuses(400, '{"error": "messages[0].content is empty"}'), 1, id="another reason"),
        pytest.param("auto", refuses(400, '{"error": {"code": "context_length_exceeded"}}'), 1, id="a known reason"),
        pytest.param("auto", refuses(503), 1, id="away"),
        pytest.param("auto", says(ROLE), 1, id="the end within the answer"),
        pytest.param("auto", refuses(400, "Param Incorrect"), 2, id="both"),
        pytest.param("yes", refuses(400, "Param Incorrect"), 1, id="yes"),
        pytest.param("no", refuses(400, "Param Incorrect"), 1, id="no"),
    ],
)
async def test_other_errors_are_not_tried_again_without_usage(option: str, script: Script, requests: int) -> None:
    async with asking(always=script, ai_usage=option) as asked:
        await failure_of(asked)
        assert len(asked.backend.requests) == requests
        assert ("stream_options" in asked.backend.requests[0].json) == (option != "no")


async def test_a_server_that_has_reported_usage_does_not_refuse_it() -> None:
    async with asking(streams("a"), refuses(400, "Param Incorrect"), streams("a")) as asked:
        await asked.ask()
        await failure_of(asked)
        await asked.ask()
        assert all("stream_options" in request.json for request in asked.backend.requests)


# Connections


async def test_a_port_where_nobody_listens_is_a_failed_connection() -> None:
    async with asking() as gone:
        url = gone.backend.url
    async with OpenAIBackend(Settings.load(ai_url=url)) as client:
        with pytest.raises(BackendError) as caught:
            await client.answer(PROMPT, on_text=print)
    assert caught.value.reason == "connect_failed"
    assert "127.0.0.1" in cause(caught.value)


async def test_a_name_that_does_not_exist_is_a_failed_connection() -> None:
    async with OpenAIBackend(Settings.load(ai_url="http://nowhere.invalid/v1")) as client:
        with pytest.raises(BackendError) as caught:
            await client.answer(PROMPT, on_text=print)
    assert caught.value.reason == "connect_failed"


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_lost_before_the_answer_began_is_transient(how: str) -> None:
    async def script(exchange: Exchange) -> None:
        getattr(exchange, how)()

    error = await failure(script)
    assert error.kind in {"away", "broken"}
    assert error.reason == "connection_lost"


@pytest.mark.parametrize(
    "reply", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"]
)
async def test_what_does_not_speak_http_is_a_bad_stream(reply: bytes) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.write(reply)
        await exchange.gone()

    error = await failure(script)
    assert error.kind in {"away", "broken"}
    assert (error.reason, cause(error)) == ("bad_stream", "the response is not valid HTTP")


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again() -> None:
    async def script(exchange: Exchange) -> None:
        await streams("a")(exchange)
        exchange.half_close()
        await exchange.gone()

    async with asking(always=script) as asked:
        for number in range(3):
            await asked.ask()
            await asked.backend.requests[number].gone()
        assert asked.text == "aaa"
        assert asked.backend.connections == 3


# Time limits


async def test_a_connection_that_takes_too_long_is_given_up() -> None:
    with unaccepting_port() as port:
        settings = Settings.load(ai_url=f"http://127.0.0.1:{port}/v1", ai_connect_timeout="100ms")
        async with OpenAIBackend(settings) as client:
            with pytest.raises(BackendError) as caught:
                await client.answer(PROMPT, on_text=print)
    assert (caught.value.reason, cause(caught.value)) == ("connect_timeout", "after 0.1 s")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(hangs(head=False), id="no head"),
        pytest.param(hangs(), id="no body"),
        pytest.param(hangs(b": keep-alive\n\n" * 3), id="comments"),
        pytest.param(hangs(ROLE), id="a role"),
        pytest.param(hangs(b"data: {"), id="part of an event"),
        pytest.param(hangs(b'{"choices": ['), id="part of a document"),
    ],
)
async def test_silence_before_the_first_token_has_a_limit(script: Script) -> None:
    limits: dict[str, Any] = dict.fromkeys(FIRST_TOKEN, "1.1s")
    async with asking(script, ai_connect_timeout="1s", **limits) as asked:
        error = await failure_of(asked)
        assert error.kind in {"away", "broken"}
        assert (error.reason, cause(error)) == ("first_token_timeout", "after 1.1 s")
        await asked.backend.requests[0].gone()


async def comments(exchange: Exchange) -> None:
    """Send keep-alive comments until the client disconnects."""
    while exchange.request.closed_by_peer_at is None:
        await exchange.send(b": keep-alive\n\n")
        await asyncio.sleep(0.01)


async def test_keep_alive_comments_are_no_tokens() -> None:
    async def before(exchange: Exchange) -> None:
        await exchange.start()
        await comments(exchange)

    async def between(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk("a")))
        await comments(exchange)

    error = await failure(before, ai_queue_timeout="1500ms", **FIRST_TOKEN)
    assert (error.reason, cause(error)) == ("first_token_timeout", "after 1.5 s")
    assert (await failure(between, ai_idle_timeout="100ms")).reason == "idle_timeout"


@pytest.mark.parametrize("token", [event(chunk("a")), REASONING], ids=["text", "reasoning"])
async def test_silence_between_tokens_has_a_limit(token: bytes) -> None:
    async with asking(hangs(token), ai_idle_timeout="100ms") as asked:
        error = await failure_of(asked)
        assert error.kind in {"away", "broken"}
        assert (error.reason, cause(error)) == ("idle_timeout", "after 0.1 s")
        await asked.backend.requests[0].gone()


@pytest.mark.parametrize("token", [event(chunk("a")), REASONING], ids=["text", "reasoning"])
async def test_tokens_keep_an_answer_alive_beyond_the_idle_limit(token: bytes) -> None:
    began = asyncio.get_running_loop().time()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        while asyncio.get_running_loop().time() < began + 1.5:
            await exchange.send(token)
            await asyncio.sleep(0.01)
        await exchange.send(event(chunk("b")), STOP, DONE)
        await exchange.end()

    async with asking(script, ai_idle_timeout="1s") as asked:
        assert await asked.ask() == Completion("stop", None)


async def test_a_whole_answer_has_a_limit() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        while exchange.request.closed_by_peer_at is None:
            await exchange.send(event(chunk("a")))
            await asyncio.sleep(0.01)

    error = await failure(script, ai_total_timeout="200ms")
    assert error.kind in {"away", "broken"}
    assert (error.reason, cause(error)) == ("total_timeout", "after 0.2 s")


# After the text is complete


async def test_a_server_that_does_not_end_its_body_after_done_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstream.ai.backend.AFTER_DONE", timedelta(milliseconds=20))
    async with asking(hangs(event(chunk("a")), STOP, DONE)) as asked:
        assert await asked.ask() == Completion("stop", None)
        await asked.backend.requests[0].gone()


@pytest.mark.parametrize("tail", [b"", b": keep-alive\n\n", event(usage_chunk(total_tokens=1))])
async def test_a_server_that_falls_silent_after_the_finish_reason_takes_nothing_away(
    tail: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imstream.ai.backend.AFTER_FINISH", timedelta(milliseconds=50))
    async with asking(hangs(event(chunk("a")), STOP, *([tail] if tail else []))) as asked:
        assert await asked.ask() == Completion("stop", {"total_tokens": 1} if b"usage" in tail else None)
        await asked.backend.requests[0].gone()


async def test_usage_that_comes_late_is_waited_for_even_beyond_the_total_limit() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk("a")) + STOP)
        await asyncio.sleep(1.5)
        await exchange.send(event(usage_chunk(total_tokens=1)), DONE)
        await exchange.end()

    async with asking(script, ai_total_timeout="1s", ai_idle_timeout="1s") as asked:
        assert await asked.ask() == Completion("stop", {"total_tokens": 1})
