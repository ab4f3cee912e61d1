"""Heads of 12 KiB for connections that fail, or become sockets that never log in."""

from tests.support.raw_socket import CLOSE, PING, TEXT, frame

KEY, VERSION = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"
UPGRADE = ("GET /ws?userId=10001 HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket")
SUBPROTOCOLS = "Sec-WebSocket-Protocol: " + ", ".join(f"p{n}" for n in range(8))
LARGE = (*(f"X-Header-{n}: {'x' * 110}" for n in range(90)), SUBPROTOCOLS, "Cookie: " + "c" * 500)


def request(*lines: str) -> bytes:
    """A request without a body."""
    return "\r\n".join((*lines, "", "")).encode()


def upgrade(*headers: str, line: str = UPGRADE[0]) -> bytes:
    """A handshake with these additional headers."""
    return request(line, *UPGRADE[1:], KEY, VERSION, *headers)


PASSING: dict[str, tuple[bytes, bytes]] = {
    "accepted, and gone": (upgrade(*LARGE), b""),
    "accepted, and closed in order": (upgrade(*LARGE), frame(CLOSE, b"\x03\xe8")),
    "half a message": (upgrade(*LARGE), frame(TEXT, b"x" * 8_000, first=0) + frame(TEXT, b"y" * 8_000)[:2_000]),
    "a message that is no JSON": (upgrade(*LARGE), frame(TEXT, b'{"a":NaN')),
    "a login": (upgrade(*LARGE), frame(TEXT, b'{"msgType":"INIT","userId":10001,"resume":[{"messageId":"m"}]}')),
    "more than its pace": (upgrade(*LARGE), frame(PING) * 205),
    "a large message, and half of another": (upgrade(*LARGE), frame(TEXT, b"x" * 16_000) * 2 + b"\x81\xfe\x3f\x00"),
    "a frame that breaks the protocol": (upgrade(*LARGE), frame(TEXT, b"x", mask=False)),
    "a frame that is too big": (upgrade(*LARGE), frame(TEXT, b"x", length=1 << 40)),
    "a text that is no UTF-8": (upgrade(*LARGE), frame(TEXT, b"\xff")),
    "another origin": (upgrade(*LARGE, "Origin: https://elsewhere.example"), b""),
    "another version": (request(*UPGRADE, KEY, "Sec-WebSocket-Version: 8", *LARGE), b""),
    "no version": (request(*UPGRADE, KEY, *LARGE), b""),
    "no key": (request(*UPGRADE, VERSION, *LARGE), b""),
    "an invalid key": (request(*UPGRADE, VERSION, "Sec-WebSocket-Key: ???", *LARGE), b""),
    "an upgrade by POST": (upgrade(*LARGE, line="POST /ws HTTP/1.1"), b""),
    "another path": (upgrade(*LARGE, line="GET /nowhere HTTP/1.1"), b""),
    "too many subprotocols": (upgrade("Sec-WebSocket-Protocol: " + ",".join("a" * 6_000)), b""),
    "a line that is too long": (upgrade("X-Long: " + "x" * 9_000), b""),
    "too many headers": (upgrade(*(f"X-{n}: x" for n in range(200))), b""),
    "a head that is too long": (upgrade(*LARGE * 4), b""),
    "the page": (request("GET / HTTP/1.1", "Host: x", *LARGE), b""),
    "no page": (request("GET /nowhere HTTP/1.1", "Host: x", *LARGE), b""),
    "half a head": (upgrade(*LARGE)[:-2], b""),
    "no HTTP": (b"\x16\x03\x01" * 4_000, b""),
}
"""The first bytes of each, and those after the handshake was accepted."""
