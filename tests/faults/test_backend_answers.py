"""Odd answers of real backends, seen from a user's socket: answers, retries and refusals."""

from dataclasses import dataclass
from pathlib import Path

from imstream.codes import Code
from imstream.texts import Text
from tests.support.backend_scripts import by_question, question_of
from tests.support.one_node import one_node
from tests.support.scripted_backend import DONE, Script, chunk, event, refuses, says, scripted_backend
from tests.support.servers import RedisServer

USER = 10001
ATTEMPTS = 3

STOP = event(chunk(finish_reason="stop"))
WHOLE = event(chunk("Hel")) + event(chunk("lo")) + STOP
REASONING = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})


@dataclass
class End:
    """How a message ends, and with how many calls."""

    script: Script
    event: str = "done"
    text: str = "Hello"
    finish: str | None = "stop"
    code: Code = Code.SUCCESS
    sentence: Text | None = None
    reason: str = ""
    calls: int = 1


def empty(*parts: bytes, reason: str = "empty_answer") -> End:
    return End(says(*parts), "failed", "", None, Code.AI_FAILED, Text.FAILED, reason, ATTEMPTS)


def refused(script: Script, reason: str, code: Code = Code.AI_FAILED, sentence: Text = Text.REFUSED) -> End:
    return End(script, "failed", "", None, code, sentence, reason)


FILTERED = event(chunk(finish_reason="content_filter"))
ENDS = {
    # Success needs evidence
    "no text": empty(STOP, DONE),
    "only reasoning": empty(REASONING, STOP, DONE),
    "an end alone": empty(DONE),
    "an abort": empty(event(chunk("half")), event(chunk(finish_reason="abort")), DONE, reason="aborted"),
    "an answer that was cut": End(says(event(chunk("Hello", finish_reason="length")), DONE), finish="length"),
    "a filtered answer": End(says(event(chunk("Hello")), FILTERED, DONE), finish="content_filter"),
    "a filter": refused(says(FILTERED, DONE), "content_filter", Code.FORBIDDEN),
    "an inspection": refused(
        says(event({"error": {"code": "data_inspection_failed", "message": "no"}})), "content_filter", Code.FORBIDDEN
    ),
    "tools": refused(
        says(event({"choices": [{"delta": {"tool_calls": [{}]}}]}), event(chunk(finish_reason="tool_calls")), DONE),
        "tool_calls",
        sentence=Text.FAILED,
    ),
    "too long": refused(says(b'error: {"code": 400, "message": "exceeds the context size"}\n\n'), "context_too_long"),
    "too many tokens": refused(
        refuses(429, '{"error": {"message": "Request too large: Limit 30000, Requested 30601"}}'), "context_too_long"
    ),
    "a refusal": End(says(event({"choices": [{"delta": {"refusal": "Hello"}}]}), STOP, DONE), finish="refusal"),
    "every chunk is the last": End(says(*(event(chunk(part, finish_reason="stop")) for part in ("Hel", "lo")), DONE)),
    "a message": End(says(event({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}), DONE)),
    # A whole answer is not lost
    "a blank": End(says(WHOLE, b"data: [DONE] \n\n")),
    "an error afterwards": End(says(WHOLE, event({"error": {"message": "usage could not be recorded"}}))),
    "pings": End(says(b"event: ping\ndata: 17\n\n", WHOLE, b"data: ping\n\n", DONE)),
    "framed twice": End(says((WHOLE + DONE).replace(b"data: ", b"data: data: "))),
    "a large event": End(says(event({**chunk("Hello"), "prompt": "x" * (3 << 19)}), STOP, DONE)),
    "an event that is too large": refused(
        says(event({**chunk("Hello"), "prompt": "x" * (5 << 20)}), STOP, DONE), "too_large", sentence=Text.FAILED
    ),
}


async def test_odd_answers_end_as_they_should(redis_server: RedisServer, tmp_path: Path) -> None:
    scripts = {question: [end.script] * end.calls for question, end in ENDS.items()}
    async with (
        scripted_backend(always=by_question(scripts)) as backend,
        one_node(tmp_path, redis_server, backend.url, max_attempts=ATTEMPTS) as node,
    ):
        async with node.peer(USER, lang="en") as someone:
            for number, (question, end) in enumerate(ENDS.items()):
                await someone.chat(USER, question, f"m{number}")
                told = await someone.end_of(f"m{number}")
                assert told.terminal is not None
                assert (told.terminal["event"], told.terminal["code"]) == (end.event, end.code), question
                assert told.terminal.get("finishReason") == end.finish, question
                assert told.terminal.get("contents") == (end.sentence.en if end.sentence else None), question
                assert told.text == end.text or end.event == "failed", question
        await node.settled()
        letters = {letter["contents"]: letter for letter in node.dead()}
    calls = [question_of(request) for request in backend.requests]
    assert {question: calls.count(question) for question in ENDS} == {name: end.calls for name, end in ENDS.items()}
    assert {name: letter["reason"] for name, letter in letters.items()} == {
        name: end.reason for name, end in ENDS.items() if end.event == "failed"
    }
    assert all(f"({backend.url}/chat/completions" in letter["error"] for letter in letters.values())
