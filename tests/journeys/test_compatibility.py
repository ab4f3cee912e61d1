"""The promise in ops/docs/protocol.md: clients of one release talk to nodes of another, and versions are negotiated."""

import asyncio
import json
import sys
from collections.abc import Iterator

import pytest

from imstream.wire import SUBPROTOCOL
from tests.support.one_node import NODE, OneNode, standing_node
from tests.support.peer import peer
from tests.support.previous_release import previous_python
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole
from tests.support.waiting import SLOW

USER = 10001
NEXT = SUBPROTOCOL.replace("v1", "v2")

CLIENT = """
import asyncio, json, sys
from imstream.client import BadMessage, Client

async def main(url, short, long, release):
    told = {}
    async with Client(url, 10001) as client:
        reply = await client.send(short, message_id=f"{release}-short")
        told["text"] = "".join([piece.text async for piece in reply])
        told["late"] = await reply.cancel()
        told["again"] = await (await client.send(short, message_id=f"{release}-short")).text()
        stopped = await client.send(long, message_id=f"{release}-long")
        async for _ in stopped:
            break
        told["receipt"] = await stopped.cancel()
        told["outcome"] = (await stopped.result()).outcome
        try:
            await (await client.send("x" * 70_000)).accepted()
        except BadMessage as error:
            told["refused"] = error.code
    print(json.dumps(told))

asyncio.run(main(*sys.argv[1:]))
"""
"""Uses every answer of a node that a program can wait for."""


@pytest.fixture(scope="module", params=["this", "previous"])
def standing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend
) -> Iterator[OneNode]:
    """A node of this release or the previous one."""
    python = previous_python() if request.param == "previous" else None
    with standing_node(tmp_path_factory.mktemp(request.param), demo.url, None, NODE, python) as node:
        yield node


@pytest.mark.parametrize("release", ["this", "previous"])
async def test_the_client_of_a_release_talks_to_a_node_of_the_same_and_the_other(release: str, node: OneNode) -> None:
    python = sys.executable if release == "this" else previous_python()
    short, long = question(30), question(2000)
    client = await asyncio.create_subprocess_exec(
        python, "-P", "-c", CLIENT, node.now.ws(), short, long, release, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20 * SLOW):
        output, _ = await client.communicate()
    assert client.returncode == 0
    assert json.loads(output) == {
        "text": whole(short),
        "again": whole(short),
        "receipt": "cancelled",
        "outcome": "cancelled",
        "late": "too_late",
        "refused": "BAD_REQUEST",
    }


@pytest.mark.parametrize("offered", [[NEXT, SUBPROTOCOL], [SUBPROTOCOL, NEXT], [SUBPROTOCOL]])
async def test_a_node_selects_this_version_whatever_stands_beside_it(offered: list[str], node: OneNode) -> None:
    async with peer(node.now.ws(USER), user=USER, subprotocols=offered) as someone:
        assert someone.connection.subprotocol == SUBPROTOCOL


@pytest.mark.parametrize("offered", [None, [NEXT]])
async def test_the_response_to_a_client_that_does_not_offer_this_version_selects_none(
    offered: list[str] | None, node: OneNode
) -> None:
    async with peer(node.now.ws(USER), user=USER, subprotocols=offered) as someone:
        assert someone.connection.subprotocol is None
