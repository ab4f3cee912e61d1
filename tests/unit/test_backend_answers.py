"""Responses of real servers, over a real socket: success needs evidence, and a whole answer is not lost."""

import asyncio
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.ai.backend import Completion, OpenAIBackend
from imstream.errors import BackendError
from imstream.settings import Settings
from tests.support.asking import PROMPT, asking, cause
from tests.support.scripted_backend import (
    DONE,
    Exchange,
    Script,
    chunk,
    event,
    hangs,
    refuses,
    says,
    scripted_backend,
    usage_chunk,
)
from tests.support.waiting import wait_until

STOP = event(chunk(finish_reason="stop"))
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
REASONING = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
WHOLE = event(chunk("Hel")) + event(chunk("lo")) + STOP
OVERFLOW = "the request exceeds the available context size, try increasing it"
INSPECTED = {"error": {"code": "data_inspection_failed", "message": "Output data may contain inappropriate content."}}


def delta(finish_reason: str | None = None, **fields: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]})


async def answer_to(*parts: bytes, **settings: Any) -> tuple[str, str]:  # noqa: ANN401 - any setting
    """The text and the finish reason of an answer whose body is sent in these parts."""
    async with asking(says(*parts), **settings) as asked:
        completion = await asked.ask()
        return asked.text, completion.finish_reason


async def failure(script: Script, **settings: Any) -> BackendError:  # noqa: ANN401 - any setting
    async with asking(script, ai_usage="no", **settings) as asked:
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        assert asked.backend.url in caught.value.detail  # not the error alone: also where
        return caught.value


async def failure_at(url: str) -> BackendError:
    async with OpenAIBackend(Settings.load(ai_url=url)) as client:
        with pytest.raises(BackendError) as caught:
            await client.answer(PROMPT, on_text=print)
    return caught.value


async def verdict_on(*parts: bytes) -> tuple[str, str]:
    error = await failure(says(*parts))
    assert cause(error)
    return error.kind, error.reason


