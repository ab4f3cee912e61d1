"""Routes: the nodes that hold a socket of a user, and inboxes, which carry notices between nodes.

A notice only saves waiting: nothing else is lost when one is.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from functools import partial

import structlog

from imstream.clock import milliseconds
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import BlockingReader, RedisClient, entries_of, to_dict
from imstream.settings import Settings
from imstream.store.scripts import LUA
from imstream.user_ids import UserId, UserIds

MAX_NOTICES = 1_000  # about; a node that is further behind finds changes by polling

ROUTE_TTL = timedelta(minutes=30)  # so long a dead node is notified
INBOX_TTL = timedelta(minutes=10)  # after the last notice
_MAX_READ = 100  # notices

_VALID = {"login": re.compile(r"[0-9]{1,20}"), "message_id": re.compile(r"[A-Za-z0-9._:-]{1,64}")}

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

_NOTICES: dict[str, tuple[Callable[..., Notice], tuple[str, ...]]] = {
    "grew": (ReplyGrew, ("user", "message_id")),
    "begun": (partial(ReplyGrew, begun=True), ("user", "message_id")),
    "queued": (MessageQueued, ("user", "message_id")),
    "cancel": (CancelRequested, ("user", "message_id")),
    "replaced": (SessionReplaced, ("user", "login")),
    "left": (NodeLeft, ("node",)),
    "drain": (DrainRequested, ("instance",)),
    "account": (AccountChanged, ("user",)),
}
"""The events of notices, and the fields of their entries in the order of the attributes."""

_EVENTS = {made: event for event, (made, _) in _NOTICES.items()}


def notice_fields(notice: Notice) -> tuple[str, ...]:
    """The stream entry of a notice, as field, value, …."""
    event = "begun" if isinstance(notice, ReplyGrew) and notice.begun else _EVENTS[type(notice)]
    pairs = zip(_NOTICES[event][1], astuple(notice), strict=False)  # `begun` is no field
    return ("event", event, *(part for name, value in pairs for part in (name, str(value))))


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
        rows = entries_of(reply)
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
        fields = {"instance": "", **to_dict(flat)}
        make, names = _NOTICES[fields["event"]]
        return make(*(_value(name, fields[name], user_ids) for name in names))
    except (KeyError, TypeError, ValueError):
        return None


def _value(name: str, text: str, user_ids: UserIds) -> UserId:
    value = user_ids.parse(text) if name == "user" else text
    if value is None or (name in _VALID and not _VALID[name].fullmatch(text)):
        raise ValueError(name)
    return int(value) if name == "login" else value
