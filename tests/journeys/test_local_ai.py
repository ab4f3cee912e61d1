"""A real model on this machine: `imstream up --local-ai` and `imstream local-ai`, with every client."""

import asyncio
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from imstream.ai.prompt.assembler import MESSAGE_TOKENS, PROMPT_TOKENS
from imstream.ai.prompt.token_count import TokenEstimate
from imstream.client import Client, Outcome, Receipt, Turn
from tests.journeys.page_support import open_page, running_chromium
from tests.support.local_model import START, LocalModel, require_model, start_model
from tests.support.processes import PYTHON, free_port, start, wait_for
from tests.support.servers import NodeProcess, RedisServer, start_node
from tests.support.terminal import piped
from tests.support.up_command import gone, up
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured", "_installed")

USER = user_id(10001)
QUESTION = "Why is the sky blue?"
STORY = "Tell me a long story about a lighthouse keeper and the sea."


@pytest.fixture(scope="module")
def _installed() -> None:
    require_model()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, _installed: None) -> Iterator[LocalModel]:
    started = start_model(tmp_path_factory.mktemp("model"), context=2048)
    with started.process:
        yield started


@pytest.fixture
def node(model: LocalModel, redis_server: RedisServer, tmp_path: Path) -> Iterator[NodeProcess]:
    """A node with the settings that suit the model."""
    settings = model.node_settings(answer_tokens=100)
    running = start_node(tmp_path, redis_url=redis_server.url, ai_url=model.url, settings=settings)
    with running.process:
        yield running


async def test_a_newcomers_first_chat_is_with_a_real_model(tmp_path: Path) -> None:
    port = free_port()
    short = {"IMSTREAM_ANSWER_TOKENS": "24", "IMSTREAM_AI_BODY": '{"temperature": 0}'}
    with up(tmp_path, "--local-ai", "--local-ai-port", str(port), "--drain-grace", "2s", env=short) as imstream:
        await asyncio.to_thread(imstream.wait_until_ready, START)
        said = imstream.running.output()
        assert f"AI       http://127.0.0.1:{port}/v1   SmolLM2-135M-Instruct.Q4_1, a model on this machine" in said
        children = imstream.children()
        assert sorted(children) == ["local-ai", "node", "redis"]
        async with Client(imstream.ws, USER) as client, asyncio.timeout(START):
            result = await (await client.send(STORY)).result()
        assert result.outcome == Outcome.DONE
        assert (result.finish_reason, result.usage and result.usage["completion_tokens"]) == ("length", 24)
        assert len(result.text.split()) > 10
        assert await asyncio.to_thread(imstream.running.terminate, 30) == 0
        assert gone(list(children.values()))
    # None of the output of llama.cpp at its start.
    lines = [line for line in imstream.running.output().splitlines() if line.startswith("ai ")]
    assert [line.split("| ")[1].split()[0] for line in lines] == ["ready:"], lines


@pytest.mark.long
async def test_the_python_client_the_terminal_and_the_page_chat_with_it(node: NodeProcess) -> None:
    async with Client(node.ws(), USER, lang="en") as client:
        reply = await client.send(QUESTION)
        pieces = [piece.text async for piece in reply]
        answer = await reply.text()
        assert "sky" in answer
        assert len(pieces) > 3, "it arrives as it is generated"
        history = [Turn(role="user", content=QUESTION), Turn(role="assistant", content=answer)]
        assert await (await client.send("Repeat your last sentence.", history=history)).text()

    code, said, _ = await piped(node.ws(), f"{QUESTION}\n")
    assert code == 0
    assert answer in said

    with running_chromium() as chromium:
        async with open_page(chromium) as page:
            await page.visit(f"{node.http}/")
            await page.fill("#user", str(USER))
            await page.press("Enter")
            await page.until("document.querySelector('#menu').dataset.state === 'online'")
            await page.fill("textarea", QUESTION)
            await page.press("Enter")
            last = "[...document.querySelectorAll('article')].at(-1)"
            await page.until(f"{last}?.dataset.status === 'done'")
            shown = await page.evaluate(f"{last}.querySelector('.answer').textContent")
            assert re.findall(r"\w+", shown) == re.findall(r"\w+", answer)  # marks of Markdown are not text
            assert page.complaints == []