# An answer without text is no answer


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([ROLE, event(chunk("", finish_reason="stop")), DONE], id="a role and a finish reason"),
        pytest.param([REASONING * 3, STOP, DONE], id="only reasoning"),
        pytest.param([delta("stop", reasoning="hm"), DONE], id="only reasoning, in one chunk"),
        pytest.param([DONE], id="[DONE] alone"),
        pytest.param([b"data: [DONE]"], id="[DONE] alone, cut"),
        pytest.param([STOP], id="a finish reason alone"),
        pytest.param([event(chunk(" \n")), STOP, DONE], id="blanks"),
        pytest.param([event(chunk(finish_reason="length")), DONE], id="cut before any text"),
        pytest.param([event(usage_chunk(total_tokens=1)), DONE], id="only usage"),
        pytest.param([delta("stop", audio={"data": "x"}), DONE], id="something else than text"),
        pytest.param([b'{"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}'], id="a document"),
        pytest.param([b'{"choices": [{"message": {"reasoning_content": "hm"}}]}'], id="a document with reasoning"),
    ],
)
async def test_an_answer_without_text_has_failed(parts: Sequence[bytes]) -> None:
    assert await verdict_on(*parts) == ("broken", "empty_answer")


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        pytest.param(
            [b"error: " + json.dumps({"code": 400, "message": OVERFLOW}).encode() + b"\n\n", DONE],
            ("impossible", "context_too_long"),
            id="a field `error`, as of llama.cpp",
        ),
        pytest.param([b"error: out of memory\n\n", DONE], ("broken", "backend_error"), id="a field `error` with text"),
        pytest.param(
            [ROLE, b"event: error\ndata: " + json.dumps({"code": 503, "message": "busy"}).encode() + b"\n\n", DONE],
            ("away", "backend_error"),
            id="an event `error` with a code",
        ),
        pytest.param(
            [ROLE, b"event: error\ndata: boom\n\n"], ("broken", "backend_error"), id="an event `error` with text"
        ),
        pytest.param(
            [ROLE, b'{"error": {"message": "busy", "code": 503}}\n'],
            ("away", "backend_error"),
            id="a bare line of JSON",
        ),
        pytest.param(
            [ROLE, b'{\n  "error": {\n    "message": "busy",\n    "code": 503\n  }\n}\n'],
            ("away", "backend_error"),
            id="bare lines of JSON",
        ),
        pytest.param(
            [b'{"error": {"message": "busy", "code": 503}}\n\n', DONE],
            ("away", "backend_error"),
            id="a bare line first",
        ),
        pytest.param(
            [b": queued\n\n", b'[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "no"}}]\n'],
            ("away", "overloaded"),
            id="a bare list",
        ),
        pytest.param([event(INSPECTED), DONE], ("impossible", "content_filter"), id="DashScope's inspection"),
        pytest.param([ROLE + event(chunk("a")), event(INSPECTED), DONE], ("impossible", "content_filter"), id="within"),
        pytest.param(
            [b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"DataInspectionFailed","message":"no"}\n\n'],
            ("impossible", "content_filter"),
            id="DashScope's event",
        ),
        pytest.param(
            [b'{"code": "InvalidApiKey", "message": "Invalid API-key provided.", "request_id": "1"}'],
            ("away", "unauthorized"),
            id="DashScope's document",
        ),
        pytest.param(
            [b'{"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}, "choices": null}'],
            ("away", "insufficient_quota"),
            id="MiniMax' document",
        ),
        pytest.param(
            [event({"error_code": 336501, "error_msg": "Rate limit reached"})],
            ("away", "overloaded"),
            id="Qianfan's event",
        ),
        pytest.param([b'{"detail": "Not Found"}'], ("broken", "bad_stream"), id="another document"),
        pytest.param(
            [event(chunk("a")), event({"error": {"code": 503}})], ("broken", "backend_error"), id="after text"
        ),
    ],
)
async def test_an_error_is_read_wherever_it_stands(parts: Sequence[bytes], verdict: tuple[str, str]) -> None:
    assert await verdict_on(*parts) == verdict


@pytest.mark.parametrize("reason", ["abort", "network_error", "error", "insufficient_system_resource"])
async def test_an_answer_that_the_model_did_not_finish_is_broken(reason: str) -> None:
    assert await verdict_on(event(chunk("half a ")), event(chunk("", finish_reason=reason)), DONE) == (
        "broken",
        "aborted",
    )


async def test_a_refusal_is_the_text() -> None:
    parts = [delta(role="assistant", refusal=None), delta(refusal="I can"), delta(refusal="not."), STOP, DONE]
    assert await answer_to(*parts) == ("I cannot.", "refusal")
    document = {"choices": [{"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"}]}
    assert await answer_to(json.dumps(document).encode()) == ("I cannot.", "refusal")


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "sensitive"])
async def test_a_filtered_answer_is_one_that_was_cut_or_none(reason: str) -> None:
    end = event(chunk(finish_reason=reason))
    assert await answer_to(event(chunk("half ")), end, DONE) == ("half ", "content_filter")
    assert await verdict_on(ROLE, end, DONE) == ("impossible", "content_filter")


