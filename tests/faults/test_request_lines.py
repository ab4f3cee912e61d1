"""The log lines of a message show its whole life, on all of its nodes, and agree with times measured by clients."""

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from imstream.metrics import BUCKETS
from ops.benchmark.websocket import WebSocket, encode
from tests.support.many_nodes import many_nodes
from tests.support.one_node import OneNode, standing_node
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole
from tests.support.waiting import SLOW, wait_until

USER = 10001
USERS, CHATS, SLOTS = 40, 6, 24
KINDS = ("started", "delta")
MEASURED = {"queue_wait": "started", "first_delta": "delta"}
"""The times in log lines, each with the kind of frame that ends it."""

TOLERANCE, BUSY_TOLERANCE = 0.010, 0.1
"""Seconds by which the log and the clients may differ, also if the run was not quiet: each waits for a CPU at times."""

QUIET = 0.15
"""Share of the time in which the node and this process wait for a CPU, on a machine with nothing else to do."""

MAX_RUNS = 5
"""Runs until the times of one agree: in the others, a process may have stood still."""


async def test_the_id_of_a_message_finds_its_whole_life_on_the_node_that_died_and_on_the_one_that_adopted_it(
    tmp_path: Path, demo: DemoBackend
) -> None:
    asked = question(60)
    async with many_nodes(tmp_path, demo.url, "a", "b", log_level="debug") as nodes:
        async with nodes["a"].peer(USER) as someone:
            await someone.chat(USER, asked, "m1")
            await someone.some_text("m1", 20)
            await nodes.killed("a")
        await wait_until(lambda: nodes["b"].logged("request ended", message_id="m1"), "its end is told", limit=20)
        [begun] = nodes["a"].logged(message_id="m1")
        claimed, ended = nodes["b"].logged(message_id="m1")
        assert begun["event"] == "request begun"
        assert (claimed["event"], claimed["stream"], claimed["worker"]) == ("request claimed", "a", "a")
        assert begun["trace"] == claimed["trace"] == ended["trace"]
        assert (ended["outcome"], ended["node"], ended["stream"], ended["attempts"]) == ("done", "b", "a", 2)
        assert ended["characters"] == len(whole(asked))
        assert 0 <= ended["queue_wait_ms"] < ended["first_delta_ms"] < ended["total_ms"]
        await nodes.settled()


async def test_times_in_log_lines_agree_with_those_of_the_clients_and_with_the_histograms(
    tmp_path: Path, demo: DemoBackend
) -> None:
    with standing_node(tmp_path, demo.url, concurrency=SLOTS, queue_limit=1000) as node:
        runs = [await _run(node, 0)]
        while _difference(runs[-1]) > TOLERANCE and len(runs) < MAX_RUNS:
            runs.append(await _run(node, len(runs)))
        exposed = await asyncio.to_thread(_scrape, node)
    run = min(runs, key=_difference)
    assert _difference(run) <= (TOLERANCE if run.starved <= QUIET else BUSY_TOLERANCE), (run.starved, run.measured)
    for name in MEASURED:
        low, high = _bucket_of_p95(exposed, f"imstream_{name}_seconds")
        assert low <= p95(_logged(runs, name)) <= high, (name, low, high)


def _difference(run: "Run") -> float:
    """By how much the log and the clients differ, in seconds."""
    return max(abs(p95(run.measured[kind]) - p95(_logged([run], name))) for name, kind in MEASURED.items())


@dataclass
class Run:
    """The measurements of one run.

    Attributes:
        measured: Seconds from each CHAT to its first frame of a kind, by kind.
        lines: The lines about the ends of its messages.
        starved: Share of the time in which the node and this process were ready and had no CPU.
    """

    measured: dict[str, list[float]]
    lines: list[dict[str, Any]]
    starved: float


