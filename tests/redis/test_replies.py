"""The reply stream decides on attempts, ends and duplicates (I4, I5)."""

import pytest

from imstream.errors import StoreRefused
from imstream.model import Record, Terminal
from imstream.store.replies import Appended, CancelRecorded, Duplicate, Ended, Opened, Rejected, ReplyStore
from tests.redis.conftest import Store

USER, MESSAGE = 10001, "m-1"


async def append(
    replies: ReplyStore, before: int, text: str, *, attempt: int = 1, terminal: Terminal | None = None
) -> Appended | Rejected:
    return await replies.append(
        USER, MESSAGE, attempt=attempt, before=before, after=before + len(text), text=text, terminal=terminal
    )


async def test_nothing_is_known_of_a_message_never_seen(store: Store) -> None:
    assert await store.replies.read(USER, MESSAGE) is None
    assert await store.replies.cancel(USER, MESSAGE) == "unknown"


async def test_a_reply_is_its_batches_in_order_and_its_end(store: Store) -> None:
    await store.replies.mark_queued(USER, MESSAGE)
    assert await store.replies.open(USER, MESSAGE, request="0/1-0") == Opened(1)
    assert await append(store.replies, 0, "你好,") == Appended()
    assert await append(store.replies, 3, "世界") == Appended()
    done = Terminal("done", "stop", {"total_tokens": 7})
    assert await append(store.replies, 5, "!", terminal=done) == Appended()
    assert await store.replies.read(USER, MESSAGE) == Record(1, "你好,世界!", done)


async def test_a_failed_end_keeps_its_reason(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    failed = Terminal("failed", reason="http_503", error="overloaded")
    assert await append(store.replies, 0, "", terminal=failed) == Appended()
    assert await store.replies.read(USER, MESSAGE) == Record(1, "", failed)


async def test_marking_comes_second_to_anything_that_is_known(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await store.replies.mark_queued(USER, MESSAGE)
    assert store.redis.xlen(store.keys.reply(USER, MESSAGE)) == 1


async def test_a_reply_whose_owner_is_not_recorded_ends_what_opens_it(store: Store) -> None:
    key = store.keys.reply(USER, "m")
    for event in ("opened", "done"):
        store.redis.xadd(key, {"attempt": "1", "event": event, "offset": "0"})
    store.redis.expire(key, 60)
    assert await store.replies.open(USER, "m", request="0/2-0") == Ended("done", "")


async def test_a_route_of_another_type_is_found_before_anything_is_written(store: Store) -> None:
    store.redis.set(store.keys.route(USER), "by hand", ex=60)
    with pytest.raises(StoreRefused, match="WRONGTYPE"):
        await store.replies.open(USER, "m", request="0/2-0")
    assert store.redis.exists(store.keys.reply(USER, "m")) == 0


async def test_a_later_attempt_shuts_out_the_earlier_one(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "old")
    assert await store.replies.open(USER, MESSAGE, request="0/1-0") == Opened(2)
    assert await append(store.replies, 3, " more") == Rejected("superseded")
    assert await append(store.replies, 0, "", attempt=1, terminal=Terminal("done")) == Rejected("superseded")
    await append(store.replies, 0, "new", attempt=2)
    assert await store.replies.read(USER, MESSAGE) == Record(2, "new", None)


async def test_there_is_one_terminal_event(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    assert await append(store.replies, 0, "x", terminal=Terminal("done")) == Appended()
    assert await append(store.replies, 1, "", terminal=Terminal("failed")) == Rejected("ended")
    assert await store.replies.cancel(USER, MESSAGE) == "too_late"
    assert await store.replies.open(USER, MESSAGE, request="0/1-0") == Ended("done", "0/1-0")
    assert store.redis.xlen(store.keys.reply(USER, MESSAGE)) == 2


async def test_an_append_may_be_repeated_when_its_outcome_is_unknown(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    for _ in range(2):
        assert await append(store.replies, 0, "abc") == Appended()
    for _ in range(2):
        assert await append(store.replies, 3, "d", terminal=Terminal("done")) == Appended()
    assert store.redis.xlen(store.keys.reply(USER, MESSAGE)) == 3
    assert await store.replies.read(USER, MESSAGE) == Record(1, "abcd", Terminal("done"))


async def test_text_that_leaves_a_gap_is_refused(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "abc")
    assert await append(store.replies, 4, "e") == Rejected("gap")
    assert await append(store.replies, 1, "b") == Rejected("gap")


async def test_appending_to_a_reply_that_redis_lost_is_told(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    store.redis.flushall()
    assert await append(store.replies, 0, "abc") == Rejected("gone")


async def test_a_message_belongs_to_the_request_that_opened_it(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    for n in range(250):  # the owner is found behind more than one page of entries
        await append(store.replies, n, "x")
    assert await store.replies.open(USER, MESSAGE, request="1/9-0") == Duplicate("0/1-0")
    assert await store.replies.open(USER, MESSAGE, request="0/1-0") == Opened(2)


async def test_a_message_of_a_lost_request_can_be_taken_over(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    assert await store.replies.open(USER, MESSAGE, request="0/2-0", lost="0/7-0") == Duplicate("0/1-0")
    assert await store.replies.open(USER, MESSAGE, request="0/2-0", lost="0/1-0") == Opened(2)
    assert await store.replies.open(USER, MESSAGE, request="0/1-0") == Duplicate("0/2-0")


async def test_cancelling_ends_a_reply_wherever_it_stands(store: Store) -> None:
    await store.replies.mark_queued(USER, "waiting")
    assert isinstance(await store.replies.cancel(USER, "waiting"), CancelRecorded)
    assert await store.replies.open(USER, "waiting", request="0/1-0") == Ended("cancelled", "")
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "so far")
    for _ in range(2):
        assert isinstance(await store.replies.cancel(USER, MESSAGE), CancelRecorded)
    assert await append(store.replies, 6, " more") == Rejected("ended")
    assert await store.replies.read(USER, MESSAGE) == Record(1, "so far", Terminal("cancelled"))


async def test_every_append_keeps_the_reply_for_its_time(store: Store) -> None:
    key, ttl = store.keys.reply(USER, MESSAGE), store.settings.reply_ttl.total_seconds()
    await store.replies.mark_queued(USER, MESSAGE)
    assert store.redis.ttl(key) > ttl
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    assert 0 < store.redis.ttl(key) <= ttl
    store.redis.expire(key, 5)
    await append(store.replies, 0, "x")
    assert store.redis.ttl(key) > 5
