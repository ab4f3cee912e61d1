"""Thousands of hostile frames against one node: other clients still get their answers, and nothing is left over.

The frames are drawn from `SEED`; IMSTREAM_FUZZ_SEED and IMSTREAM_FUZZ_FRAMES change the seed and the number of frames.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imstream.codes import CloseCode, Code, MsgType
from imstream.demo.answer import canned_answer
from tests.support.hostile_frames import ECHOED_CODES, Hostile
from tests.support.observing import ObservedNode, start_observed_node
from tests.support.one_node import NO_IDENTITY, QUICK, OneNode, standing_node
from tests.support.peer import peer
from tests.support.raw_socket import BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, TEXT, RawSocket, frame, raw_socket
from tests.support.servers import DemoBackend, RedisServer
from tests.support.tiers import examples
from tests.support.waiting import wait_until
from tests.unit.test_wire import NEARLY_FRAMES

SEED = int(os.environ.get("IMSTREAM_FUZZ_SEED", "20261124"))
FRAMES = int(os.environ.get("IMSTREAM_FUZZ_FRAMES", "6000"))
ATTACKERS, DECENT = 8, range(20001, 20004)
BATCH, BATCHES = 40, 4
"""Frames that an attacker sends before it waits for the node, and how many such batches it sends."""

MB = 1 << 20

EXPECTED = (NO_IDENTITY, "messages refused because of load")
"""Warnings of a node whose users send more than it may answer."""

CODES = {*CloseCode, 1002, 1007} - {CloseCode.INTERNAL_ERROR}
"""Documented close codes, and those of RFC 6455 for an invalid frame and invalid UTF-8."""

ECHOABLE_CODES = frozenset({*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}) - {CloseCode.INTERNAL_ERROR}
"""All close codes that a client may send and that are echoed (RFC 6455, section 7.4), except that of a defect."""


@dataclass
class Seen:
    """Frames and close codes that the attackers have received."""

    frames: int = 0
    closes: dict[int | None, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)


@asynccontextmanager
async def fuzzed_node(redis_server: RedisServer, demo: DemoBackend, folder: Path) -> AsyncIterator[ObservedNode]:
    """A node without a limit on the rate."""
    limits = {**QUICK, "frame_rate": 0, "user_limit": 4, "queue_limit": 1000, "max_frame": 65536}
    node = await start_observed_node(folder, redis_url=redis_server.url, ai_url=demo.url, settings=limits)
    with node.process:
        yield node
        assert await asyncio.to_thread(node.process.terminate) == 0
    for level in ("error", "warning", "critical"):
        assert [event for event in node.logged(level) if not event.startswith(EXPECTED)] == []
    assert "Traceback" not in node.process.output()


async def hear(
    raw: RawSocket, seen: Seen, fence: bytes | None, *, echoed: frozenset[int] = frozenset(ECHOED_CODES)
) -> bool:
    """Read until the answer to a ping with these bytes; False when the socket is closed before."""
    while (found := await raw.next_frame()) is not None:
        opcode, payload = found
        assert opcode in {TEXT, PONG, CLOSE}, "a node sends no other frames"
        if opcode == TEXT:
            told = raw.texts.pop()
            assert told["code"] in set(Code)
            assert told["msgType"] in set(MsgType)
            seen.answers[told["code"]] = seen.answers.get(told["code"], 0) + 1
        elif opcode == PONG and payload == fence:
            return True
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2]) if payload else None
            assert code is None or code in CODES | echoed, f"close code {code}"
            seen.closes[code] = seen.closes.get(code, 0) + 1
            return False
    return False


async def attack(port: int, hostile: Hostile, user: int, *, log_in: bool, seen: Seen) -> None:
    """Send hostile frames on one socket until the node closes it, or until a last one that must close it."""
    async with raw_socket(port) as raw:
        head = await raw.upgrade(f"/ws?userId={user}")
        assert head.startswith(b"HTTP/1.1 101 "), head
        if log_in:
            await raw.send_frame(msgType="INIT", userId=user)
        with suppress(ConnectionError):  # the node may close it meanwhile
            for batch in range(BATCHES):
                fence = f"{batch}".encode()
                for piece in hostile.split(b"".join(hostile.survivable() for _ in range(BATCH))):
                    await raw.send(piece)
                await raw.send(frame(PING, fence))
                if not await hear(raw, seen, fence):
                    return
                seen.frames += BATCH
            await raw.send(hostile.fatal())
            seen.frames += 1
            raw.finish()  # an incomplete frame stays incomplete
            await hear(raw, seen, None)


async def decent(url: str, user: int, over: asyncio.Event) -> int:
    """Ask one question after the other, and check each answer; how many were asked."""
    asked = 0
    while not over.is_set():
        async with peer(url, user=user) as someone:
            for _ in range(10):
                question = f"question {asked} [[demo first=0 pace=1ms length=5]]"
                told = await someone.chat(user, question, f"q{asked}")
                assert told.get("event") == "accepted", told
                assert (await someone.end_of(f"q{asked}")).text == "".join(canned_answer(question))
                asked += 1
    return asked


@pytest.mark.timeout(900)
@pytest.mark.parametrize("frames", [FRAMES, pytest.param(100_000, marks=pytest.mark.long)])
async def test_thousands_of_hostile_frames_do_no_harm(
    frames: int, redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with fuzzed_node(redis_server, demo, tmp_path) as node:
        process = psutil.Process(node.process.pid)
        seen, over = Seen(), asyncio.Event()
        memory = 0

        async def attacker(number: int) -> None:
            nonlocal memory
            user, session = 10001 + number, 0
            while seen.frames < frames:
                hostile = Hostile(hash((SEED, number, session)), user)
                await attack(node.port, hostile, user, log_in=session % 4 != 0, seen=seen)
                session += 1
                if not memory and seen.frames > frames // 5:
                    memory = process.memory_info().rss

        tasks, files = await node.tasks(), node.open_files()
        decents = [asyncio.create_task(decent(node.ws(user), user, over)) for user in DECENT]
        await asyncio.gather(*(attacker(number) for number in range(ATTACKERS)))
        over.set()
        answered = await asyncio.gather(*decents)

        await wait_until(lambda: node.clients() == 0, "no socket is left", limit=20)
        await wait_until(lambda: node.open_files() <= files + 10, "only files for Redis and the backend are left")

        async def no_task_is_left() -> bool:
            return await node.tasks() <= tasks

        await wait_until(no_task_is_left, "no task is left")
        assert process.memory_info().rss - memory < 10 * MB
    assert min(answered) >= 10
    assert seen.frames >= frames
    # The attackers have caused each kind of answer.
    assert {Code.SUCCESS, Code.BAD_REQUEST, Code.FORBIDDEN} <= set(seen.answers)
    assert {1002, 1007, 1009, 4501} <= set(seen.closes)


# The same with hypothesis: fewer frames, but failures are minimised

PAYLOADS = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda text: text.encode(errors="replace")),
    NEARLY_FRAMES.map(lambda made: json.dumps(made).encode()),
)
ANY_FRAME = st.builds(
    lambda opcode, payload, first, mask, length: frame(opcode, payload, first=first, mask=mask, length=length),
    st.sampled_from([TEXT, TEXT, TEXT, BINARY, CONTINUATION, PING, PONG, CLOSE]) | st.integers(0, 15),
    PAYLOADS,
    st.sampled_from([FIN, FIN, FIN, 0]) | st.integers(0, 15).map(lambda bits: bits << 4),
    st.sampled_from([True, True, True, False]),
    st.none() | st.none() | st.integers(0, 2**63),
)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node for all examples."""
    with standing_node(tmp_path_factory.mktemp("fuzz"), demo.url, frame_rate=0, user_limit=1) as node:
        yield node
        node.check_log()
        assert '"level":"error"' not in node.now.process.output()


@example(frames=[frame(CLOSE, (3072).to_bytes(2))], log_in=False, cut=1)  # an application code
@settings(max_examples=examples(150), derandomize=True)
@given(frames=st.lists(ANY_FRAME, min_size=1, max_size=15), log_in=st.booleans(), cut=st.integers(1, 10_000))
def test_any_frames_in_any_order_are_answered_or_close_the_socket_with_a_known_code(
    standing: OneNode,
    frames: list[bytes],
    log_in: bool,  # noqa: FBT001 - a parameter of pytest
    cut: int,
) -> None:
    async def play() -> None:
        data = b"".join(frames)
        async with raw_socket(standing.port) as raw:
            assert (await raw.upgrade("/ws?userId=10001")).startswith(b"HTTP/1.1 101 ")
            if log_in:
                await raw.send_frame(msgType="INIT", userId=10001)
            with suppress(ConnectionError):
                await raw.send(data[:cut])
                await raw.send(data[cut:] + frame(PING, b"fence"))
                raw.finish()
                await hear(raw, Seen(), b"fence", echoed=ECHOABLE_CODES)
        async with standing.peer(20001) as other:
            await other.send("PING")
            assert (await other.frame())["msgType"] == "HEARTBEAT"

    asyncio.run(play())
