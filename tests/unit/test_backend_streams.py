"""Answers of real servers on the wire."""

import asyncio
import json
from typing import Any

import pytest

from imstream.ai.backend import Completion
from imstream.errors import BackendError
from tests.support.asking import PROMPT, asking, cause
from tests.support.letting_go import Asker, lets_go
from tests.support.scripted_backend import DONE, Exchange, Framing, chunk, event, says, streams, usage_chunk
from tests.support.waiting import wait_until

STOP = event(chunk(finish_reason="stop"))
COUNTS = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


async def answer_to(*parts: bytes, framing: Framing = "chunked") -> tuple[str, Completion]:
    """The text and the completion of an answer whose body is sent in these parts."""
    async with asking(says(*parts, framing=framing)) as asked:
        completion = await asked.ask()
        assert "" not in asked.pieces
        return asked.text, completion


async def failure_of(*parts: bytes, framing: Framing = "chunked") -> BackendError:
    async with asking(says(*parts, framing=framing)) as asked:
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        return caught.value


# Fragmentation and framing

ANSWER = event(chunk("Hello ")) + event(chunk("你好😀")) + STOP + event(usage_chunk(**COUNTS)) + DONE


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
async def test_bytes_that_come_one_by_one_make_the_same_answer(line_end: bytes, framing: str) -> None:
    body = ANSWER.replace(b"\n", line_end)
    how: Any = len(body) if framing == "length" else framing
    parts = [body[at : at + 1] for at in range(len(body))]
    assert await answer_to(*parts, framing=how) == ("Hello 你好😀", Completion("stop", COUNTS))


@pytest.mark.parametrize("size", [2, 3, 7, 64, 100_000])
async def test_any_size_of_read_makes_the_same_answer(size: int) -> None:
    parts = [ANSWER[at : at + size] for at in range(0, len(ANSWER), size)]
    assert await answer_to(*parts) == ("Hello 你好😀", Completion("stop", COUNTS))


async def test_the_events_of_one_read_are_one_piece_and_those_of_another_are_another() -> None:
    async with asking(says(event(chunk("a")) + event(chunk("b")), event(chunk("c")), STOP + DONE)) as asked:
        await asked.ask()
        assert asked.pieces == ["ab", "c"]


async def test_text_is_given_out_as_soon_as_it_comes() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for number in range(3):
            await exchange.send(event(chunk(str(number))))
            await wait_until(lambda number=number: asked.pieces[number:] == [str(number)], f"piece {number}")
        await exchange.send(STOP, DONE)
        await exchange.end()

    async with asking(script) as asked:
        await asked.ask()
        assert asked.pieces == ["0", "1", "2"]


async def test_one_read_may_hold_thousands_of_chunks() -> None:
    comment = b"1\r\n:\r\n" * 20_000
    answer = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (b"\n", event(chunk("at last")), STOP, DONE))

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.write(comment + answer + b"0\r\n\r\n")

    async with asking(script) as asked:
        await asked.ask()
        assert asked.text == "at last"


async def test_one_http_chunk_may_hold_half_an_event_and_one_read_many_chunks() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.write(b"".join(b"1\r\n%c\r\n" % byte for byte in ANSWER) + b"0\r\n\r\n")

    async with asking(script) as asked:
        assert await asked.ask() == Completion("stop", COUNTS)
        assert asked.text == "Hello 你好😀"


