"""A model that thinks before it answers: the frames of each node, and that reasoning is no part of answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from imstream.guards.words.word_guard import IN_ANSWER
from tests.support.backend_scripts import by_question
from tests.support.many_nodes import standing_nodes
from tests.support.one_node import OneNode, one_node, standing_node
from tests.support.peer import Frame, Peer, Told, peer
from tests.support.processes import free_port
from tests.support.raw_socket import raw_socket
from tests.support.scripted_backend import (
    DONE,
    Exchange,
    Script,
    ScriptedBackend,
    chunk,
    event,
    says,
    scripted_backend,
)
from tests.support.servers import RedisServer
from tests.support.users import query, user_id

USER = user_id(10001)
MOST = 600_000
"""Maximum characters of an answer, and of reasoning."""

STOP = event(chunk(finish_reason="stop"))
MB = 1 << 20


def delta(**fields: Any) -> bytes:  # noqa: ANN401 - JSON
    return event({"choices": [{"delta": fields}]})


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "thinking", "thinking": [{"type": "text", "text": text}]} for text in texts]


def whole(**message: str) -> Script:
    """One JSON document."""
    body = event({"choices": [{"message": message, "finish_reason": "stop"}]})
    return says(body.removeprefix(b"data: "), content_type="application/json")


ANSWER = (delta(content="The "), delta(content="answer"), STOP, DONE)
FORMS: dict[str, Script] = {
    "DeepSeek, vLLM": says(delta(reasoning_content="Let me "), delta(reasoning_content="think"), *ANSWER),
    "Ollama": says(delta(content="", reasoning="Let me "), delta(content="", reasoning="think"), *ANSWER),
    "OpenRouter": says(
        delta(reasoning="Let me ", reasoning_details=[{"type": "reasoning.text", "text": "Let me "}]),
        delta(reasoning_details=[{"type": "reasoning.summary", "summary": "think"}]),
        *ANSWER,
    ),
    "Mistral": says(delta(content=parts("Let me ")), delta(content=parts("thi", "nk")), *ANSWER),
    "tags": says(*(delta(content=text) for text in ("<th", "ink>\nLet me ", "think</th", "ink>\n\n")), *ANSWER),
    "text beside it": says(
        delta(reasoning="Let me "), delta(content="The ", reasoning="think"), delta(content="answer"), STOP, DONE
    ),
    "a document": whole(content="The answer", reasoning_content="Let me think"),
}


@dataclass
class Model:
    """A model whose answer the test plays, part by part; `b""` breaks the connection."""

    parts: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    def says(self, *given: bytes) -> None:
        """Send these parts next."""
        for part in given:
            self.parts.put_nowait(part)

    async def __call__(self, exchange: Exchange) -> None:
        """The script."""
        await exchange.start()
        while (part := await self.parts.get()) != DONE:
            if not part:
                exchange.close()
                return
            await exchange.send(part)
        await exchange.send(part)
        await exchange.end()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    """A node that shows reasoning. Each test runs its backend."""
    url = f"http://127.0.0.1:{free_port()}/v1"
    with standing_node(tmp_path_factory.mktemp("thinking"), url, thinking="show", max_answer=MOST) as node:
        yield node


def backend_of(node: OneNode, always: Script) -> AbstractAsyncContextManager[ScriptedBackend]:
    """The backend of this node."""
    return scripted_backend(always, port=int(node.ai_url.split(":")[2].split("/")[0]))


@asynccontextmanager
async def device(node: OneNode, *wants: str, resume: dict[str, Told] | None = None) -> AsyncIterator[Peer]:
    """Connect and log in with these wants."""
    async with peer(node.now.ws(USER), lang="en") as someone:
        someone.told.update(resume or {})
        points = [{"messageId": name, **told.point} for name, told in (resume or {}).items()]
        await someone.send_frame("INIT", userId=USER, wants=[*wants], resume=points)
        await someone.until(msgType="INIT")
        yield someone


def frames(someone: Peer, message_id: str, name: str) -> list[Frame]:
    """The frames with this event about a message."""
    return [one for one in someone.frames if (one.get("event"), one.get("messageId")) == (name, message_id)]


def states(someone: Peer, message_id: str) -> list[str]:
    """The states since the message was opened: before that, it is queued for a moment if its worker is slow."""
    return [one["state"] for one in frames(someone, message_id, "status") if one["state"] != "queued"]


def thoughts(found: list[Frame]) -> str:
    """The reasoning of the last call, assembled as a client must."""
    text = ""
    for one in found:
        assert one["start"] in {0, len(text)}
        text = one["contents"] if one["start"] == 0 else text + one["contents"]
    return text


async def test_reasoning_is_sent_to_sockets_that_request_it_and_is_no_part_of_the_answer(node: OneNode) -> None:
    scripts = {question: [script] for question, script in FORMS.items()}
    async with (
        backend_of(node, by_question(scripts)),
        node.peer(USER) as plain,
        device(node, "status") as state_only,
        device(node, "status", "thinking") as curious,
    ):
        for number, question in enumerate(FORMS):
            name = f"form-{number}"
            await curious.chat(USER, question, name)
            for someone in (curious, plain, state_only):
                told = await someone.end_of(name)
                assert (told.text, told.offset) == ("The answer", 10), question
            assert thoughts(frames(curious, name, "thinking")) == "Let me think", question
            assert frames(curious, name, "thinking")[0]["attempt"] == 1
            assert set(states(curious, name)) <= {"started", "thinking"}, question  # none, if all came at once
            assert set(plain.told[name].events) == {"delta", "done"}
            assert set(state_only.told[name].events) - {"status"} == {"delta", "done"}
            events = curious.told[name].events
            assert events.index("delta") > max(at for at, one in enumerate(events) if one == "thinking"), question
            assert node.recorded(USER, name) == ("done", "The answer")


@pytest.mark.parametrize("mode", ["hide", "status"])
async def test_reasoning_is_shown_only_where_the_operator_allows_it(
    redis_server: RedisServer, tmp_path: Path, mode: str
) -> None:
    model = Model()
    async with (
        scripted_backend(always=model) as backend,
        one_node(tmp_path, redis_server, backend.url, **({} if mode == "status" else {"thinking": mode})) as node,
        device(node, "status", "thinking") as someone,
    ):
        await someone.chat(USER, "why?", "m")
        await someone.until(event="status", state="started")
        model.says(delta(reasoning_content="hm"))
        if mode != "hide":
            await someone.until(event="status", state="thinking")
        model.says(*ANSWER)
        assert (await someone.end_of("m")).text == "The answer"
        assert states(someone, "m") == (["started"] if mode == "hide" else ["started", "thinking", "started"])
        assert frames(someone, "m", "thinking") == []
        marks = [entry for entry in node.record(USER, "m") if "thinking" in entry]
        assert all((mark["event"], mark["text"], mark["offset"]) == ("text", "", "0") for mark in marks)
        assert mode != "hide" or marks == []
        await node.all_finished()


async def test_a_call_that_fails_takes_its_reasoning_with_it(node: OneNode) -> None:
    """While it thinks, a backend goes away, and then its answer is cut, and then again in its text."""
    model, away = Model(), event({"error": {"code": 503, "message": "overloaded"}})
    async with backend_of(node, model), device(node, "status", "thinking") as someone:
        await someone.chat(USER, "why?", "cut")
        for reasoning, then in (("first", away), ("second", b""), ("third", b"")):
            model.says(delta(reasoning_content=reasoning))
            told = await someone.until(event="thinking")
            assert (told["contents"], told["start"]) == (reasoning, 0)
            if reasoning == "third":
                model.says(delta(content="half "))
                await someone.some_text("cut", 5)
            model.says(then, *([DONE] if then else []))
            if not then:
                await someone.until(event="restart")
        model.says(delta(reasoning_content="fourth"))
        last = await someone.until(event="thinking")
        assert (last["contents"], last["start"], last["attempt"]) == ("fourth", 0, 3)
        model.says(*ANSWER)
        assert (await someone.end_of("cut")).text == "The answer"
        assert states(someone, "cut")[:3] == ["started", "thinking", "waiting"]
        assert node.recorded(USER, "cut") == ("done", "The answer")


async def test_a_socket_that_connects_while_the_model_thinks_receives_all_reasoning(node: OneNode) -> None:
    model = Model()
    async with (
        backend_of(node, model),
        node.peer(USER) as plain,
    ):
        async with device(node, "thinking") as someone:
            await someone.chat(USER, "why?", "resumed")
            model.says(delta(reasoning_content="Let me "))
            await someone.until(event="thinking")
            left = someone.told["resumed"]
        async with device(node, "status", "thinking", resume={"resumed": left}) as back, device(node) as later:
            assert (await back.until(event="status"))["state"] == "thinking"
            first = await back.until(event="thinking")
            assert (first["contents"], first["start"]) == ("Let me ", 0)
            await later.send_frame("INIT", userId=USER, resume=[{"messageId": "resumed"}])
            await later.until(msgType="INIT")
            await later.send_frame("INIT", userId=USER, wants=["thinking"])
            assert (await later.until(event="thinking"))["contents"] == "Let me "
            model.says(delta(reasoning_content="think"))
            assert (await back.until(event="thinking"))["start"] == 7
            model.says(*ANSWER)
            for socket in (back, later, plain):
                assert (await socket.end_of("resumed")).text == "The answer"
            assert (
                thoughts(frames(back, "resumed", "thinking"))
                == thoughts(frames(later, "resumed", "thinking"))
                == "Let me think"
            )
        assert set(plain.told["resumed"].events) == {"delta", "done"}


async def test_a_message_can_be_cancelled_while_the_model_thinks(node: OneNode) -> None:
    model = Model()
    async with (
        backend_of(node, model) as backend,
        device(node, "status", "thinking") as someone,
    ):
        await someone.chat(USER, "why?", "cancelled")
        model.says(delta(reasoning_content="hm"))
        await someone.until(event="thinking")
        await someone.send_frame("CANCEL", messageId="cancelled")
        assert (await someone.end_of("cancelled")).text == ""
        await (await backend.request()).gone()
        model.says(b"")
        assert node.recorded(USER, "cancelled") == ("cancelled", "")


async def test_a_socket_on_another_node_receives_the_state_and_that_of_the_next_attempt_when_the_first_node_dies(
    tmp_path: Path,
) -> None:
    model, second, third = Model(), Model(), Model()
    async with scripted_backend() as backend:
        backend.then(model, second, third)
        with standing_nodes(tmp_path, backend.url, "a", "b", thinking="show") as nodes:
            async with device(nodes["b"], "status", "thinking") as other:
                async with device(nodes["a"], "status", "thinking") as someone:
                    await someone.chat(USER, "why?", "m")
                    model.says(delta(reasoning_content="hm"))
                    await someone.until(event="thinking")
                    await other.until(event="status", state="thinking")
                    left = someone.told["m"]
                async with device(nodes["b"], "status", "thinking", resume={"m": left}) as back:
                    assert (await back.until(event="status"))["state"] == "thinking"
                    model.says(ANSWER[0])
                    await back.some_text("m")
                    model.says(*ANSWER[1:])
                    assert (await back.end_of("m")).text == (await other.end_of("m")).text == "The answer"
                    assert states(back, "m") == ["thinking", "started"]
                    assert frames(back, "m", "thinking") == frames(other, "m", "thinking") == []
                async with device(nodes["a"]) as someone:
                    await someone.chat(USER, "and why?", "n")
                    second.says(delta(reasoning_content="second"))
                    await other.until(event="status", state="thinking", messageId="n")
                    await nodes.killed("a")
                third.says(delta(reasoning_content="third"))
                again = await other.until(event="thinking")
                assert (again["contents"], again["start"], again["attempt"]) == ("third", 0, 2)
                third.says(*ANSWER)
                assert (await other.end_of("n")).text == "The answer"
            assert nodes.any.recorded(USER, "n") == ("done", "The answer")
            second.says(b"")
            await nodes.settled()
            nodes.check_logs()


async def test_an_answer_that_is_continued_may_be_thought_about_again(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    model = Model()
    async with (
        scripted_backend(always=model) as backend,
        one_node(tmp_path, redis_server, backend.url, thinking="show", ai_continue="assistant") as node,
        device(node, "status", "thinking") as someone,
    ):
        await someone.chat(USER, "why?", "m")
        model.says(delta(content="<think>first</think>"), delta(content="The "))
        await someone.some_text("m", 4)
        model.says(b"", delta(content="<think>second thought"))
        again = await someone.until(event="thinking")
        assert (again["contents"], again["start"], again["attempt"]) == ("second ", 0, 1)
        model.says(delta(content="</think>answer"))
        await someone.some_text("m", len("The answer"))  # else its end could come before its state was sent
        model.says(STOP, DONE)
        told = await someone.end_of("m")
        assert (told.text, told.attempt) == ("The answer", 1)
        assert "restart" not in told.events
        assert states(someone, "m")[-2:] == ["thinking", "started"]
        assert thoughts(frames(someone, "m", "thinking")) == "second thought"
        assert backend.requests[1].json["messages"][-1] == {"role": "assistant", "content": "The "}
        assert node.recorded(USER, "m") == ("done", "The answer")
        await node.all_finished()


async def test_reasoning_passes_the_filters_of_the_answer(redis_server: RedisServer, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("secret plan\n", "utf-8")
    reasoning = [delta(reasoning_content=text) for text in ("a sec", "ret pl", "an ends in sec")]
    async with (
        scripted_backend(always=says(*reasoning, *ANSWER)) as backend,
        one_node(tmp_path, redis_server, backend.url, thinking="show", words=words, words_action="mask") as node,
    ):
        async with device(node, "thinking") as someone:
            await someone.chat(USER, "why?", "masked")
            assert (await someone.end_of("masked")).text == "The answer"
            assert thoughts(frames(someone, "masked", "thinking")) == f"a {'＊' * 11} ends in sec"
        await node.settled()
        await node.terminated()
        await node.start(words_action="refuse")
        async with device(node, "thinking") as someone:
            await someone.chat(USER, "why?", "refused")
            told = await someone.end_of("refused")
            assert told.terminal is not None
            assert (told.terminal["code"], told.terminal["contents"]) == ("FORBIDDEN", IN_ANSWER.sentence.en)
            assert thoughts(frames(someone, "refused", "thinking")) == "a "
        await node.settled()


async def test_a_slow_reader_gets_fewer_and_larger_frames_and_costs_no_more_than_the_reasoning(node: OneNode) -> None:
    piece = "thinking about it ... " * 10
    sent = (piece * (MOST // len(piece) + 2))[:MOST]
    model = Model()
    async with (
        backend_of(node, model),
        device(node, "thinking") as quick,
        raw_socket(node.port, narrow=True) as slow,
    ):
        process = psutil.Process(node.now.process.pid)
        await slow.upgrade(f"/ws?{query(USER)}")
        await slow.send_frame(msgType="INIT", userId=USER, wants=["thinking"])
        await slow.until(msgType="INIT")
        await quick.chat(USER, "why?", "slow")
        before = process.memory_info().rss
        for _ in range(MOST // len(piece) + 10):  # a little more than is sent on
            model.says(delta(reasoning_content=piece))
        model.says(*ANSWER)
        assert (await quick.end_of("slow")).text == "The answer"
        assert process.memory_info().rss - before < 20 * MB
        await slow.until(event="done")
        found = [frame for frame in slow.texts if frame.get("event") == "thinking"]
        assert thoughts(found) == thoughts(frames(quick, "slow", "thinking")) == sent
        assert max(len(one["contents"]) for one in found) > 10_000
        assert len(found) < len(frames(quick, "slow", "thinking"))
