"""The log lines of a message show its whole life, on all of its nodes, and agree with times measured by clients."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect

from imstream.metrics import BUCKETS
from tests.support.many_nodes import many_nodes
from tests.support.one_node import OneNode, standing_node
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole
from tests.support.waiting import wait_until

USER = 10001
USERS, CHATS, SLOTS = 40, 6, 24
TOLERANCE = 0.010
"""Seconds by which the log and a client may differ on an idle machine."""


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
        users = await asyncio.gather(*(_ask(node, USER + n) for n in range(USERS)))
        await node.all_finished()
        await wait_until(
            lambda: len(node.logged("request ended", outcome="done")) == USERS * CHATS, "all ends are told"
        )
        told = node.logged("request ended")
        exposed = await asyncio.to_thread(_scrape, node)
    measured = [times for user in users for times in user]
    tolerance = TOLERANCE + 6 * p95([times["pong"] for times in measured])
    for name, event in (("queue_wait", "started"), ("first_delta", "delta")):
        client, logged = p95([one[event] for one in measured]), p95([line[f"{name}_ms"] / 1000 for line in told])
        assert abs(client - logged) <= tolerance, (name, client, logged, tolerance)
        low, high = _bucket_of_p95(exposed, f"imstream_{name}_seconds")
        assert low <= logged <= high, (name, logged, low, high)


async def _ask(node: OneNode, user: int) -> list[dict[str, float]]:
    """Ask one question after the other; for each, the seconds until the first frame of a kind.

    `pong`: the same for a heartbeat right before it, which tells how fast the node and this process are just now.
    """
    measured = []
    async with connect(node.now.ws(user), compression=None, proxy=None) as socket:
        await socket.send(json.dumps({"msgType": "INIT", "userId": user, "wants": ["status"]}))
        await socket.recv()
        for number in range(CHATS):
            chat = {"msgType": "CHAT", "userId": user, "messageId": f"m{number}"}
            chat["contents"] = "hello [[demo first=50ms pace=5ms length=10]]"
            begun = time.monotonic()
            await socket.send("PING")
            await socket.recv()
            sent = time.monotonic()
            times = {"pong": sent - begun}
            await socket.send(json.dumps(chat))
            while "done" not in times:
                frame = json.loads(await socket.recv())
                kind = frame.get("state") or frame.get("event") or frame.get("code")
                times.setdefault(str(kind), time.monotonic() - sent)
            measured.append(times)
    return measured


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
