"""The addresses a node listens on."""

import asyncio
import socket

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from imstream.gateway.server import GatewayServer
from imstream.settings import Settings
from tests.support.waiting import wait_until


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def _hello(_: object) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def _no_socket(_: object) -> None:
    raise AssertionError("this test opens no socket")


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "reached_by"), [("::", ("127.0.0.1", "::1")), ("::1", ("::1",))])
async def test_all_addresses_are_those_of_both_families(host: str, reached_by: tuple[str, ...]) -> None:
    app = Starlette(routes=[Route("/", _hello)])
    server = GatewayServer(app, Settings(host=host, port=0), _no_socket)
    server.listen()
    port = int(server.address.rpartition(":")[2])
    serving = asyncio.create_task(server.serve())
    await wait_until(lambda: server.started, "it serves")
    try:
        for address in reached_by:
            reader, writer = await asyncio.open_connection(address, port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"hello")
            writer.close()
            await writer.wait_closed()
    finally:
        server.stop()
        await serving
