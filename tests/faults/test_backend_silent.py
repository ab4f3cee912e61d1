"""A silent backend: after one of two time limits the call is closed, and another attempt is made."""

import asyncio
from pathlib import Path

from tests.support.backend_scripts import by_question, question_of
from tests.support.one_node import one_node
from tests.support.scripted_backend import Exchange, chunk, event, hangs, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.waiting import SLOW

USER = 10001

BEGINNING = event(chunk("It begins and then"))


async def test_silence_before_and_between_tokens_ends_the_call_and_it_is_made_again(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    # Different limits, to tell which one applied.
    first, idle, spread = 0.9, 0.3, 0.8 * SLOW
    answer = streams("The answer")
    scripts = {
        "no response": [hangs(head=False), answer],
        "no token": [hangs(), answer],
        "only comments": [hangs(b": still alive\n\n", b": and kicking\n\n"), answer],
        "no second token": [hangs(BEGINNING), answer],
    }
    limits = {
        "ai_first_token_timeout": f"{first}s",
        "ai_load_timeout": f"{first}s",
        "ai_idle_timeout": f"{idle}s",
    }
    async with (
        scripted_backend(always=by_question(scripts)) as backend,
        one_node(tmp_path, redis_server, backend.url, **limits) as node,
    ):
        async with node.peer(USER) as someone:
            for question in scripts:
                await someone.chat(USER, question, question.replace(" ", "-"))
            for question in scripts:
                told = await someone.end_of(question.replace(" ", "-"))
                assert told.text == "The answer"
                # Silence before the answer uses up no attempt: the backend is away.
                broke = question == "no second token"
                assert (told.events.count("restart"), told.attempt) == ((1, 2) if broke else (0, 1)), question
        assert len(backend.requests) == 8
        calls = {question_of(request): request for request in backend.requests[:4]}
        for question, call in calls.items():
            lasted = await call.gone() - call.received_at  # the call was closed, not left open
            # The backend has received it later than the node has sent it.
            if question == "no second token":
                assert lasted < idle + spread, question
            else:
                assert lasted > idle, question
        log = node.now.process.output()
        assert log.count('"reason":"first_token_timeout"') == 3
        assert log.count('"reason":"idle_timeout"') == 1
        await node.settled()


async def test_a_slow_answer_that_goes_on_is_left_alone(redis_server: RedisServer, tmp_path: Path) -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.start()
        for n in range(8):  # longer than both limits together, but never silent for as long as one of them
            await exchange.send(event(chunk(f"{n} ")))
            await asyncio.sleep(0.3)
        await exchange.send(event(chunk(finish_reason="stop")))
        await exchange.end()

    limits = {"ai_first_token_timeout": "1s", "ai_idle_timeout": "1200ms"}
    async with (
        scripted_backend(always=slow) as backend,
        one_node(tmp_path, redis_server, backend.url, **limits) as node,
    ):
        async with node.peer(USER) as someone:
            await someone.chat(USER, "hello", "m1")
            told = await someone.end_of("m1")
        assert told.text == "0 1 2 3 4 5 6 7 "
        assert "restart" not in told.events
        assert len(backend.requests) == 1
        await node.settled()
