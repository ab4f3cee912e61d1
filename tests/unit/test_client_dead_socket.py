"""Connections that are lost without either end noticing: data sent into them arrives on another one."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from imstream.client import Client, Receipt, Timing
from tests.support.scripted_ws import FAST, USER, connected, scripted_server, within
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import SLOW, wait_until

PROBED = replace(FAST, probe=timedelta(seconds=1))


@pytest.mark.parametrize("is_cancel", [False, True], ids=["message", "cancel"])
async def test_a_message_sent_into_a_dead_socket_arrives_soon(*, is_cancel: bool) -> None:
    timing = PROBED if is_cancel else Timing(open=FAST.open)
    async with scripted_server() as server, tcp_proxy(server.port) as proxy:
        login = asyncio.create_task(server.logged_in())
        async with Client(f"ws://127.0.0.1:{proxy.port}/ws", USER, timing=timing) as client:
            await login
            proxy.swallow()
            began = asyncio.get_running_loop().time()
            if is_cancel:
                receipt = asyncio.create_task(client.cancel("m1"))
            else:
                await client.send("hello", message_id="m1")
            await wait_until(lambda: proxy.swallowed, "it is lost")
            proxy.forward()
            peer = await server.logged_in()
            frame = await peer.hear_cancel() if is_cancel else await peer.hear_chat()
            assert frame.message_id == "m1"
            assert asyncio.get_running_loop().time() - began < 5 * SLOW  # 3 s for the pong, up to 0.5 s of backoff
            if is_cancel:
                await peer.send_frame("SYSTEM", code="UNKNOWN", message_id="m1")
                assert await within(receipt) is Receipt.UNKNOWN


async def is_open(socket: Any) -> bool:  # noqa: ANN401 - either end
    """Whether a connection outlives several time limits for a sign of life."""
    try:
        async with asyncio.timeout(3 * PROBED.probe.total_seconds()):
            await socket.wait_closed()
    except TimeoutError:
        return True
    return False


async def test_a_living_server_is_not_left() -> None:
    async with connected(timing=PROBED) as session:
        await session.client.send("hello", message_id="m1")
        assert await is_open(session.peer.socket)


async def test_a_server_that_is_busy_with_a_message_is_not_taken_for_dead() -> None:
    async with connected(timing=PROBED) as session:
        await session.client.send("first", message_id="m1")
        await session.peer.hear_chat()
        session.peer.socket.transport.pause_reading()
        await session.client.send("second", message_id="m2")
        assert await is_open(session.peer.socket)
        session.peer.socket.transport.resume_reading()
        assert (await session.peer.hear_chat()).message_id == "m2"


async def test_a_frame_before_the_pong_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(timing=PROBED) as session:
        protocol = session.peer.socket.protocol
        send_frame = protocol.send_frame

        def send_no_pong(frame: Frame) -> None:
            if frame.opcode is not Opcode.PONG:
                send_frame(frame)

        monkeypatch.setattr(protocol, "send_frame", send_no_pong)
        await session.client.send("hello", message_id="m1")
        for offset in range(1, 5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(PROBED.probe.total_seconds() / 2):
                    await session.peer.gone()
            await session.peer.send_chat("m1", "delta", contents="x", attempt=1, offset=offset)
        await session.peer.gone()  # nothing follows