# Events


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ANSWER.replace(b"data: ", b"data:"), id="data without a space"),
        pytest.param(ANSWER.replace(b"data: ", b"event: message\nid: 1\nretry: 10\ndata: "), id="other fields"),
        pytest.param(ANSWER.replace(b"data: ", b": keep-alive\n\n:\ndata: "), id="comments"),
        pytest.param(ANSWER.replace(b'"choices": ', b'\ndata: "choices": '), id="data in several lines"),
        pytest.param(b"\xef\xbb\xbf" + ANSWER, id="a byte order mark"),
        pytest.param(b"\n\n" + ANSWER, id="blank lines first"),
        pytest.param(event(chunk("")) + event(chunk()) + event({"choices": []}) + ANSWER, id="events without text"),
        pytest.param(
            event({"choices": [{"delta": {"role": "assistant", "content": None}}]}) + ANSWER, id="content null"
        ),
        pytest.param(event({"choices": [{"index": 0, "finish_reason": None}]}) + ANSWER, id="no delta"),
        pytest.param(event({"choices": [{"delta": {"reasoning_content": "hm"}}]}) + ANSWER, id="reasoning"),
        pytest.param(ANSWER + event(chunk("nothing counts after it")), id="more after the end"),
    ],
)
async def test_the_dialects_of_servers_say_the_same(body: bytes) -> None:
    assert await answer_to(body) == ("Hello 你好😀", Completion("stop", COUNTS))


async def test_reasoning_is_not_shown_and_not_lost_from_usage() -> None:
    usage = event(usage_chunk(completion_tokens=50, completion_tokens_details={"reasoning_tokens": 40}))
    reasoning = event({"choices": [{"delta": {"reasoning_content": "let me think"}}]})
    text, completion = await answer_to(reasoning, event(chunk("42")), STOP, usage, DONE)
    assert (text, completion.usage) == ("42", {"completion_tokens": 50, "reasoning_tokens": 40})


# The end


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize(
    ("end", "completion"),
    [
        pytest.param([STOP, event(usage_chunk(**COUNTS)), DONE], Completion("stop", COUNTS), id="everything"),
        pytest.param([STOP + event(usage_chunk(**COUNTS)) + DONE], Completion("stop", COUNTS), id="everything at once"),
        pytest.param([STOP, event(usage_chunk(**COUNTS))], Completion("stop", COUNTS), id="no [DONE]"),
        pytest.param([STOP], Completion("stop", None), id="a finish reason only"),
        pytest.param([DONE], Completion("stop", None), id="[DONE] only"),
        pytest.param([b"data: [DONE]"], Completion("stop", None), id="[DONE] without a line end"),
        pytest.param([event(chunk(finish_reason="length")), DONE], Completion("length", None), id="length"),
        pytest.param([STOP, event(chunk(" more")), DONE], Completion("stop", None), id="text after the finish reason"),
    ],
)
async def test_an_answer_is_whole_with_done_or_a_finish_reason(
    end: list[bytes], completion: Completion, framing: Framing
) -> None:
    text, got = await answer_to(event(chunk("Hello")), *end, framing=framing)
    assert got == completion
    assert text.startswith("Hello")
    assert ("more" in text) == (b"more" in b"".join(end))


@pytest.mark.parametrize("last", [b"", event(chunk("b"))[:-1], b"data: {", b": keep-alive\n\n"])
@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_an_orderly_end_without_either_is_a_broken_answer(last: bytes, framing: Framing) -> None:
    parts = (event(chunk("a")), last) if last else (event(chunk("a")),)
    error = await failure_of(*parts, framing=framing)
    assert error.kind in {"away", "broken"}
    assert error.reason == "broken_stream"


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("torn", [False, True])
async def test_a_connection_lost_within_the_answer_is_a_broken_answer(how: str, framing: str, torn: bool) -> None:  # noqa: FBT001 - a column
    async def script(exchange: Exchange) -> None:
        await exchange.start(framing=1000 if framing == "length" else "chunked")
        await exchange.send(event(chunk("a")))
        if torn:  # within an HTTP chunk and within a character
            await exchange.write(b"40\r\ndata: \xe4")
        await wait_until(lambda: asked.pieces == ["a"], "the text has come")
        getattr(exchange, how)()

    async with asking(script) as asked:
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        assert caught.value.reason == "broken_stream"


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_broken_answer_lets_go_of_who_took_it(how: str) -> None:
    come = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk("a")))
        await come.wait()
        getattr(exchange, how)()

    async def ask(asker: Asker) -> None:
        def take(text: str) -> None:
            asker.take(text)
            come.set()

        await asked.client.answer(PROMPT, on_text=take)

    async with asking(script) as asked:
        assert await lets_go(ask)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_lost_after_the_finish_reason_takes_nothing_away(how: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk("a")) + STOP)
        await wait_until(lambda: asked.pieces == ["a"], "the text has come")
        getattr(exchange, how)()

    async with asking(script) as asked:
        assert await asked.ask() == Completion("stop", None)


