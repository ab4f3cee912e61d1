"""The metrics of nodes while others die, and while Redis hangs; and where they are served."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.many_nodes import ManyNodes, becomes, standing_nodes
from tests.support.processes import consecutive_ports, http_status, wait_for
from tests.support.scraping import metrics_become, scrape, scraped
from tests.support.servers import DemoBackend, RedisServer, start_node
from tests.support.waiting import wait_until

USER = 10001


def unfinished(stream: str) -> str:
    return f'imstream_requests_unfinished{{stream="{stream}"}}'


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Two nodes with short leases."""
    with standing_nodes(tmp_path_factory.mktemp("metrics"), demo.url, "a", "b", concurrency=1) as nodes:
        yield nodes


async def agrees(nodes: ManyNodes, stream: str, *, at: str) -> None:
    """Wait until a node's metrics have the length of a stream."""

    async def is_told() -> bool:
        return (await scraped(nodes[at].now.http)).get(unfinished(stream)) == nodes[stream].unfinished()

    await wait_until(is_told, f"{at} tells the length of the stream of {stream}")


async def test_an_adopted_stream_has_its_own_label_until_it_is_released(nodes: ManyNodes) -> None:
    count = 4
    async with nodes["a"].peer(USER) as someone:
        for number in range(count):  # the first one does not end on node a
            pace = "pace=10ms length=10 stall=1" if number == 0 else "pace=100ms length=10"
            await someone.chat(USER, f"[[demo first=0s {pace}]]", f"m{number}")
        await metrics_become(nodes["a"].now.http, {unfinished("a"): count})
        before = await scraped(nodes["b"].now.http)
        assert unfinished("a") not in before
        await nodes.killed("a")
    await metrics_become(
        nodes["b"].now.http, {"imstream_adoptions_total": 1, 'imstream_requests_running{stream="a"}': 1}, since=before
    )
    await agrees(nodes, "a", at="b")
    await nodes.start("a")
    await agrees(nodes, "a", at="a")
    await nodes.settled()
    await nodes.left_alone()
    await agrees(nodes, "a", at="a")
    await agrees(nodes, "b", at="b")

    async def is_gone() -> bool:
        return unfinished("a") not in await scraped(nodes["b"].now.http)

    await wait_until(is_gone, "node b no longer counts the stream")


async def test_a_scrape_never_waits_for_redis(nodes: ManyNodes) -> None:
    server, node = nodes.server.process, nodes["a"]
    assert server is not None
    server.signal(signal.SIGSTOP)
    try:
        await metrics_become(node.now.http, {"imstream_redis_up": 0, "imstream_lease_held": 0})
        await becomes(node, "redis does not answer")
    finally:
        server.signal(signal.SIGCONT)
    await metrics_become(node.now.http, {"imstream_redis_up": 1, "imstream_lease_held": 1})


def test_a_listener_of_its_own_shows_details_that_the_node_hides(redis_server: RedisServer, tmp_path: Path) -> None:
    port = consecutive_ports(2)
    node = start_node(
        tmp_path,
        redis_url=redis_server.url,
        ai_url="http://127.0.0.1:1/v1",
        port=port,
        settings={"metrics": "127.0.0.1:+1"},
    )
    with node.process:
        listener = f"http://127.0.0.1:{port + 1}"
        assert scrape(listener)["imstream_lease_held"] == 1
        wait_for(lambda: f'"metrics":"{listener}"' in node.process.output(), node.process, "the address in the log")
        assert http_status(f"{listener}/readyz") == 200
        assert http_status(f"{listener}/") == 404
        assert http_status(f"{node.http}/metrics") == 404
        assert node.process.terminate() == 0
