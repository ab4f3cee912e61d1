"""Replies that are written on other nodes, routes and notices: the parts of a node, on real servers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import pytest
import redis

from imstream.ai.router import Backends
from imstream.codes import CloseCode, Code
from imstream.errors import StoreUnavailable
from imstream.gateway import presence as presence_module
from imstream.gateway.presence import Presence
from imstream.gateway.registry import Registry
from imstream.gateway.reply_sync import InboxConsumer, ReplySync
from imstream.guards.chain import GuardChain
from imstream.guards.guard import Guard, Reject
from imstream.keys import Keys
from imstream.model import Question, Terminal
from imstream.redis.client import BlockingReader, RedisClient
from imstream.reply_buffer import ReplyBuffer, ReplyBuffers
from imstream.settings import Settings
from imstream.store.inbox import (
    AccountChanged,
    DrainRequested,
    Inbox,
    NodeLeft,
    Notice,
    ReplyGrew,
    RouteAdded,
    Routes,
    SessionReplaced,
    parse_notice,
)
from imstream.store.replies import ReplyStore
from imstream.texts import Text
from imstream.user_ids import UserId
from imstream.worker.jobs import Jobs
from tests.redis.worker_harness import USER, Follower
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


@dataclass(eq=False)
class FakeSession:
    """A session as the registry uses it."""

    user_id: UserId = USER
    login: int = 0
    closed: list[CloseCode] = field(default_factory=list)
    followed: list[ReplyBuffer] = field(default_factory=list)

    @property
    def writer(self) -> Self:
        """It is its own writer."""
        return self

    def follow_new(self, reply: ReplyBuffer) -> None:
        """See `SessionWriter`."""
        self.followed.append(reply)

    def close(self, code: CloseCode, kind: Code, text: Text) -> None:
        """See `Session`."""
        del kind, text
        self.closed.append(code)

    def close_rejected(self, verdict: Reject) -> None:
        """See `Session`."""
        self.closed.append(verdict.close or CloseCode.LOCKED)


@dataclass
class FakeGuard(Guard):
    """Gives the same verdict on every session, once the store is available."""

    verdict: Reject | None = None
    away: int = 0
    asked: int = 0

    async def check_session(self, user_id: UserId) -> Reject | None:
        """See `Guard`."""
        del user_id
        self.asked += 1
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        return self.verdict


class FakeAdopter:
    """Counts the scans that are requested. Also plays the consumer."""

    looks = sweeps = 0

    def sweep_soon(self) -> None:
        """See `StreamConsumer`."""
        self.sweeps += 1

    def scan_now(self) -> None:
        """See `Adopter`."""
        self.looks += 1


@dataclass
class Desk:
    """The parts of node 0 that react to other nodes, and the means of the test to act as another node."""

    redis: redis.Redis
    replies: ReplyStore
    buffers: ReplyBuffers
    registry: Any
    inbox: Inbox
    others_inbox: Inbox
    routes: Any
    reply_sync: ReplySync
    presence: Presence
    adopter: FakeAdopter
    guard: FakeGuard
    keys: Keys = field(default_factory=Keys)

    def session(self, **known: Any) -> FakeSession:  # noqa: ANN401 - any attribute
        """Add a session that has logged in."""
        session = FakeSession(**known)
        self.registry.add(session)
        self.registry.log_in(session, session.user_id)
        return session

    def gone(self, session: FakeSession) -> None:
        """Remove a session whose socket is closed."""
        self.registry.remove(session)
        self.presence.on_disconnect(session.user_id)

    async def tell(self, notice: Notice) -> None:
        """Send a notice as another node."""
        await self.others_inbox.notify(["0", "1"], notice)

    def route(self) -> set[str]:
        """The nodes on the route of the user."""
        found: Any = self.redis.smembers(self.keys.route(USER))
        return set(found)


@asynccontextmanager
async def desk(
    server: RedisServer,
    routes_of: type[Routes] = Routes,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[Desk]:
    """Build and run the parts."""
    quick = {"node": "0", "redis_url": server.url, "read_block": "50ms", "sweep_interval": "1h", "redis_timeout": "1s"}
    known = Settings.load(**{**quick, **settings})
    reader = BlockingReader(known.redis_url, block=known.read_block, timeout=known.redis_timeout)
    async with RedisClient(known.redis_url, connections=2, timeout=known.redis_timeout) as redis_client:
        inbox, replies, buffers = Inbox(redis_client, reader, known), ReplyStore(redis_client, known), ReplyBuffers()
        registry: Any = Registry(known)
        guard = FakeGuard()
        routes, adopter = routes_of(redis_client, known), FakeAdopter()
        reply_sync = ReplySync(interval=known.sweep_interval, replies=replies, buffers=buffers, registry=registry)
        presence = Presence(
            one_session=known.sessions == "one",
            routes=routes,
            inbox=inbox,
            registry=registry,
            guards=GuardChain([guard]),
        )
        played: Any = adopter
        jobs = Jobs(known, backends=Backends(known), replies=replies, buffers=buffers, inbox=inbox)
        listener = InboxConsumer(
            inbox=inbox,
            reply_sync=reply_sync,
            presence=presence,
            jobs=jobs,
            consumer=played,
            adopter=played,
            on_drain=played,
        )
        others = Inbox(redis_client, reader, known.model_copy(update={"node": "1"}))
        with server.client() as client:
            found = Desk(
                client, replies, buffers, registry, inbox, others, routes, reply_sync, presence, adopter, guard
            )
            client.config_resetstat()
            tasks = [asyncio.create_task(part.run()) for part in (listener, reply_sync, presence)]
            await inbox.notify(["0"], NodeLeft("0"))  # a node does not notify itself
            await wait_until(lambda: client.info("commandstats").get("cmdstat_xread"), "it reads its inbox")
            try:
                yield found
                assert not any(task.done() for task in tasks), "all of them still run"
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await reader.aclose()


async def written(replies: ReplyStore, text: str, *, before: int = 0, end: bool = False, message_id: str = "m") -> None:
    """Append text to a reply as another node."""
    result = await replies.append(
        *(USER, message_id),
        attempt=1,
        before=before,
        after=before + len(text),
        text=text,
        terminal=Terminal("done") if end else None,
    )
    assert type(result).__name__ == "Appended"


async def test_a_reply_is_followed_batch_by_batch_from_its_beginning_on(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        session = node.session()
        await node.replies.open(USER, "m", request="1/1-0")
        await node.tell(ReplyGrew(USER, "m", begun=True))
        await wait_until(lambda: session.followed, "the session follows it")
        follower = Follower(session.followed[0])
        for n, text in enumerate(("one ", "two ", "three")):
            await written(node.replies, text, before=4 * n, end=text == "three")
            await node.tell(ReplyGrew(USER, "m"))
            await wait_until(lambda part=text: follower.text.endswith(part), f"{text!r} has come")
        assert await follower.end() == "done"
        assert (follower.text, follower.restarts) == ("one two three", 0)


async def test_a_failed_reply_that_is_reopened_elsewhere_is_read_again(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        session, reply = node.session(), node.buffers.get(USER, "m")  # kept by a slow session, for example
        await node.replies.open(USER, "m", request="1/1-0")
        failed = Terminal("failed", reason="http_503")
        await node.replies.append(USER, "m", attempt=1, before=0, after=4, text="half", terminal=failed)
        assert await node.reply_sync.catch_up(reply)
        assert reply.terminal == failed
        await node.tell(ReplyGrew(USER, "m", begun=True))  # late: nothing has changed
        await wait_until(lambda: session.followed == [reply], "the notice is handled")
        assert (reply.fence, reply.terminal) == (1, failed)
        await node.replies.open(USER, "m", request="1/2-0", reopens=True)
        await node.tell(ReplyGrew(USER, "m", begun=True))
        await wait_until(lambda: reply.fence == 2, "the record is read again")
        assert reply.terminal is None
        assert session.followed[-1] is reply
        follower = Follower(reply, attempt=1, offset=4, text="half")
        done = Terminal("done", "stop")
        await node.replies.append(USER, "m", attempt=2, before=0, after=5, text="whole", terminal=done)
        await node.tell(ReplyGrew(USER, "m"))
        assert await follower.end() == "done"
        assert (follower.text, follower.restarts) == ("whole", 1)


async def test_what_nobody_here_follows_is_not_read(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        await node.replies.open(USER, "m", request="1/1-0")
        reads = node.redis.info("commandstats").get("cmdstat_xrange", {}).get("calls", 0)
        await node.tell(ReplyGrew(USER, "m"))
        await node.tell(NodeLeft("1"))
        await wait_until(lambda: node.adopter.looks == 1, "all notices are handled")
        assert node.redis.info("commandstats").get("cmdstat_xrange", {}).get("calls", 0) == reads
        assert len(node.buffers) == 0


async def test_a_reply_whose_notices_were_lost_is_looked_at_now_and_then(redis_server: RedisServer) -> None:
    async with desk(redis_server, sweep_interval="100ms") as node:
        await node.replies.open(USER, "m", request="1/1-0")
        follower = Follower(reply := node.buffers.get(USER, "m"))
        assert await node.reply_sync.catch_up(reply)
        await written(node.replies, "all of it", end=True)
        assert await follower.end() == "done"
        assert follower.text == "all of it"


async def test_a_record_that_redis_loses_after_it_was_read_is_missed(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        await node.replies.mark_queued(USER, "m", Question("hello?", "digest"))
        reply = node.buffers.get(USER, "m")
        assert await node.reply_sync.catch_up(reply)
        assert await node.reply_sync.catch_up(reply)  # nothing is new
        node.redis.delete(Keys("im").reply(USER, "m"))
        assert not await node.reply_sync.catch_up(reply)
        await node.replies.open(USER, "m", request="1/1-0")
        assert await node.reply_sync.catch_up(reply)
        await written(node.replies, "all of it", end=True)
        assert await node.reply_sync.catch_up(reply)
        assert (reply.text_from(0), reply.terminal is not None) == ("all of it", True)


async def test_a_record_of_which_redis_loses_the_known_end_is_read_again(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        await node.replies.open(USER, "m", request="1/1-0")
        await written(node.replies, "first ")
        reply = node.buffers.get(USER, "m")
        assert await node.reply_sync.catch_up(reply)
        last: Any = node.redis.xrevrange(Keys("im").reply(USER, "m"), count=1)
        node.redis.xdel(Keys("im").reply(USER, "m"), last[0][0])
        await written(node.replies, "another end", end=True)
        assert await node.reply_sync.catch_up(reply)
        assert (reply.text_from(0), reply.terminal is not None) == ("another end", True)


async def test_notices_that_are_malformed_or_of_a_newer_version_are_passed_over(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        for fields in (
            {"event": "sunset"},
            {"no": "event"},
            {"event": "grew", "user": "nobody", "message_id": "m"},
            {"event": "grew", "user": "10001"},
            {"event": "replaced", "user": "10001", "login": ""},
            {"event": "left"},
        ):
            node.redis.xadd(node.keys.inbox("0"), fields)  # type: ignore[arg-type]
        await node.tell(NodeLeft("1"))
        await wait_until(lambda: node.adopter.looks == 1, "the valid one behind them is handled")


async def test_a_record_that_somebody_has_spoilt_harms_no_other(redis_server: RedisServer) -> None:
    async with desk(redis_server, sweep_interval="100ms") as node:
        spoilt, good = node.buffers.get(USER, "spoilt"), node.buffers.get(USER, "good")
        node.redis.xadd(node.keys.reply(USER, "spoilt"), {"what": "is this"})
        node.redis.expire(node.keys.reply(USER, "spoilt"), 60)
        await node.replies.open(USER, "good", request="1/1-0")
        await node.tell(ReplyGrew(USER, "spoilt"))
        await written(node.replies, "all of it", end=True, message_id="good")
        await wait_until(lambda: good.terminal is not None, "the other one is loaded")
        assert spoilt.terminal is None


async def test_the_route_leads_here_while_a_socket_of_the_user_is_here(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        one, two = node.session(), node.session()
        for session in (one, two):
            await node.presence.on_login(session, USER)  # type: ignore[arg-type]
        assert node.route() == {"0"}
        assert 0 < one.login < two.login
        assert node.redis.ttl(node.keys.route(USER)) > 60
        node.redis.sadd(node.keys.route(USER), "1")
        node.gone(one)
        node.gone(two)
        await wait_until(lambda: node.route() == {"1"}, "it no longer leads here")
        assert one.closed == two.closed == []


class LosesTheFirst(Routes):
    """Routes on a Redis that is not available at the first login."""

    lost = False

    async def add_route(self, user_id: UserId) -> RouteAdded:
        """See `Routes`."""
        if not self.lost:
            self.lost = True
            raise StoreUnavailable("away")
        return await super().add_route(user_id)


async def test_a_route_that_could_not_be_noted_is_mended_and_older_sessions_are_replaced_then(
    redis_server: RedisServer,
) -> None:
    async with desk(redis_server, LosesTheFirst, sessions="one") as node:
        older = node.session(login=1)
        newer = node.session()
        await node.presence.on_login(newer, USER)  # type: ignore[arg-type]
        await wait_until(lambda: node.route() == {"0"}, "the route is written")
        await wait_until(lambda: newer.login > 1, "its login has a number")
        assert (older.closed, newer.closed) == ([CloseCode.REPLACED], [])


class Slow(Routes):
    """Routes whose answer the test delays."""

    def __init__(self, redis_client: RedisClient, settings: Settings) -> None:
        super().__init__(redis_client, settings)
        self.answers = asyncio.Event()

    async def add_route(self, user_id: UserId) -> RouteAdded:
        """See `Routes`."""
        login = await super().add_route(user_id)
        await self.answers.wait()
        return login


async def test_who_hears_of_another_login_before_the_number_of_its_own_waits_for_that(
    redis_server: RedisServer,
) -> None:
    async with desk(redis_server, Slow, sessions="one") as node:
        session = node.session()
        arriving = asyncio.create_task(node.presence.on_login(session, USER))  # type: ignore[arg-type]
        await wait_until(lambda: node.route() == {"0"}, "its route is written")
        await node.tell(SessionReplaced(USER, 1))  # an older login, announced late
        await node.tell(NodeLeft("1"))
        await wait_until(lambda: node.adopter.looks == 1, "the notices are handled")
        node.routes.answers.set()
        await arriving
        assert session.closed == []
        node.presence.replace(SessionReplaced(USER, session.login + 1))
        assert session.closed == [CloseCode.REPLACED]


async def test_who_turns_out_to_be_the_older_closes_when_it_knows(redis_server: RedisServer) -> None:
    async with desk(redis_server, Slow, sessions="one") as node:
        session = node.session()
        arriving = asyncio.create_task(node.presence.on_login(session, USER))  # type: ignore[arg-type]
        await wait_until(lambda: node.route() == {"0"}, "its route is written")
        node.presence.replace(SessionReplaced(USER, 10**17))  # newer than any real login
        assert session.closed == []
        node.routes.answers.set()
        await arriving
        assert session.closed == [CloseCode.REPLACED]


BANNED = Reject("banned", Code.FORBIDDEN, Text.OTHER_USER, close=CloseCode.LOCKED)


async def test_when_an_account_has_changed_all_sessions_of_that_user_are_closed_and_no_others(
    redis_server: RedisServer,
) -> None:
    async with desk(redis_server) as node:
        sessions, other = [node.session(), node.session()], node.session(user_id=USER + 1)
        await node.tell(AccountChanged(USER))
        await wait_until(lambda: node.guard.asked, "the guard is asked")
        assert [one.closed for one in sessions] == [[], []]
        node.guard.verdict = BANNED
        await node.tell(AccountChanged(USER))
        await wait_until(lambda: [one.closed for one in sessions] == [[CloseCode.LOCKED]] * 2, "both are closed")
        assert other.closed == []


async def test_an_account_that_cannot_be_looked_at_is_looked_at_again(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        session = node.session()
        node.redis.hset(node.keys.account(USER), "banned", 1)
        node.guard.verdict, node.guard.away = BANNED, 2
        await node.tell(AccountChanged(USER))
        await wait_until(lambda: session.closed == [CloseCode.LOCKED], "it is closed")
        assert node.guard.asked == 3


async def test_whoever_is_banned_while_coming_in_does_not_stay(redis_server: RedisServer) -> None:
    async with desk(redis_server) as node:
        session = node.session()
        node.guard.verdict = BANNED
        await node.presence.on_login(session, USER)  # type: ignore[arg-type]
        assert session.closed == []  # without an account entry, no guard is asked
        node.redis.hset(node.keys.account(USER), "banned", 1)
        await node.presence.on_login(session, USER)  # type: ignore[arg-type]
        assert session.closed == [CloseCode.LOCKED]


async def test_a_ban_that_nobody_was_told_of_is_noticed_when_routes_are_renewed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "ROUTE_TTL", timedelta(milliseconds=300))
    async with desk(redis_server) as node:
        session = node.session()
        node.guard.verdict = BANNED
        node.redis.hset(node.keys.account(USER), "banned", 1)
        await wait_until(lambda: session.closed, "it is closed")
        assert session.closed[0] == CloseCode.LOCKED


def test_a_request_to_drain_without_an_instance_is_for_the_process_that_runs() -> None:
    assert parse_notice(["event", "drain"]) == DrainRequested()
