"""Log events about sockets: user, address, origin and close code."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.one_node import OneNode, standing_node
from tests.support.peer import peer
from tests.support.raw_socket import raw_socket
from tests.support.servers import DemoBackend
from tests.support.stage import AT_ONCE, expected
from tests.support.users import user_id
from tests.support.waiting import wait_until

FROM = "https://chat.example.com"


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node that allows one other origin, and bursts of five frames."""
    known = {"origins": f"same,{FROM}", "log_format": "json", "frame_rate": 5, "frame_burst": 5}
    with standing_node(tmp_path_factory.mktemp("log"), demo.url, **known) as node:
        yield node


async def test_a_socket_of_a_user_is_logged_once_at_its_end(node: OneNode) -> None:
    user = user_id(10077)
    async with connect(node.now.ws(user), origin=FROM, proxy=None) as socket:  # type: ignore[arg-type] # a NewType
        await socket.send(json.dumps({"msgType": "INIT", "userId": user}))
        await socket.recv()
    await wait_until(lambda: node.logged("session closed", user=user), "the end is logged")
    [closed] = node.logged("session closed", user=user)
    assert (closed["peer"], closed["origin"]) == ("127.0.0.1", FROM)
    assert (closed["code"], closed["slowed"]) == (1000, 0)
    assert not node.logged("session opened")


async def test_a_socket_that_nobody_closed_has_no_code(node: OneNode) -> None:
    async with node.peer(user_id(10078)) as someone:
        someone.connection.transport.abort()
        await wait_until(lambda: node.logged("session closed", user=user_id(10078), code=1005), "the end is logged")


async def test_who_sends_too_much_is_logged_once_at_the_end(node: OneNode) -> None:
    async with node.peer(user_id(10079)) as someone:
        for _ in range(10):
            await someone.send("PING")
        await someone.until(code="RATE_LIMITED")
    await wait_until(lambda: node.logged("session closed", user=user_id(10079)), "the end is logged", limit=10)
    assert node.logged("session closed", user=user_id(10079))[0]["slowed"] >= 1


async def test_an_answer_is_logged_once_with_the_sockets_that_followed_it(node: OneNode) -> None:
    user = user_id(10083)
    async with node.peer(user) as someone, node.peer(user):
        await someone.chat(user, f"hello {AT_ONCE}", "m1")
        told = await someone.end_of("m1")
    await wait_until(lambda: node.logged("request ended", user=user), "the end is logged")
    [line] = node.logged("request ended", user=user)
    assert (line["message_id"], line["outcome"], line["characters"]) == ("m1", "done", len(told.text))
    assert (line["sockets"], line["slow_sockets"]) == (2, 0)
    assert "hello" not in json.dumps(line)


async def test_a_page_from_elsewhere_is_logged_with_its_origin(node: OneNode) -> None:
    with pytest.raises(InvalidStatus):
        await connect(node.now.ws(10080), origin="https://evil.example", proxy=None)  # type: ignore[arg-type] # same
    told = {"origin": "https://evil.example", "peer": "127.0.0.1"}
    await wait_until(lambda: node.logged("handshake refused", **told), "it is logged")


async def test_a_hangup_does_not_end_a_node_that_has_nothing_to_reload_and_is_logged(node: OneNode) -> None:
    async with node.peer(user_id(10082)) as someone:
        node.now.process.signal(signal.SIGHUP)
        await wait_until(lambda: node.logged("nothing to reload"), "it is logged")
        await someone.chat(user_id(10082), f"still there? {AT_ONCE}", "m1")
        assert (await someone.end_of("m1")).text == expected(f"still there? {AT_ONCE}")


async def test_strangers_cannot_fill_the_log(node: OneNode) -> None:
    await wait_until(lambda: node.sessions() == 0, "the end of the last session is logged")
    before = len(node.now.process.output())
    for _ in range(20):
        async with peer(node.now.ws(user_id(10081))) as someone:
            await someone.send("no frame")
            await someone.until(code="BAD_REQUEST")
    assert len(node.now.process.output()) == before


async def test_refused_clients_cannot_fill_the_log_nor_send_it_control_characters(node: OneNode) -> None:
    before, refused = len(node.now.process.output()), 0
    nasty = "https://evil.example/\x9b31m\x85" + "x" * 7000
    for number in range(150):
        async with raw_socket(node.port) as raw:
            forwarded = f"X-Forwarded-For: {nasty}, 192.0.2.{number}"
            head = await raw.upgrade("/ws?userId=10082", [f"Origin: {nasty}", forwarded], encoding="latin-1")
            refused += head.startswith(b"HTTP/1.1 403 ")
    assert refused == 150

    def written() -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in node.now.process.output()[before:].splitlines()
            if line.startswith("{") and line.endswith("}")
        ]

    def accounted() -> bool:
        counts = [line["count"] for line in written() if line["event"] == "log lines dropped"]
        logged = [line for line in written() if line["event"] == "handshake refused"]
        return len(logged) + sum(map(int, counts)) == 150

    await wait_until(accounted, "each refusal is logged or counted")
    said = node.now.process.output()[before:]
    assert len(said) < 50_000
    assert all(char.isprintable() or char == "\n" for char in said)
    lines = [line for line in written() if line["event"] == "handshake refused"]
    assert lines
    for line in lines:
        assert line["origin"].startswith("https://evil.example/\\x9b31m")
        assert len(line["origin"]) <= 64
        assert line["peer"].endswith(" by 127.0.0.1")
        assert "192.0.2." in line["peer"]
