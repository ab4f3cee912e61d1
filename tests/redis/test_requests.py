"""The requests stream: admission, delivery, the end of a request."""

import asyncio
from datetime import timedelta

import pytest

from imstream.model import ChatRequest, MalformedEntry
from imstream.store.leases import Held, Holder, Leases
from imstream.store.requests import Admitted, GroupMissing, PendingEntry, QueueFull
from tests.redis.conftest import Store, chat_request
from tests.support.waiting import wait_until

SOON = timedelta(milliseconds=50)


async def test_a_request_comes_out_as_it_went_in(store: Store) -> None:
    asked = chat_request(contents="a\n“b” 你好 😀")
    await store.requests.ensure_group()
    await store.requests.admit(asked)
    [entry] = await store.requests.read(count=5, block=SOON)
    assert ChatRequest.from_fields(entry.fields) == asked


async def test_a_request_that_came_before_the_group_is_delivered(store: Store) -> None:
    await store.requests.admit(chat_request())
    await store.requests.ensure_group()
    assert len(await store.requests.read(count=5, block=SOON)) == 1


async def test_the_cap_of_the_node_refuses_and_evicts_nothing(store: Store) -> None:
    verdicts = await asyncio.gather(*(store.requests.admit(chat_request(10001 + n)) for n in range(20)))
    assert sum(isinstance(verdict, Admitted) for verdict in verdicts) == 5
    assert verdicts.count(QueueFull(by_user=False)) == 15
    assert store.redis.xlen(store.keys.requests("0")) == 5


async def test_the_cap_of_a_user_leaves_room_for_others(store: Store) -> None:
    verdicts = [await store.requests.admit(chat_request(10001)) for _ in range(3)]
    assert verdicts[2] == QueueFull(by_user=True)
    assert isinstance(await store.requests.admit(chat_request(10002)), Admitted)


async def test_the_position_counts_those_that_wait_for_a_worker(store: Store) -> None:
    await store.requests.ensure_group()
    first = await store.requests.admit(chat_request(10001))
    second = await store.requests.admit(chat_request(10002))
    assert isinstance(first, Admitted)
    assert isinstance(second, Admitted)
    assert (first.position, second.position) == (1, 2)
    await store.requests.read(count=2, block=SOON)
    third = await store.requests.admit(chat_request(10003))
    assert isinstance(third, Admitted)
    assert third.position == 1


async def test_a_finished_request_leaves_nothing_behind(store: Store) -> None:
    await store.requests.ensure_group()
    await store.requests.admit(chat_request())
    [entry] = await store.requests.read(count=1, block=SOON)
    await store.requests.finish(entry)
    await store.requests.finish(entry)  # idempotent
    assert store.redis.xlen(store.keys.requests("0")) == 0
    assert store.redis.xpending(store.keys.requests("0"), "workers")["pending"] == 0
    assert store.redis.exists(store.keys.load("0")) == 0


async def test_a_finished_request_makes_room_for_its_user(store: Store) -> None:
    await store.requests.ensure_group()
    for _ in range(2):
        await store.requests.admit(chat_request())
    [entry] = await store.requests.read(count=1, block=SOON)
    await store.requests.finish(entry)
    assert isinstance(await store.requests.admit(chat_request()), Admitted)


async def test_a_buried_request_is_readable_in_the_dead_stream(store: Store) -> None:
    asked = chat_request()
    await store.requests.ensure_group()
    await store.requests.admit(asked)
    [entry] = await store.requests.read(count=1, block=SOON)
    for _ in range(2):  # idempotent: there is one dead letter
        await store.requests.bury(entry, reason="http_400", error="no such model", attempts=1)
    [letter] = store.dead()
    assert letter["contents"] == asked.contents
    assert (letter["reason"], letter["error"], letter["attempts"]) == ("http_400", "no such model", "1")
    assert int(letter["dead_at"]) >= asked.at
    assert store.redis.xlen(store.keys.requests("0")) == 0
    assert store.redis.exists(store.keys.load("0")) == 0


async def test_what_a_dead_worker_left_is_pending_and_can_be_claimed(store: Store) -> None:
    await store.requests.ensure_group()
    await store.requests.admit(chat_request())
    [entry] = await store.requests.read(count=1, block=SOON)
    assert await store.requests.pending() == [PendingEntry(entry.entry_id, 1, "0")]
    assert await store.requests.pending(exclude=[entry.entry_id]) == []
    claimed = await store.requests.claim(PendingEntry(entry.entry_id, 1, "0"), deliveries=2)
    assert claimed is not None
    assert claimed.fields == entry.fields
    assert await store.requests.pending() == [PendingEntry(entry.entry_id, 2, "0")]


