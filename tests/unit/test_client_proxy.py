"""The client and the proxy that the environment names."""

import asyncio
from datetime import timedelta

import pytest

from imstream.client import Client, NotConnected, Timing
from tests.support.scripted_ws import FAST, USER, connected, scripted_server, within

SOON = Timing(open=timedelta(milliseconds=300))
ELSEWHERE = "ws://chat.example/ws"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "socks_proxy"):
        for variable in (name, name.upper()):
            monkeypatch.delenv(variable, raising=False)


async def test_this_machine_is_never_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with connected() as session:
        assert await session.asked()


async def test_other_machines_are_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(await reader.readline())
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        await writer.drain()
        writer.close()

    proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(NotConnected, match=rf"through the proxy http://127.0.0.1:{port}: .*407"):
        await Client(ELSEWHERE, USER, timing=SOON).__aenter__()
    assert (await within(asked.get())).startswith(b"CONNECT chat.example:80 ")
    proxy.close()
    await proxy.wait_closed()


@pytest.mark.parametrize(
    ("proxy", "problem"),
    [
        ("socks5h://me:secret@proxy.example:1080", "requires python-socks"),
        ("ftp://me:secret@proxy.example", "scheme ftp"),
        ("http://me@proxy.example", "without password"),
        ("http://me:secret@proxy.example:none", "Port could not be cast"),
        ("http://me:secret@127.0.0.1:9", "Connection refused"),
    ],
)
async def test_a_proxy_that_cannot_be_used_is_one_sentence(
    proxy: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(NotConnected, match=f"^ws://chat.example/ws through the proxy .*{problem}") as caught:
        await Client(ELSEWHERE, USER, timing=SOON).__aenter__()
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_the_next_server_is_tried_when_the_proxy_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "ftp://proxy.example")
    async with scripted_server() as here:
        login = asyncio.create_task(here.logged_in())
        async with Client([ELSEWHERE, here.url], USER, timing=FAST):
            await login
