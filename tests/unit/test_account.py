"""The account guard: bans, locks, the daily quota and violations."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from imstream.clock import Day
from imstream.codes import CloseCode, Code
from imstream.errors import StoreUnavailable
from imstream.guards import account
from imstream.guards.account import Account, AccountWithQuota
from imstream.guards.chain import ChatAllowed, GuardChain
from imstream.guards.guard import Allow, LoginAttempt, Reject
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.store.accounts import AccountOpen, Banned, Locked, QuotaExhausted, ViolationRecorded
from imstream.store.inbox import AccountChanged
from imstream.texts import localize
from tests.support.guard_deps import guard_deps

USER = 10001
MIDDAY = int(datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp() * 1000)
ASKED = ChatRequest(USER, "m-1", "hello", (), "en", MIDDAY, "trace")


@dataclass
class FakeAccounts:
    """Returns the given results, and records the calls."""

    result: Any = field(default_factory=lambda: AccountOpen(2))
    violation: ViolationRecorded | Exception = field(default_factory=lambda: ViolationRecorded(1, "noted", ()))
    calls: list[tuple[str, str]] = field(default_factory=list)

    async def check(self, _: int, day: Day) -> object:
        """See `Accounts`."""
        self.calls.append(("look", day.name))
        return self.result

    async def check_and_count(self, _: int, message_id: str, __: int, day: Day) -> object:
        """See `Accounts`."""
        self.calls.append((f"count {message_id}", day.name))
        return self.result

    async def undo_count(self, _: int, message_id: str, at: int, day: Day) -> None:
        """See `Accounts`."""
        self.calls.append((f"uncount {message_id} of {at}", day.name))

    async def refund(self, _: int, message_id: str, day: Day) -> bool:
        """See `Accounts`."""
        self.calls.append((f"give back {message_id}", day.name))
        return True

    async def record_violation(self, _: int) -> ViolationRecorded:
        """See `Accounts`."""
        if isinstance(self.violation, Exception):
            raise self.violation
        return self.violation


@dataclass
class FakeInbox:
    """Records the notices."""

    notices: list[tuple[tuple[str, ...], AccountChanged]] = field(default_factory=list)

    async def notify(self, nodes: tuple[str, ...], notice: AccountChanged, *, include_self: bool) -> None:
        """See `Inbox`."""
        assert include_self
        self.notices.append((nodes, notice))


def guard(accounts: FakeAccounts, *, quota: int = 0, inbox: FakeInbox | None = None, zone: str = "UTC") -> Account:
    """The guard of a node with these settings."""
    settings = Settings.load(daily_quota=quota, quota_timezone=zone)
    kind = AccountWithQuota if quota else Account
    return kind(cast("Any", accounts), cast("Any", inbox or FakeInbox()), settings)


def with_quota(accounts: FakeAccounts, **more: Any) -> Account:  # noqa: ANN401 - see `guard`
    """The guard with a daily quota of 3."""
    return guard(accounts, quota=3, **more)


@pytest.mark.parametrize("quota", [0, 3])
async def test_a_node_has_one_guard_of_accounts_which_costs_a_chat_nothing_without_a_quota(quota: int) -> None:
    [built] = [one for one in GuardChain.create(guard_deps(daily_quota=quota)).guards if isinstance(one, Account)]
    accounts = FakeAccounts(AccountOpen(1, new=True))
    one = guard(accounts, quota=quota)
    assert type(built) is type(one)
    await one.check_chat(ASKED)
    await one.on_failure(ASKED)
    assert bool(accounts.calls) == (quota > 0)


async def test_who_may_come_in_is_told_what_remains_if_that_is_limited() -> None:
    assert await GuardChain([guard(FakeAccounts())]).check_login(LoginAttempt(USER)) == Allow(remaining=None)
    assert await GuardChain([with_quota(FakeAccounts())]).check_login(LoginAttempt(USER)) == Allow(remaining=1)
    assert await GuardChain([with_quota(FakeAccounts(AccountOpen(9)))]).check_login(LoginAttempt(USER)) == Allow(
        remaining=0
    )


async def verdicts(one: Account) -> list[Allow | Reject | None]:
    return [await one.check_login(LoginAttempt(USER)), await one.check_session(USER), await one.check_chat(ASKED)]


async def test_a_banned_user_is_kept_out_at_every_moment() -> None:
    one = with_quota(FakeAccounts(Banned()))
    for verdict in (
        await one.check_login(LoginAttempt(USER)),
        await one.check_session(USER),
        await one.check_chat(ASKED),
    ):
        assert isinstance(verdict, Reject)
        assert (verdict.code, verdict.close, verdict.retry_after) == (Code.FORBIDDEN, CloseCode.LOCKED, None)
        assert "banned" in localize(verdict.sentence, "en", **verdict.values)
        assert "封禁" in localize(verdict.sentence, "zh", **verdict.values)


async def test_a_locked_user_is_told_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "now_ms", lambda: MIDDAY)
    one = with_quota(FakeAccounts(Locked(timedelta(minutes=30))), zone="Asia/Shanghai")
    for verdict in (
        await one.check_login(LoginAttempt(USER)),
        await one.check_session(USER),
        await one.check_chat(ASKED),
    ):
        assert isinstance(verdict, Reject)
        assert (verdict.code, verdict.close, verdict.retry_after) == (
            *(Code.FORBIDDEN, CloseCode.LOCKED),
            timedelta(minutes=30),
        )
        for lang in ("zh", "en"):
            assert "2026-11-24 20:30 (Asia/Shanghai)" in localize(verdict.sentence, lang, **verdict.values)


async def test_who_may_stay_is_not_bothered() -> None:
    assert await guard(FakeAccounts()).check_session(USER) is None


async def test_a_message_is_counted_on_the_day_of_the_zone_and_taken_back_if_it_was_new() -> None:
    accounts = FakeAccounts(AccountOpen(1, new=True))
    late = replace(ASKED, at=MIDDAY + 4 * 3_600_000)  # midnight in Shanghai
    passed = await GuardChain([with_quota(accounts, zone="Asia/Shanghai")]).check_chat(late)
    assert isinstance(passed, ChatAllowed)
    assert passed.remaining == 2
    await passed.undo()
    assert accounts.calls == [("count m-1", "2026-11-25"), (f"uncount m-1 of {late.at}", "2026-11-25")]


async def test_a_message_that_was_counted_before_is_not_taken_back() -> None:
    accounts = FakeAccounts(AccountOpen(1, new=False))
    passed = await with_quota(accounts).check_chat(ASKED)
    assert passed == Allow(remaining=2)


async def test_when_all_is_used_up_it_is_said_when_the_next_day_begins() -> None:
    verdict = await with_quota(FakeAccounts(QuotaExhausted()), zone="Asia/Shanghai").check_chat(ASKED)
    assert isinstance(verdict, Reject)
    assert (verdict.code, verdict.close, verdict.retry_after) == (Code.RATE_LIMITED, None, timedelta(hours=4))
    for lang in ("zh", "en"):
        said = localize(verdict.sentence, lang, **verdict.values)
        assert "3" in said
        assert "2026-11-25 00:00 (Asia/Shanghai)" in said


async def test_what_failed_is_given_back_on_the_day_it_was_asked() -> None:
    accounts = FakeAccounts()
    await with_quota(accounts).on_failure(ASKED)
    await with_quota(accounts).on_failure(replace(ASKED, at=2**62))  # edited by hand: no such day
    assert accounts.calls == [("give back m-1", "2026-11-24")]


@pytest.mark.parametrize("verdict", ["locked", "banned"])
async def test_one_violation_too_many_is_told_to_all_nodes_with_the_user_and_to_this_one(verdict: Any) -> None:  # noqa: ANN401 - a parameter
    inbox = FakeInbox()
    accounts = FakeAccounts(violation=ViolationRecorded(3, verdict, ("a", "b")))
    await guard(accounts, inbox=inbox).on_violation(USER)
    assert inbox.notices == [(("a", "b"), AccountChanged(USER))]


@pytest.mark.parametrize("violation", [ViolationRecorded(1, "noted", ()), StoreUnavailable("away")])
async def test_an_earlier_one_is_only_counted_and_without_redis_not_even_that(
    violation: ViolationRecorded | Exception,
) -> None:
    inbox = FakeInbox()
    await guard(FakeAccounts(violation=violation), inbox=inbox).on_violation(USER)
    assert inbox.notices == []