async def test_tool_calls_are_no_answer_unless_there_is_text() -> None:
    call = delta(tool_calls=[{"index": 0, "function": {"name": "search", "arguments": ""}}])
    end = event(chunk(finish_reason="tool_calls"))
    assert await verdict_on(ROLE, call, end, DONE) == ("impossible", "tool_calls")
    assert await verdict_on(delta(function_call={"name": "search"}), STOP, DONE) == ("impossible", "tool_calls")
    assert await answer_to(event(chunk("Let me see.")), call, end, DONE) == ("Let me see.", "tool_calls")


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_context_window_exceeded"])
async def test_an_answer_that_was_cut_at_a_limit_has_the_finish_reason_length(reason: str) -> None:
    assert await answer_to(event(chunk("half a")), event(chunk(finish_reason=reason)), DONE) == ("half a", "length")


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            [{"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}], id="one message"
        ),
        pytest.param([{"message": {"content": "Hel"}}, {"message": {"content": "lo"}}], id="messages in parts"),
        pytest.param([{"message": {"content": "Hel"}}, {"message": {"content": "Hello"}}], id="messages that grow"),
        pytest.param([{"delta": {"content": "Hello"}}, {"delta": {}, "message": {"content": "Hello"}}], id="once more"),
        pytest.param([{"delta": {"role": "assistant"}, "message": {"content": "Hello"}}], id="beside an empty delta"),
        pytest.param([{"text": "Hel"}, {"text": "lo"}], id="texts, as of completions"),
        pytest.param([{"delta": {"content": {"type": "text", "text": "Hello"}}}], id="an object of text"),
    ],
)
async def test_a_message_may_take_the_place_of_a_delta(parts: Sequence[object]) -> None:
    events = [event({"choices": [part]}) for part in parts]
    assert (await answer_to(*events, DONE))[0] == "Hello"


# A finish reason ends nothing while text still comes


@pytest.mark.parametrize("ending", [[DONE], []], ids=["[DONE]", "the end of the body"])
async def test_a_finish_reason_with_every_chunk_ends_nothing(
    ending: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imstream.ai.backend.AFTER_FINISH", timedelta(milliseconds=20))

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for number in range(8):
            await exchange.send(event(chunk(str(number), finish_reason="stop")))
            await asyncio.sleep(0.04)
        await exchange.send(*ending)
        await exchange.end()

    async with asking(script) as asked:
        assert await asked.ask() == Completion("stop", None)
        assert asked.pieces == list("01234567")


async def test_a_finish_reason_of_the_reasoning_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imstream.ai.backend.AFTER_FINISH", timedelta(milliseconds=50))

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for fields in ({"reasoning_content": "hm"}, {"reasoning_content": "so"}, {"content": "a"}, {"content": "b"}):
            await exchange.send(delta("stop" if "reasoning_content" in fields else None, **fields))
            await asyncio.sleep(0.06)
        await exchange.send(STOP, DONE)
        await exchange.end()

    async with asking(script) as asked:
        await asked.ask()
        assert asked.text == "ab"


async def test_a_last_part_without_its_blank_line_is_read() -> None:
    first, last = (event(chunk(text, finish_reason="stop")) for text in ("a", "b"))
    assert await answer_to(first, last.rstrip()) == ("ab", "stop")


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_an_answer_that_is_cut_between_finish_reasons_is_broken(how: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for text in "ab":
            await exchange.send(event(chunk(text, finish_reason="stop")))
            await wait_until(lambda text=text: text in asked.pieces, "the text has come")
        getattr(exchange, how)()

    async with asking(script) as asked:
        with pytest.raises(BackendError) as caught:
            await asked.ask()
    assert (caught.value.kind, caught.value.reason) == ("broken", "broken_stream")


async def test_an_error_between_finish_reasons_is_one() -> None:
    a, b = (event(chunk(text, finish_reason="stop")) for text in "ab")
    assert await verdict_on(a, b, event({"error": {"message": "lost"}})) == ("broken", "backend_error")


async def test_silence_after_finish_reasons_is_the_end() -> None:
    a, b = (event(chunk(text, finish_reason="stop")) for text in "ab")
    async with asking(hangs(a, b), ai_idle_timeout="100ms") as asked:
        assert await asked.ask() == Completion("stop", None)
        assert asked.text == "ab"


# Nothing that follows a whole answer can void it


DOCUMENT = b'{"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}'


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("body", [WHOLE.rstrip(), (WHOLE + DONE).rstrip(), DOCUMENT])
async def test_a_whole_answer_may_lose_its_end(body: bytes, how: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start(framing=len(body) + 2)
        await exchange.send(body)
        await asyncio.sleep(0.05)
        getattr(exchange, how)()

    async with asking(script) as asked:
        assert await asked.ask() == Completion("stop", None)
        assert asked.text == "Hello"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
async def test_events_may_lack_the_blank_line_between_them(line_end: bytes) -> None:
    body = (ROLE + WHOLE + DONE).replace(b"\n\n", line_end)
    assert await answer_to(body) == ("Hello", "stop")
    assert await answer_to(*[body[at : at + 1] for at in range(len(body))]) == ("Hello", "stop")


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"data: [DONE] \n\n", id="[DONE] and a blank"),
        pytest.param(b"data:  [DONE]\t\n\n", id="blanks on both sides"),
        pytest.param(b'data: "[DONE]"\n\n', id="[DONE] in quotes"),
        pytest.param(event({"error": {"message": "usage could not be recorded"}}), id="an error"),
        pytest.param(b"event: error\ndata: usage could not be recorded\n\n", id="an event `error`"),
        pytest.param(b'error: {"code": 500}\n\n', id="a field `error`"),
        pytest.param(b'{"error": {"message": "usage could not be recorded"}}\n', id="a bare error"),
        pytest.param(event({"code": "InternalError", "message": "no"}), id="an error without that name"),
        pytest.param(event(chunk(finish_reason="error")), id="another finish reason"),
        pytest.param(b"data: goodbye\n\n", id="no JSON"),
        pytest.param(b"data: {\n\n", id="half an object"),
        pytest.param(b"data: 7\n\n", id="a number"),
        pytest.param(b"event: done\ndata: 7\n\n", id="an event of another name"),
        pytest.param(event({"choices": [{"delta": {"content": 7}}]}), id="another shape"),
        pytest.param(event({"choices": [], "usage": "none"}), id="usage of another shape"),
        pytest.param(b"<html>502 Bad Gateway</html>\n\n", id="a page"),
        pytest.param(b"\xff\xfe\n\n", id="no UTF-8"),
        pytest.param(b"data: [DO", id="half a [DONE]"),
        pytest.param(b"data: " + b"x" * (5 << 20), id="an event without end"),
        pytest.param((b":" + b" " * 1000 + b"\n\n") * 5000, id="comments without end"),
    ],
)
async def test_later_events_cannot_void_a_whole_answer(rest: bytes) -> None:
    assert await answer_to(WHOLE, rest) == ("Hello", "stop")
    assert await answer_to(WHOLE + rest) == ("Hello", "stop")


