"""Backends that mean harm: whatever they send costs little, is bounded, and is told in a short line."""

from __future__ import annotations

import gc
import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from imstream.ai.backend import PIECE, OpenAIBackend
from imstream.errors import BackendError, PermanentBackendError
from imstream.settings import Settings
from tests.support.asking import PROMPT
from tests.support.blaster import Cost, blaster, chunked, head, measured
from tests.support.scripted_backend import DONE, chunk, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


MIB = 1 << 20
LIMIT = 262_144
STOP = event(chunk(finish_reason="stop"))
SSE = "Content-Type: text/event-stream"


def filled(pattern: bytes, size: int = MIB) -> bytes:
    return pattern * (size // len(pattern))


def wrapped(value: bytes, where: bytes = b"x") -> bytes:
    """An event with this JSON in a field, and what makes it whole."""
    return b'data: {"%b":%b,"choices":[]}\n\n' % (where, value) + STOP + DONE


def ended(reason: str, **fields: object) -> bytes:
    return chunked(event(chunk("a")) + event({**chunk(), **fields}) + b"data: " + reason.encode() + b"\n\n" + DONE)


def finishing(reason: str) -> bytes:
    return chunked(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":%b}]}\n\n' % reason.encode() + DONE)


PLAIN = chunked(filled(event(chunk("word ")), MIB) + STOP + DONE, SSE)


@dataclass
class Told:
    """What became of a call: how the answer ended, or the error; and its text."""

    end: str
    error: BackendError | None
    pieces: list[str]
    usage: dict[str, int] | None
    cost: Cost


async def told(answer: bytes | Callable[[bytes], bytes], **settings: Any) -> Told:  # noqa: ANN401 - any setting
    """Ask a backend that answers like this."""
    give = answer if callable(answer) else lambda _: answer
    pieces = list[str]()
    with blaster(give) as url:
        async with OpenAIBackend(Settings.load(ai_url=url, **settings)) as client, measured() as cost:
            try:
                completion = await client.answer(PROMPT, on_text=pieces.append)
            except BackendError as error:
                return Told(error.reason, error, pieces, None, cost)
    return Told(completion.finish_reason, None, pieces, completion.usage, cost)


BAD = "bad_stream"
BROKEN = "broken_stream"
BOMB = gzip.compress(gzip.compress(b"\n" * (256 * MIB), 1), 1)

HOSTILE: dict[str, tuple[bytes, str]] = {
    # Much that says nothing
    "empty events": (chunked(filled(b"data:{}\n\n", 3 * MIB), SSE), BAD),
    "comments": (chunked(b"data: {}\n\n" + filled(b":\n", 3 * MIB), SSE), BAD),
    "blank lines": (chunked(b"data: {}\n\n" + filled(b"\n", 3 * MIB), SSE), BAD),
    "carriage returns": (chunked(b"data: {}\n\n" + filled(b"\r", 3 * MIB), SSE), BAD),
    "blanks before anything": (chunked(filled(b" \n", 3 * MIB), SSE), BAD),
    "data lines without an end": (chunked(filled(b"data\n", 3 * MIB), SSE), BAD),
    "a line without an end": (chunked(b"data: " + filled(b"x", 3 * MIB), SSE), BAD),
    "hidden reasoning": (chunked(filled(b'data:{"choices":[{"delta":{"r":1}}]}\n\n') + STOP + DONE, SSE), "stop"),
    "after the finish reason": (chunked(event(chunk("a")) + STOP + filled(b":\n", 3 * MIB), SSE), "stop"),
    # JSON that takes long to read, or much memory
    "many lists": (chunked(wrapped(b"[" + filled(b"[],", 9 * MIB // 10) + b"[]]"), SSE), "stop"),
    "many keys": (
        chunked(wrapped(b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}"), SSE),
        "stop",
    ),
    "many escapes": (chunked(wrapped(b'"' + filled(b"\\u4e2d", 9 * MIB // 10) + b'"'), SSE), "stop"),
    "half characters": (chunked(wrapped(b'"' + filled(b"\\ud800", 9 * MIB // 10) + b'"'), SSE), "stop"),
    "deep nesting": (chunked(wrapped(filled(b"[", 9 * MIB // 10)), SSE), BAD),
    "a long number": (chunked(wrapped(filled(b"1", 9 * MIB // 10)), SSE), BAD),
    "a long fraction": (chunked(wrapped(b"1." + filled(b"1", 9 * MIB // 10)), SSE), "stop"),
    "a document that is too long": (chunked(b'{"x":"' + filled(b"x", 9 * MIB)), BAD),
    "a document of many lists": (chunked(b"[" + filled(b"[],", 9 * MIB // 10) + b"[]]"), BAD),
    # Pages
    "titles that begin": (chunked(b"<p>" + filled(b"<title", MIB // 8)), BAD),
    "titles": (chunked(b"<p>" + filled(b"<title>", MIB // 8)), BAD),
    "scripts": (chunked(filled(b"<script></script  ", MIB // 8)), BAD),
    "a number with thousands of digits": (chunked(b"<title>&#" + filled(b"1", 5000) + b";</title>"), BAD),
    "a page that is too long": (chunked(filled(b"<title>", 9 * MIB)), BAD),
    # HTTP
    "chunks of one byte": (head("Transfer-Encoding: chunked") + filled(b"1\r\n:\r\n", 3 * MIB), BAD),
    "chunk extensions": (head("Transfer-Encoding: chunked") + b"1;" + filled(b"a", 9 * MIB), BAD),
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
    "a status beyond all": (head("Content-Length: 0", status="999 No"), "http_999"),
    "another protocol": (head("Upgrade: websocket", "Connection: upgrade", status="101 Up") + filled(b"x"), "http_101"),
    "nothing": (head(status="204 No Content"), BROKEN),
    # Encodings
    "a bomb": (head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB, BAD),
    "br": (chunked(event(chunk("a")) + STOP + DONE, "Content-Encoding: br"), BAD),
    "an unknown encoding": (chunked(event(chunk("a")) + STOP + DONE, "Content-Encoding: x-own"), BAD),
    "two encodings": (chunked(STOP + DONE, "Content-Encoding: identity", "Content-Encoding: identity, gzip"), BAD),
    "identity": (chunked(event(chunk("a")) + STOP + DONE, "Content-Encoding: Identity"), "stop"),
    "a bomb in a refusal": (
        head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}", status="503 Away") + BOMB,
        "http_503",
    ),
    # Fields
    "a finish reason of half a character": (finishing(r'"\ud800"'), "other"),
    "a finish reason that is long": (finishing(json.dumps("x" * 500_000)), "other"),
    "a finish reason with a sign": (finishing(r'"stop\u202e"'), "other"),
    "a finish reason that is a number": (finishing("7"), BAD),
    "an error of half a character": (
        chunked(b'data: {"error":{"message":"\\ud800\\u202e","code":"\\ud800"}}\n\n'),
        "backend_error",
    ),
    "a long error": (
        chunked(event({"error": {"message": "x\u202e" * 200_000, "code": "y" * 200_000}})),
        "backend_error",
    ),
    "an error of many fields": (
        chunked(event({"error": {"detail": [{"loc": [10**4000, [["x"] * 9], "a"], "msg": "b"}] * 50}})),
        "backend_error",
    ),
    "content of numbers": (
        chunked(event({"choices": [{"delta": {"content": [{"type": "text", "text": 10**4200}]}}]}) + STOP),
        "stop",
    ),
    "an answer in one event": (chunked(event(chunk("x" * 1_000_000)) + DONE, SSE), "length"),
    "an answer without end": (chunked(filled(event(chunk("word " * 40)), 9 * MIB), SSE), "length"),
}


@pytest.fixture(autouse=True)
def collected_as_in_a_node() -> Iterator[None]:
    """What a hundred thousand new objects cost depends on the garbage collector, which a node has set like this."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture(scope="module")
def plain() -> list[float]:
    """CPU seconds of a plain answer of a mebibyte, measured when it is first needed."""
    return []


@pytest.mark.parametrize("row", HOSTILE)
async def test_a_hostile_answer_costs_little_and_is_told_in_a_short_line(row: str, plain: list[float]) -> None:
    if not plain:
        for _ in range(3):
            usual = await told(PLAIN)
            assert (usual.end, "".join(usual.pieces)) == ("stop", "word " * (MIB // len(event(chunk("word ")))))
            plain.append(usual.cost.total)
    answer, end = HOSTILE[row]
    one = await told(answer, ai_first_token_timeout="20s", ai_idle_timeout="20s")
    assert one.end == end, one.error
    assert max(map(len, one.pieces), default=0) <= PIECE
    assert sum(map(len, one.pieces)) <= LIMIT
    if end == "length":
        assert sum(map(len, one.pieces)) == LIMIT
    if one.error is not None:
        assert len(str(one.error)) < 300
        assert str(one.error).isprintable()
        assert isinstance(one.error, PermanentBackendError) == (end == "http_101")
    usual_cost = sorted(plain)[1]
    assert one.cost.total < 8 * usual_cost, f"{one.cost.total / usual_cost:.1f} times a plain answer of a mebibyte"
    assert one.cost.pause < 3 * usual_cost, f"{one.cost.pause / usual_cost:.1f} times a plain answer of a mebibyte"
