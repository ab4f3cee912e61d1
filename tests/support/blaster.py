"""A server in a thread that sends fixed bytes as fast as they are read, and a meter of the CPU cost of reading.

The scripted backend shares the event loop with its client. Here the loop only reads, so its CPU time is that of
reading the answer.
"""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass


def head(*fields: str, status: str = "200 OK") -> bytes:
    """The head of a response."""
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode()


def chunked(body: bytes, *fields: str, size: int = 60_000) -> bytes:
    """A successful response whose body comes in chunks."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    # Closed by the server: a kept-alive connection could be reused in the moment in which it ends.
    return head("Transfer-Encoding: chunked", "Connection: close", *fields) + chunks + b"0\r\n\r\n"


def _serve(connection: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    with connection, suppress(OSError):
        request = b""
        while data := connection.recv(65536):
            request += data
            before, end, body = request.partition(b"\r\n\r\n")
            length = before.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            if end and len(body) >= int(length or b"0"):
                connection.sendall(answer(body))
                connection.shutdown(socket.SHUT_WR)
                request = b""


@contextmanager
def blaster(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """Answer each request with bytes made from its body, then close the connection. Yields the base URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=_serve, args=(connection, answer), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


@dataclass
class Cost:
    """CPU seconds of the event loop's thread: the total, and the maximum between two readings."""

    total: float = 0.0
    pause: float = 0.0


@asynccontextmanager
async def measured() -> AsyncIterator[Cost]:
    """Measure the CPU cost of the block in this thread."""
    cost = Cost()
    began = last = time.thread_time()

    async def watch() -> None:
        nonlocal last
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            cost.pause = max(cost.pause, now - last)
            last = now

    watching = asyncio.create_task(watch())
    try:
        yield cost
    finally:
        watching.cancel()
        now = time.thread_time()
        cost.total, cost.pause = now - began, max(cost.pause, now - last)
