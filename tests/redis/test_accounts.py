"""Accounts in Redis: bans, locks, violations and quotas, on every server and in a cluster."""

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from imstream.clock import Day
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.accounts import AccountOpen, Accounts, Banned, Locked, QuotaExhausted
from imstream.store.inbox import Routes
from tests.redis.conftest import Store
from tests.support.redis_sets import cluster_set
from tests.support.waiting import wait_until

USER = 10001
NOW = time.time_ns() // 1_000_000
DAY = Day("2026-11-24", NOW - 1000, NOW + 3_600_000)
TOMORROW = Day("2026-11-25", DAY.end, DAY.end + 86_400_000)
LONG = timedelta(hours=1)
ACCOUNT, VIOLATIONS, QUOTA = Keys().account(USER), Keys().violations(USER), Keys().quota(USER, DAY.name)


def accounts(store: Store, **settings: Any) -> Accounts:  # noqa: ANN401 - any setting
    """Accounts with a quota of three messages."""
    given = {"redis_url": store.settings.redis_url, "daily_quota": 3, **settings}
    return Accounts(store.redis_client, Settings.load(**given))


# Bans and locks


async def test_who_was_never_banned_or_locked_is_free_and_leaves_nothing_in_redis(store: Store) -> None:
    assert await accounts(store).check(USER, DAY) == AccountOpen(0)
    assert store.redis.dbsize() == 0


async def test_a_ban_holds_until_it_is_taken_back_and_tells_where_the_sockets_are(store: Store) -> None:
    known = accounts(store)
    await Routes(store.redis_client, store.settings).add_route(USER)
    assert (await known.ban(USER, reason="spam", by="alice")).nodes == ("0",)
    assert await known.check(USER, DAY) == Banned()
    assert await known.check_and_count(USER, "m", NOW, DAY) == Banned()
    written = store.redis.hgetall(ACCOUNT)
    assert (written["banned"], written["reason"], written["by"]) == ("1", "spam", "alice")
    assert abs(int(written["at"]) - time.time() * 1000) < 60_000
    assert await known.unban(USER)
    assert not await known.unban(USER)
    assert await known.check(USER, DAY) == AccountOpen(0)
    assert not store.redis.exists(ACCOUNT, QUOTA)


async def test_a_lock_ends_by_itself_and_leaves_nothing(store: Store) -> None:
    known = accounts(store)
    until = (await known.lock(USER, LONG, reason="", by="alice")).until
    standing = await known.check(USER, DAY)
    assert isinstance(standing, Locked)
    assert LONG - timedelta(minutes=1) < standing.remaining <= LONG
    looked = await known.look(USER)
    assert isinstance(looked, Locked)
    assert timedelta() <= standing.remaining - looked.remaining < timedelta(minutes=1)
    assert abs(until - (time.time() + 3600) * 1000) < 60_000
    await known.lock(USER, timedelta(milliseconds=20), reason="", by="alice")  # the later lock replaces the earlier one
    await wait_until(lambda: _is_open(known), "the lock is over")
    assert not store.redis.exists(ACCOUNT)


async def test_a_lock_and_a_ban_are_taken_back_one_by_one(store: Store) -> None:
    known = accounts(store)
    await known.lock(USER, LONG, reason="", by="alice")
    await known.ban(USER, reason="", by="alice")
    assert await known.unlock(USER)
    assert not await known.unlock(USER)
    assert await known.check(USER, DAY) == Banned()
    await known.lock(USER, LONG, reason="", by="alice")
    assert await known.unban(USER)
    assert isinstance(await known.check(USER, DAY), Locked)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"banned": "1"}, Banned()),
        ({"banned": "spam"}, Banned()),
        ({"banned": "0"}, AccountOpen(0)),
        ({"banned": ""}, AccountOpen(0)),
        ({"locked_until": "tomorrow"}, Banned()),
        ({"locked_until": ""}, Banned()),
        ({"locked_until": "1_000"}, Banned()),
        ({"locked_until": "0xffffffffffffff"}, Banned()),
        ({"locked_until": "0x1"}, AccountOpen(0)),
        ({"locked_until": "-.5e1"}, AccountOpen(0)),
        ({"locked_until": "nan"}, Banned()),
        ({"locked_until": "inf"}, Banned()),
        ({"locked_until": "9" * 20}, Banned()),
        ({"locked_until": "1"}, AccountOpen(0)),
        ({"note": "a good customer"}, AccountOpen(0)),
    ],
)
async def test_what_is_written_with_redis_cli_holds_and_what_has_no_sense_lets_nobody_in(
    store: Store, fields: dict[str, str], expected: object
) -> None:
    for name, value in fields.items():
        store.redis.hset(ACCOUNT, name, value)
    assert await accounts(store).look(USER) == (None if expected == AccountOpen(0) else expected)
    assert await accounts(store).check(USER, DAY) == expected
    assert await accounts(store).check_and_count(USER, "m", NOW, DAY) == (
        AccountOpen(1, new=True) if expected == AccountOpen(0) else expected
    )


