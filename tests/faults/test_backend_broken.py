"""An answer breaks off: a new attempt begins, the client sees a restart, and answers are never mixed."""

from pathlib import Path

import pytest

from imstream.texts import Text
from tests.support.backend_scripts import breaks_off, by_question
from tests.support.one_node import one_node
from tests.support.scripted_backend import chunk, event, refuses, says, scripted_backend, streams
from tests.support.servers import RedisServer

USER = 10001

WRONG = event(chunk("Half of a wrong 答案 "))
WHOLE = ("The whole ", "right 答案 😀")


BROKEN = {
    "reset in the middle": breaks_off(WRONG, reset=True),
    "closed in the middle": breaks_off(WRONG, WRONG),
    "closed within an event": breaks_off(WRONG, WRONG[:40]),
    "closed within a character": breaks_off(WRONG, 'data: {"choices":[{"delta":{"content":"答'.encode()[:-1]),
    "ends without an end mark": says(WRONG),
    "ends without anything": says(),
    "ends with its connection": says(WRONG, framing="close"),
    "less than its length": breaks_off(WRONG, framing=10_000),
    "an error in the middle": says(WRONG, event({"error": {"message": "overloaded", "code": 503}})),
}


async def test_a_broken_answer_is_made_again_and_never_spliced(redis_server: RedisServer, tmp_path: Path) -> None:
    questions = {f"m{number}": name for number, name in enumerate(BROKEN)}
    # Each breaks off twice, then the answer is complete.
    scripts = {name: [script, script, streams(*WHOLE)] for name, script in BROKEN.items()}
    async with (
        scripted_backend(always=by_question(scripts)) as backend,
        one_node(tmp_path, redis_server, backend.url, ai_breaker_failures=1000) as node,
    ):
        async with node.peer(USER, lang="en") as someone:
            for message_id, question in questions.items():
                await someone.chat(USER, question, message_id)
            for message_id, question in questions.items():
                told = await someone.end_of(message_id)
                assert told.text == "".join(WHOLE), question
                # Without text of an attempt, no restart is needed.
                assert told.events.count("restart") <= 2, question
                assert told.attempt <= 3, question  # a connection that ends without a response is no attempt
        for message_id in questions:
            assert node.recorded(USER, message_id) == ("done", "".join(WHOLE))
            assert [entry["event"] for entry in node.record(USER, message_id)].count("opened") <= 3
        assert len(backend.requests) == 3 * len(BROKEN)
        await node.settled()


async def test_after_the_last_attempt_the_client_is_told_and_the_request_is_kept_for_the_operator(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=says(WRONG)) as backend,
        one_node(tmp_path, redis_server, backend.url, max_attempts=3) as node,
    ):
        async with node.peer(USER, lang="en") as someone:
            await someone.chat(USER, "hello", "m1")
            failed = (await someone.end_of("m1")).terminal
            assert failed is not None
            assert (failed["event"], failed["code"], failed["contents"]) == ("failed", "AI_FAILED", Text.FAILED.en)
        await node.settled()
        [letter] = node.dead()
        assert (letter["reason"], letter["attempts"], letter["contents"]) == ("broken_stream", "3", "hello")
        assert len(backend.requests) == 3


@pytest.mark.parametrize(
    ("status", "reason", "text"), [(400, "http_400", Text.REFUSED), (418, "http_418", Text.FAILED)]
)
async def test_what_can_never_succeed_is_not_tried_again_and_holds_up_nobody(
    status: int, reason: str, text: Text, redis_server: RedisServer, tmp_path: Path
) -> None:
    scripts = {"bad": [refuses(status, '{"error": {"message": "no"}}')]}
    async with (
        scripted_backend(always=by_question(scripts, otherwise=streams(*WHOLE))) as backend,
        one_node(tmp_path, redis_server, backend.url, concurrency=1) as node,
    ):
        async with node.peer(USER) as someone:
            await someone.chat(USER, "bad", "m1")
            await someone.chat(USER, "good", "m2")
            failed = (await someone.end_of("m1")).terminal
            assert failed is not None
            assert (failed["event"], failed["contents"]) == ("failed", text.zh)
            assert (await someone.end_of("m2")).text == "".join(WHOLE)
        await node.settled()
        assert [letter["reason"] for letter in node.dead()] == [reason]
        assert len(backend.requests) == 2
