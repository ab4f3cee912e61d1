"""An HTTP/1.1 client of one server, directly or through a proxy. Its connections are kept for further requests."""

import asyncio
import socket
import ssl
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus

from aiohappyeyeballs import AddrInfoType, start_connection
from multidict import CIMultiDict
from yarl import URL

from imstream.ai.held_connection import RECEIVE_BUFFER
from imstream.ai.http_connection import HttpConnection
from imstream.ai.http_response import HttpError, Response

KEEP_ALIVE = 4.0  # seconds, of an unused connection: servers close theirs after 5 s (uvicorn, Node) or later
_ADDRESSES_TTL = 10.0  # seconds that the addresses of a host are kept
_NEXT_ADDRESS = 0.25  # seconds after which the next one is tried, too (RFC 8305, section 5)


class ConnectFailed(HttpError):  # noqa: N818 - reads as what happened
    """The server or its proxy cannot be reached. `is_tls`: because of TLS, such as a certificate."""

    def __init__(self, url: URL, error: OSError | UnicodeError) -> None:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        super().__init__(f"Cannot connect to host {url.raw_host}:{url.port} [{why}]")
        self.is_tls = isinstance(error, ssl.SSLError)


class ProxyRefused(HttpError):  # noqa: N818 - same
    """The proxy does not connect to the server. `status`: that of its response."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the proxy answers with status {status}")
        self.status = status


class HttpClient:
    """Sends each request on a connection of its own, and follows no redirect. Time limits are the caller's.

    The number of connections is not limited: a call that waits for a free one would be reported as a connect timeout.
    """

    def __init__(
        self, server: URL, headers: Mapping[str, str], *, limit: int, proxy: URL | None, keep_alive: float = KEEP_ALIVE
    ) -> None:
        """`headers`: of each request. `limit`: bytes of a response. `keep_alive`: see `KEEP_ALIVE`."""
        self._server, self._peer = server, proxy or server
        self._is_tunnel = proxy is not None and server.scheme == "https"
        self._proxy_login = _login("Proxy-Authorization", proxy) if proxy is not None else {}
        fields = CIMultiDict({"Host": server.host_port_subcomponent or "", **_login("Authorization", server)})
        fields.update(headers)
        self._origin = ""  # before the path in a request
        if proxy is not None and not self._is_tunnel:
            self._origin = str(server.origin())
            fields.update(self._proxy_login)
        self._fields = _lines(fields)
        self._limit = limit
        self._keep_alive = keep_alive
        self._tls = _tls_context() if "https" in {server.scheme, self._peer.scheme} else None
        self._idle: deque[tuple[HttpConnection, float]] = deque()  # since a loop time
        self._timer: asyncio.TimerHandle | None = None  # closes connections
        self._lookup = asyncio.Lock()
        self._addresses: deque[AddrInfoType] = deque()
        self._looked_up = 0.0  # loop time

    async def request(
        self,
        method: str,
        url: URL,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        on_send: Callable[[], None] | None = None,
    ) -> Response:
        """Send a request to a URL of the server; return when the head of the response is received.

        A body is JSON. `on_send` is called when a connection, new or kept, starts to send. Raises `HttpError`.
        """
        head = f"{method} {self._origin}{url.raw_path_qs} HTTP/1.1\r\n{self._fields}{_lines(headers or {})}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection = self._kept() or await self._connect()
        if on_send is not None:
            on_send()
        return await connection.send(b"%b\r\n%b" % (head.encode(), body))

    async def close(self) -> None:
        """Close the unused connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection, _ in self._idle:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # the event loop closes them

    def _kept(self) -> HttpConnection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def _keep(self, connection: HttpConnection, is_reusable: bool) -> None:  # noqa: FBT001 - a callback
        if not is_reusable:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._timer is None:
            self._timer = loop.call_later(self._keep_alive, self._close_unused)

    def _close_unused(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        while self._idle:
            connection, since = self._idle[0]
            if loop.time() < since + self._keep_alive:
                self._timer = loop.call_at(since + self._keep_alive, self._close_unused)
                return
            connection.abort()
            self._idle.popleft()

    async def _connect(self) -> HttpConnection:
        try:
            if not self._is_tunnel:
                return await self._connect_to_peer(self._keep)
            return await self._connect_through(await self._connect_to_peer(lambda *_: None))
        except (OSError, UnicodeError) as error:  # the latter: a host name that is too long
            host = self._server if isinstance(error, ssl.SSLError) else self._peer
            raise ConnectFailed(host, error) from None

    async def _connect_to_peer(self, on_end: Callable[[HttpConnection, bool], None]) -> HttpConnection:
        peer, loop = self._peer, asyncio.get_running_loop()
        async with self._lookup:
            if not self._addresses or loop.time() > self._looked_up + _ADDRESSES_TTL:
                found = await loop.getaddrinfo(peer.raw_host, peer.port, type=socket.SOCK_STREAM)
                self._addresses, self._looked_up = deque(found), loop.time()
            self._addresses.rotate(-1)  # the next connection begins with another one
            addresses = tuple(self._addresses)
        sock = await start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS, socket_factory=_small_socket)
        connection = HttpConnection(limit=self._limit, on_end=on_end)
        is_plain = peer.scheme != "https"
        try:
            wire, _ = await loop.create_connection(lambda: connection if is_plain else asyncio.Protocol(), sock=sock)
        except BaseException:
            sock.close()
            raise
        if not is_plain:
            await self._start_tls(wire, connection, peer)
        return connection

    async def _connect_through(self, proxy: HttpConnection) -> HttpConnection:
        """Ask a proxy for a tunnel to the server."""
        address = f"{self._server.host_subcomponent}:{self._server.port}"
        head = f"CONNECT {address} HTTP/1.1\r\n{_lines({'Host': address, **self._proxy_login})}\r\n"
        connection = HttpConnection(limit=self._limit, on_end=self._keep)
        try:
            response = await proxy.send(head.encode())
            if response.status == HTTPStatus.OK:
                await self._start_tls(proxy.transport, connection, self._server)
                return connection
        except BaseException:
            proxy.abort()
            raise
        proxy.abort()
        raise ProxyRefused(response.status)

    async def _start_tls(self, wire: asyncio.Transport, connection: HttpConnection, url: URL) -> None:
        assert self._tls is not None  # noqa: S101 - the scheme is https
        loop = asyncio.get_running_loop()
        try:
            name = (url.raw_host or "").rstrip(".")  # as certificates have it
            transport = await loop.start_tls(wire, connection, self._tls, server_hostname=name)
        except BaseException:
            wire.abort()
            raise
        assert transport is not None  # noqa: S101 - only of a transport that is closed
        connection.connection_made(transport)
        connection.wire = wire


def _small_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return sock


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _lines(fields: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items())


def _login(field: str, url: URL) -> dict[str, str]:
    """The field with the user and the password of a URL, if it has any."""
    if url.user is None and url.password is None:
        return {}
    return {field: "Basic " + b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()}
