"""A hostile backend: its answers are bounded in the node and in Redis, and other sockets are not affected."""

import gzip
import json
from pathlib import Path
from typing import Any, cast

from imstream.texts import Text
from tests.support.blaster import blaster, chunked, head
from tests.support.one_node import OneNode, one_node
from tests.support.peer import Told
from tests.support.scripted_backend import DONE, chunk, event
from tests.support.servers import RedisServer

USER = 10001
MIB = 1 << 20
LIMIT = 50_000
STOP = event(chunk(finish_reason="stop")) + DONE

ENDLESS = [f"endless {number}" for number in range(6)]
WHOLE = {
    "half a character at the end": b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"\\ud800"}]}\n\n',
    "half a character in the usage": event(chunk("a")) + b'data: {"usage":{"\\ud800":1,"b":2}}\n\n' + STOP,
    "NUL": event(chunk("one\0two")) + STOP,
}
BROKEN = {
    "a bomb": head("Content-Encoding: gzip") + gzip.compress(b"data: {}\n\n" * (4 * MIB)),
    "a page": chunked(b"<p>" + b"<title" * (MIB // 24)),
    "an entity": chunked(b"<title>&#" + b"1" * 5000 + b";</title>"),
    "a number": chunked(b'data: {"error":{"detail":[{"loc":[%b],"msg":"a"}]}}\n\n' % (b"1" * 4300)),
    "interim responses": head(status="100 Continue") * 20_000,
}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
QUESTIONS = [*ENDLESS, *WHOLE, *BROKEN]
ANSWERS = {
    **{question: chunked(event(chunk("0123456789" * 100)) * (4 * MIB // 1000)) for question in ENDLESS},
    **{question: chunked(body) for question, body in WHOLE.items()},
    **BROKEN,
}


def answer_to(request: bytes) -> bytes:
    asked = json.loads(request or b"{}").get("messages")
    return ANSWERS[asked[-1]["content"]] if asked else NOT_FOUND  # else it is the check at the start


async def test_hostile_answers_are_bounded_and_leave_the_conversation_alone(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_answer": LIMIT, "max_attempts": 1, "retry_window": "1s"}
    settings["ai_breaker_failures"] = 1000
    with blaster(answer_to) as url:
        async with one_node(tmp_path, redis_server, url, **settings) as node:
            async with node.peer(USER, lang="en") as someone:
                await someone.chat(USER, "NUL", "before")
                text = (await someone.end_of("before")).text
                assert text == "one\ufffdtwo"

                memory, stored = peak_memory(node), redis_memory(node)
                for number, question in enumerate(QUESTIONS):
                    await someone.chat(USER, question, f"m{number}")
                for number, question in enumerate(QUESTIONS):
                    check(question, await someone.end_of(f"m{number}"))
                assert peak_memory(node) - memory < 16 * MIB
                assert redis_memory(node) - stored < 8 * MIB

                # The same socket and a history with that answer still work.
                history = [{"role": "user", "content": "NUL"}, {"role": "assistant", "content": text}]
                assert (await someone.chat(USER, "NUL", "again", history=history))["event"] == "accepted"
                assert (await someone.end_of("again")).text == text
            await node.settled()
            letters = node.dead()
            assert {letter["reason"] for letter in letters} == {"bad_stream", "backend_error", "encoded"}
            assert max(len(letter["error"]) for letter in letters) < 300


def check(question: str, told: Told) -> None:
    """Whether it has ended as expected."""
    assert told.terminal is not None
    if question in ENDLESS:
        assert (len(told.text), told.terminal["finishReason"]) == (LIMIT, "length")
    elif question in WHOLE:
        assert told.terminal["event"] == "done", question
    else:
        # A page, or an encoding: our configuration may be wrong.
        sentence = Text.AI_AWAY.en if question in {"a bomb", "a page", "an entity"} else Text.FAILED.en
        assert (told.terminal["event"], told.terminal["contents"]) == ("failed", sentence), question


def peak_memory(node: OneNode) -> int:
    """Peak memory of its process in bytes."""
    status = Path(f"/proc/{node.now.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def redis_memory(node: OneNode) -> int:
    found: int = cast("Any", node.redis.info("memory"))["used_memory"]
    return found