async def test_handing_back_does_not_count_as_a_death(store: Store) -> None:
    await store.requests.ensure_group()
    await store.requests.admit(chat_request())
    [entry] = await store.requests.read(count=1, block=SOON)
    await store.requests.hand_back(entry)
    assert await store.requests.pending() == [PendingEntry(entry.entry_id, 0, "0")]


async def test_a_pending_entry_that_was_deleted_by_hand_is_forgotten(store: Store) -> None:
    await store.requests.ensure_group()
    await store.requests.admit(chat_request())
    [entry] = await store.requests.read(count=1, block=SOON)
    store.redis.xdel(store.keys.requests("0"), entry.entry_id)
    assert await store.requests.claim(PendingEntry(entry.entry_id, 1, "0"), deliveries=2) is None
    assert await store.requests.pending() == []


async def test_preparing_twice_keeps_the_group_and_counts_the_load_anew(store: Store) -> None:
    assert await store.requests.ensure_group() is True
    await store.requests.admit(chat_request(10001))
    await store.requests.admit(chat_request(10002))
    store.redis.hset(store.keys.load("0"), mapping={"10001": 7, "10009": 3})
    assert await store.requests.ensure_group() is False
    assert store.redis.hgetall(store.keys.load("0")) == {"10001": "1", "10002": "1"}


async def test_reading_without_a_group_says_so(store: Store) -> None:
    store.redis.xadd(store.keys.requests("0"), {"a": "b"})
    with pytest.raises(GroupMissing):
        await store.requests.read(count=1, block=SOON)
    with pytest.raises(GroupMissing):
        await store.requests.pending()


async def test_the_stream_deleted_under_a_waiting_read_is_noticed(store: Store) -> None:
    await store.requests.ensure_group()
    reading = asyncio.create_task(store.requests.read(count=1, block=timedelta(seconds=1)))
    await wait_until(
        lambda: any(client["cmd"] == "xreadgroup" for client in store.redis.client_list()), "the read to begin"
    )
    store.redis.delete(store.keys.requests("0"))
    store.redis.xadd(store.keys.requests("0"), {"a": "b"})  # 6.2 notices only when the key exists again
    with pytest.raises(GroupMissing):
        await reading


@pytest.mark.parametrize(
    "change",
    [{"user": "nobody"}, {"history": "["}, {"history": '[{"role": "user"}]'}, {"history": "7"}, {"at": ""}],
)
def test_an_entry_changed_by_hand_is_malformed(change: dict[str, str]) -> None:
    flat = chat_request().fields()
    fields = dict(zip(flat[::2], flat[1::2], strict=True)) | change
    with pytest.raises(MalformedEntry):
        ChatRequest.from_fields(fields)


async def test_metrics_have_the_length_of_the_stream_from_the_replies_of_scripts(store: Store) -> None:
    stream = store.metrics.stream("0")
    await store.requests.ensure_group()
    for number in range(3):
        await store.requests.admit(chat_request(10001 + number))
        assert stream.unfinished == await store.requests.unfinished() == number + 1
    one, two, _ = await store.requests.read(count=3, block=SOON)
    assert stream.oldest == one.entry_id
    for _ in range(2):  # idempotent
        await store.requests.finish(one)
        assert stream.unfinished == await store.requests.unfinished() == 2
    assert stream.oldest == ""
    for _ in range(2):
        await store.requests.bury(two, reason="http_400", error="?", attempts=1)
        assert stream.unfinished == await store.requests.unfinished() == 1
    assert b'imstream_dead_letters_total{reason="http_400"} 1.0\n' in store.metrics.expose("")[0]


async def test_a_renewal_of_the_lease_updates_metrics_with_changes_of_others(store: Store) -> None:
    leases = Leases(store.redis_client, store.settings, store.metrics)
    holder, stream = Holder("one", "host", "machine", 1, "http://one"), store.metrics.stream("0")
    await leases.acquire(holder)
    assert (stream.unfinished, stream.oldest) == (0, "")
    first = store.redis.xadd(store.keys.requests("0"), {"user": "x"})
    store.redis.xadd(store.keys.requests("0"), {"user": "x"})
    await leases.acquire(holder)
    assert (stream.unfinished, stream.oldest) == (2, first)
    await leases.release(holder)
    await leases.adopt("1")
    assert store.metrics.stream("1").unfinished == 0
    store.redis.delete(store.keys.requests("0"))
    store.redis.set(store.keys.requests("0"), "of another type")
    assert await leases.acquire(holder) == Held()  # the lease does not depend on it