async def test_a_problem_after_a_whole_answer_is_one_log_line() -> None:
    with capture_logs() as logs:
        await answer_to(WHOLE, event({"error": {"message": "usage could not be recorded"}}), DONE)
        await answer_to(event(chunk("a")), b"data: hello\n\n" * 3, STOP, DONE)
        await answer_to(WHOLE, DONE)
    first, second = (line for line in logs if line["event"] == "answer is whole in spite of a problem")
    assert first["problem"] == "backend_error: usage could not be recorded"
    assert second["problem"].startswith("an event that is not JSON")
    assert second["skipped"] == 3


PINGS = [
    pytest.param(b"event: ping\ndata: ping\n\n", id="a word"),
    pytest.param(b"event: ping\ndata: 1732400000\n\n", id="a time"),
    pytest.param(b'event: ping\ndata: {"type": "ping"}\n\n', id="an object"),
    pytest.param(b"event: keepalive\ndata: \n\n", id="no data"),
    pytest.param(b"event: heartbeat\n\n", id="a name alone"),
    pytest.param(b"data: ping\n\n", id="without a name"),
    pytest.param(b"data: \n\n", id="nothing at all"),
    pytest.param(b"data: null\n\n", id="null"),
    pytest.param(b"id: 7\nretry: 1000\n\n", id="other fields"),
]


