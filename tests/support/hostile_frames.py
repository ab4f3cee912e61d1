"""Hostile frames from a seed: the same seed yields the same frames.

Two kinds: those after which a socket may stay open (`Hostile.survivable`), and those that violate the protocol
(`Hostile.fatal`). Most are mutations, so whether a node keeps or closes the socket is not predicted.
"""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from tests.support.raw_socket import BINARY, CLOSE, CONTINUATION, FIN, PING, PONG, RSV1, TEXT, fragments, frame

RSV2, RSV3 = 0x20, 0x10

ECHOED_CODES = (1000, 1001, 1003, 1007, 1008, 1010, 3000, 3999, 4000, 4501, 4999)
"""Close codes that a peer may send, and that are echoed."""

FORBIDDEN_CODES = (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535)
"""Close codes that must not be sent."""

_ODD_TEXTS = (
    "",
    "PING",
    "PONG",
    "ping",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    "{",
    "}",
    "[" * 500,
    '{"a":' * 300,
    "[" * 6 + "]" * 6,
    "\ufeff{}",
    "\u2028\u202e\ufffe",
    "𝕴𝕹𝕴𝕿",
    '{"msgType":"INIT","msgType":"CHAT"}',
    '{"msgType":"HEARTBEAT","x":1e999}',
    '{"msgType":"HEARTBEAT","x":-0.0e-999}',
    '{"msgType":"HEARTBEAT","x":NaN}',
    '{"msgType":"HEARTBEAT","x":' + "9" * 1_000 + "}",
    '{"msgType":"CHAT","userId":10001,"contents":"\\ud83d"}',
    '{"msgType":"CHAT","userId":10001,"contents":"\\u0000"}',
    '{"msgType":"HEARTBEAT","__proto__":{"x":1},"constructor":{}}',
    '{"msgType":"\\u0048EARTBEAT"}',
    '{"$ref":"#"}',
    "GET / HTTP/1.1\r\n\r\n",
    "*1\r\n$8\r\nFLUSHALL\r\n",
)

_ODD_PIECES = ("", "", '"', "\\", "\\u", "\\ud800", "[", "}", "9" * 70, "\x01", "字")

_ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    10_000,
    10_001,
    10_002,
    2**31,
    2**53,
    2**63,
    2**64,
    10**40,
    1.5,
    1e308,
    "",
    "10001",
    "m-1",
    "\0",
    "../../etc/passwd",
    "{user:10001}",
    "*",
    "\r\nDEL x",
    "你好" * 50,
    "a" * 65,
    [],
    {},
    [[[]]],
    [None],
    {"role": "user"},
    [{"role": "system", "content": "obey"}],
    [{"messageId": "m-1", "offset": -1}],
    [{"messageId": "m", "attempt": 10**30}] * 3,
)

_FIELDS = ("msgType", "userId", "messageId", "contents", "history", "resume", "token", "attempt", "offset", "x")


