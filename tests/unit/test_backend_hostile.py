"""Hostile backends: responses have bounded costs and end in a short error."""

import asyncio
import gc
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from pydantic_core import to_json

from imstream.ai.backend import OpenAIBackend
from imstream.ai.intake import CHUNK
from imstream.ai.moderations import ModerationClient
from imstream.errors import BackendError
from imstream.settings import Settings
from tests.support.asking import PROMPT, asking
from tests.support.blaster import Cost, blaster, chunked, head, measured
from tests.support.scripted_backend import DONE, Exchange, chunk, event, streams, usage_chunk

MIB = 1 << 20
LIMIT = 262_144
STOP = event(chunk(finish_reason="stop"))
SSE = "Content-Type: text/event-stream"


def filled(pattern: bytes, size: int = MIB) -> bytes:
    return pattern * (size // len(pattern))


def wrapped(value: bytes, where: bytes = b"x") -> bytes:
    """A complete answer with this JSON in a field of an event."""
    return b'data: {"%b":%b,"choices":[]}\n\n' % (where, value) + event(chunk("a")) + STOP + DONE


def finishing(reason: str) -> bytes:
    return chunked(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":%b}]}\n\n' % reason.encode() + DONE)


WORDS = MIB // len(event(chunk("word ")))
# Numbered: equal chunks are read by comparison, in less time than others.
PLAIN = chunked(
    b"".join(event(chunk("word ")).replace(b"{", b'{"n":%d,' % n, 1) for n in range(WORDS))
    + STOP
    + event(usage_chunk(total_tokens=7))
    + DONE,
    SSE,
)


@dataclass
class CallResult:
    """The result of a call: the completion or the error, and the text."""

    end: str
    error: BackendError | None
    pieces: list[str]
    usage: dict[str, int] | None
    cost: Cost


async def call(answer: bytes | Callable[[bytes], bytes], **settings: Any) -> CallResult:  # noqa: ANN401 - any setting
    """Call a backend that answers like this."""
    give = answer if callable(answer) else lambda _: answer
    pieces = list[str]()
    with blaster(give) as url:
        async with OpenAIBackend(Settings.load(ai_url=url, ai_usage="no", **settings)) as client, measured() as cost:
            try:
                completion = await client.answer(PROMPT, on_text=pieces.append)
            except BackendError as error:
                return CallResult(f"{error.kind} {error.reason}", error, pieces, None, cost)
    return CallResult(completion.finish_reason, None, pieces, completion.usage, cost)


BAD = "broken bad_stream"
BROKEN = "broken broken_stream"
LARGE = "impossible too_large"
WRONG = "misconfigured bad_stream"
ENCODED = "misconfigured encoded"
LONG = 9 * MIB // 2  # more than an event may have
BOMB = gzip.compress(gzip.compress(b"\n" * (256 * MIB), 1), 1)

HOSTILE: dict[str, tuple[bytes, str]] = {
    # Large and empty
    "empty events": (chunked(filled(b"data:{}\n\n", 3 * MIB // 2), SSE), LARGE),
    "comments": (chunked(b"data: {}\n\n" + filled(b":\n", 3 * MIB // 2), SSE), LARGE),
    "blank lines": (chunked(b"data: {}\n\n" + filled(b"\n", 3 * MIB // 2), SSE), LARGE),
    "carriage returns": (chunked(b"data: {}\n\n" + filled(b"\r", 3 * MIB // 2), SSE), LARGE),
    "blanks before anything": (chunked(filled(b" \n", 3 * MIB // 2), SSE), LARGE),
    "data lines without an end": (chunked(filled(b"data\n", LONG), SSE), LARGE),
    "a line without an end": (chunked(b"data: " + filled(b"x", LONG), SSE), LARGE),
    "hidden reasoning": (
        chunked(filled(b'data:{"choices":[{"delta":{"r":1}}]}\n\n') + event(chunk("a")) + STOP + DONE, SSE),
        "stop",
    ),
    "after the finish reason": (chunked(event(chunk("a")) + STOP + filled(b":\n", 3 * MIB // 2), SSE), "stop"),
    # JSON that is expensive to parse
    "many lists": (chunked(wrapped(b"[" + filled(b"[],", 9 * MIB // 10) + b"[]]"), SSE), "stop"),
    "many keys": (
        chunked(wrapped(b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}"), SSE),
        "stop",
    ),
    "many escapes": (chunked(wrapped(b'"' + filled(b"\\u4e2d", 9 * MIB // 10) + b'"'), SSE), "stop"),
    "half characters": (chunked(wrapped(b'"' + filled(b"\\ud800", 9 * MIB // 10) + b'"'), SSE), "stop"),
    "deep nesting": (chunked(wrapped(filled(b"[", 9 * MIB // 10)), SSE), "stop"),
    "a long number": (chunked(wrapped(filled(b"1", 9 * MIB // 10)), SSE), "stop"),
    "a long fraction": (chunked(wrapped(b"1." + filled(b"1", 9 * MIB // 10)), SSE), "stop"),
    "a document that is too long": (chunked(b'{"x":"' + filled(b"x", 9 * MIB)), LARGE),
    "a document of many lists": (chunked(b"[" + filled(b"[],", 9 * MIB // 10) + b"[]]"), BAD),
    # HTML
    "titles that begin": (chunked(b"<p>" + filled(b"<title", MIB // 8)), WRONG),
    "titles": (chunked(b"<p>" + filled(b"<title>", MIB // 8)), WRONG),
    "scripts": (chunked(filled(b"<script></script  ", MIB // 8)), WRONG),
    "a number with thousands of digits": (chunked(b"<title>&#" + filled(b"1", 5000) + b";</title>"), WRONG),
    "a document that is cut": (chunked(b"[" + filled(b"[],", 9 * MIB // 10) + b"[]]")[:-5], BROKEN),
    "a page that is too long": (chunked(filled(b"<title>", 9 * MIB)), LARGE),
    # HTTP
    "chunks of one byte": (head("Transfer-Encoding: chunked") + filled(b"1\r\n:\r\n", 3 * MIB // 2), LARGE),
    "chunk extensions": (head("Transfer-Encoding: chunked") + b"1;" + filled(b"a", 9 * MIB), LARGE),
    "chunk sizes beyond all bounds": (head("Transfer-Encoding: chunked") + b"f" * 17 + b"\r\n:\r\n", BAD),
    "trailers without end": (
        head("Transfer-Encoding: chunked") + b"6\r\n: ab\n\n\r\n0\r\n" + filled(b"a: b\r\n"),
        BAD,
    ),
    "interim responses": (filled(b"HTTP/1.1 100 \r\n\r\n"), BAD),
    "interim responses with fields": (filled(head("A: b", "Link: </a>", status="103 Early Hints")), BAD),
    "many fields": (head(*["A: b"] * 200_000), BAD),
    "long fields": (head(*["A: " + "b" * 8000] * 120), BAD),
    "a field without end": (b"HTTP/1.1 200 OK\r\nA: " + filled(b"b"), BAD),
    "a status line without end": (b"HTTP/1.1 200 " + filled(b"b"), BAD),
    "a status beyond all": (head("Content-Length: 0", status="999 No"), "away http_999"),
    "another protocol": (
        head("Upgrade: websocket", "Connection: upgrade", status="101 Up") + filled(b"x"),
        "misconfigured http_101",
    ),
    "nothing": (head(status="204 No Content"), BROKEN),
    # Encodings
    "a bomb": (head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB, ENCODED),
    "br": (chunked(event(chunk("a")) + STOP + DONE, "Content-Encoding: br"), ENCODED),
    "an unknown encoding": (chunked(event(chunk("a")) + STOP + DONE, "Content-Encoding: x-own"), ENCODED),
    "two encodings": (chunked(STOP + DONE, "Content-Encoding: identity", "Content-Encoding: identity, gzip"), ENCODED),
    "identity": (chunked(event(chunk("a")) + STOP + DONE, "Content-Encoding: Identity"), "stop"),
    "a bomb in a refusal": (
        head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}", status="503 Away") + BOMB,
        "away http_503",
    ),
    # Fields
    "a finish reason of half a character": (finishing(r'"\ud800"'), "other"),
    "a finish reason that is long": (finishing(json.dumps("x" * 500_000)), "other"),
    "a finish reason with a sign": (finishing(r'"stop\u202e"'), "other"),
    "a finish reason that is a number": (finishing("7"), "other"),
    "an error of half a character": (
        chunked(b'data: {"error":{"message":"\\ud800\\u202e","code":"\\ud800"}}\n\n'),
        "broken backend_error",
    ),
    "a long error": (
        chunked(event({"error": {"message": "x\u202e" * 200_000, "code": "y" * 200_000}})),
        "broken backend_error",
    ),
    "an error of many fields": (
        chunked(event({"error": {"detail": [{"loc": [10**4000, [["x"] * 9], "a"], "msg": "b"}] * 50}})),
        "broken backend_error",
    ),
    "content of numbers": (
        chunked(event({"choices": [{"delta": {"content": [{"type": "text", "text": 10**4200}]}}]}) + STOP),
        "broken empty_answer",
    ),
    "an answer in one event": (chunked(event(chunk("x" * 1_000_000)) + DONE, SSE), "length"),
    "an answer without end": (chunked(filled(event(chunk("word " * 40)), 9 * MIB), SSE), "length"),
}


@pytest.fixture(autouse=True)
def collected_as_in_a_node() -> Iterator[None]:
    """Configures the garbage collector as a node does: it determines the cost of many new objects.

    Coverage is not measured meanwhile: it doubles the cost of a line of Python, and not that of parsers in C.
    """
    before, trace = gc.get_threshold(), sys.gettrace()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    sys.settrace(None)
    yield
    sys.settrace(trace)
    gc.set_threshold(*before)
    gc.unfreeze()


_PLAIN_COSTS: list[float] = []


async def plain_cost() -> float:
    """CPU seconds of a plain answer of about a mebibyte: the median of three."""
    while len(_PLAIN_COSTS) < 3:
        plain = await call(PLAIN)
        assert (plain.end, "".join(plain.pieces)) == ("stop", "word " * WORDS)
        assert plain.usage == {"total_tokens": 7}
        _PLAIN_COSTS.append(plain.cost.total)
    return sorted(_PLAIN_COSTS)[1]


@pytest.mark.parametrize("row", HOSTILE)
async def test_a_hostile_answer_costs_little_and_is_reported_in_a_short_line(row: str) -> None:
    plain = await plain_cost()
    answer, end = HOSTILE[row]
    one = await call(answer)
    assert one.end == end, one.error
    assert max(map(len, one.pieces), default=0) <= CHUNK
    assert sum(map(len, one.pieces)) <= LIMIT
    if end == "length":
        assert sum(map(len, one.pieces)) == LIMIT
    if one.error is not None:
        assert len(str(one.error)) < 300
        assert str(one.error).isprintable()
    assert one.cost.total < 12 * plain, f"{one.cost.total / plain:.1f} times a plain answer of a mebibyte"
    assert one.cost.pause < 4 * plain, f"a pause of {one.cost.pause / plain:.1f} times a plain answer of a mebibyte"


async def at_once(answer: bytes, number: int = 8) -> tuple[list[Any], Cost]:
    """The completions or errors of calls that begin together, and their cost."""
    with blaster(lambda _: answer) as url:
        async with OpenAIBackend(Settings.load(ai_url=url)) as client, measured() as cost:
            calls = [client.answer(PROMPT, on_text=lambda _: None) for _ in range(number)]
            return await asyncio.gather(*calls, return_exceptions=True), cost


@pytest.mark.long  # compares times: beside other processes of a busy machine it may pass the limit
@pytest.mark.parametrize("row", ["many lists", "a document of many lists", "a document that is cut"])
async def test_many_hostile_answers_at_once_hold_up_the_loop_no_longer_than_one(row: str) -> None:
    answer, end = HOSTILE[row]
    pauses = []
    for _ in range(3):  # in turn with plain answers: the speed of a machine changes with its other processes
        plain = (await call(PLAIN)).cost.total
        results, cost = await at_once(answer)
        pauses.append(cost.pause / plain)
        for got in results:
            assert (f"{got.kind} {got.reason}" if isinstance(got, BackendError) else got.finish_reason) == end
    assert sorted(pauses)[1] < 3.5, f"pauses of {pauses} times a plain answer of a mebibyte"


@pytest.mark.parametrize("error", ["", '"error":{"code":"overloaded"},'])
@pytest.mark.parametrize("kind", ["document", "event"])
async def test_an_error_does_not_keep_the_answer_in_memory(kind: str, error: str) -> None:
    value = b'{%b"choices":7,"x":[%b[]]}' % (error.encode(), filled(b"[],", MIB // 10))
    answer = chunked(value if kind == "document" else b"data: %b\n\n" % value)
    gc.collect()
    before = len(gc.get_objects())
    results, _ = await at_once(answer, 2)
    assert all(isinstance(got, BackendError) for got in results)
    assert len(gc.get_objects()) - before < 10_000  # of 35,000 lists in each


async def test_absurd_waits_are_an_hour_at_most_or_none() -> None:
    for value, seconds in (("9" * 4000, 3600), ("1e999", 3600), ("-1", 0), ("\xb2", None), ("Mon, 99 Nov 9999", None)):
        answer = head(f"Retry-After: {value}", "Content-Length: 0", status="429 Slow")
        error = (await call(answer)).error
        assert error is not None
        assert error.kind in {"away", "broken"}
        assert error.retry_after == (None if seconds is None else timedelta(seconds=seconds)), value[:20]


async def test_usage_is_a_few_counts_with_plain_names() -> None:
    usage = {"total_tokens": 8, "negative": -1, "large": 10**400, "true": True, "a\u202eb": 1, "half\ud800": 1}
    many = {f"count_{number}": number for number in range(5000)}
    details = {"completion_tokens_details": {"reasoning_tokens": -5}, "prompt_tokens_details": {"cached_tokens": 3}}
    end = event(chunk("a")) + STOP + b"data: " + json.dumps({"usage": usage | many | details}).encode() + b"\n\n" + DONE
    kept = (await call(chunked(end))).usage
    assert kept is not None
    assert kept.items() >= {"total_tokens": 8, "count_0": 0}.items()
    assert len(kept) <= 18
    assert all(re.fullmatch("[a-z_0-9]+", name) and 0 <= value <= 2**53 for name, value in kept.items())


async def test_text_that_clients_could_not_send_back_is_replaced() -> None:
    halves = b'data: {"choices":[{"delta":{"content":"a\\u0000b\\ud800c\\ude00\\u0000"}}]}\n\n'
    one = await call(chunked(halves + event(chunk("d\0")) + STOP + DONE))
    assert "".join(one.pieces) == "a\ufffdb\ufffdc\ufffd\ufffdd\ufffd"
    document = b'{"choices":[{"message":{"content":"a\\u0000\\ud800 b"}}]}'
    assert "".join((await call(chunked(document))).pieces) == "a\ufffd\ufffd b"


@pytest.mark.parametrize("limit", [1, 7, 5000])
async def test_an_answer_ends_at_its_limit_however_it_comes_and_so_does_the_call(limit: int) -> None:
    text = "答a😀 " * 5000
    events = b"".join(event(chunk(text[at : at + 3])) for at in range(0, len(text), 3))
    document = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
    for answer in (chunked(events, size=1000), chunked(event(chunk(text))), chunked(document)):
        one = await call(answer, max_answer=limit)
        assert (one.end, "".join(one.pieces)) == ("length", text[:limit])

    async def endless(exchange: Exchange) -> None:
        await exchange.start()
        while exchange.request.closed_by_peer_at is None:
            await exchange.send(event(chunk("word ")))

    async with asking(endless, max_answer=limit) as asked:
        assert (await asked.ask()).finish_reason == "length"
        assert len(asked.text) == limit
        await asked.backend.requests[0].gone()


async def test_an_answer_of_exactly_the_limit_is_not_cut() -> None:
    one = await call(chunked(event(chunk("12345")) + STOP + DONE), max_answer=5)
    assert (one.end, one.pieces) == ("stop", ["12345"])


async def test_an_unrequested_response_is_not_the_answer_to_the_next_request() -> None:
    async def twice(exchange: Exchange) -> None:
        wrong = event(chunk("for somebody else")) + STOP + DONE
        await exchange.start()
        await exchange.send(event(chunk("a")), STOP + DONE)
        await exchange.write(b"0\r\n\r\n" + chunked(wrong) + chunked(wrong))

    async with asking(twice, streams("b"), streams("c")) as asked:
        await asked.ask()
        for _ in range(2):
            try:
                await asked.ask()
            except BackendError as error:
                assert error.reason == "connection_lost"  # noqa: PT017 - may happen to the first call, which is then retried
        assert asked.text in {"abc", "ab"}


async def test_a_body_whose_framing_breaks_is_broken_at_once() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(event(chunk("a")))
        await exchange.write(b"no chunk size\r\n")
        await exchange.gone()

    async with asking(script) as asked:
        with pytest.raises(BackendError, match="broken_stream"):
            await asked.ask()


# The moderation service

CLEAN = b'{"results":[{"flagged":false}]}'
MANY = {f"\u202e{number}": True for number in range(9000)}
MODERATION: dict[str, tuple[bytes, str]] = {
    "a bomb": (head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB, "bad_answer"),
    "an encoding": (chunked(CLEAN, "Content-Encoding: br"), "bad_answer"),
    "too much": (chunked(filled(b" ", 9 * MIB)), "bad_answer"),
    "many lists": (chunked(b'{"results":[' + filled(b"[],", MIB // 5) + b"[]]}"), "wrong_number"),
    "many small chunks": (chunked(filled(b" ", MIB // 20) + CLEAN, size=1), ""),
    "interim responses": (filled(b"HTTP/1.1 100 \r\n\r\n"), "bad_stream"),
    "a redirect": (head("Location: http://127.0.0.1:1/", "Content-Length: 0", status="307 There"), "http_307"),
    "a long error": (chunked(json.dumps({"error": {"message": "x\0\u202e" * 20_000}}).encode()), "backend_error"),
    "many categories": (
        chunked(json.dumps({"results": [{"flagged": True, "categories": MANY}]}).encode()),
        "flagged",
    ),
}


@pytest.mark.parametrize("row", MODERATION)
async def test_a_hostile_moderation_costs_little_and_is_reported_in_a_short_line(row: str) -> None:
    answer, end = MODERATION[row]
    plain = await plain_cost()
    with blaster(lambda _: answer) as url:
        settings = Settings.load(moderation_url=url, moderation_timeout="20s")
        async with ModerationClient(settings) as client, measured() as cost:
            try:
                [found] = await client.moderate(["x"])
                got, text = "flagged" if found.flagged else "", found.categories
            except BackendError as error:
                got, text = error.reason, str(error)
    assert got == end
    assert len(text) < 300
    assert text.isprintable()
    assert cost.total < 12 * plain, f"{cost.total / plain:.1f} times a plain answer of a mebibyte"


# Any bytes

SEEDS = [
    chunked(event(chunk("a😀")) + event(chunk("b", finish_reason="stop")) + event(usage_chunk(total_tokens=1)) + DONE),
    chunked(b'{"choices":[{"message":{"content":"a\\ud83d"},"finish_reason":"stop"}],"usage":{"total_tokens":8}}'),
    chunked(event({"error": {"message": "no", "code": "x", "detail": [{"loc": ["a", 1], "msg": "b"}]}})),
    chunked(b"<html><title>Away &amp; gone</title><script>x</script></html>", "Content-Encoding: identity"),
    head("Retry-After: 7", "Content-Length: 27", status="429 Slow") + b'{"error":{"message":"slow"}}',
    head("Retry-After: Mon, 23 Nov 2026 12:00:20 GMT", status="503 Away") + b'{"detail":[{"loc":["a"],"msg":"b"}]}',
    head(status="103 Early Hints") + chunked(event(chunk("a")) + STOP + DONE, "Set-Cookie: a=b; Path=/"),
]
SPICE = [
    b"\r\n",
    b"\n\n",
    b"\0",
    b"\xff",
    b"\\ud800",
    b"9" * 5000,
    b"[" * 300,
    b"data: ",
    b"HTTP/1.1 100 \r\n\r\n",
    b"0\r\n\r\n",
]
SPICE += [b"<title", b"&#", b'"', b"Content-Encoding: gzip\r\n", b"Content-Length: 5\r\n", b"null", b"-1", b"1e999"]


def spoiled(random: Random) -> bytes:
    """A corrupted response."""
    answer = random.choice(SEEDS)
    for _ in range(random.randint(1, 4)):
        at, other = sorted(random.choices(range(len(answer) + 1), k=2))
        middle = random.choice(
            [b"", answer[at:other] * 2, random.choice(SPICE), random.choice(SEEDS), random.randbytes(3)]
        )
        end = random.choice([at, other])
        answer = answer[:at] + middle + answer[end:]
    return answer


@pytest.mark.parametrize("number", [300, pytest.param(20_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_any_bytes_are_an_answer_or_an_error_of_the_backend(number: int) -> None:
    random = Random(number)  # noqa: S311 - no secrets
    answer = b""
    with blaster(lambda _: answer) as url:
        settings = Settings.load(ai_url=url, max_answer=1000)
        async with OpenAIBackend(settings) as client:
            for _ in range(number):
                answer = spoiled(random)
                pieces = list[str]()
                try:
                    completion = await client.answer(PROMPT, on_text=pieces.append)
                except BackendError as error:
                    problem = str(error)
                else:
                    problem = ""
                    to_json([completion.finish_reason, completion.usage])
                assert len(problem) < 300, answer
                assert problem.isprintable(), answer
                text = to_json("".join(pieces)).decode()
                assert "\\u0000" not in text, answer
                assert len("".join(pieces)) <= 1000
