"""The reply stream decides on attempts, ends and duplicates (I4, I5)."""

from datetime import timedelta
from typing import Any

import pytest

from imstream.errors import StoreRefused
from imstream.model import Continued, Question, Record, Terminal, Waiting
from imstream.store.replies import (
    MAX_LISTED,
    Appended,
    CancelRecorded,
    Duplicate,
    Ended,
    Opened,
    Opening,
    OtherQuestion,
    Rejected,
    ReplyStore,
    WaitRecorded,
)
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


async def test_that_the_model_thinks_is_part_of_the_record_until_there_is_text(store: Store) -> None:
    replies = store.replies

    async def thinks(after: str = "") -> tuple[bool, str, int]:
        record = await replies.read(USER, MESSAGE, after=after)
        assert record is not None
        return record.thinking, record.text, record.start

    async def note(offset: int) -> None:
        noted = await replies.append(
            USER, MESSAGE, attempt=1, before=offset, after=offset, text="", terminal=None, thinking=True
        )
        assert noted == Appended()

    await replies.open(USER, MESSAGE, request="0/1-0")
    await note(0)
    assert await thinks() == (True, "", 0)
    record = await replies.read(USER, MESSAGE)
    assert record is not None
    await append(replies, 0, "abc")
    assert await thinks() == (False, "abc", 0)
    await note(3)  # a continued call thinks again
    assert await thinks() == (True, "abc", 0)
    assert await thinks(record.position) == (True, "abc", 0)
    await append(replies, 3, "d", terminal=Terminal("done", "stop"))
    assert await thinks() == (False, "abcd", 0)
    assert "since" not in str(store.redis.xrange(store.keys.reply(USER, MESSAGE)))