@pytest.mark.parametrize("ping", PINGS)
async def test_events_that_are_not_ours_are_skipped(ping: bytes) -> None:
    assert await answer_to(
        ping, ROLE, ping, event(chunk("Hel")), ping * 2, event(chunk("lo")), ping, STOP, ping, DONE
    ) == (
        "Hello",
        "stop",
    )


@pytest.mark.parametrize("prefix", [b"data: ", b"data:", b"data: data: "])
async def test_events_that_were_framed_twice_are_read(prefix: bytes) -> None:
    assert await answer_to((WHOLE + DONE).replace(b"data: ", prefix + b"data: ")) == ("Hello", "stop")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
async def test_lines_of_json_without_a_field_name_are_read(line_end: bytes) -> None:
    assert await answer_to((WHOLE + DONE).replace(b"data: ", b"").replace(b"\n", line_end)) == ("Hello", "stop")
    lines = (WHOLE + DONE).replace(b"data: ", b"").replace(b"\n\n", line_end)
    assert await answer_to(ROLE, lines) == ("Hello", "stop")


@pytest.mark.parametrize("size", [3 << 19, 3 << 20])
async def test_a_large_event_is_read(size: int) -> None:
    large = event({**chunk("Hello"), "prompt": "x" * size})
    assert await answer_to(large, STOP, DONE) == ("Hello", "stop")


async def test_an_event_beyond_the_bound_is_not_tried_again() -> None:
    error = await failure(says(event({**chunk("Hello"), "prompt": "x" * (5 << 20)}), STOP, DONE))
    assert (error.kind, error.reason, cause(error)) == (
        "impossible",
        "too_large",
        "an event of more than 4194304 bytes",
    )


@pytest.mark.parametrize("coding", ["br", "gzip", "zstd, br"])
async def test_an_encoding_that_was_not_requested_is_reported_as_misconfigured(coding: str) -> None:
    error = await failure(says(WHOLE, DONE, headers={"Content-Encoding": coding}))
    assert (error.kind, error.reason) == ("misconfigured", "encoded")
    assert cause(error) == f"content encoding {coding}, although none is accepted"


# The address, and the setting to change


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("", "IMSTREAM_AI_URL may have to end in /v1"),
        ("/api", "IMSTREAM_AI_URL may have to end in /v1"),
        ("/v1/chat/completions", "IMSTREAM_AI_URL must end before /chat/completions, which is appended"),
        ("/v1", "check IMSTREAM_AI_URL and IMSTREAM_AI_MODEL"),
    ],
)
@pytest.mark.parametrize(
    "script",
    [
        refuses(404, '{"detail": "Not Found"}'),
        refuses(405, '{"detail": "Method Not Allowed"}'),
        refuses(301, headers={"Location": "/"}),
        says(b"<html><title>Open WebUI</title>", content_type="text/html"),
    ],
)
async def test_a_wrong_address_is_reported_with_a_hint(script: Script, path: str, hint: str) -> None:
    async with scripted_backend(script) as backend:
        base = backend.url.removesuffix("/v1") + path
        error = await failure_at(base)
    assert error.kind == "misconfigured"
    assert error.detail.endswith(f" ({base}/chat/completions; {hint})")


async def checked(*scripts: Script, path: str = "/v1", **settings: Any) -> tuple[BackendError | None, list[str]]:  # noqa: ANN401 - any setting
    """The error of a check of a backend with these scripts, and its requests."""
    async with scripted_backend() as backend:
        backend.models = None
        backend.then(*scripts)
        base = backend.url.removesuffix("/v1") + path
        async with OpenAIBackend(Settings.load(**{"ai_url": base, "ai_model": "qwen3", **settings})) as client:
            error = await client.check()
        return error, [f"{request.method} {request.target}" for request in backend.requests]


def listing(*models: str, owner: str = "vllm") -> Script:
    """A script: a list of models."""
    body = json.dumps({"object": "list", "data": [{"id": model, "owned_by": owner} for model in models]})
    return says(body.encode(), content_type="application/json")


