"""The login of the client, with one server or several."""

import asyncio
import socket
from datetime import timedelta

import pytest

from imstream.client import Client, NotConnected, SessionEnded, Timing
from imstream.codes import CloseCode
from tests.support.scripted_ws import FAST, USER, Session, scripted_server, within


async def leave(client: Client) -> None:
    """Close a client that was entered in another task."""
    await client.__aexit__(None, None, None)


async def test_logs_in_with_its_user_token_and_language() -> None:
    async with scripted_server() as server:
        client = Client(server.url, USER, token="signed", lang="en", timing=FAST)  # noqa: S106 - no secret
        entering = asyncio.create_task(client.__aenter__())
        peer = await server.peer()
        init = await peer.hear_init()
        assert (init.user_id, init.token, init.resume) == (USER, "signed", [])
        assert peer.path == "/ws?userId=10001"
        assert peer.language == "en"
        assert not entering.done()
        await peer.send_frame("INIT")
        await within(entering)
        await leave(client)


async def test_without_a_language_the_server_chooses() -> None:
    async with scripted_server() as server:
        login = asyncio.create_task(server.logged_in())
        async with Client(server.url, USER, timing=FAST):
            assert (await login).language is None


async def test_the_query_of_the_address_is_kept() -> None:
    async with scripted_server() as server:
        login = asyncio.create_task(server.logged_in())
        async with Client(server.url + "?zone=a", USER, timing=FAST):
            assert (await login).path == "/ws?zone=a&userId=10001"


@pytest.mark.parametrize("url", ["http://127.0.0.1/ws", "127.0.0.1:8080", "ws://", ""])
async def test_an_address_that_is_no_websocket_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="WebSocket address"):
        Client(url, USER)


@pytest.mark.parametrize("user_id", [10000, 0, -10001, 2**53])
async def test_a_user_id_that_no_server_takes_is_refused_at_once(user_id: int) -> None:
    with pytest.raises(ValueError, match="a number from 10001 to 9007199254740991"):
        Client("ws://127.0.0.1/ws", user_id)


async def test_a_client_needs_an_address() -> None:
    with pytest.raises(ValueError, match="address of a server"):
        Client([], USER)


async def test_says_why_when_no_server_lets_it_in_in_time() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"ws://127.0.0.1:{unused.getsockname()[1]}/ws"
        with pytest.raises(NotConnected, match=r"ws://127\.0\.0\.1"):
            await Client(url, USER, timing=Timing(open=timedelta(milliseconds=200))).__aenter__()


async def test_a_server_that_does_not_answer_the_login_is_left() -> None:
    async with scripted_server() as server:
        timing = Timing(login=timedelta(milliseconds=500), backoff=FAST.backoff, open=FAST.open)
        entering = asyncio.create_task(Client(server.url, USER, timing=timing).__aenter__())
        mute = await server.peer()
        await mute.hear_init()
        await mute.gone()
        await server.logged_in()
        await leave(await within(entering))


async def test_a_login_that_is_not_possible_now_is_tried_again() -> None:
    async with scripted_server() as server:
        entering = asyncio.create_task(Client(server.url, USER, timing=FAST).__aenter__())
        peer = await server.peer()
        await peer.hear_init()
        await peer.send_frame("SYSTEM", code="UNAVAILABLE", contents="Redis is away")
        await peer.gone()
        await server.logged_in()
        await leave(await within(entering))


@pytest.mark.parametrize("code", [CloseCode.NOT_AUTHENTICATED, CloseCode.BAD_USER_ID, CloseCode.LOCKED, 4999])
async def test_a_server_that_refuses_the_user_ends_the_login(code: int) -> None:
    async with scripted_server() as server:
        entering = asyncio.create_task(Client(server.url, USER, timing=FAST).__aenter__())
        peer = await server.peer()
        await peer.hear_init()
        await peer.send_frame("SYSTEM", code="SYSTEM_ERROR", contents="who are you?")
        await peer.close(code)
        with pytest.raises(SessionEnded, match=r"who are you\?") as caught:
            await within(entering)
        assert caught.value.code == code


async def test_giving_up_the_login_leaves_nothing() -> None:
    async with scripted_server() as server:
        entering = asyncio.create_task(Client(server.url, USER, timing=FAST).__aenter__())
        peer = await server.peer()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(entering)
        await peer.gone()


async def test_the_next_server_is_tried_when_one_cannot_be_reached() -> None:
    async with scripted_server() as first, scripted_server() as second:
        dead = "ws://127.0.0.1:9/ws"  # the discard port, which is not in use
        login = asyncio.create_task(second.logged_in())
        async with Client([dead, second.url, first.url], USER, timing=FAST) as client:
            session = Session(second, client, await login)
            reply = await session.asked()
            await session.lose_connection()  # the one that worked is tried first
            await session.peer.close(CloseCode.DRAINING)  # and replaced when it drains
            peer = await first.logged_in()
            await peer.send_chat(reply.message_id, "done", attempt=1, offset=0)
            await within(reply.text())


async def test_a_full_server_is_left_for_another() -> None:
    async with scripted_server() as full, scripted_server() as free:
        entering = asyncio.create_task(Client([full.url, free.url], USER, timing=FAST).__aenter__())
        await (await full.peer()).close(CloseCode.NODE_FULL)
        await free.logged_in()
        await leave(await within(entering))
