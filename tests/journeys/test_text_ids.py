"""Users as identity providers name them: a node with `IMSTREAM_USER_IDS=text`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.client import Client, ClientError
from imstream.keys import Keys
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Told, peer
from tests.support.servers import DemoBackend
from tests.support.stage import AT_ONCE, expected
from tests.support.tokens import SECRET, token
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

SETTINGS = {"user_ids": "text", "auth": "jwt", "auth_secret": SECRET, "log_format": "json"}
ENV = {f"IMSTREAM_{name.upper()}": value for name, value in SETTINGS.items()}

IDS = [
    "0b9c2f1e-6a57-4a5e-9f0e-6f2f3f1f6f3a",
    "ada.love-lace+im@example.com",
    "auth0|5f7c8ec7c33c6c004bbafe82",
    "https://accounts.example.com/u/7=",
    "-_7",
    "010001",
    "x" * 128,
]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    with standing_node(tmp_path_factory.mktemp("text"), demo.url, **SETTINGS) as node:
        yield node


def command(*words: str) -> str:
    """Run `imstream …` with the settings of the node, and return its output."""
    result = CliRunner().invoke(main, words, env=ENV)
    assert result.exit_code == 0, result.output
    return result.output.strip()


async def test_keys_and_logs_use_the_user_of_the_token(node: OneNode) -> None:
    for user in IDS:
        signed = command("token", f"--user={user}")
        async with node.peer(user, token=signed) as someone:
            assert someone.frames[-1]["userId"] == user
            await someone.chat(user, f"hello {AT_ONCE}", "m")
            told = await someone.end_of("m")
            assert told.text == expected(f"hello {AT_ONCE}")
        async with node.peer(user, token=signed, resume={"m": Told()}) as again:  # on another device
            assert (await again.end_of("m")).text == told.text
        assert node.recorded(user, "m") == ("done", told.text)
        async with peer(node.now.ws("mallory")) as mallory:
            await mallory.send_frame("INIT", userId="mallory", token=signed)
            assert await mallory.closed() == 4500

    def logged(event: str) -> list[Any]:
        lines = [
            json.loads(line)
            for line in node.now.process.output().splitlines()
            if line.startswith("{") and line.endswith("}")
        ]
        return [line["user"] for line in lines if line["event"] == event]

    await wait_until(lambda: len(logged("session closed")) == 2 * len(IDS), "every session is logged")
    assert logged("session closed") == [user for user in IDS for _ in range(2)]


@pytest.mark.parametrize("typed", ["ada+im@example.com", "ada%2Bim%40example.com", "ada%2bim@example.com"])
async def test_an_address_may_have_needless_escapes(typed: str, node: OneNode) -> None:
    user = "ada+im@example.com"
    async with peer(f"{node.now.ws()}?userId={typed}") as someone:
        assert (await someone.login(user, token=token(sub=user)))["userId"] == user


async def test_a_number_stands_for_its_digits(node: OneNode) -> None:
    async with peer(node.now.ws(5), user=5, token=token(sub=5)) as someone:  # as clients of numbers send it
        assert someone.frames[-1]["userId"] == "5"
        await someone.chat(5, AT_ONCE, "m5")
        await someone.end_of("m5")
    assert node.redis.exists(Keys().reply("5", "m5"))


async def test_an_operator_locks_a_user_of_the_python_client(node: OneNode) -> None:
    user = IDS[2]
    async with Client(node.now.ws(), user, token=token(sub=user), lang="en") as client:
        assert await (await client.send(AT_ONCE)).text() == expected(AT_ONCE)
        shown = await asyncio.to_thread(command, "user", "show", user, "--redis", node.redis_url)
        assert "sockets     on node 0" in shown
        await asyncio.to_thread(command, "user", "lock", user, "--for", "1m", "--redis", node.redis_url)
        with pytest.raises(ClientError, match="locked"):  # the message is refused, or the session has ended
            await (await client.send("still here?")).text()
    await asyncio.to_thread(command, "user", "unlock", user, "--redis", node.redis_url)