async def test_a_failed_end_keeps_its_reason(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    failed = Terminal("failed", reason="http_503", error="overloaded")
    assert await append(store.replies, 0, "", terminal=failed) == Appended()
    assert await store.replies.read(USER, MESSAGE) == Record(1, "", failed)


async def test_marking_comes_second_to_anything_that_is_known(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await store.replies.mark_queued(USER, MESSAGE)
    assert store.redis.xlen(store.keys.reply(USER, MESSAGE)) == 1


async def test_a_reply_without_a_recorded_owner_ends_the_request_that_opens_it(store: Store) -> None:
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


# Continued attempts


async def test_an_attempt_continues_the_text_of_its_writer_and_clients_notice_nothing(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "Once ")
    await append(store.replies, 5, "upon")
    usage = {"total_tokens": 3}
    how: dict[str, Any] = {"request": "0/1-0", "continues": 100}
    opened = await store.replies.open(USER, MESSAGE, after=1, shown=9, usage=usage, **how)
    assert opened == Opened(2, continued=Continued(1, {}, usage, "Once upon"))
    assert await append(store.replies, 9, " a", attempt=1) == Rejected("superseded")
    assert await append(store.replies, 0, "Once", attempt=2) == Rejected("gap")
    assert await append(store.replies, 9, " a time", attempt=2) == Appended()
    record = await store.replies.read(USER, MESSAGE)
    assert record is not None
    assert record == Record(2, "Once upon a time", None)
    assert record.continued == Continued(1, {})
    again = await store.replies.open(USER, MESSAGE, after=2, shown=16, **how)
    assert again == Opened(3, continued=Continued(1, {}, usage, "Once upon a time"))


async def test_another_worker_continues_the_record_and_clients_that_may_have_more_text_restart(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "abc")
    how: dict[str, Any] = {"request": "0/1-0", "continues": 100}
    assert await store.replies.open(USER, MESSAGE, **how) == Opened(2, continued=Continued(2, {1: 3}, None, "abc"))
    await append(store.replies, 3, "de", attempt=2)
    opened = await store.replies.open(USER, MESSAGE, after=2, shown=6, **how)  # Redis has lost its last batch
    assert opened == Opened(3, continued=Continued(3, {1: 3, 2: 5}, None, "abcde"))
    assert await store.replies.open(USER, MESSAGE, request="0/1-0", after=3) == Opened(4)
    record = await store.replies.read(USER, MESSAGE)
    assert record is not None
    assert record == Record(4, "", None)
    assert record.continued is None


async def test_text_at_its_limit_and_the_text_of_another_request_are_not_continued(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "abc")
    assert await store.replies.open(USER, MESSAGE, request="0/1-0", continues=3) == Opened(2)
    await append(store.replies, 0, "abc", attempt=2)
    assert await store.replies.open(USER, MESSAGE, request="0/2-0", lost="0/1-0", continues=100) == Opened(3)


async def test_a_continued_attempt_without_a_call_does_not_count(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "abc")
    opened = await store.replies.open(USER, MESSAGE, request="0/1-0", after=1, continues=100)
    assert isinstance(opened, Opened)
    assert opened.counted == 1
    opened = await store.replies.open(USER, MESSAGE, request="0/1-0", after=2, unused=True)
    assert isinstance(opened, Opened)
    assert (opened.counted, opened.continued) == (1, None)


async def test_attempts_do_not_count_as_long_as_continued_ones_add_text(store: Store) -> None:
    counted = list[int]()
    for attempt, text in enumerate(("abc", "", "d", "e", "", "")):
        opened = await store.replies.open(USER, MESSAGE, request="0/1-0", continues=100)
        assert isinstance(opened, Opened)
        counted.append(opened.counted)
        before = "" if opened.continued is None else opened.continued.text
        await append(store.replies, len(before), text, attempt=attempt + 1)
    assert counted == [0, 1, 2, 0, 0, 1]


async def test_an_opening_whose_answer_was_lost_is_returned_again(store: Store) -> None:
    async def opened_twice(word: str, **given: Any) -> Opened:  # noqa: ANN401 - the arguments of the store
        first, second = [
            await store.replies.open(*(USER, MESSAGE), request="0/1-0", continues=100, word=word, **given)
            for _ in range(2)
        ]
        assert isinstance(first, Opened)
        assert isinstance(second, Opened)
        assert first == second
        assert (first.at, first.counted, first.waited is None) == (second.at, second.counted, second.waited is None)
        return second

    assert await opened_twice("a") == Opened(1)
    await append(store.replies, 0, "abc")
    continued = await opened_twice("b", after=1, shown=3, usage={"total_tokens": 7})
    assert continued.continued == Continued(1, {}, {"total_tokens": 7}, "abc")
    await store.replies.wait(USER, MESSAGE, attempt=2, pause=timedelta(0), why=Waiting("default", "http_503"))
    assert (await opened_twice("c")).waited is not None


async def test_only_the_latest_opening_is_returned_again_and_only_to_its_caller(store: Store) -> None:
    async def opened_with(word: str) -> Opening:
        return await store.replies.open(USER, MESSAGE, request="0/1-0", word=word)

    assert await opened_with("a") == Opened(1)
    assert await opened_with("b") == Opened(2)  # another process of this node
    assert await opened_with("a") == Opened(3)
    await append(store.replies, 0, "abc", attempt=3)
    assert await opened_with("a") == Opened(3)  # it runs after its repetition
    assert await opened_with("b") == Opened(4)
    await store.replies.cancel(USER, MESSAGE)
    assert await opened_with("a") == Ended("cancelled", "0/1-0")


async def test_text_ends_a_wait_and_another_failure_begins_another_window(store: Store) -> None:
    why = Waiting("default", "http_503")
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await store.replies.wait(USER, MESSAGE, attempt=1, pause=timedelta(0), why=why)
    opened = await store.replies.open(USER, MESSAGE, request="0/1-0", continues=100)
    assert isinstance(opened, Opened)
    assert opened.waited is not None
    await append(store.replies, 0, "abc", attempt=2)
    opened = await store.replies.open(USER, MESSAGE, request="0/1-0", continues=100)
    assert isinstance(opened, Opened)
    assert opened.waited is None
    await store.replies.wait(USER, MESSAGE, attempt=3, pause=timedelta(0), why=why)
    opened = await store.replies.open(USER, MESSAGE, request="0/1-0", continues=100)
    assert isinstance(opened, Opened)
    assert (opened.waited is not None, opened.continued is not None) == (True, True)


async def test_a_continued_attempt_may_wait_and_be_cancelled_where_it_stands(store: Store) -> None:
    await store.replies.open(USER, MESSAGE, request="0/1-0")
    await append(store.replies, 0, "abc")
    await store.replies.open(USER, MESSAGE, request="0/1-0", continues=100)
    why = Waiting("default", "http_503")
    waits = await store.replies.wait(USER, MESSAGE, attempt=2, pause=timedelta(0), why=why)
    assert isinstance(waits, WaitRecorded)
    record = await store.replies.read(USER, MESSAGE)
    assert record is not None
    assert record == Record(2, "abc", None)
    assert record.waiting == why
    assert await append(store.replies, 3, "d", attempt=2) == Appended()
    await store.replies.cancel(USER, MESSAGE)
    assert await store.replies.read(USER, MESSAGE) == Record(2, "abcd", Terminal("cancelled"))


# The question and the list of a user's messages


async def test_the_question_is_kept_once_with_the_reply(store: Store) -> None:
    question = Question("你好?", "digest")
    assert await store.replies.mark_queued(USER, MESSAGE, question) == ()
    for attempt in (1, 2):
        assert await store.replies.open(USER, MESSAGE, question, request="0/1-0") == Opened(attempt)
    rows: Any = store.redis.xrange(store.keys.reply(USER, MESSAGE))
    assert [fields.get("question") for _, fields in rows] == ["你好?", None, None]
    record = await store.replies.read(USER, MESSAGE)
    assert record is not None
    assert record.question == question
    later = await store.replies.read(USER, MESSAGE, after=rows[0][0])
    assert later is not None
    assert later.question is None


async def test_a_question_that_an_older_release_did_not_record_is_added(store: Store) -> None:
    store.redis.xadd(store.keys.reply(USER, MESSAGE), {"attempt": 0, "event": "queued", "offset": 0})
    assert await store.replies.open(USER, MESSAGE, Question("你好?", "digest"), request="0/1-0") == Opened(1)
    record = await store.replies.read(USER, MESSAGE)
    assert record is not None
    assert record.question == Question("你好?", "digest")


async def test_another_question_with_the_id_of_a_queued_one_is_not_begun(store: Store) -> None:
    await store.replies.mark_queued(USER, MESSAGE, Question("first", "one"))
    assert await store.replies.mark_queued(USER, MESSAGE, Question("second", "two")) is None
    assert await store.replies.open(USER, MESSAGE, Question("second", "two"), request="0/2-0") == OtherQuestion()
    assert await store.replies.open(USER, MESSAGE, Question("first", "one"), request="0/1-0") == Opened(1)
    # A request of an older release has no digest: it may be the same question.
    await store.replies.mark_queued(USER, "old", Question("first", "one"))
    assert await store.replies.open(USER, "old", Question("first"), request="0/3-0") == Opened(1)


async def test_the_newest_messages_of_a_user_are_listed_with_their_last_event_until_their_replies_expire(
    store: Store,
) -> None:
    assert await store.replies.messages(USER) == {}
    key = store.keys.messages(USER)
    store.redis.zadd(key, {f"m{number}": number for number in range(MAX_LISTED)})
    for message_id in ("m1", "m2", "m3", "m4"):  # the replies to the others have expired
        await store.replies.open(USER, message_id, request="0/1-0")
    await store.replies.append(USER, "m2", attempt=1, before=0, after=2, text="hi", terminal=Terminal("done"))
    await store.replies.append(USER, "m3", attempt=1, before=0, after=2, text="hi")
    await store.replies.cancel(USER, "m4")
    await store.replies.mark_queued(USER, "waits")
    states = {"m1": "opened", "m2": "done", "m3": "text", "m4": "cancelled", "waits": "queued"}
    messages = await store.replies.messages(USER)
    assert list(messages.items()) == list(states.items())
    assert (store.redis.zcard(key), store.redis.zscore(key, "m0")) == (MAX_LISTED, None)


async def test_the_list_outlives_the_replies_in_it_and_then_expires(store: Store) -> None:
    def left(key: str) -> float:
        return store.redis.pttl(key) / 1000

    key, settings = store.keys.messages(USER), store.settings
    await store.replies.open(USER, "begun", request="0/1-0")
    longest = (settings.retry_window + settings.ai_total_timeout + settings.reply_ttl).total_seconds()
    assert longest - 60 < left(key) <= 1.2 * longest
    await store.replies.mark_queued(USER, "waits")
    await store.replies.open(USER, "also-begun", request="0/2-0")
    assert left(key) > settings.queued_ttl.total_seconds() - 60


async def test_a_message_that_waited_is_listed_once_and_a_list_is_not_prolonged_for_each_message(store: Store) -> None:
    def calls(command: str) -> int:
        return int(store.redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])

    await store.replies.mark_queued(USER, "m0", request="0/0-0")
    before = calls("zadd"), calls("pexpire")
    await store.replies.open(USER, "m0", request="0/0-0")
    assert (calls("zadd"), calls("pexpire")) == (before[0], before[1] + 1)  # that of the reply
    assert await store.replies.messages(USER) == {"m0": "opened"}
    await store.replies.mark_queued(USER, "m1", request="0/1-0")
    assert (calls("zadd"), calls("pexpire")) == (before[0] + 1, before[1] + 2)


async def test_a_list_of_another_type_keeps_no_message_from_being_answered(store: Store) -> None:
    store.redis.set(store.keys.messages(USER), "by hand", ex=60)
    assert await store.replies.mark_queued(USER, MESSAGE) == ()
    assert await store.replies.open(USER, MESSAGE, request="0/1-0") == Opened(1)
