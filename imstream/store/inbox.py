"""Inboxes: what nodes tell each other. A notice is a hint that makes things quick; nothing is lost when one is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from imstream.clock import milliseconds
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import Argument, BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.scripts import load_script

MAX_NOTICES = 1_000
"""About so many are kept; a node that is further behind finds out by looking."""

INBOX_TTL = timedelta(minutes=10)
"""How long an inbox is kept in which nobody leaves anything: that of a node that is dead, mostly."""

_AT_ONCE = 100
"""Most notices taken in one read."""

_DIGITS = re.compile(r"[0-9]{1,20}")
_MESSAGE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

_NOTIFY = load_script("notify")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ReplyGrew:
    """Something new is in the reply stream of a message. `begun`: it is the first attempt's beginning."""

    user_id: int
    message_id: str
    begun: bool = False

    def fields(self) -> tuple[str, ...]:
        """As field, value, …."""
        event = "begun" if self.begun else "grew"
        return ("event", event, "user", str(self.user_id), "message_id", self.message_id)


@dataclass(frozen=True, slots=True)
class SessionReplaced:
    """A user has logged in again; with one session for each user, those with an older login are to be closed."""

    user_id: int
    login: int

    def fields(self) -> tuple[str, ...]:
        """As field, value, …."""
        return ("event", "replaced", "user", str(self.user_id), "login", str(self.login))


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """A node has given up its lease; what it left may be adopted at once."""

    node: str

    def fields(self) -> tuple[str, ...]:
        """As field, value, …."""
        return ("event", "left", "node", self.node)


@dataclass(frozen=True, slots=True)
class AccountChanged:
    """A user was locked or banned: the sessions are to be closed."""

    user_id: int

    def fields(self) -> tuple[str, ...]:
        """As field, value, …."""
        return ("event", "account", "user", str(self.user_id))


Notice = ReplyGrew | SessionReplaced | NodeLeft | AccountChanged


async def notify(redis: RedisClient, keys: Keys, node: str, notice: Notice) -> None:
    """Leave a notice for a node. Raises `StoreError`."""
    arguments: tuple[Argument, ...] = (MAX_NOTICES, milliseconds(INBOX_TTL), *notice.fields())
    await _NOTIFY.run(redis, (keys.inbox(node),), arguments)


class Inbox:
    """The inbox of this node, and the way to those of the others."""

    def __init__(self, redis: RedisClient, reader: BlockingReader, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._reader = reader
        self._keys = Keys(settings.key_prefix)
        self._block = milliseconds(settings.read_block)
        self._after: str | None = None

    async def notify(self, nodes: Iterable[str], notice: Notice, *, include_self: bool = False) -> bool:
        """Leave a notice for each of these nodes but this one. One that cannot be left is only logged.

        Args:
            nodes: The nodes.
            notice: What they are told.
            include_self: Leave it for this one too, as the last, whether it is among them or not.

        Returns:
            Whether any of them is another node.
        """
        others = {*nodes} - {self.node}
        for node in (*others, self.node) if include_self else others:
            try:
                await notify(self._redis, self._keys, node, notice)
            except StoreError as error:
                log.warning("notice not left", to=node, error=str(error))
        return bool(others)

    async def read(self) -> list[Notice]:
        """Wait for notices left since the last call, or since this is called first. Empty after a while without any.

        Raises:
            StoreError: Redis was not reached.
        """
        key = self._keys.inbox(self.node)
        if self._after is None:
            newest = await self._redis.execute("XREVRANGE", key, "+", "-", "COUNT", 1)
            self._after = newest[0][0] if newest else "0-0"
        answer = await self._reader.execute(
            "XREAD", "COUNT", _AT_ONCE, "BLOCK", self._block, "STREAMS", key, self._after
        )
        streams = answer.items() if isinstance(answer, dict) else answer or ()
        rows = [row for _, entries in streams for row in entries]
        if rows:
            self._after = rows[-1][0]
        return [notice for _, flat in rows if (notice := parse_notice(flat)) is not None]


def parse_notice(flat: Sequence[str]) -> Notice | None:
    """Read an entry, given as field, value, …; None for what is no notice, or one of a newer version of imstream."""
    try:
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        match fields["event"]:
            case "grew" | "begun" as event:
                return ReplyGrew(_number(fields["user"]), _message_id(fields["message_id"]), begun=event == "begun")
            case "replaced":
                return SessionReplaced(_number(fields["user"]), _number(fields["login"]))
            case "left":
                return NodeLeft(fields["node"])
            case "account":
                return AccountChanged(_number(fields["user"]))
    except (KeyError, TypeError, ValueError):  # whoever wrote it, it is a hint and no more
        pass
    return None


def _number(text: str) -> int:
    if _DIGITS.fullmatch(text) is None:
        raise ValueError("no number")
    return int(text)


def _message_id(text: str) -> str:
    if _MESSAGE_ID.fullmatch(text) is None:
        raise ValueError("no message id")
    return text