async def test_an_account_of_another_type_lets_nobody_in(store: Store) -> None:
    store.redis.set(ACCOUNT, "banned")
    with pytest.raises(StoreError):
        await accounts(store).check(USER, DAY)


async def test_a_route_says_that_there_is_an_account_to_look_at(store: Store) -> None:
    routes = Routes(store.redis_client, store.settings)
    assert not (await routes.add_route(USER)).has_account
    store.redis.hset(ACCOUNT, "banned", 1)
    login = await routes.add_route(USER)
    assert (login.has_account, login.nodes) == (True, ("0",))


# Violations


async def test_so_many_violations_lock_and_so_many_ban(store: Store) -> None:
    known = accounts(store, lock_after=2, ban_after=4)
    await Routes(store.redis_client, store.settings).add_route(USER)
    recorded = [await known.record_violation(USER) for _ in range(5)]
    assert [one.count for one in recorded] == [1, 2, 3, 4, 5]
    assert [one.verdict for one in recorded] == ["noted", "locked", "locked", "banned", "noted"]
    assert [one.nodes for one in recorded] == [(), ("0",), ("0",), ("0",), ()]
    assert await known.check(USER, DAY) == Banned()
    assert store.redis.hget(ACCOUNT, "reason") == "4 refused contents"
    assert store.redis.hget(ACCOUNT, "by") == "node 0"


async def test_zero_means_never(store: Store) -> None:
    known = accounts(store, lock_after=0, ban_after=0)
    assert {(await known.record_violation(USER)).verdict for _ in range(12)} == {"noted"}
    assert await known.check(USER, DAY) == AccountOpen(0)


async def test_violations_are_forgotten_after_a_while_but_not_because_of_a_lock(store: Store) -> None:
    known = accounts(store, lock_after=2, lock_time="1h", violation_window="10m")
    await known.record_violation(USER)
    assert 590_000 < store.redis.pttl(VIOLATIONS) <= 600_000
    await known.record_violation(USER)
    assert 4_190_000 < store.redis.pttl(VIOLATIONS) <= 4_200_000


async def test_a_violation_shortens_no_lock_and_changes_no_ban(store: Store) -> None:
    known = accounts(store, lock_after=1, lock_time="1s", ban_after=2)
    await known.lock(USER, LONG, reason="by hand", by="alice")
    assert (await known.record_violation(USER)).verdict == "noted"
    await known.ban(USER, reason="by hand", by="alice")
    assert (await known.record_violation(USER)).verdict == "noted"
    assert store.redis.hget(ACCOUNT, "reason") == "by hand"


async def test_a_pardon_forgets_the_violations_too(store: Store) -> None:
    known = accounts(store, lock_after=2)
    await known.record_violation(USER)
    await known.record_violation(USER)
    assert await known.unlock(USER)
    assert (await known.record_violation(USER)).verdict == "noted"


# The messages of a day


async def test_a_day_has_so_many_messages_and_the_next_one_as_many(store: Store) -> None:
    known = accounts(store)
    for used in (1, 2, 3):
        assert await known.check_and_count(USER, f"m{used}", NOW, DAY) == AccountOpen(used, new=True)
    assert await known.check_and_count(USER, "m4", NOW, DAY) == QuotaExhausted()
    assert await known.check_and_count(USER, "m4", DAY.end, TOMORROW) == AccountOpen(1, new=True)
    assert await known.check(USER, DAY) == AccountOpen(3)
    assert store.redis.zcard(QUOTA) == 3
    forgotten_at = time.time_ns() // 1_000_000 + store.redis.pttl(QUOTA)
    assert abs(forgotten_at - (DAY.end + 3_600_000)) < 5_000  # an hour after the end of the day


async def test_a_message_that_is_sent_again_is_counted_once_and_passes_also_when_all_is_used_up(store: Store) -> None:
    known = accounts(store, daily_quota=1)
    await known.check_and_count(USER, "m", NOW, DAY)
    # It may have been admitted.
    assert await known.check_and_count(USER, "m", NOW + 5, DAY) == AccountOpen(1, new=False)
    await store.replies.mark_queued(USER, "m")
    assert await known.check_and_count(USER, "m", NOW + 10, DAY) == AccountOpen(1, new=False)
    assert await known.check_and_count(USER, "m", DAY.end, TOMORROW) == AccountOpen(0, new=False)  # over midnight, too


