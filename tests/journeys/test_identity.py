"""Logins with tokens, and their expiry, on a real node."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from imstream.cli.main import main
from imstream.client import Client
from imstream.user_ids import UserId
from imstream.wire import SUBPROTOCOL
from tests.support.one_node import OneNode, one_node, standing_node
from tests.support.peer import Frame, Peer, Told, peer
from tests.support.processes import free_port
from tests.support.servers import DemoBackend, RedisServer
from tests.support.tokens import SECRET, as_jwk, issuer, key_of, private_pem, token, written
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USER, OTHER = user_id(10001), user_id(10002)
BRIEF = "[[demo first=0 pace=1ms length=20]]"
LONG = "[[demo first=0 pace=10ms length=5000]]"
WARNING = 2.0

shown: list[str] = []
"""All tokens of this module, none of which may be in the node's log."""


def of(user: UserId, *, holds: float = 60.0, **claims: Any) -> str:  # noqa: ANN401 - right and wrong ones
    """A token with the node's signature; other claims may make it invalid."""
    shown.append(token(sub=str(user), exp=time.time() + holds, **claims))
    return shown[-1]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node with token authentication that logs at level debug."""
    settings = {"auth": "jwt", "auth_secret": SECRET, "auth_leeway": "0s", "auth_warning": f"{WARNING}s"}
    folder = tmp_path_factory.mktemp("identity")
    with standing_node(folder, demo.url, **settings, log_level="debug", origins="same") as node:
        yield node
        said = node.now.process.output()
        assert "login refused" in said
        assert [secret for secret in (SECRET, *shown) if secret in said or secret.split(".")[-1] in said] == []


async def refused(someone: Peer, code: str = "UNAUTHORIZED") -> Frame:
    """The error frame before the socket is closed as not authenticated."""
    assert await someone.closed() == 4500
    assert (someone.frames[-1]["msgType"], someone.frames[-1]["code"]) == ("SYSTEM", code)
    return someone.frames[-1]


# Login


async def test_a_token_in_init_lets_its_user_in(node: OneNode) -> None:
    async with node.peer(USER, token=of(USER)) as someone:
        await someone.chat(USER, f"hello {BRIEF}", "m-init")
        assert (await someone.end_of("m-init")).terminal is not None


async def test_a_token_beside_the_subprotocol_does_the_same_and_is_not_echoed(node: OneNode) -> None:
    offered = of(USER)
    async with peer(node.now.ws(USER), subprotocols=[SUBPROTOCOL, offered]) as someone:
        assert someone.connection.subprotocol == SUBPROTOCOL
        assert someone.connection.response is not None
        assert offered not in str(someone.connection.response.headers)
        assert (await someone.login(USER))["code"] == "SUCCESS"
    async with peer(node.now.ws(USER), subprotocols=[offered, SUBPROTOCOL], user=USER) as someone:
        assert someone.connection.subprotocol == SUBPROTOCOL


@pytest.mark.parametrize("beside", [[], ["imstream.v2.json"], ["chat"]])
async def test_our_subprotocol_alone_is_no_token(beside: list[str], node: OneNode) -> None:
    async with peer(node.now.ws(USER), subprotocols=[SUBPROTOCOL, *beside]) as someone:
        await someone.send_frame("INIT", userId=USER)
        await refused(someone)


async def test_without_our_subprotocol_nothing_beside_it_counts_and_none_is_chosen(node: OneNode) -> None:
    async with peer(node.now.ws(USER), subprotocols=[of(USER)]) as someone:
        assert someone.connection.subprotocol is None
        await someone.send_frame("INIT", userId=USER)
        await refused(someone)


@pytest.mark.parametrize(
    ("lang", "claims", "sentence"),
    [
        ("en", None, "Please log in with a token"),
        ("zh", None, "请用令牌 (token) 登录"),
        ("en", {"holds": -1}, "Your login has expired, please log in again"),
        ("zh", {"holds": -1}, "登录已过期,请重新登录"),
        ("en", {"nbf": 2**33}, "This token is not valid yet"),
        ("en", {"key": "another secret of at least 32 bytes"}, "This token is not valid"),
        ("zh", {"key": "another secret of at least 32 bytes"}, "登录令牌无效"),
        ("en", {"user": OTHER}, "This token is not valid"),
        ("en", {"aud": "others"}, "This token is not valid"),
    ],
)
async def test_others_are_told_in_their_language_and_closed(
    lang: str, claims: dict[str, Any] | None, sentence: str, node: OneNode
) -> None:
    shows = None if claims is None else of(**{"user": USER, **claims})
    async with peer(node.now.ws(USER), lang=lang) as someone:
        await someone.send_frame("INIT", userId=USER, **({} if shows is None else {"token": shows}))
        assert (await refused(someone))["contents"] == sentence


@pytest.mark.parametrize("wrong", [5, {"a": 1}, ["x"], True])
async def test_a_token_that_is_no_text_is_a_bad_request_that_does_not_repeat_it(
    wrong: Any,  # noqa: ANN401 - any JSON
    node: OneNode,
) -> None:
    async with peer(node.now.ws(USER)) as someone:
        await someone.send_frame("INIT", userId=USER, token=wrong)
        assert (await someone.frame())["contents"].endswith("token: Input should be a valid string")


async def test_the_user_of_the_address_must_be_the_one_who_logs_in(node: OneNode) -> None:
    async with peer(node.now.ws(OTHER)) as someone:
        await someone.send_frame("INIT", userId=USER, token=of(USER))
        assert (await someone.frame())["code"] == "FORBIDDEN"
        await someone.send_frame("CHAT", userId=USER, contents="hello")
        assert (await someone.frame())["code"] == "FORBIDDEN"


async def test_who_has_logged_in_cannot_become_somebody_else(node: OneNode) -> None:
    async with peer(node.now.ws(), user=USER, token=of(USER)) as someone:
        await someone.send_frame("INIT", userId=OTHER, token=of(OTHER))
        assert (await someone.frame())["code"] == "FORBIDDEN"
        await someone.send_frame("INIT", userId=USER, token=of(OTHER))
        await refused(someone)


async def test_a_token_in_the_address_is_none(node: OneNode) -> None:
    async with peer(f"{node.now.ws(USER)}&token={of(USER)}") as someone:
        await someone.send_frame("INIT", userId=USER)
        await refused(someone)


# Expiry


async def test_a_login_ends_with_its_token_after_a_warning(node: OneNode) -> None:
    began = time.time()
    async with node.peer(USER, token=of(USER, holds=4.5)) as someone:
        warning = await someone.until(msgType="SYSTEM")
        assert time.time() < began + 4.5, "the warning comes before the login expires"
        assert warning["code"] == "UNAUTHORIZED"
        assert "请用新的令牌再次登录" in warning["contents"]
        await someone.chat(USER, f"still here {BRIEF}", "m-warned")
        await someone.end_of("m-warned")
        assert (await refused(someone))["contents"] == "登录已过期,请重新登录"
        assert time.time() >= began + 4.5


async def test_a_new_token_on_the_same_socket_prolongs_it_while_an_answer_goes_on(node: OneNode) -> None:
    async with node.peer(USER, token=of(USER, holds=4)) as someone:
        first_ends = time.time() + 4
        await someone.chat(USER, f"long {LONG}", "m-long")
        await someone.until(msgType="SYSTEM", code="UNAUTHORIZED")
        await someone.send_frame("INIT", userId=USER, token=of(USER))
        await someone.until(msgType="INIT")
        while time.time() < first_ends + 1.5:  # the first login has expired
            await someone.until(messageId="m-long", event="delta")
        await someone.send_frame("CANCEL", messageId="m-long")
        await someone.end_of("m-long")
        assert "restart" not in someone.told["m-long"].events


async def test_a_python_client_goes_on_with_fresh_tokens_and_notices_nothing(node: OneNode) -> None:
    given: list[str] = []

    async def fresh() -> str:
        given.append(of(USER, holds=4))
        return given[-1]

    changes: list[object] = []
    async with Client(f"ws://127.0.0.1:{node.port}/ws", USER, token=fresh, on_change=changes.append) as client:
        reply = await client.send(f"long {LONG}")
        await wait_until(lambda: len(given) >= 3, "the login was prolonged twice", limit=20)
        await reply.cancel()
    assert len(changes) == 1, "it was never disconnected"


# Messages of other users


def comparable(frame: Frame) -> str:
    """A frame without the fields that differ in every response."""
    return json.dumps({**frame, "respTime": "", "messageId": ""})


async def test_the_message_of_another_user_looks_exactly_like_none(node: OneNode) -> None:
    async with node.peer(USER, token=of(USER)) as owner, node.peer(OTHER, token=of(OTHER)) as other:
        await owner.chat(USER, f"long {LONG}", "m-theirs")
        await owner.some_text("m-theirs")
        await owner.chat(USER, f"brief {BRIEF}", "m-ended")
        await owner.end_of("m-ended")

        answers = []
        for message_id in ("m-none", "m-theirs", "m-ended"):
            await other.send_frame("CANCEL", messageId=message_id)
            cancelled = await other.frame()
            points = [{"messageId": message_id, "attempt": 1, "offset": 3}]
            await other.send_frame("INIT", userId=OTHER, token=of(OTHER), resume=points)
            welcome, resumed = await other.frame(), await other.frame()
            assert {cancelled["messageId"], resumed["messageId"]} == {message_id}
            assert (cancelled["code"], resumed["code"]) == ("UNKNOWN", "EXPIRED")
            answers.append([*map(comparable, (cancelled, welcome, resumed))])
        assert answers[0] == answers[1] == answers[2]

        # They may use the same id for a message of their own.
        await other.chat(OTHER, f"mine {BRIEF}", "m-theirs")
        mine = await other.end_of("m-theirs")
        assert mine.terminal is not None
        assert mine.terminal["event"] == "done"
        assert owner.told["m-theirs"].terminal is None
        await owner.send_frame("CANCEL", messageId="m-theirs")
        await owner.end_of("m-theirs")
        assert not [frame for frame in other.frames if frame.get("userId") == USER]


# Pages


@pytest.mark.parametrize("origin", ["https://evil.example.com", "null", "http://127.0.0.1:1"])
async def test_a_page_of_another_origin_is_refused_before_the_socket_opens(origin: str, node: OneNode) -> None:
    with pytest.raises(InvalidStatus) as told:
        async with peer(node.now.ws(USER), headers={"Origin": origin, "Accept-Language": "en"}):
            pass
    assert told.value.response.status_code == 403
    assert told.value.response.body == b"Pages of this origin may not connect (IMSTREAM_ORIGINS)"


async def test_a_page_of_this_node_may_come(node: OneNode) -> None:
    async with peer(node.now.ws(USER), headers={"Origin": node.now.http}, user=USER, token=of(USER)):
        pass


# Keys and settings


def test_the_command_signs_what_the_node_believes(node: OneNode) -> None:
    env = {"IMSTREAM_AUTH_SECRET": SECRET}
    signed = CliRunner().invoke(main, ["token", "--user", str(USER), "--ttl", "5m"], env=env)
    assert signed.exit_code == 0
    shown.append(signed.output.strip())

    async def log_in() -> None:
        async with node.peer(USER, token=shown[-1]):
            pass

    asyncio.run(log_in())


async def test_keys_may_come_after_the_node_and_change_while_it_runs(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    old, new = key_of("EdDSA", 1), key_of("EdDSA", 2)
    by_command = CliRunner().invoke(
        main, ["token", "--user", str(USER), "--key", str(written(tmp_path, private_pem(old)))]
    )
    assert by_command.exit_code == 0
    with_old = by_command.output.strip()
    with_new = token(new, "EdDSA", headers={"kid": "new"})
    async with issuer(as_jwk(old, "EdDSA", kid="old"), away=True) as keys:
        settings = {"auth": "jwt", "auth_algorithm": "EdDSA", "auth_jwks_url": keys.url}
        async with one_node(tmp_path, redis_server, demo.url, **settings) as node:

            async def answer(shows: str) -> str:
                """The code that an INIT with this token receives."""
                async with peer(node.now.ws(USER)) as someone:
                    await someone.send_frame("INIT", userId=USER, token=shows)
                    code: str = (await someone.frame())["code"]
                    return code

            async def is_let_in(shows: str) -> bool:
                return await answer(shows) == "SUCCESS"

            async with peer(node.now.ws(USER)) as someone:
                await someone.send_frame("INIT", userId=USER, token=with_old)
                told = await someone.frame()
                assert (told["code"], told["msgType"]) == ("UNAVAILABLE", "SYSTEM")
                assert told["retryAfterMs"] > 0
                await keys.come()

                async def comes_in() -> bool:  # the socket stays open for another login
                    await someone.send_frame("INIT", userId=USER, token=with_old)
                    return bool((await someone.frame())["code"] == "SUCCESS")

                await wait_until(comes_in, "the node has found the keys", limit=20)
            keys.keys = [as_jwk(new, "EdDSA", kid="new")]
            await wait_until(lambda: is_let_in(with_new), "the node has found the new key", limit=20)
            assert await answer(with_old) == "UNAUTHORIZED"
            await keys.go()
            assert await is_let_in(with_new)
            assert await answer(token(old, "EdDSA", headers={"kid": "newer"})) == "UNAVAILABLE"


async def test_who_cannot_be_logged_in_in_time_is_sent_away_to_come_back_later(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/"
    settings = {"auth": "jwt", "auth_algorithm": "ES256", "auth_jwks_url": nowhere, "init_timeout": "2s"}
    shown_key = token(key_of("ES256"), "ES256", sub=str(USER), exp=time.time() + 60)
    async with one_node(tmp_path, redis_server, demo.url, **settings) as node, peer(node.now.ws(USER)) as someone:
        await someone.send_frame("INIT", userId=USER, token=shown_key)
        assert await someone.closed() == 1013
        assert {frame["code"] for frame in someone.frames} == {"UNAVAILABLE"}


async def test_a_node_that_would_ask_nobody_does_not_listen_beyond_its_machine(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url) as node:
        assert "users are not authenticated (IMSTREAM_AUTH=none)" in node.now.process.output()
        await node.terminated()
        await node.start(wait=False, host="0.0.0.0")
        assert await node.died() == 2
        assert "IMSTREAM_HOST=0.0.0.0 is not allowed with IMSTREAM_AUTH=none" in node.now.process.output()
        await node.start(allow_insecure="true")
        assert "INSECURE: users are not authenticated" in node.now.process.output()


async def test_a_page_whose_name_was_made_to_lead_here_is_refused(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url) as node:
        for headers in (
            [("Host", "evil.example.com")],
            [("X-Forwarded-For", "10.0.0.7")],
            [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "10.0.0.7")],  # of a client, then of a balancer
        ):
            origin = f"http://{dict(headers).get('Host', f'127.0.0.1:{node.port}')}"
            with pytest.raises(InvalidStatus) as told:
                async with connect(node.now.ws(USER), additional_headers=[("Origin", origin), *headers]):
                    pass
            assert told.value.response.status_code == 403
        async with peer(node.now.ws(USER), user=USER, resume={"m": Told()}):
            pass