@pytest.mark.long
async def test_a_cancelled_answer_frees_its_slot_at_once(node: NodeProcess, model: LocalModel) -> None:
    async with Client(node.ws(), USER) as client:
        replies = [await client.send(f"{STORY} Number {number}.") for number in range(2)]
        for reply in replies:
            await anext(aiter(reply))
        assert await asyncio.to_thread(model.busy_slots) == 2
        assert await replies[0].cancel() == Receipt.CANCELLED
        await wait_until(lambda: model.busy_slots() == 1, "one slot is free again", limit=2)
        assert (await replies[1].result()).outcome == Outcome.DONE
        await wait_until(lambda: model.busy_slots() == 0, "all slots are free", limit=2)


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        "The sea was calm and the keeper lit the lamp. ",
        "海面很平静,守塔人点亮了灯。",
        'if (x != 0) { return "%s" % items[i++]; }\n',
        "🚢🌊🌅🔦",
    ],
)
async def test_a_history_beyond_the_context_is_trimmed_so_that_the_model_does_not_complain(
    words: str, node: NodeProcess, model: LocalModel
) -> None:
    turn = words * (100 // len(words))
    history = [Turn(role=("user", "assistant")[number % 2], content=f"{turn}{number}") for number in range(100)]
    async with Client(node.ws(), USER) as client, asyncio.timeout(START):
        result = await (await client.send(QUESTION, history=history)).result()
    assert result.outcome == Outcome.DONE, result.why
    assert result.usage
    context = model.settings.context
    assert result.usage["prompt_tokens"] + 100 <= context
    assert result.usage["prompt_tokens"] > context / 8, "what fits is sent"
    assert "ai call failed" not in node.process.output()


@pytest.mark.long
def test_our_token_count_is_near_that_of_the_model_and_never_less_than_nodes_allow_for(model: LocalModel) -> None:
    """Without the model's tokenizer, whose vocabulary is English."""
    estimate = TokenEstimate().count
    english = 20 * "The keeper lit the lamp, as he had done on each of the ten thousand evenings before. "
    ours = estimate(english) + MESSAGE_TOKENS + PROMPT_TOKENS
    assert 1.0 <= ours / model.prompt_tokens([{"role": "user", "content": english}]) <= 1.3
    others = {
        "code": "def add(a: int, b: int) -> int:\n    return a + b  # the sum\n\n",
        "JSON": '{"id": 17, "name": "lamp", "tags": ["a", "b"], "price": 12.5}\n',
        "German": "Eine Nachricht, die angenommen wurde, wird beantwortet, was auch immer dazwischen stirbt. ",
        "Russian": "Принятое сообщение всегда получает ответ. ",
        "Chinese": "今天天气很好,我们去海边看灯塔。守塔人说,明天会下雨。",
        "Japanese": "受け付けられたメッセージには必ず答えが返ります。",
        "Korean": "수락된 메시지는 항상 답변됩니다. ",
        "emoji": "🚢🌊🌅🔦",
    }
    told = model.settings.node_settings()
    answer = int(told["answer_tokens"])
    factor = (model.settings.context - answer) / (int(told["context_tokens"]) - answer)
    ratios = {name: model.tokens(20 * text) / estimate(20 * text) for name, text in others.items()}
    assert max(ratios.values()) < factor, ratios


# The process


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_while_it_loads_while_it_answers_and_while_it_waits(
    number: signal.Signals, tmp_path: Path
) -> None:
    for moment in ("loading", "answering", "waiting"):
        model = start_model(tmp_path, wait=moment != "loading")
        with model.process as process, socket.socket() as call:
            if moment == "loading":
                wait_for(lambda: _listens(process.pid), process, "the server that loads the model", limit=START)
            elif moment == "answering":
                call.connect(("127.0.0.1", model.settings.port))
                body = json.dumps({"messages": [{"role": "user", "content": STORY}], "stream": True})
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                call.sendall(f"{head}{body}".encode())
                assert call.recv(4096)
            process.signal(number)
            assert process.wait(10) == -number


def _listens(pid: int) -> bool:
    return any(one.status == psutil.CONN_LISTEN for one in psutil.Process(pid).net_connections("tcp"))


@pytest.mark.long
def test_it_says_why_it_cannot_start(tmp_path: Path) -> None:
    def refused(*options: str) -> str:
        command = [PYTHON, "-m", "imstream", "local-ai", *options]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode in {1, 2}
        assert "Traceback" not in ended.stderr
        return ended.stderr  # llama.cpp's log comes from a thread of its own, perhaps after our line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"IMSTREAM_LOCAL_AI_PORT={port}: cannot listen: Address already in use" in refused("--port", str(port))
    assert "IMSTREAM_LOCAL_AI_MODEL='no.gguf' is not allowed" in refused("--model", "no.gguf")
    (tmp_path / "broken.gguf").write_text("no model")
    assert "the model broken.gguf cannot be loaded" in refused("--model", "broken.gguf", "--port", str(free_port()))


@pytest.mark.long
def test_it_ends_with_imstream_up_however_that_ends(tmp_path: Path) -> None:
    for end in (signal.SIGKILL, signal.SIGTERM):
        options = ("--local-ai", "--local-ai-port", str(free_port()), "--drain-grace", "1s")
        with up(tmp_path, *options) as imstream:
            imstream.wait_until_ready(START)
            children = list(imstream.children().values())
            imstream.running.signal(end)
            imstream.running.wait(30)
            psutil.wait_procs(children, timeout=10)
            assert gone(children)


@pytest.mark.long
def test_it_names_the_settings_of_nodes_that_suit_it(tmp_path: Path) -> None:
    port = free_port()
    command = [PYTHON, "-m", "imstream", "local-ai", "--port", str(port), "--context", "2048"]
    with start(command, tmp_path / "log", cwd=tmp_path) as process:
        wait_for(lambda: "for nodes:" in process.output(), process, "local-ai", limit=START)
        said = process.output()
    ready, for_nodes = said.splitlines()
    assert ready == f"ready: SmolLM2-135M-Instruct.Q4_1, a model on this machine, at http://127.0.0.1:{port}/v1"
    assert for_nodes.startswith("for nodes: IMSTREAM_AI_MODEL=SmolLM2-135M-Instruct.Q4_1 IMSTREAM_")
    assert "IMSTREAM_CONTEXT_TOKENS=768" in for_nodes