@pytest.mark.parametrize("path", ["", "/v1/chat/completions"])
@pytest.mark.parametrize("script", [refuses(404, '{"detail": "Not Found"}'), says(b"<html>", content_type="text/html")])
async def test_the_check_finds_a_wrong_address(script: Script, path: str) -> None:
    error, asked = await checked(script, script, path=path)
    assert error is not None
    assert error.kind == "misconfigured"
    assert f"{path}/chat/completions; IMSTREAM_AI_URL m" in error.detail
    assert asked == [f"GET {path}/models", f"POST {path}/chat/completions"]


@pytest.mark.parametrize(
    "script",
    [
        listing("qwen3"),
        listing("llama3", "qwen3:latest"),  # Ollama
        listing("models/qwen3"),  # Gemini
        listing("/models/other.gguf", owner="llamacpp"),  # accepts every name
        listing(),
    ],
)
async def test_a_backend_that_lists_the_model_passes_the_check(script: Script) -> None:
    assert await checked(script) == (None, ["GET /v1/models"])


@pytest.mark.parametrize("no_list", [refuses(404), refuses(405), refuses(403, '{"error": {"message": "scopes"}}')])
async def test_a_backend_without_a_list_of_models_passes_the_check_if_it_reads_requests(no_list: Script) -> None:
    answer = refuses(400, '{"error": {"message": "model is required"}}')
    assert await checked(no_list, answer) == (None, ["GET /v1/models", "POST /v1/chat/completions"])


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_backend_that_drops_requests_for_a_list_of_models_passes_the_check_if_it_reads_others(how: str) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.method == "GET":
            getattr(exchange, how)()  # as nginx with `return 444`
        else:
            await refuses(400, '{"error": {"message": "model is required"}}')(exchange)

    error, asked = await checked(*[script] * 3)  # a GET may be repeated by the HTTP client
    assert error is None
    assert asked[-1] == "POST /v1/chat/completions"


async def test_the_check_finds_a_model_that_is_not_listed_a_wrong_key_and_a_backend_that_is_away() -> None:
    error, _ = await checked(listing("qwen2", "llama3"))
    assert error is not None
    assert (error.reason, error.kind) == ("model_not_found", "misconfigured")
    assert error.detail.startswith("qwen3 is not in its list of models: qwen2, llama3 (")
    assert error.detail.endswith("check IMSTREAM_AI_MODEL)")
    refused = refuses(401, '{"error": {"message": "Incorrect API key"}}')
    error, _ = await checked(refused, refused)
    assert error is not None
    assert (error.reason, error.detail.endswith("check IMSTREAM_AI_KEY)")) == ("http_401", True)
    error, _ = await checked(ai_url="http://127.0.0.1:9/v1")
    assert error is not None
    assert (error.reason, error.kind) == ("connect_failed", "away")


@pytest.mark.parametrize(
    ("status", "body", "hint"),
    [
        (404, {"error": {"code": "model_not_found", "message": "no"}}, "check IMSTREAM_AI_MODEL"),
        (401, {"error": {"message": "no"}}, "check IMSTREAM_AI_KEY"),
        (400, {"error": {"message": "API key not valid"}}, "check IMSTREAM_AI_KEY"),
        (503, {"error": {"message": "no"}}, ""),
        (400, {"error": {"message": "Your organization must be verified to stream this model"}}, ""),
    ],
)
async def test_a_hint_is_given_where_a_setting_may_be_wrong(status: int, body: object, hint: str) -> None:
    error = await failure(refuses(status, json.dumps(body)))
    assert error.detail.endswith(f"/v1/chat/completions; {hint})" if hint else "/v1/chat/completions)")