async def test_a_message_whose_answer_is_forgotten_is_counted_again_when_it_is_asked_again(store: Store) -> None:
    known = accounts(store, daily_quota=2, reply_ttl="15m")
    later = NOW + 15 * 60_000
    await known.check_and_count(USER, "m", NOW, DAY)
    assert await known.check_and_count(USER, "m", later, DAY) == AccountOpen(2, new=True)
    assert await known.check_and_count(USER, "m", 2 * later - NOW, DAY) == QuotaExhausted()
    # The latest count is refunded.
    assert await known.refund(USER, "m", DAY)
    assert store.redis.zrange(QUOTA, 0, -1) == [f"m#{NOW}"]


async def test_what_is_not_admitted_is_given_back_once(store: Store) -> None:
    known = accounts(store, daily_quota=2)
    await known.check_and_count(USER, "other", NOW, DAY)
    await known.check_and_count(USER, "m", NOW, DAY)
    for _ in range(2):
        await known.undo_count(USER, "m", NOW, DAY)
        assert await known.check(USER, DAY) == AccountOpen(1)


async def test_what_another_request_relies_on_is_not_given_back(store: Store) -> None:
    """Otherwise a user could send one message to two nodes at once, one of which is full, without being counted."""
    known = accounts(store)
    assert await known.check_and_count(USER, "m", NOW, DAY) == AccountOpen(1, new=True)
    # The other request, which is admitted:
    assert await known.check_and_count(USER, "m", NOW, DAY) == AccountOpen(1, new=False)
    await known.undo_count(USER, "m", NOW, DAY)
    assert await known.check(USER, DAY) == AccountOpen(1)


async def test_what_has_failed_is_given_back_on_its_own_day_however_often_that_is_said(store: Store) -> None:
    known = accounts(store)
    await known.check_and_count(USER, "m", NOW, DAY)
    await known.check_and_count(USER, "n", DAY.end, TOMORROW)
    assert await known.refund(USER, "m", DAY)
    assert not await known.refund(USER, "m", DAY)
    assert await known.check(USER, DAY) == AccountOpen(0)
    assert await known.check(USER, TOMORROW) == AccountOpen(1)


async def test_of_many_at_the_last_free_place_exactly_one_gets_it(store: Store) -> None:
    known = accounts(store, daily_quota=50)
    async with RedisClient(store.settings.redis_url, connections=2, timeout=store.settings.redis_timeout) as others:
        other = Accounts(others, Settings.load(redis_url=store.settings.redis_url, daily_quota=50))
        asked = [
            one.check_and_count(USER, f"m{n}-{index}", NOW, DAY)
            for n in range(150)
            for index, one in enumerate((known, other))
        ]
        verdicts = await asyncio.gather(*asked)
    assert sum(isinstance(verdict, AccountOpen) for verdict in verdicts) == 50
    assert verdicts.count(QuotaExhausted()) == 250


async def test_a_quota_may_be_changed_at_any_time(store: Store) -> None:
    for n in range(3):
        await accounts(store).check_and_count(USER, f"m{n}", NOW, DAY)
    assert await accounts(store, daily_quota=1).check_and_count(USER, "more", NOW, DAY) == QuotaExhausted()
    assert await accounts(store, daily_quota=5).check_and_count(USER, "more", NOW, DAY) == AccountOpen(4, new=True)
    assert await accounts(store).reset_quota(USER, DAY) == 4
    assert await accounts(store).check(USER, DAY) == AccountOpen(0)


# Redis Cluster


async def test_all_of_it_works_in_a_cluster(tmp_path: Path) -> None:
    with cluster_set(tmp_path) as cluster:
        settings = Settings.load(redis_url=cluster.url, daily_quota=1, lock_after=1, ban_after=2)
        async with RedisClient(cluster.url, connections=1, timeout=settings.redis_timeout) as redis_client:
            known = Accounts(redis_client, settings)
            for user in range(10001, 10011):  # on all masters
                assert await known.check_and_count(user, "m", NOW, DAY) == AccountOpen(1, new=True)
                await known.undo_count(user, "m", NOW, DAY)
                assert await known.check_and_count(user, "n", NOW, DAY) == AccountOpen(1, new=True)
                assert await known.check_and_count(user, "o", NOW, DAY) == QuotaExhausted()
                await Routes(redis_client, settings).add_route(user)
                assert (await known.record_violation(user)).verdict == "locked"
                assert isinstance(await known.check(user, DAY), Locked)
                assert await known.unlock(user)
                assert (await known.ban(user, reason="", by="")).nodes == ("0",)
                assert await known.unban(user)
                assert await known.check(user, DAY) == AccountOpen(1)


async def _is_open(known: Accounts) -> bool:
    return isinstance(await known.check(USER, DAY), AccountOpen)
