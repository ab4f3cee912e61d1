"""Routes: the nodes that hold a socket of a user, and inboxes, which carry notices between nodes.

A notice only saves waiting: nothing else is lost when one is.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import structlog

from imstream.clock import milliseconds
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.scripts import LUA
from imstream.user_ids import UserId, UserIds

MAX_NOTICES = 1_000  # about; a node that is further behind finds changes by polling

ROUTE_TTL = timedelta(minutes=30)  # so long a dead node is notified
INBOX_TTL = timedelta(minutes=10)  # after the last notice
_MAX_READ = 100  # notices

_NUMBER = re.compile(r"[0-9]{1,20}")
_VALID = {"login": _NUMBER, "message_id": re.compile(r"[A-Za-z0-9._:-]{1,64}")}


log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ReplyGrew:
    """The reply stream of a message has new entries. `begun`: by the first attempt, also after it was reopened."""

    user_id: UserId
    message_id: str
    begun: bool = False


@dataclass(frozen=True, slots=True)
class MessageQueued:
    """A message was accepted and waits for its turn. Sent only to nodes with sockets of the user."""

    user_id: UserId
    message_id: str


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The node that works on a message is to cancel it."""

    user_id: UserId
    message_id: str


@dataclass(frozen=True, slots=True)
class SessionReplaced:
    """A user has logged in again. With one session for each user, sessions with an older login are to be closed."""

    user_id: UserId
    login: int


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """A node has released its lease; its stream may be adopted at once."""

    node: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator drains the node, as with SIGTERM. Only the process of this instance; empty: whichever runs."""

    instance: str = ""


@dataclass(frozen=True, slots=True)
class AccountChanged:
    """A user was locked or banned: the user's sessions are to be closed."""

    user_id: UserId


Notice = ReplyGrew | MessageQueued | CancelRequested | SessionReplaced | NodeLeft | DrainRequested | AccountChanged

_MESSAGE_NOTICES: dict[str, Callable[[UserId, str], Notice]] = {
    "grew": ReplyGrew,
    "begun": partial(ReplyGrew, begun=True),
    "queued": MessageQueued,
    "cancel": CancelRequested,
}


def notice_fields(notice: Notice) -> tuple[str, ...]:
    """The stream entry of a notice, as field, value, …."""
    match notice:
        case ReplyGrew(user_id, message_id, begun):
            return ("event", "begun" if begun else "grew", "user", str(user_id), "message_id", message_id)
        case MessageQueued(user_id, message_id):
            return ("event", "queued", "user", str(user_id), "message_id", message_id)
        case CancelRequested(user_id, message_id):
            return ("event", "cancel", "user", str(user_id), "message_id", message_id)
        case SessionReplaced(user_id, login):
            return ("event", "replaced", "user", str(user_id), "login", str(login))
        case NodeLeft() | DrainRequested():
            if isinstance(notice, NodeLeft):
                about = ("left", "node", notice.node)
            else:
                about = ("drain", "instance", notice.instance)
            return ("event", *about)
        case AccountChanged(user_id):
            return ("event", "account", "user", str(user_id))


async def send_notice(redis: RedisClient, keys: Keys, node: str, notice: Notice) -> None:
    """Append a notice to the inbox of a node. Raises `StoreError`."""
    await LUA["notify"].run(redis, (keys.inbox(node),), (MAX_NOTICES, milliseconds(INBOX_TTL), *notice_fields(notice)))


class Inbox:
    """Reads the inbox of this node, and writes to those of others."""

    def __init__(self, redis: RedisClient, reader: BlockingReader, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._reader = reader
        self._keys = Keys(settings.key_prefix)
        self._block = milliseconds(settings.read_block)
        self._user_ids = settings.user_ids
        self._last_id: str | None = None

    async def notify(self, nodes: Iterable[str], notice: Notice, *, include_self: bool = False) -> bool:
        """Notify these nodes but this one, or with `include_self` also this one, as the last. Errors are logged.

        Returns whether any of the nodes is another one.
        """
        others = {*nodes} - {self.node}
        for node in (*others, self.node) if include_self else others:
            try:
                await send_notice(self._redis, self._keys, node, notice)
            except StoreError as error:
                log.warning("notice not sent", to=node, error=str(error))
        return bool(others)

    async def read(self) -> list[Notice]:
        """Wait up to `read_block` for notices since the last call, or since the first. Raises `StoreError`."""
        key = self._keys.inbox(self.node)
        if self._last_id is None:
            newest = await self._redis.execute("XREVRANGE", key, "+", "-", "COUNT", 1)
            self._last_id = newest[0][0] if newest else "0-0"
        options = ("COUNT", _MAX_READ, "BLOCK", self._block)
        reply = await self._reader.execute("XREAD", *options, "STREAMS", key, self._last_id)
        streams = reply.items() if isinstance(reply, dict) else reply or ()
        rows = [row for _, entries in streams for row in entries]
        if rows:
            self._last_id = rows[-1][0]
        return [notice for _, flat in rows if (notice := parse_notice(flat, self._user_ids)) is not None]


@dataclass(frozen=True, slots=True)
class RouteAdded:
    """A route is added. `nodes`: those with a socket of the user, this one included.

    A later login of the user, on any node, has a higher number. `has_account`: check whether the user may stay.
    """

    login: int
    nodes: tuple[str, ...]
    has_account: bool = False


class Routes:
    """The routes that lead to this node."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.node = settings.node
        self._redis = redis
        self._keys = Keys(settings.key_prefix)

    async def add_route(self, user_id: UserId) -> RouteAdded:
        """Record that this node holds a socket of the user. Idempotent."""
        keys = (self._keys.route(user_id), self._keys.account(user_id))
        login, has_account, *nodes = await LUA["add_route"].run(self._redis, keys, (self.node, milliseconds(ROUTE_TTL)))
        return RouteAdded(int(login), tuple(nodes), has_account=bool(has_account))

    async def remove_route(self, user_id: UserId) -> None:
        """Record that this node has lost its last socket of the user."""
        await self._redis.execute("SREM", self._keys.route(user_id), self.node)


def parse_notice(flat: Sequence[str], user_ids: UserIds = UserIds.NUMBER) -> Notice | None:
    """Read an entry, given as field, value, …; None when it is invalid, or of a newer version of imstream."""
    try:
        pairs = zip(flat[::2], flat[1::2], strict=True)
        fields = {name: text for name, text in pairs if name not in _VALID or _VALID[name].fullmatch(text)}
        if (event := fields["event"]) in {"left", "drain"}:
            return NodeLeft(fields["node"]) if event == "left" else DrainRequested(fields.get("instance", ""))
        if (user_id := user_ids.parse(fields["user"])) is None:
            return None
        match event:
            case "grew" | "begun" | "queued" | "cancel":
                return _MESSAGE_NOTICES[event](user_id, fields["message_id"])
            case "replaced":
                return SessionReplaced(user_id, int(fields["login"]))
            case "account":
                return AccountChanged(user_id)
    except (KeyError, TypeError, ValueError):
        pass
    return None
