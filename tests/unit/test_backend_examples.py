"""The examples of backends.md, each with a server that behaves as documented for the real one."""

import asyncio
import re
import shlex
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from imstream.ai.backend import Completion, OpenAIBackend, PromptMessage
from imstream.errors import BackendError
from imstream.settings import Settings
from tests.support.asking import Asking
from tests.support.scripted_backend import DONE, Exchange, Script, chunk, event, refuses, scripted_backend, usage_chunk
from tests.unit.test_documents import DOCS

PROMPT = [
    PromptMessage("system", "Be brief."),
    PromptMessage("user", "hi"),
    PromptMessage("assistant", "Hello!"),
    PromptMessage("user", "and now?"),
]
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
STOP = event(chunk(finish_reason="stop"))
COUNTS = event(usage_chunk(**USAGE))

DOCUMENT = DOCS / "backends.md"
EXAMPLES = re.findall(r"^### (.*)$", DOCUMENT.read_text("utf-8").partition("## Examples")[2], re.MULTILINE)


def delta(**fields: object) -> bytes:
    return event({"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": fields}]})


def example(name: str) -> dict[str, str]:
    """The variables that an example exports; keys are filled in."""
    section = DOCUMENT.read_text("utf-8").partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    words = [word for line in section.splitlines() if line.startswith("export ") for word in shlex.split(line)[1:]]
    return {variable: value.replace("…", "key-of-the-test") for variable, _, value in (w.partition("=") for w in words)}


@asynccontextmanager
async def using(name: str, *scripts: Script, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[Asking]:  # noqa: ANN401 - any setting
    """Use an example with these scripts in place of the real server."""
    for variable, value in example(name).items():
        monkeypatch.setenv(variable, value)
    async with scripted_backend() as backend:
        backend.then(*scripts)
        url = re.sub(r"^https?://[^/]*", f"http://127.0.0.1:{backend.port}", example(name)["IMSTREAM_AI_URL"])
        async with OpenAIBackend(Settings.load(ai_url=url, **settings)) as client:
            yield Asking(client, backend)


async def ask(asked: Asking) -> Completion:
    return await asked.client.answer(PROMPT, on_text=asked.pieces.append)


def server(*insists: tuple[Callable[[Any, Exchange], bool], int, str], sends: Sequence[bytes]) -> Script:
    """A server that refuses a request for which a condition does not hold, and streams its answer otherwise."""

    async def script(exchange: Exchange) -> None:
        for holds, status, body in insists:
            if not holds(exchange.request.json, exchange):
                await refuses(status, body)(exchange)
                return
        await exchange.start()
        for part in sends:
            await exchange.send(part)
        await exchange.end()

    return script


def has_bearer(_: Any, exchange: Exchange) -> bool:  # noqa: ANN401 - JSON
    return exchange.request.headers.get("authorization", "").startswith("Bearer ")


def test_every_example_is_tested() -> None:
    tested = ["Azure OpenAI", "OpenRouter", "DashScope", "DeepSeek", "Mistral", "vLLM", "SGLang", "Ollama", "llama.cpp"]
    assert tested == EXAMPLES


async def test_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    safe = {"hate": {"filtered": False, "severity": "safe"}}
    target = "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"
    azure = server(
        (
            lambda _, exchange: exchange.target == target,
            404,
            '{"error": {"code": "404", "message": "Resource not found"}}',
        ),
        (
            lambda _, exchange: exchange.request.headers.get("api-key") == "key-of-the-test",
            401,
            '{"statusCode": 401, "message": "Unauthorized. Access token is missing, invalid, …"}',
        ),
        (
            lambda body, _: "max_tokens" not in body and body["max_completion_tokens"] == 4096,
            400,
            '{"error": {"message": "Unsupported parameter: \'max_tokens\'", "code": "unsupported_parameter"}}',
        ),
        sends=[
            event({"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": safe}]}),
            delta(role="assistant", content="", refusal=None),
            event({"choices": [{"index": 0, "delta": {"content": "Yes"}, "content_filter_results": safe}]}),
            STOP,
            COUNTS,
            DONE,
        ],
    )
    async with using("Azure OpenAI", azure, monkeypatch=monkeypatch) as asked:
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.text == "Yes"
        assert "authorization" not in asked.backend.requests[0].headers


async def test_openrouter(monkeypatch: pytest.MonkeyPatch) -> None:
    openrouter = server(
        (has_bearer, 401, '{"error": {"code": 401, "message": "No auth credentials found"}}'),
        sends=[
            *[b": OPENROUTER PROCESSING\n\n"] * 3,
            delta(
                role="assistant",
                content="",
                reasoning="hm",
                reasoning_details=[{"type": "reasoning.text", "text": "hm"}],
            ),
            delta(role="assistant", content="Yes"),
            event(chunk("", finish_reason="stop", native_finish_reason="stop")),
            event(chunk("", usage={**USAGE, "cost": 0.00014, "is_byok": False})),
            DONE,
        ],
    )
    async with using("OpenRouter", openrouter, monkeypatch=monkeypatch) as asked:
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.text == "Yes"
        [request] = asked.backend.requests
        assert request.target == "/api/v1/chat/completions"
        assert (request.headers["http-referer"], request.headers["x-title"]) == (
            "https://chat.example.com",
            "Example chat",
        )
        assert request.json["provider"] == {"sort": "throughput"}


