"""A client that has nothing but /asyncapi.json, from its node."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.one_node import OneNode, standing_node
from tests.support.peer import peer
from tests.support.schemas import DOCUMENT, fitting
from tests.support.servers import DemoBackend


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    with standing_node(tmp_path_factory.mktemp("asyncapi"), demo.url, user_ids="number") as node:
        yield node


def names(references: list[dict[str, str]]) -> list[str]:
    return [reference["$ref"].rpartition("/")[2] for reference in references]


def fetched(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - a URL of the test's own
        document: dict[str, Any] = json.load(answer)
        return document


async def test_each_example_of_a_client_frame_is_answered_as_documented_in_its_operation(node: OneNode) -> None:
    document = await asyncio.to_thread(fetched, f"{node.now.http}/asyncapi.json")
    assert document == DOCUMENT
    address = node.now.http.replace("http:", "ws:") + document["channels"]["chat"]["address"]
    async with peer(address) as someone:
        for name in ("logIn", "ask", "cancel", "beat"):
            operation = document["operations"][name]
            for message in names(operation["messages"]):
                [example] = document["components"]["messages"][message]["examples"]
                payload = example["payload"]
                await someone.send(payload if isinstance(payload, str) else json.dumps(payload))
                answers = set(names(operation["reply"]["messages"]))
                while not answers & set(fitting(await someone.frame())):
                    pass
                assert someone.frames[-1]["code"] in {"SUCCESS", "TOO_LATE"}  # the answer may be complete already