async def test_the_address_is_reported_without_its_secrets() -> None:
    async with scripted_backend(refuses(404)) as backend:
        url = backend.url.replace("//", "//me:pass@") + "?api-version=7&api-key=sk-secret"
        error = await failure_at(url)
    assert f"{backend.url}/chat/completions?api-version=7" in error.detail.replace("***@", "").replace("me@", "")
    assert "pass" not in str(error)
    assert "sk-secret" not in str(error)


async def test_a_connection_that_fails_names_the_address() -> None:
    async with scripted_backend() as gone:
        url = gone.url
    error = await failure_at(url)
    assert (error.kind, error.reason) == ("away", "connect_failed")
    assert error.detail.endswith(f" ({url}/chat/completions)")


# Whose fault, and for how long

TOO_LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 30601."
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "6s"}


@pytest.mark.parametrize(
    ("status", "error", "verdict"),
    [
        (402, {"message": "Insufficient Balance"}, ("away", "insufficient_quota")),
        (400, {"message": "Your credit balance is too low to access the API."}, ("away", "insufficient_quota")),
        (
            400,
            {"message": "Your organization must be verified to stream this model."},
            ("misconfigured", "misconfigured"),
        ),
        (400, {"message": "System role not supported"}, ("misconfigured", "misconfigured")),
        (404, {"message": "The model does not exist", "code": "model_not_found"}, ("misconfigured", "model_not_found")),
        (429, {"message": TOO_LARGE, "type": "tokens"}, ("impossible", "context_too_long")),
        (400, {"message": "Content Exists Risk"}, ("impossible", "content_filter")),
        (400, INSPECTED["error"], ("impossible", "content_filter")),
        (403, {"message": "Your input was flagged", "code": 403}, ("impossible", "content_filter")),
    ],
)
async def test_an_error_has_the_class_of_its_cause(status: int, error: object, verdict: tuple[str, str]) -> None:
    got = await failure(refuses(status, json.dumps({"error": error})))
    assert (got.kind, got.reason) == verdict


async def test_plain_text_instead_of_a_stream_is_reported() -> None:
    whole, within, page = b"upstream reset", b"upstream reset\nsorry\n", b"<h1>upstream reset</h1>"
    for parts in ([whole[:9], whole[9:]], [event(chunk("a")), within], [ROLE, page]):
        error = await failure(says(*parts, content_type="text/plain"))
        assert (error.kind, error.reason, cause(error)) == ("broken", "broken_stream", "upstream reset")


async def test_a_page_with_status_400_is_not_of_the_api() -> None:
    page = "<html><title>400 The plain HTTP request was sent to HTTPS port</title></html>"
    error = await failure(refuses(400, page, content_type="text/html"))
    assert (error.kind, error.reason) == ("misconfigured", "misconfigured")


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ({"message": "Resource has been exhausted", "status": "RESOURCE_EXHAUSTED", "details": [RETRY_INFO]}, 6),
        ({"message": "You exceeded your current quota. Please retry in 6.07s."}, 6.07),
        ({"message": "Requests have exceeded call rate limit. Please retry after 20 seconds."}, 20),
        ({"message": "Rate limit reached. Please try again in 1m2.5s."}, 62.5),
        ({"message": "请求过于频繁,请在 3 秒后重试"}, 3),
        ({"message": "Rate limit reached"}, None),
    ],
)
async def test_a_wait_in_the_body_is_used(error: object, seconds: float | None) -> None:
    wait = None if seconds is None else timedelta(seconds=seconds)
    for body in (json.dumps({"error": error}), json.dumps([{"error": error}])):
        got = await failure(refuses(429, body))
        assert (got.kind, got.reason, got.retry_after) == ("away", "http_429", wait)
    inside = await failure(says(event({"error": {"code": 429, **error}})))  # type: ignore[dict-item]
    assert (inside.kind, inside.retry_after) == ("away", wait)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_an_error_is_never_empty(status: int) -> None:
    error = await failure(refuses(status))
    assert cause(error) == "the response does not say why"
    assert cause(await failure(says(event({"error": {"code": status}})))) == "an error without a text"