async def test_dashscope(monkeypatch: pytest.MonkeyPatch) -> None:
    dashscope = server(
        (has_bearer, 401, '{"error": {"code": "invalid_api_key", "message": "Incorrect API key provided."}}'),
        (lambda body, _: body["enable_thinking"] is False, 400, '{"error": {"code": "invalid_parameter_error"}}'),
        sends=[
            event({"choices": [{"delta": {"content": "", "role": "assistant"}, "index": 0, "finish_reason": None}]}),
            delta(content="Yes"),
            event({"choices": [{"delta": {"content": ""}, "index": 0, "finish_reason": "stop"}], "usage": None}),
            COUNTS,
            DONE,
        ],
    )
    async with using("DashScope", dashscope, monkeypatch=monkeypatch) as asked:
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.text == "Yes"
        assert asked.backend.requests[0].target == "/compatible-mode/v1/chat/completions"


async def test_deepseek(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deepseek(exchange: Exchange) -> None:
        await exchange.start()
        for _ in range(15):  # longer than the limit of silence
            await exchange.send(b": keep-alive\n\n")
            await asyncio.sleep(0.1)
        await exchange.send(delta(role="assistant", content=None, reasoning_content="hm"), delta(content="Yes"))
        await exchange.send(event(chunk("", finish_reason="stop", usage={**USAGE, "prompt_cache_hit_tokens": 0})), DONE)
        await exchange.end()

    limits = {"ai_first_token_timeout": "1s", "ai_load_timeout": "1s"}
    async with using("DeepSeek", deepseek, monkeypatch=monkeypatch, **limits) as asked:
        assert await ask(asked) == Completion("stop", {**USAGE, "prompt_cache_hit_tokens": 0})
        assert asked.text == "Yes"
        assert asked.backend.requests[0].json["max_tokens"] == 1024


KNOWN_TO_MISTRAL = {"model", "messages", "stream", "temperature", "top_p", "max_tokens", "stop", "safe_prompt"}


async def mistral(exchange: Exchange) -> None:
    """Refuse unknown parameters, and send the content as parts."""
    if unknown := sorted(set(exchange.request.json) - KNOWN_TO_MISTRAL):
        problem = (
            f'{{"type": "extra_forbidden", "loc": ["body", "{unknown[0]}"], "msg": "Extra inputs are not permitted"}}'
        )
        await refuses(
            422, f'{{"object": "error", "message": {{"detail": [{problem}]}}, "type": "invalid_request_error"}}'
        )(exchange)
        return
    await exchange.start()
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    await exchange.send(delta(role="assistant", content=""), delta(content=[thinking]), delta(content="Yes"))
    await exchange.send(event(chunk("", finish_reason="stop", usage=USAGE)), DONE)
    await exchange.end()


@pytest.mark.parametrize(("usage", "requests"), [("no", 2), ("auto", 3)])
async def test_mistral(usage: str, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with using("Mistral", *[mistral] * requests, monkeypatch=monkeypatch, ai_usage=usage) as asked:
        for _ in range(2):
            assert await ask(asked) == Completion("stop", USAGE)
        assert asked.text == "YesYes"
        assert len(asked.backend.requests) == requests


async def test_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(message: str) -> str:
        return f'{{"object": "error", "message": "{message}", "type": "BadRequestError", "param": null, "code": 400}}'

    vllm = server(
        (
            lambda body, _: all(message["role"] != "system" for message in body["messages"]),
            400,
            error("System role not supported"),
        ),
        (
            lambda body, _: [message["role"] for message in body["messages"]] == ["user", "assistant", "user"],
            400,
            error("Conversation roles must alternate user/assistant/user/assistant/..."),
        ),
        sends=[delta(role="assistant", content=""), delta(content="Yes"), STOP, COUNTS, DONE],
    )
    async with using("vLLM", vllm, monkeypatch=monkeypatch) as asked:
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.backend.requests[0].json["messages"][0]["content"] == "Be brief.\n\nhi"


async def test_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    sglang = server(
        sends=[
            delta(role="assistant", content="", reasoning_content=None),
            *[
                delta(content=piece, reasoning_content=None)
                for piece in ("<think>", "\nhm\n", "</think>", "\n\n", "Yes")
            ],
            event(chunk(finish_reason="stop", matched_stop=151645)),
            COUNTS,
            DONE,
        ],
    )
    async with using("SGLang", sglang, monkeypatch=monkeypatch) as asked:
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.text == "Yes"
        body = asked.backend.requests[0].json
        assert (body["top_k"], body["chat_template_kwargs"]) == (20, {"enable_thinking": True})


async def test_ollama(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ollama(exchange: Exchange) -> None:
        await asyncio.sleep(0.4)  # the model is loaded, without a sign of life
        await exchange.start()
        await exchange.send(delta(role="assistant", content="Yes"), STOP, COUNTS, DONE)
        await exchange.end()

    short: dict[str, Any] = {"ai_first_token_timeout": "300ms"}
    async with using("Ollama", ollama, monkeypatch=monkeypatch, **short) as asked:
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.backend.requests[0].json["reasoning_effort"] == "none"


async def test_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = refuses(503, '{"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}')
    llama = server(
        sends=[
            delta(role="assistant", content=None),
            *[delta(content=piece) for piece in ("<think>", "hm", "</think>", "Yes")],
            STOP,
            event({**usage_chunk(**USAGE), "timings": {"prompt_n": 9, "predicted_per_second": 40.1}}),
            DONE,
        ],
    )
    async with using("llama.cpp", loading, llama, monkeypatch=monkeypatch) as asked:
        with pytest.raises(BackendError) as failed:
            await ask(asked)
        assert failed.value.kind == "away"
        assert await ask(asked) == Completion("stop", USAGE)
        assert asked.text == "Yes"
        assert asked.backend.requests[0].json["min_p"] == 0.05
