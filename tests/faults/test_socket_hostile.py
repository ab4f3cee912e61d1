"""Invalid and malicious frames: each gets its documented answer, and the node keeps serving other clients."""

import json
import struct
import time
import zlib
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.costly_frames import PLAIN, SHAPES, TOO_LONG
from tests.support.one_node import OneNode, standing_node
from tests.support.raw_socket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    FIN,
    PING,
    PONG,
    RSV1,
    TEXT,
    fragments,
    frame,
    raw_socket,
    raw_user,
)
from tests.support.servers import DemoBackend

USER, OTHER = 10001, 10002

MAX_FRAME, MAX_FIRST = 65536, 16384
RSV2, RSV3 = 0x20, 0x10

HEARTBEAT = json.dumps({"msgType": "HEARTBEAT", "userId": USER}).encode()
BOMB = zlib.compress(b"\0" * (64 << 20))[2:-4]
"""64 MB of zeros as a deflate stream of 64 KB."""


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node without a limit on the rate."""
    with standing_node(tmp_path_factory.mktemp("hostile"), demo.url, max_frame=MAX_FRAME, frame_rate=0) as node:
        yield node


@pytest.fixture
async def node(standing: OneNode) -> AsyncIterator[OneNode]:
    """The node; after the test it holds no state, has logged no problem, and still answers others."""
    pid = standing.now.process.pid
    async with standing.peer(OTHER) as healthy:
        yield standing
        await healthy.send("PING")
        assert (await healthy.frame())["msgType"] == "HEARTBEAT"
        told = await healthy.chat(OTHER, "still there? [[demo first=0 length=3]]", "m1")
        assert told["event"] == "accepted"
        assert (await healthy.end_of("m1")).events[-1] == "done"
    assert standing.now.process.process.poll() is None
    assert standing.now.process.pid == pid
    await standing.settled()
    standing.check_log()


def _chat(**fields: object) -> bytes:
    return json.dumps({"msgType": "CHAT", "userId": USER, "contents": "hello", **fields}).encode()


REFUSED = {
    "binary": (frame(BINARY, HEARTBEAT), ""),
    "an empty text": (frame(TEXT), ""),
    "no json": (frame(TEXT, b"hello"), ""),
    "half of json": (frame(TEXT, HEARTBEAT[:-1]), ""),
    "a list": (frame(TEXT, b"[1, 2]"), ""),
    "a number": (frame(TEXT, b"1e999"), ""),
    "null": (frame(TEXT, b"null"), ""),
    "deep lists": (frame(TEXT, b"[" * 60_000), ""),
    "deep objects": (frame(TEXT, b'{"a":' * 12_000), ""),
    "deep in a field": (frame(TEXT, b'{"msgType":"HEARTBEAT","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"), ""),
    "deep history": (frame(TEXT, _chat(history=[[[[[[["deep"]]]]]]])), "history.0"),
    "not a number": (frame(TEXT, _chat(contents=float("nan"))), "contents"),
    "an infinite offset": (
        frame(TEXT, b'{"msgType":"INIT","userId":10001,"resume":[{"messageId":"m","offset":Infinity}]}'),
        "resume.0.offset",
    ),
    "NUL": (frame(TEXT, _chat(contents="a\0b")), "NUL"),
    "a key that occurs twice": (frame(TEXT, b'{"msgType":"CANCEL","messageId":"a","messageId":"b"}'), "messageId"),
    "a number beyond all bounds that nobody reads": (
        frame(TEXT, b'{"msgType":"HEARTBEAT","x":1e999}'),
        "1e999",
    ),
    "half a surrogate pair": (frame(TEXT, _chat(contents="\ud83d")), ""),
    "a surrogate pair turned round": (frame(TEXT, _chat(contents="\ude00\ud83d")), ""),
    "half a surrogate pair as id": (frame(TEXT, _chat(messageId="\udfff")), ""),
    "a very large number": (frame(TEXT, b'{"msgType":"HEARTBEAT","messageId":' + b"9" * 30_000 + b"}"), ""),
    "a number beyond all bounds": (frame(TEXT, b'{"msgType":"INIT","userId":' + b"9" * 30_000 + b"}"), ""),
    "an id with a line break": (frame(TEXT, _chat(messageId="m1\n")), "messageId"),
    "an id that is a path": (frame(TEXT, _chat(messageId="../../etc")), "messageId"),
    "an id with braces": (frame(TEXT, _chat(messageId="{user:10002}")), "messageId"),
    "too many resumed": (
        frame(TEXT, json.dumps({"msgType": "INIT", "userId": USER, "resume": [{"messageId": "m"}] * 65}).encode()),
        "resume",
    ),
}
"""Frames that are rejected on a socket that stays open, and the field that is named."""


@pytest.mark.parametrize("what", REFUSED)
async def test_a_message_that_makes_no_sense_is_refused_and_the_socket_stays_open(what: str, node: OneNode) -> None:
    data, field = REFUSED[what]
    async with raw_user(node.port, USER) as someone:
        await someone.send(data)
        opcode, _ = await someone.next_frame() or (CLOSE, b"")
        assert opcode == TEXT
        if field is not None:
            assert (someone.texts[-1]["msgType"], someone.texts[-1]["code"]) == ("SYSTEM", "BAD_REQUEST")
            assert field in someone.texts[-1]["contents"]
        await someone.send(frame(TEXT, HEARTBEAT))
        assert (await someone.until(msgType="HEARTBEAT"))["code"] == "SUCCESS"


# The cost of rejecting them


async def _costs(node: OneNode, texts: dict[str, bytes], *, log_in: bool) -> dict[str, float]:
    """The CPU time of the node for each of these frames, in seconds: the minimum of several runs.

    The machine may do other things too: frames that seem dear get more chances.
    """
    clock = (~node.now.process.pid << 3) | 2  # that of another process, see clock_getcpuclockid(3)
    costs = dict.fromkeys(texts, float("inf"))
    for round_ in range(15):
        dear = [what for what in texts if round_ < 3 or what == PLAIN or costs[what] > 2.5 * costs[PLAIN]]
        if dear == [PLAIN]:
            break
        async with raw_socket(node.port) as someone:
            await someone.upgrade("/ws")
            if log_in:
                await someone.send_frame(msgType="INIT", userId=USER)
                await someone.until(msgType="INIT")
            for what in dear:
                before = time.clock_gettime(clock)
                await someone.send(texts[what])
                assert (await someone.next_frame() or (CLOSE, b""))[0] == TEXT, what
                costs[what] = min(costs[what], time.clock_gettime(clock) - before)
                assert someone.texts[-1]["code"] == "BAD_REQUEST", what
    return costs


OTHER_SIZES = [(log_in, size) for log_in in (False, True) for size in (3_000, 8_000)] + [(True, MAX_FIRST)]


EACH_SIZE = [(False, MAX_FIRST), (True, MAX_FRAME)]


# Three times on an idle machine, four beside other tests: with cold caches, expensive frames suffer more.
@pytest.mark.parametrize(
    ("log_in", "size", "times"),
    [
        *((*one, 4) for one in EACH_SIZE),
        *(pytest.param(*one, 3, marks=pytest.mark.long) for one in (*EACH_SIZE, *OTHER_SIZES)),
    ],
)
async def test_no_frame_costs_more_than_three_times_a_plain_one_to_refuse(
    log_in: bool,  # noqa: FBT001 - a parameter of pytest
    size: int,
    times: int,
    node: OneNode,
) -> None:
    shapes = SHAPES | TOO_LONG if log_in and size == MAX_FRAME else SHAPES
    texts = {what: make(size).encode() for what, make in shapes.items()}
    costs = await _costs(node, {what: frame(TEXT, text) for what, text in texts.items()}, log_in=log_in)
    dear = {what: f"{cost / costs[PLAIN]:.1f}" for what, cost in costs.items() if cost > times * costs[PLAIN]}
    assert dear == {}, f"as multiples of {costs[PLAIN] * 1e6:.0f} µs"


CLOSED = {
    "bad UTF-8": (frame(TEXT, b'{"msgType":"\xff\xfe"}'), 1007),
    "bad UTF-8 in fragments": (fragments([b'"\xe4\xbd', b"\xff", b'"']), 1007),
    "a surrogate in UTF-8": (frame(TEXT, b'"\xed\xa0\x80"'), 1007),
    "overlong UTF-8": (frame(TEXT, b'"\xc0\xaf"'), 1007),
    "too big": (frame(TEXT, b"x" * (MAX_FRAME + 1)), 1009),
    "too big as it says": (frame(TEXT, b"x", length=1 << 62), 1009),
    "too big before INIT": (frame(TEXT, b"x" * (MAX_FIRST + 1)), 1009),
    "binary and too big before INIT": (frame(BINARY, b"x" * (MAX_FIRST + 1)), 1009),
    "much too big before INIT": (frame(TEXT, b"x" * MAX_FRAME)[:20_000], 1009),
    "too big before INIT, in fragments": (fragments([b"x" * 6_000] * 3), 1009),
    "too big before INIT, in fragments without end": (fragments([b"x" * 6_000] * 3, end=False), 1009),
    "too big in fragments": (fragments([b"x" * 9_000] * 8), 1009),
    "empty fragments without end": (fragments([b""] * 5_000, end=False), 1009),
    "empty fragments with an end": (fragments([b""] * 5_000), 1009),
    "tiny fragments without end": (fragments([b"x"] * 5_000, end=False), 1009),
    "binary fragments without end": (fragments([b""] * 5_000, BINARY, end=False), 1009),
    "compressed": (frame(TEXT, zlib.compress(HEARTBEAT)[2:-4], first=FIN | RSV1), 1002),
    "a deflate bomb": (frame(TEXT, BOMB[:MAX_FIRST], first=FIN | RSV1), 1002),
    "second reserved bit": (frame(TEXT, HEARTBEAT, first=FIN | RSV2), 1002),
    "third reserved bit": (frame(TEXT, HEARTBEAT, first=FIN | RSV3), 1002),
    "no mask": (frame(TEXT, HEARTBEAT, mask=False), 1002),
    "no mask on a ping": (frame(PING, b"hi", mask=False), 1002),
    **{f"reserved opcode {opcode}": (frame(opcode, HEARTBEAT), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "continuation of nothing": (frame(CONTINUATION, HEARTBEAT), 1002),
    "a message within a message": (frame(TEXT, b"{", first=0) + frame(TEXT, HEARTBEAT), 1002),
    "a ping in fragments": (frame(PING, b"hi", first=0), 1002),
    "a large ping": (frame(PING, b"x" * 126), 1002),
    "half a close code": (frame(CLOSE, b"\x03"), 1002),
    "close code 1005": (frame(CLOSE, struct.pack("!H", 1005)), 1002),
    "close code 999": (frame(CLOSE, struct.pack("!H", 999)), 1002),
    "a close reason in bad UTF-8": (frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
    "a close in order": (frame(CLOSE, struct.pack("!H", 1000)), 1000),
    "a close in the middle of a message": (frame(TEXT, b"{", first=0) + frame(CLOSE, struct.pack("!H", 1001)), 1002),
    "a user id without end": (frame(TEXT, b'{"msgType":"INIT","userId":' + b"9" * 400 + b"}"), 4501),
    "a user id that is no number": (frame(TEXT, b'{"msgType":"INIT","userId":NaN}'), 4501),
    "an infinite user id": (frame(TEXT, b'{"msgType":"INIT","userId":-Infinity}'), 4501),
}
"""Frames that close the socket, and the close code."""


@pytest.mark.parametrize("what", CLOSED)
async def test_a_frame_that_breaks_the_protocol_closes_the_socket_with_its_code(what: str, node: OneNode) -> None:
    data, code = CLOSED[what]
    async with raw_socket(node.port) as someone:
        # The offered extension is not negotiated: a compressed frame is invalid.
        head = await someone.upgrade("/ws", ["Sec-WebSocket-Extensions: permessage-deflate"])
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"permessage-deflate" not in head
        await someone.send(data)
        assert await someone.close_code() == code


async def test_a_login_with_all_that_it_may_resume_and_a_long_token_fits_and_then_messages_may_be_large(
    node: OneNode,
) -> None:
    points = [{"messageId": f"{n:064}", "attempt": 10 + n, "offset": 1_000_000 + n} for n in range(64)]
    async with raw_socket(node.port) as someone:
        await someone.upgrade("/ws")
        await someone.send(frame(TEXT, b" " * MAX_FIRST))  # its size is allowed, its contents are not
        assert (await someone.until(msgType="SYSTEM"))["code"] == "BAD_REQUEST"
        login = json.dumps({"msgType": "INIT", "userId": USER, "token": "x" * 8192, "resume": points}).encode()
        large = _chat(messageId="", contents="x" * (MAX_FRAME - 100))
        await someone.send(frame(TEXT, login) + frame(TEXT, large))  # without waiting for the welcome
        assert (await someone.until(msgType="INIT"))["code"] == "SUCCESS"
        assert "messageId" in (await someone.until(msgType="SYSTEM", code="BAD_REQUEST"))["contents"]
        assert sum(told["code"] == "EXPIRED" for told in someone.texts) == 64


async def test_what_looks_odd_but_is_right_is_taken(node: OneNode) -> None:
    async with raw_user(node.port, USER) as someone:
        message = json.dumps({"msgType": "HEARTBEAT", "userId": USER, "字段": "未知 😀"}, ensure_ascii=False).encode()
        every_byte = fragments([message[n : n + 1] for n in range(len(message))])
        with_pings = frame(TEXT, message[:5], first=0) + frame(PING, b"hi") + frame(CONTINUATION, message[5:])
        for data in (every_byte, with_pings, frame(PONG, b"nobody asked") + frame(TEXT, message)):
            await someone.send(data)
            assert (await someone.until(msgType="HEARTBEAT"))["code"] == "SUCCESS"
        for n in range(len(data)):
            await someone.send(data[n : n + 1])
        assert (await someone.until(msgType="HEARTBEAT"))["code"] == "SUCCESS"
        contents = "\x1b[31m \u202e \ufffe 😀 [[demo first=0 length=1]]"
        await someone.send_frame(msgType="CHAT", userId=USER, contents=contents, messageId="odd")
        assert (await someone.until(messageId="odd", event="done"))["code"] == "SUCCESS"


async def test_who_does_not_wait_for_the_handshake_harms_nobody(node: OneNode) -> None:
    async with raw_socket(node.port) as someone:
        head = await someone.upgrade(also=frame(TEXT, HEARTBEAT) + frame(PING, b"hi"))
        assert head.startswith(b"HTTP/1.1 101 ")
        await someone.send(frame(TEXT, HEARTBEAT))
        assert (await someone.until(msgType="HEARTBEAT"))["code"] == "SUCCESS"


@pytest.mark.parametrize("how", ["reset", "end"])
async def test_a_peer_that_vanishes_within_a_frame_leaves_nothing(how: str, node: OneNode) -> None:
    async with raw_user(node.port, USER) as someone:
        await someone.send_frame(
            msgType="CHAT", userId=USER, contents="hello [[demo length=30 pace=5ms]]", messageId="gone"
        )
        await someone.until(event="accepted")
        await someone.send(frame(TEXT, HEARTBEAT)[:7])
        if how == "reset":
            someone.reset()


async def test_blanks_around_the_version_of_a_handshake_mean_nothing(node: OneNode) -> None:
    handshake = (
        NO_HANDSHAKE["an old version"].replace(b"Version: 8", b"Version:\t 13 ").replace(b"Host: x", b"Host: 127.0.0.1")
    )
    async with raw_socket(node.port) as someone:
        await someone.send(handshake.replace(b"GET /ws", b"GET /ws?userId=10001"))
        assert (await someone.head()).startswith(b"HTTP/1.1 101 ")


NO_HANDSHAKE = {
    "nothing": b"",
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
    "half a request": b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: webso",
    "no key": (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ),
    "an old version": (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 8\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ),
    "an upgrade by POST": (
        b"POST /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nContent-Length: 0\r\n\r\n"
    ),
    "another path": (
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ),
}


@pytest.mark.parametrize("what", NO_HANDSHAKE)
async def test_a_connection_that_never_becomes_a_websocket_is_told_so_or_let_go(what: str, node: OneNode) -> None:
    async with raw_socket(node.port) as someone:
        await someone.send(NO_HANDSHAKE[what])
        if what not in {"nothing", "half a request"}:
            head = await someone.head()
            assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.1 3")), head
            if what == "an old version":
                assert head.startswith(b"HTTP/1.1 426 ")
                assert b"\r\nSec-WebSocket-Version: 13\r\n" in head
