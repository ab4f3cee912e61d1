"""The records of one message in Redis, for `imstream explain`: its reply, its request and its dead letter."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from imstream.clock import time_of, to_timedelta
from imstream.errors import StoreRefused
from imstream.keys import GROUP, Keys
from imstream.model import TERMINAL_EVENTS
from imstream.redis.client import RedisClient, to_dict
from imstream.store.leases import is_node_id
from imstream.store.nodes import number_in
from imstream.store.pauses import ALL
from imstream.user_ids import UserId

PAGE = 100  # entries of a stream that are read at a time while a request or a dead letter is looked for
CLOCKS = 60_000  # milliseconds by which the clocks of two masters of a Redis Cluster may differ

_PRIVATE = {"text", "question", "digest", "contents", "history"}
_NOT_SHOWN = _PRIVATE | {"v", "valid", "user", "message_id", "lang", "event", "attempt", "offset", "try"}
_END_OF_CALENDAR = 253_402_300_799_000  # ms since 1970: the last second of 9999
_TIMES = {"since", "until", "dead_at"}

Row = tuple[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the message, at a time of Redis' clock. `about`: its fields, without any text."""

    at: datetime
    event: str
    attempt: int
    offset: int
    about: dict[str, str]


@dataclass(slots=True)
class Timeline:
    """The life of a message."""

    user: UserId
    message_id: str
    state: str = "unknown"  # queued, running, waiting (for a backend), done, failed, cancelled, or unknown
    now: str = "not in Redis: it was never accepted, or its reply has expired"  # one sentence about its state
    kept_for: timedelta | None = None  # how much longer its reply is kept
    request: str | None = None  # the one that owns it: its node and entry id
    events: list[Event] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # facts that are not recorded


async def newest(redis: RedisClient, keys: Keys, user: UserId, count: int) -> list[Timeline]:
    """The newest messages of a user, the newest first. Raises `StoreError`."""
    listed = await redis.execute("ZREVRANGE", keys.messages(user), 0, count - 1)
    return [await explain(redis, keys, user, message_id) for message_id in listed]


async def explain(redis: RedisClient, keys: Keys, user: UserId, message_id: str) -> Timeline:
    """Read all that is recorded about a message. Raises `StoreError`."""
    return await _Search(redis, keys, Timeline(user, message_id)).run()


