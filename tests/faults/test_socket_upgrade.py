"""An upgrade request that the parser rejects gets an answer, and does not disturb the shutdown of the node."""

import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import psutil

from tests.support.one_node import one_node
from tests.support.processes import free_port, http_status, wait_for
from tests.support.raw_socket import raw_socket
from tests.support.servers import DemoBackend, RedisServer, start_node

MAX_HEAD, MAX_HEADERS, MAX_ITEMS = 16_384, 128, 8

TOO_MUCH = {
    "a header of 9 KiB": ["X-Long: " + "x" * 9 * 1024],
    "a cookie of 60 KiB": ["Cookie: " + "x" * 60 * 1024],
    "200 headers": [f"X-{number}: x" for number in range(200)],
    "2,000 headers": [f"X-{number}: x" for number in range(2000)],
}


def _padded(size: int, *lines: str) -> bytes:
    """A request of `size` bytes, with no line over 8 KiB."""
    made = "\r\n".join((*lines, "Host: 127.0.0.1", *("X-Pad: " + "x" * 4_000,) * (size // 5_000), "X-Rest: "))
    return f"{made}{'x' * (size - len(made) - 4)}\r\n\r\n".encode()


async def _check_bounds(port: int) -> None:
    """Check the limits on bytes, headers and items of a head."""
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    upgrade = ("GET /ws HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
    page = ("GET /healthz HTTP/1.1",)
    headers = [f"X-{n}: x" for n in range(MAX_HEADERS)]

    def protocols(count: int) -> str:
        return "Sec-WebSocket-Protocol: " + ", ".join(f"p{n}" for n in range(count))

    def of(*lines: str) -> bytes:
        return "\r\n".join((*lines, "", "")).encode()

    asked = {
        _padded(MAX_HEAD, *page): 200,
        _padded(MAX_HEAD + 1, *page): 431,
        _padded(MAX_HEAD, *upgrade): 101,
        _padded(MAX_HEAD + 1, *upgrade): 431,
        of(*page, *headers): 200,
        of(*page, *headers, "X-One-More: x"): 431,
        of(*upgrade, *headers): 431,
        of(*upgrade, protocols(MAX_ITEMS)): 101,
        of(*upgrade, protocols(MAX_ITEMS + 1)): 400,
        of(*upgrade, protocols(MAX_ITEMS), protocols(1)): 400,
        of(upgrade[0], "Connection: Upgrade" + ", x" * MAX_ITEMS, *upgrade[2:]): 400,
        _padded(200_000, *page): 431,
        of("GET /" + "x" * MAX_HEAD + " HTTP/1.1"): 431,
    }
    for request, status in asked.items():
        for pieces in ([request], [request[:100], request[100:16_000], request[16_000:]]):
            async with raw_socket(port) as someone:
                for piece in pieces:
                    await someone.send(piece)
                assert (await someone.head()).split(b" ")[1] == str(status).encode(), request[:200]


async def test_headers_that_are_too_large_are_answered_with_431_and_the_node_ends_in_order(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    async with one_node(tmp_path, redis_server, demo.url) as node:
        await _check_bounds(node.port)
        for what, headers in TOO_MUCH.items():
            async with raw_socket(node.port) as someone:
                head = await someone.upgrade("/ws?userId=10001", headers)
                assert head.startswith(b"HTTP/1.1 431 "), what
                assert await someone.ended()  # a sentence that names the limit, and the end
        await node.nothing_open()

        process = psutil.Process(node.now.process.pid)
        memory = process.memory_info().rss
        async with raw_socket(node.port) as endless:
            await endless.send(b"GET /ws HTTP/1.1\r\nHost: x\r\n")
            with suppress(ConnectionError):
                for _ in range(30):
                    await endless.send(b"X-Header: value\r\n" * 60_000)
            # The answer may be lost when the connection is aborted.
            assert (await endless.head()).split(b"\r\n")[0] in {b"HTTP/1.1 431 Request Header Fields Too Large", b""}
        assert process.memory_info().rss - memory < 10 << 20
        await node.nothing_open()

        async with AsyncExitStack() as stack:
            # These connections stay open, refused, incomplete or silent, while the node stops.
            refused = await stack.enter_async_context(raw_socket(node.port))
            assert (await refused.upgrade(headers=TOO_MUCH["200 headers"])).startswith(b"HTTP/1.1 431 ")
            half = await stack.enter_async_context(raw_socket(node.port))
            await half.send(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
            long = await stack.enter_async_context(raw_socket(node.port))
            await long.send(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nX-Long: " + b"x" * 20_000)
            await stack.enter_async_context(raw_socket(node.port))
            healthy = await stack.enter_async_context(node.peer(10001))
            began = time.monotonic()
            assert await node.terminated() == 0
            assert time.monotonic() - began < 8
            assert await healthy.closed() == 1012
        assert '"drained"' in node.now.process.output()


async def test_a_node_that_is_not_ready_refuses_a_handshake_with_503_and_has_nothing_to_log(tmp_path: Path) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    node = start_node(tmp_path, redis_url=nowhere, ai_url="http://127.0.0.1:9/v1", wait=False)
    with node.process:
        wait_for(lambda: http_status(f"{node.http}/readyz") == 503, node.process, "a node without Redis")
        async with raw_socket(node.port) as someone:
            head = await someone.upgrade("/ws?userId=10001")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert await someone.ended() == b"not ready: redis does not answer"
    assert "uvicorn" not in node.process.output()