async def _run(node: OneNode, number: int) -> Run:
    """Have all users ask all questions, and wait for their lines."""
    pids = os.getpid(), node.now.process.pid
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_logged_in(node, USER + n)) for n in range(USERS)]
        began, waited = time.monotonic(), sum(map(_waited_for_cpu, pids))
        for client in clients:
            client.chat([f"run{number}-{n}" for n in range(CHATS)])
        for client in clients:
            await client.until(lambda it=client: len(it.after["done"]) == CHATS)  # type: ignore[misc] # bound now
        starved = (sum(map(_waited_for_cpu, pids)) - waited) / (time.monotonic() - began)

    def lines() -> list[dict[str, Any]]:
        ended = node.logged("request ended", outcome="done")
        return [line for line in ended if line["message_id"].startswith(f"run{number}-")]

    await wait_until(lambda: len(lines()) == USERS * CHATS, "all ends are told")
    measured = {kind: [after for client in clients for after in client.after[kind].values()] for kind in KINDS}
    return Run(measured, lines(), starved)


@asynccontextmanager
async def _logged_in(node: OneNode, user: int) -> AsyncIterator["Client"]:
    """Connect and log in a user."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(node.now.ws(user), user), "127.0.0.1", node.port)
    try:
        await client.until(lambda: client.is_logged_in)
        yield client
    finally:
        client.transport.abort()


class Client(WebSocket):
    """A user who needs little CPU, so that frames do not wait for this process: `after` is what a user sees.

    Attributes:
        after: Seconds from a CHAT to its first frame of a kind, by kind and message.
    """

    def __init__(self, url: str, user: int) -> None:
        super().__init__(url, user)
        self.after: dict[str, dict[str, float]] = {kind: {} for kind in (*KINDS, "done")}
        self.is_logged_in = False
        self._user = user
        self._sent_at = 0.0
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds after a frame."""
        async with asyncio.timeout(20 * SLOW):
            while not condition():
                assert not self.transport.is_closing(), "the node has closed the socket"
                self._changed.clear()
                await self._changed.wait()

    def chat(self, message_ids: Sequence[str]) -> None:
        """Send messages at once: each waits in the node until those before it are admitted."""
        chat = {"msgType": "CHAT", "userId": self._user, "contents": "hello [[demo first=50ms pace=5ms length=10]]"}
        frames = [encode(json.dumps({**chat, "messageId": one})) for one in message_ids]
        self._sent_at = time.monotonic()
        self.transport.write(b"".join(frames))

    def upgraded(self, error: str | None) -> None:
        """Log in."""
        assert error is None, error
        self.transport.write(encode(json.dumps({"msgType": "INIT", "userId": self._user, "wants": ["status"]})))

    def received(self, payload: bytes) -> None:
        """Note the time of a frame."""
        now = time.monotonic()
        for kind, part in (
            ("delta", b'"event":"delta"'),
            ("started", b'"state":"started"'),
            ("done", b'"event":"done"'),
        ):
            if part in payload:
                message_id = payload.partition(b'"messageId":"')[2].partition(b'"')[0].decode()
                self.after[kind].setdefault(message_id, now - self._sent_at)
                if kind == "done":
                    self._changed.set()
                return
        self.is_logged_in = True
        self._changed.set()

    def lost(self, reason: str) -> None:  # noqa: ARG002 - an override
        """Let `until` fail."""
        self._changed.set()


def _waited_for_cpu(pid: int) -> float:
    """The seconds that the main thread of a process was ready and had no CPU."""
    return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[1]) / 1e9


def _logged(runs: Sequence[Run], name: str) -> list[float]:
    """The seconds in the lines of all runs."""
    return [line[f"{name}_ms"] / 1000 for run in runs for line in run.lines]


def _scrape(node: OneNode) -> str:
    with urllib.request.urlopen(f"{node.now.http}/metrics", timeout=5) as answer:  # noqa: S310 - a URL of the test's own
        return str(answer.read().decode())


def p95(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[len(values) * 95 // 100]


def _bucket_of_p95(exposed: str, series: str) -> tuple[float, float]:
    """The bounds of the bucket that holds the 95th percentile."""
    [family] = [one for one in text_string_to_metric_families(exposed) if one.name == series]
    counts = {float(one.labels["le"]): one.value for one in family.samples if one.name.endswith("_bucket")}
    rank = counts[float("inf")] * 95 // 100
    bounds = (0.0, *BUCKETS, float("inf"))
    number = next(number for number, bound in enumerate(bounds) if counts.get(bound, 0) > rank)
    return bounds[number - 1], bounds[number]
