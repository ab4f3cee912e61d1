"""The sessions of a node, and the timer that closes silent ones."""

import asyncio
from dataclasses import dataclass, field
from typing import Self, cast

from imstream.codes import CloseCode, Code
from imstream.gateway.registry import CLOSE_GRACE, Registry
from imstream.gateway.session import Session
from imstream.settings import Settings
from imstream.texts import Text
from imstream.user_ids import UserId
from tests.support.virtual_time import in_virtual_time

INIT_LIMIT, IDLE_LIMIT, STALL_LIMIT = 10.0, 75.0, 20.0


@dataclass(eq=False)
class FakeSession:
    """A session as the registry uses it."""

    user_id: UserId | None = None
    peer: str = "192.0.2.1"
    began_at: float = 0.0
    heard_at: float = 0.0
    blocked_since: float | None = None
    closing_since: float | None = None
    ends_at: float | None = None
    warn_at: float | None = None
    has_asked: bool = False
    was_slow: bool = False
    told: list[tuple[str, CloseCode, Code, Text, float]] = field(default_factory=list)
    warned: list[float] = field(default_factory=list)

    @property
    def writer(self) -> Self:
        """It is its own writer."""
        return self

    def close(self, code: CloseCode, kind: Code, text: Text) -> None:
        """See `Session`."""
        now = asyncio.get_running_loop().time()
        self.closing_since = now
        self.told.append(("close", code, kind, text, now))

    def warn(self) -> None:
        """See `Session`."""
        self.warn_at = None
        self.warned.append(asyncio.get_running_loop().time())

    def expel(self, code: CloseCode, kind: Code, text: Text) -> None:
        """See `Session`."""
        self.told.append(("expel", code, kind, text, asyncio.get_running_loop().time()))


def registry() -> Registry:
    return Registry(
        Settings.load(init_timeout=INIT_LIMIT, idle_timeout=IDLE_LIMIT, stall_timeout=STALL_LIMIT),
    )


def session(**state: float | None) -> Session:
    return cast("Session", FakeSession(**state))  # type: ignore[arg-type]


def played(one: Session) -> FakeSession:
    return cast("FakeSession", one)


async def first_words(one: Session) -> tuple[str, CloseCode, Code, Text, float]:
    """The close of a session that is silent for a long time."""
    sessions = registry()
    sessions.add(one)
    running = asyncio.create_task(sessions.run())
    await asyncio.sleep(200)
    running.cancel()
    return played(one).told[0]


@in_virtual_time
async def test_a_socket_that_does_not_log_in_is_closed_within_a_second_after_its_time() -> None:
    how, code, kind, text, at = await first_words(session())
    assert (how, code, kind, text) == ("close", CloseCode.NOT_AUTHENTICATED, Code.INIT_TIMEOUT, Text.NO_INIT)
    assert INIT_LIMIT < at <= INIT_LIMIT + 1


@in_virtual_time
async def test_a_socket_that_could_not_be_logged_in_in_time_may_come_back_later() -> None:
    how, code, kind, text, at = await first_words(session(has_asked=True))
    assert (how, code, kind, text) == ("close", CloseCode.NODE_FULL, Code.UNAVAILABLE, Text.UNAVAILABLE)
    assert INIT_LIMIT < at <= INIT_LIMIT + 1


@in_virtual_time
async def test_a_silent_session_is_closed_after_its_time() -> None:
    how, code, kind, text, at = await first_words(session(user_id=10001, heard_at=3))
    assert (how, code, kind, text) == ("close", CloseCode.NO_HEARTBEAT, Code.NO_HEARTBEAT, Text.NO_HEARTBEAT)
    assert 3 + IDLE_LIMIT < at <= 3 + IDLE_LIMIT + 1


@in_virtual_time
async def test_a_reader_that_stalls_is_not_waited_for() -> None:
    how, code, kind, text, at = await first_words(session(user_id=10001, blocked_since=5))
    assert (how, code, kind, text) == ("expel", CloseCode.READER_TOO_SLOW, Code.READER_TOO_SLOW, Text.TOO_SLOW)
    assert 5 + STALL_LIMIT < at <= 5 + STALL_LIMIT + 1


@in_virtual_time
async def test_a_session_that_cannot_close_is_cut_off_after_its_grace() -> None:
    how, _, _, _, at = await first_words(session(user_id=10001, closing_since=1))
    assert how == "expel"
    assert 1 + CLOSE_GRACE < at <= 1 + CLOSE_GRACE + 1


@in_virtual_time
async def test_a_login_that_ends_is_warned_once_and_closed_with_the_socket() -> None:
    one = session(user_id=10001, warn_at=20, ends_at=50)
    how, code, kind, text, at = await first_words(one)
    assert (how, code, kind, text) == ("close", CloseCode.NOT_AUTHENTICATED, Code.UNAUTHORIZED, Text.LOGIN_EXPIRED)
    assert 50 < at <= 50 + 1
    [warned_at] = played(one).warned
    assert 20 < warned_at <= 20 + 1


@in_virtual_time
async def test_a_session_that_is_heard_and_reads_is_left_alone() -> None:
    one = session(user_id=10001)
    sessions = registry()
    sessions.add(one)
    running = asyncio.create_task(sessions.run())
    loop = asyncio.get_running_loop()
    while loop.time() < 10 * IDLE_LIMIT:
        await asyncio.sleep(IDLE_LIMIT - 1)
        played(one).heard_at = loop.time()
    running.cancel()
    assert played(one).told == []


def test_a_session_is_known_until_its_socket_is_gone() -> None:
    sessions, one, other = registry(), session(), session()
    sessions.add(one)
    sessions.add(other)
    assert (len(sessions), set(sessions)) == (2, {one, other})
    sessions.remove(one)
    sessions.remove(one)  # may be repeated
    assert list(sessions) == [other]


def test_sessions_may_leave_while_all_are_looked_at() -> None:
    sessions = registry()
    for _ in range(3):
        sessions.add(session())
    for one in sessions:
        sessions.remove(one)
    assert len(sessions) == 0


def test_a_user_has_the_sessions_that_have_logged_in() -> None:
    sessions, one, other, stranger = registry(), session(user_id=10001), session(user_id=10001), session()
    for connected in (one, other, stranger):
        sessions.add(connected)
    sessions.log_in(one, 10001)
    sessions.log_in(one, 10001)  # may be repeated
    assert sessions.sessions_of(10001) == (one,)
    sessions.log_in(other, 10001)
    assert sessions.sessions_of(10001) == (one, other)
    assert sessions.users() == [10001]
    sessions.remove(stranger)
    sessions.remove(one)
    assert sessions.sessions_of(10001) == (other,)
    sessions.remove(other)
    assert (sessions.sessions_of(10001), sessions.users()) == ((), [])