async def test_broken_chunk_framing_ends_with_the_idle_limit_at_the_latest() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk("a")))
        await exchange.write(b"no chunk size\r\n")
        await exchange.gone()

    async with asking(script, ai_idle_timeout="200ms") as asked:
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        assert caught.value.reason in {"broken_stream", "idle_timeout"}


# Errors inside a success


async def test_an_error_event_in_the_middle_ends_the_answer() -> None:
    passing = await failure_of(event(chunk("a")), event({"error": {"message": "try later", "code": 503}}), DONE)
    assert passing.kind in {"away", "broken"}
    assert (passing.reason, cause(passing)) == ("backend_error", "try later")
    lasting = await failure_of(event(chunk("a")), event({"error": {"code": "context_length_exceeded"}}), DONE)
    assert lasting.kind in {"impossible", "misconfigured"}
    assert lasting.reason == "context_too_long"


@pytest.mark.parametrize(
    "payload",
    [b"data: {\n\n", b"data: hello\n\n", b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', b"data: 7\n\n"],
    ids=["half an object", "no JSON", "no UTF-8", "no object"],
)
async def test_invalid_events_count_only_if_the_answer_is_not_whole(payload: bytes) -> None:
    assert await answer_to(event(chunk("a")), payload, STOP, DONE) == ("a", Completion("stop", None))
    error = await failure_of(event(chunk("a")), payload)
    assert (error.kind, error.reason) == ("broken", "bad_stream")


async def test_an_event_without_end_is_refused_and_the_connection_closed() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b"data: ", *([b"x" * (1 << 17)] * 34))
        await exchange.gone()

    async with asking(script) as asked:
        with pytest.raises(BackendError, match="too_large: an event of more than"):
            await asked.ask()


# Answers that are not streamed


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream", "text/plain"])
async def test_an_answer_that_is_not_streamed_is_taken(content_type: str) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello 你好"}, "finish_reason": "stop"}
    body = json.dumps({"object": "chat.completion", "choices": [choice], "usage": COUNTS}).encode()
    async with asking(says(body[:50], body[50:], content_type=content_type, framing=len(body))) as asked:
        assert await asked.ask() == Completion("stop", COUNTS)
        assert asked.pieces == ["Hello 你好"]


async def test_an_error_object_in_a_success_is_an_error() -> None:
    error = await failure_of(b'{"error": {"message": "Model is loading", "type": "server_error"}}')
    assert error.kind in {"away", "broken"}
    assert (error.reason, cause(error)) == ("overloaded", "server_error: Model is loading")


async def test_a_page_in_a_success_is_a_bad_stream() -> None:
    error = await failure_of(b"<html><title>Welcome</title>" + b"<p>hello</p>" * 1000)
    assert (error.kind, error.reason) == ("misconfigured", "bad_stream")
    assert cause(error) == "a page instead of an answer: Welcome"


# The connection after an answer


async def test_one_connection_carries_one_answer_after_another() -> None:
    async with asking(always=streams("a", usage=COUNTS)) as asked:
        for _ in range(5):
            await asked.ask()
        assert asked.text == "aaaaa"
        assert [request.connection for request in asked.backend.requests] == [0] * 5


async def test_answers_at_the_same_time_do_not_wait_for_each_other() -> None:
    async def script(exchange: Exchange) -> None:
        await wait_until(lambda: len(asked.backend.requests) == 5, "all requests have come")
        await streams("a")(exchange)

    async with asking(always=script, concurrency=1) as asked:
        await asyncio.gather(*(asked.ask() for _ in range(5)))
        assert asked.backend.connections == 5
