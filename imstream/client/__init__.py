"""The Python client: `async with Client(url, user_id) as client: reply = await client.send("hello")`."""

from imstream.client.client import Client
from imstream.client.connection import Connected, ConnectionChange, Disconnected
from imstream.client.errors import (
    BadMessage,
    Busy,
    Cancelled,
    ClientClosed,
    ClientError,
    Expired,
    Failed,
    NotConnected,
    ProtocolViolation,
    RateLimited,
    Refused,
    SessionEnded,
    Unanswered,
    Unavailable,
)
from imstream.client.reconnect import Timing
from imstream.client.reply import (
    Accepted,
    Outcome,
    Piece,
    Receipt,
    Reply,
    ReplyEvent,
    Restarted,
    Result,
    Status,
    Thinking,
)
from imstream.wire import Turn

__all__ = [
    "Accepted",
    "BadMessage",
    "Busy",
    "Cancelled",
    "Client",
    "ClientClosed",
    "ClientError",
    "Connected",
    "ConnectionChange",
    "Disconnected",
    "Expired",
    "Failed",
    "NotConnected",
    "Outcome",
    "Piece",
    "ProtocolViolation",
    "RateLimited",
    "Receipt",
    "Refused",
    "Reply",
    "ReplyEvent",
    "Restarted",
    "Result",
    "SessionEnded",
    "Status",
    "Thinking",
    "Timing",
    "Turn",
    "Unanswered",
    "Unavailable",
]
