"""Private names of libraries that imstream uses: an upgrade that removes one fails here, with a sentence."""

import inspect
from importlib.metadata import version

from redis.asyncio.connection import Connection, DefaultParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server, ServerState
from websockets.http11 import Response
from websockets.server import ServerProtocol


def check(library: str, owner: object, *names: str, used_by: str) -> None:
    """Assert that an object of a library has attributes."""
    for name in names:
        where = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        assert hasattr(owner, name), f"{library} {version(library)} has no {where}.{name}, which {used_by} uses"


def test_uvicorn_has_the_names_that_limit_connections_and_requests() -> None:
    used_by = "imstream/gateway/server.py"
    methods = ("on_message_begin", "on_header", "on_headers_complete", "on_response_complete", "send_400_response")
    check("uvicorn", HttpToolsProtocol, *methods, "handle_websocket_upgrade", used_by=used_by)
    check("uvicorn", HttpToolsProtocol, "_unset_keepalive_if_required", used_by=used_by)
    check("uvicorn", ServerState(), "connections", "tasks", used_by=used_by)
    check("uvicorn", Server, "capture_signals", used_by=used_by)
    source = inspect.getsource(HttpToolsProtocol)
    attributes = ("connections", "transport", "logger", "loop", "cycle", "headers", "parser", "scope", "url")
    unset = [name for name in attributes if f"self.{name} = " not in source and f"self.{name}: " not in source]
    assert unset == [], f"uvicorn sets no such attributes of HttpToolsProtocol, which {used_by} uses"
    call = "self.ws_protocol_class(  # type: ignore[call-arg, misc]\n            config=self.config,"
    assert call in source, f"uvicorn does not call the factory of {used_by} with keyword arguments"


def test_websockets_has_the_names_that_bound_and_free_a_socket() -> None:
    used_by = "imstream/gateway/websocket_protocol.py"
    names = ("parser", "parser_exc", "handshake_exc", "reader", "close_sent", "close_rcvd")
    check("websockets", ServerProtocol(), *names, used_by=used_by)
    check("websockets", ServerProtocol().reader, "buffer", used_by=used_by)
    check("websockets", Response, "serialize", used_by=used_by)


def test_redis_has_the_names_that_read_and_write_without_its_streams() -> None:
    used_by = "imstream/redis/connection.py"
    check("redis", Connection(), "_writer", used_by=used_by)
    check("redis", DefaultParser, "parse_error", used_by=used_by)