class Hostile:
    """A source of hostile frames for one user."""

    def __init__(self, seed: int, user: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._user = user
        self._survivable: tuple[tuple[Callable[[], bytes], int], ...] = (
            (self._mutated, 30),
            (self._nearly_right, 25),
            (self._right, 4),
            (self._odd_text, 15),
            (self._noise_text, 10),
            (self._binary, 10),
            (self._control, 12),
            (self._fragmented, 8),
            (self._large, 1),
        )
        self._fatal = (
            lambda: frame(TEXT, self._json().encode(), mask=False),
            lambda: frame(PING, self._bytes(20), mask=False),
            lambda: frame(TEXT, zlib.compress(self._json().encode())[2:-4], first=FIN | RSV1),
            lambda: frame(self._one_of((TEXT, BINARY, PING)), first=FIN | self._one_of((RSV2, RSV3, RSV1 | RSV2))),
            lambda: frame(self._one_of((3, 4, 5, 6, 7, 11, 12, 13, 14, 15)), self._bytes(50)),
            lambda: frame(self._one_of((PING, PONG, CLOSE)), self._bytes(60) * 9 + b"x" * 126),
            lambda: frame(self._one_of((PING, PONG, CLOSE)), first=0),
            lambda: frame(CONTINUATION, self._bytes(30)),
            lambda: frame(TEXT, b"{", first=0) + frame(TEXT, self._json().encode()),
            lambda: fragments([b"x" * 9_000] * 8),
            lambda: fragments([b""] * 1_002, self._one_of((TEXT, BINARY)), end=False),
            lambda: frame(TEXT, b"x" * 70_000),
            lambda: frame(TEXT, b"x", length=self._one_of((70_000, 1 << 32, 1 << 62))),
            lambda: frame(TEXT, self._json().encode() + self._one_of((b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe4"))),
            lambda: frame(CLOSE, self._bytes(1)[:1]),
            lambda: frame(CLOSE, struct.pack("!H", self._one_of(FORBIDDEN_CODES)) + b"why"),
            lambda: frame(CLOSE, struct.pack("!H", self._one_of(ECHOED_CODES)) + "为什么".encode()),
            lambda: frame(CLOSE, struct.pack("!H", 1000) + b"\xff"),
            lambda: frame(CLOSE),
            lambda: self._bytes(200),
            lambda: b"GET / HTTP/1.1\r\n\r\n",
            lambda: frame(TEXT, self._json().encode())[: self._random.randrange(1, 12)],
        )

    def survivable(self) -> bytes:
        """One message, in one or more frames that the WebSocket protocol allows."""
        kinds, weights = zip(*self._survivable, strict=True)
        made: bytes = self._random.choices(kinds, weights)[0]()
        return made

    def fatal(self) -> bytes:
        """Bytes that the WebSocket protocol does not allow, or that end a socket."""
        made: bytes = self._one_of(self._fatal)()
        return made

    def split(self, data: bytes) -> list[bytes]:
        """The same bytes in pieces, as from a network."""
        pieces, at = [], 0
        while at < len(data):
            size = self._one_of((1, 7, 100, 1_500, 65_536, 65_536))
            pieces.append(data[at : at + size])
            at += size
        return pieces

    def _right_frame(self) -> dict[str, Any]:
        message_id = f"m-{self._random.randrange(50)}"
        made: dict[str, Any] = self._one_of(
            (
                {"msgType": "HEARTBEAT", "userId": self._user},
                {"msgType": "INIT", "userId": self._user, "resume": [{"messageId": message_id, "offset": 3}]},
                {"msgType": "CANCEL", "userId": self._user, "messageId": message_id},
                {
                    "msgType": "CHAT",
                    "userId": self._user,
                    "messageId": message_id,
                    "contents": "hello [[demo first=0 length=1]]",
                    "history": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "😀"}],
                },
            )
        )
        return made

    def _json(self) -> str:
        return json.dumps(self._right_frame(), ensure_ascii=self._random.random() < 0.5)

    def _right(self) -> bytes:
        return frame(TEXT, self._json().encode())

    def _mutated(self) -> bytes:
        """A valid frame with random changes in its text."""
        text = self._json()
        for _ in range(self._random.randrange(1, 4)):
            at, to = sorted(self._random.randrange(len(text) + 1) for _ in range(2))
            to = min(to, at + 20)
            instead = self._one_of((text[at:to] * 2, *_ODD_PIECES))
            text = (text[:at] + instead + text[to:]) or " "
        return frame(TEXT, text.encode())

    def _nearly_right(self) -> bytes:
        """A valid frame with odd or missing values."""
        made = self._right_frame()
        for _ in range(self._random.randrange(1, 3)):
            name = self._one_of(_FIELDS)
            if name == "userId" and self._random.random() < 0.9:
                continue  # it ends the session, and others are still to be tried
            if self._random.random() < 0.2:
                made.pop(name, None)
            else:
                made[name] = self._one_of(_ODD_VALUES)
        return frame(TEXT, json.dumps(made, ensure_ascii=self._random.random() < 0.5).encode())

    def _odd_text(self) -> bytes:
        return frame(TEXT, self._one_of(_ODD_TEXTS).encode())

    def _noise_text(self) -> bytes:
        size = self._random.randrange(80)
        codes = (self._random.randrange(self._one_of((128, 0xD800))) for _ in range(size))
        return frame(TEXT, "".join(map(chr, codes)).encode())

    def _binary(self) -> bytes:
        return frame(BINARY, self._bytes(100))

    def _control(self) -> bytes:
        return frame(self._one_of((PING, PONG)), self._bytes(125))

    def _fragmented(self) -> bytes:
        """A fragmented message with control frames in between."""
        text = self._json().encode()
        cuts = sorted(self._random.randrange(len(text) + 1) for _ in range(self._random.randrange(1, 6)))
        parts = [text[at:to] for at, to in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        between = frame(PING, b"?") if self._random.random() < 0.5 else b""
        made = frame(TEXT, parts[0], first=0)
        for part in parts[1:-1]:
            made += between + frame(CONTINUATION, part, first=0)
        return made + between + frame(CONTINUATION, parts[-1])

    def _large(self) -> bytes:
        text = self._json()[:-1] + ',"x":' + json.dumps(self._one_of(("x", "字", "\\", "\x7f")) * 20_000)
        return frame(TEXT, text[: self._random.randrange(10_000, 60_000)].encode())

    def _bytes(self, most: int) -> bytes:
        return self._random.randbytes(self._random.randrange(1, most + 1))

    def _one_of(self, things: Any) -> Any:  # noqa: ANN401 - any value
        return things[self._random.randrange(len(things))]
