"""A connection to an untrusted HTTP/1.1 server, whose responses are bounded. httptools parses them."""
# ruff: noqa: D102 - the callbacks of asyncio and httptools are described there

from collections.abc import Callable
from http import HTTPStatus

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from imstream.ai.held_connection import HeldConnection
from imstream.ai.http_response import BadResponse, BodyBroken, ConnectionLost, Failure, Response, ResponseTooLarge

HEAD_LIMIT = 32 * 1024  # bytes of the head of a response and its trailers, including interim responses (1xx)
OVERHEAD_LIMIT = 512 * 1024  # bytes of a response that are not body, such as chunk sizes, beyond the size of its body
_FIELD = 32  # bytes that each field and each status line count in addition, as in HTTP/2 (RFC 9113, section 6.5.2)


class HttpConnection(HeldConnection):
    """A connection, on which one request is sent after the other.

    It is aborted if it receives anything that belongs to no request, such as a second response.
    """

    def __init__(self, *, limit: int, on_end: "Callable[[HttpConnection, bool], None]") -> None:
        """`limit`: bytes of a response. `on_end`: called after each one; whether the connection can be used again."""
        super().__init__()
        self._limit = limit
        self._on_end = on_end
        self._response: Response | None = None
        self._is_complete = self._is_reusable = False  # after the response
        self._head_remaining = self._allowed = 0  # bytes
        self._unchecked = 0  # bytes that may be received before the limits are checked again
        self._parts: list[bytes] = []
        self.on_body = self._parts.append  # called by the parser, without running Python code
        self._parser = HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(  # what servers do
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    async def send(self, request: bytes) -> Response:
        """Send a request; return when the head of the response is received.

        Raises `ConnectionLost`, `BadResponse` or `ResponseTooLarge`. Cancelling closes the connection.
        """
        if self.transport.is_closing():
            raise ConnectionLost("the connection was closed")
        response = self._response = Response(self)
        self._is_complete = False
        self._head_remaining = self._allowed = self._unchecked = HEAD_LIMIT
        self.transport.write(request)
        try:
            await response.wait()
        except BaseException:
            self.abort()
            raise
        if not response.status:
            response.check()
        return response

    def abort(self) -> None:
        self._response = None
        super().abort()

    # Called by the event loop

    def data_received(self, data: bytes) -> None:
        if self.gathered is not None:
            if (held := self.gather(data)) is None:
                return
            data = held
        response = self._response
        if response is None:
            self.abort()
            return
        had_head = response.status != 0
        failure: Failure | None = None
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._is_reusable = False
            if not self._is_complete:
                failure = BodyBroken if had_head else BadResponse, "it is not valid HTTP"
        body = b"".join(self._parts)  # does not copy a single one
        self._parts.clear()
        response.received += len(body)
        self._unchecked -= len(data)
        if self._unchecked < 0 and failure is None:
            failure = self._check_limits(response)
        if failure is not None or self._is_complete:
            if failure is not None and not had_head:
                response.status = 0  # `send` raises it
            self._end(response, body, failure)
        else:
            response.receive(body)
            if not had_head and response.status:
                response.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._socket = None
        self.release()
        if (response := self._response) is not None:
            headers = response.headers
            has_end = "content-length" in headers or headers.get("transfer-encoding", "").lower().endswith("chunked")
            failure = BodyBroken if response.status else ConnectionLost, "the connection was closed"
            is_end = response.status and not has_end and exc is None and not self._is_reset
            self._end(response, b"", None if is_end else failure)
        del self.on_body, self._parser  # they refer to this object

    def _check_limits(self, response: Response) -> Failure | None:
        """Check the limits of a response; called occasionally, not for each read."""
        received = self._allowed - self._unchecked
        if not response.status:
            return BadResponse, "the head is too long"
        allowed = min(self._limit, OVERHEAD_LIMIT + 2 * response.received)
        if received <= allowed:
            self._allowed, self._unchecked = allowed, allowed - received
            return None
        what = "a response" if received > self._limit else f"{response.received} bytes in a response"
        return ResponseTooLarge, f"{what} of more than {allowed} bytes"

    def _end(self, response: Response, body: bytes, failure: Failure | None) -> None:
        self._response = None
        self.stop_holding()
        is_reusable = failure is None and self._is_complete and self._is_reusable and not self.transport.is_closing()
        unsent = self.transport.get_write_buffer_size() + self.wire.get_write_buffer_size()  # of the request
        self._on_end(self, is_reusable and unsent == 0)
        response.end(body, failure)

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._is_complete:
            raise BadResponse("a second response")
        self._count(0)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        response = self._response
        if response is not None and not response.status:  # later ones are trailers
            key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
            response.headers[key] = f"{response.headers[key]}, {text}" if key in response.headers else text

    def on_headers_complete(self) -> None:
        assert self._response is not None  # noqa: S101 - nothing else is parsed
        status = self._parser.get_status_code()
        if status < HTTPStatus.CONTINUE:
            raise BadResponse(f"status {status}")
        if status >= HTTPStatus.OK or status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._response.status = status
        else:
            self._response.headers.clear()

    def on_message_complete(self) -> None:
        if self._response is not None and self._response.status:
            self._is_complete, self._is_reusable = True, self._parser.should_keep_alive()

    def _count(self, size: int) -> None:
        self._head_remaining -= size + _FIELD
        if self._head_remaining < 0:
            raise BadResponse("the head is too long")