@dataclass(slots=True)
class _Search:
    redis: RedisClient
    keys: Keys
    found: Timeline

    async def run(self) -> Timeline:
        key = self.keys.reply(self.found.user, self.found.message_id)
        rows, ttl = await asyncio.gather(self._range(key), self.redis.execute("PTTL", key))
        self.found.kept_for = to_timedelta(ttl) if ttl >= 0 else None
        self.found.events = list(_merged(rows))
        last = self.found.events[-1] if self.found.events else None
        opened = [one for one in self.found.events if one.event == "opened" and "request" in one.about]
        self.found.request = opened[-1].about["request"] if opened else None
        asked = opened[0].about["request"] if opened else None
        ended = last is not None and last.event in TERMINAL_EVENTS
        request = await (self._retried(last) if ended else self._unfinished_request())
        may_be_dead = request is None and (last is None or last.event == "failed" or not ended)
        letter = await self._letter(last) if may_be_dead else None
        self._add_question(asked or self.found.request, request or letter)
        if request is not None and (ended or last is None):
            await self._describe_unopened()
        elif last is not None:
            await self._describe(last, request)
        elif letter is not None:
            self.found.state, self.found.now = "failed", "it was given up; its reply has expired"
            self.found.unknown.append("its attempts: its reply has expired")
        self._note_unknown(opened, ended=ended)
        return self.found

    async def _unfinished_request(self) -> Row | None:
        """The request, if it is unfinished: that of the reply, or one in the stream of any node."""
        if self.found.request is not None:
            node, _, entry_id = self.found.request.rpartition("/")
            rows = await self._range(self.keys.requests(node), entry_id, entry_id)
            return rows[0] if rows else None
        for node in await self._nodes():
            if (row := await self._find(self.keys.requests(node))) is not None:
                self.found.request = f"{node}/{row[0]}"
                return row
        return None

    async def _retried(self, last: Event | None) -> Row | None:
        """The request that was made from the dead letter, if no worker has opened it yet."""
        if last is None or last.event != "failed" or self.found.request is None:
            return None
        node, _, before = self.found.request.rpartition("/")
        row = await self._find(self.keys.requests(node))
        if row is None or row[0] == before:  # it is just about to be buried
            return None
        self.found.request = f"{node}/{row[0]}"
        self.found.events.append(Event(_time(row[0]), "retried", 0, 0, {"node": node, "entry": row[0]}))
        return row

    async def _letter(self, last: Event | None) -> Row | None:
        """The dead letter: of the node of the request, or of any if that is not known."""
        nodes = [self.found.request.rpartition("/")[0]] if self.found.request else await self._nodes()
        start = "-" if last is None else str(max(0, int(last.at.timestamp() * 1000) - CLOCKS))
        for node in nodes:
            if (row := await self._find(self.keys.dead(node), start)) is not None:
                about = {"node": node, "entry": row[0]} | _shown(row[1])
                self.found.events.append(Event(_time(row[0]), "dead letter", 0, 0, about))
                return row
        if last is not None and last.event == "failed":
            self.found.unknown.append(
                "its dead letter: it was refused, retried or deleted, or there were too many newer ones"
            )
        return None

    def _add_question(self, asked: str | None, source: Row | None) -> None:
        """Put first when it was asked: the id of its first request is the time of its admission."""
        if asked is None:
            if self.found.events:
                self.found.unknown.append("when it was asked, and on which node")
            return
        node, _, entry_id = asked.rpartition("/")
        about = {"node": node, "entry": entry_id}
        about |= {name: source[1][name] for name in ("trace", "lang") if source and name in source[1]}
        self.found.events.insert(0, Event(_time(entry_id), "asked", 0, 0, about))

    async def _describe(self, last: Event, request: Row | None) -> None:
        self.found.state, self.found.now = last.event, f"it has ended: {last.event}"
        if last.event in TERMINAL_EVENTS:
            return
        if request is None:
            self.found.now = "it has not ended, but no stream has its request: it was deleted, or Redis has lost data"
            self.found.state = "unknown"
            return
        if last.event == "queued":
            await self._describe_unopened()
            return
        by = next((one.about.get("by", "?") for one in reversed(self.found.events) if one.event == "opened"), "?")
        alive = await self.redis.execute("PTTL", self.keys.lease(by)) != -2  # noqa: PLR2004 - no such key
        where = f"node {by}" if alive else f"node {by}, which has no lease: another node takes over"
        if last.event == "waiting":
            until, backend = last.about.get("until"), last.about.get("backend", "?")
            self.found.now = (
                f"it waits on {where} for the end of a pause by an operator"
                if until is None
                else f"it waits for backend {backend} on {where}, at most until {until}"
            )
        else:
            self.found.state, self.found.now = "running", f"it is answered on {where}"
            self.found.unknown.append("the text of the last moments: it is recorded in batches")

    async def _describe_unopened(self) -> None:
        node, _, entry_id = (self.found.request or "").rpartition("/")
        try:
            pending = await self.redis.execute("XPENDING", self.keys.requests(node), GROUP, entry_id, entry_id, 1)
        except StoreRefused:  # no group yet
            pending = []
        self.found.state = "queued"
        if pending:
            self.found.now = f"node {pending[0][1]} has read it, and has not opened its reply"
        else:
            count = await self.redis.execute("XLEN", self.keys.requests(node))
            self.found.now = f"it waits for a worker of node {node}, in a stream of {count} unfinished requests"
        if any(await self.redis.execute("HMGET", self.keys.paused(), ALL, node)):
            self.found.now += "; an operator has paused the node"

    def _note_unknown(self, opened: list[Event], *, ended: bool) -> None:
        if opened and opened[0].attempt > 1:
            self.found.unknown.append(f"attempts before {opened[0].attempt}: Redis has lost them")
        if opened and ended:
            self.found.unknown.append(
                "which backend was called, unless it had to be waited for: see the log of the node"
            )

    async def _nodes(self) -> list[str]:
        return sorted(filter(is_node_id, await self.redis.execute("ZRANGE", self.keys.nodes(), 0, -1)))

    async def _find(self, stream: str, start: str = "-") -> Row | None:
        """The newest entry about the message. Entries are long: they are read in pages."""
        end = "+"
        wanted = str(self.found.user), self.found.message_id
        while rows := await self.redis.execute("XREVRANGE", stream, end, start, "COUNT", PAGE):
            for entry_id, flat in rows:
                fields = to_dict(flat)
                if (fields.get("user"), fields.get("message_id")) == wanted:
                    return entry_id, fields
            end = f"({rows[-1][0]}"
        return None

    async def _range(self, stream: str, start: str = "-", end: str = "+") -> list[Row]:
        rows = await self.redis.execute("XRANGE", stream, start, end)
        return [(entry_id, to_dict(flat)) for entry_id, flat in rows or ()]


def _merged(rows: list[Row]) -> Iterator[Event]:
    """The events of a reply. Batches of text that follow each other are one event, with their number and characters.

    So are waits for one backend for one reason, with their number (`times`) and the fields of the last one.
    """
    batch: Event | None = None
    wait: Event | None = None
    for entry_id, fields in rows:
        text = fields.get("text", "")
        about = _shown(fields)
        event = fields.get("event", "?")
        if event == "text" and "thinking" in fields:
            event = "thinking"
        if event == "text" and batch is not None:
            number, characters = int(batch.about["batches"]) + 1, int(batch.about["characters"]) + len(text)
            batch.about.update(batches=str(number), characters=str(characters), until=_iso(entry_id))
            continue
        cause = event, about.get("backend"), about.get("reason")
        if wait is not None and cause == (wait.event, wait.about.get("backend"), wait.about.get("reason")):
            wait.about.update(about, times=str(int(wait.about.get("times", "1")) + 1))
            continue
        made = Event(_time(entry_id), event, number_in(fields, "attempt") or 0, number_in(fields, "offset") or 0, about)
        batch = made if event == "text" else None
        wait = made if event == "waiting" else None
        if text or batch is not None:
            about["characters"] = str(len(text))
        if batch is not None:
            about["batches"] = "1"
        yield made


def _shown(fields: Mapping[str, str]) -> dict[str, str]:
    """The fields that are shown, with times as in `Event.at`."""
    shown = {name: value for name, value in fields.items() if name not in _NOT_SHOWN and value != ""}
    times = {name: _iso(shown[name]) for name in _TIMES & shown.keys() if shown[name].isdecimal()}
    return shown | times


def _time(entry_id: str) -> datetime:
    """The time in an entry id, or of a number of milliseconds since 1970."""
    return datetime.fromtimestamp(min(time_of(entry_id), _END_OF_CALENDAR) / 1000, UTC)


def _iso(time: str) -> str:
    return _time(time).isoformat(timespec="milliseconds")
