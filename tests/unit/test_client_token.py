"""Tokens of the client: login, renewal and rejection."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from imstream.client import Client, Connected, ConnectionChange, NotConnected, SessionEnded
from imstream.codes import CloseCode
from imstream.wire import ClientInit
from tests.support.scripted_ws import FAST, USER, Peer, ScriptedServer, connected, scripted_server, within


def numbered() -> Callable[[], str]:
    """A function that returns another token at each call: 1, 2, 3."""
    given: list[str] = []

    def give() -> str:
        given.append(str(len(given) + 1))
        return given[-1]

    return give


async def refuse(peer: Peer) -> str | None:
    """Refuse the login; returns its token."""
    init = await peer.hear_init()
    await peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="not valid")
    await peer.close(CloseCode.NOT_AUTHENTICATED)
    return init.token


async def test_each_connection_shows_a_fresh_token() -> None:
    async with connected(token=numbered()) as session:
        session.peer.drop()
        peer = await session.server.peer()
        assert (await peer.hear_init()).token == "2"  # noqa: S105 - no secret


async def test_a_token_may_take_its_time() -> None:
    async def give() -> str:
        await asyncio.sleep(0)
        return "signed"

    async with scripted_server() as server:
        entering = asyncio.create_task(Client(server.url, USER, token=give, timing=FAST).__aenter__())
        peer = await server.peer()
        assert (await peer.hear_init()).token == "signed"  # noqa: S105 - no secret
        await peer.send_frame("INIT")
        await (await within(entering)).__aexit__(None, None, None)


async def test_when_the_login_is_about_to_end_a_fresh_token_is_shown_on_the_same_connection() -> None:
    changes: list[ConnectionChange] = []
    async with connected(token=numbered(), on_change=changes.append) as session:
        reply = await session.asked()
        for number in ("2", "3"):
            await session.peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="your login ends in 30 s")
            init = await session.peer.hear_init()
            assert (init.token, init.resume) == (number, [])
            await session.peer.send_frame("INIT")
        await session.peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
        assert await within(reply.text()) == ""
    assert [type(change) for change in changes] == [Connected]


async def test_a_token_that_cannot_be_renewed_is_not_shown_again() -> None:
    async with connected(token="signed") as session:  # noqa: S106 - no secret
        await session.peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="your login ends in 30 s")
        reply = await session.client.send("hello")
        frame = await session.peer.hear()
        assert not isinstance(frame, ClientInit)
        await session.peer.close(CloseCode.NOT_AUTHENTICATED)
        with pytest.raises(SessionEnded, match="ends in 30 s"):
            await within(reply.text())


async def test_after_the_end_of_its_login_a_client_comes_back_with_a_fresh_token_and_resumes() -> None:
    async with connected(token=numbered()) as session:
        reply = await session.asked()
        await session.peer.close(CloseCode.NOT_AUTHENTICATED)
        peer = await session.server.peer()
        init = await peer.hear_init()
        assert init.token == "2"  # noqa: S105 - no secret
        assert [point.message_id for point in init.resume] == [reply.message_id]
        await peer.send_frame("INIT")
        await peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
        await within(reply.text())


async def test_a_token_that_came_too_late_for_a_login_that_ends_is_shown_again() -> None:
    given = iter(["old"])
    async with connected(token=lambda: next(given, "new")) as session:
        await session.peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="your login has expired")
        assert (await session.peer.hear_init()).token == "new"  # noqa: S105 - no secret
        await session.peer.close(CloseCode.NOT_AUTHENTICATED)
        peer = await session.server.peer()
        assert (await peer.hear_init()).token == "new"  # noqa: S105 - no secret
        await peer.send_frame("INIT")


async def entering(server: ScriptedServer, token: Callable[[], str]) -> asyncio.Task[Client]:
    return asyncio.create_task(Client(server.url, USER, token=token, timing=FAST).__aenter__())


async def test_two_fresh_tokens_that_are_refused_are_enough() -> None:
    async with scripted_server() as server:
        task = await entering(server, numbered())
        assert [await refuse(await server.peer()), await refuse(await server.peer())] == ["1", "2"]
        with pytest.raises(SessionEnded, match="not valid") as ended:
            await within(task)
        assert ended.value.code == CloseCode.NOT_AUTHENTICATED


async def test_a_token_that_was_refused_is_not_shown_a_second_time() -> None:
    async with scripted_server() as server:
        task = await entering(server, lambda: "stale")
        assert await refuse(await server.peer()) == "stale"
        with pytest.raises(SessionEnded, match="not valid"):
            await within(task)


async def test_a_login_that_came_too_late_is_no_fault_of_its_token() -> None:
    async with scripted_server() as server:
        task = await entering(server, lambda: "signed")
        for _ in range(3):
            peer = await server.peer()
            assert (await peer.hear_init()).token == "signed"  # noqa: S105 - no secret
            await peer.send_frame("SYSTEM", code="INIT_TIMEOUT", contents="no login in time")
            await peer.close(CloseCode.NOT_AUTHENTICATED)
        await server.logged_in()
        await (await within(task)).__aexit__(None, None, None)


async def test_a_token_that_was_refused_once_matters_no_more_after_a_login() -> None:
    async with connected(token=numbered()) as session:
        for _ in range(3):
            await session.peer.close(CloseCode.NOT_AUTHENTICATED)
            session.peer = await session.server.logged_in()


async def test_without_a_token_it_is_tried_again_and_said_why() -> None:
    calls: list[int] = []

    def give() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the secret is hunter2")
        return "signed"

    async with scripted_server() as server:
        task = await entering(server, give)
        peer = await server.peer()
        assert (await peer.hear_init()).token == "signed"  # noqa: S105 - no secret
        await peer.send_frame("INIT")
        await (await within(task)).__aexit__(None, None, None)
    assert len(calls) == 2


async def test_a_client_that_never_gets_a_token_says_so_without_repeating_what_it_was_told() -> None:
    def give() -> str:
        raise OSError("the secret is hunter2")

    async with scripted_server() as server:
        client = Client(server.url, USER, token=give, timing=replace(FAST, open=timedelta(milliseconds=200)))
        with pytest.raises(NotConnected) as error:
            await client.__aenter__()
    assert str(error.value) == "there is no token: OSError"


def test_a_token_is_in_no_repr() -> None:
    assert "hunter2" not in repr(ClientInit(msg_type="INIT", user_id=USER, token="hunter2"))  # noqa: S106 - no secret
