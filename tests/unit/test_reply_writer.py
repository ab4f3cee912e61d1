"""The writer of one attempt: whatever Redis does, the record is the text that followers saw."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.errors import StoreUnavailable
from imstream.model import Question, Record, Terminal
from imstream.reply_buffer import ReplyBuffer
from imstream.store.inbox import Inbox, ReplyGrew
from imstream.store.replies import Appended, Opened, Rejected, ReplyStore
from imstream.worker.reply_writer import ReplyWriter
from tests.support.reply_model import ReplyModel
from tests.support.virtual_time import VirtualTimeLoop, in_virtual_time

USER, MESSAGE, REQUEST = 10001, "m", "0/1-0"
DONE = Terminal("done", "stop")


class PlayedStore:
    """A reply stream and inboxes. A command may fail: Redis is `away`, or its `answer is lost`.

    Attributes:
        inboxes: While it is not set, no notice is answered.
    """

    node = "0"

    def __init__(self) -> None:
        self.inboxes = asyncio.Event()
        self.inboxes.set()
        self.model = ReplyModel()
        self.faults: list[str] = []
        self.appends = 0
        self.told: list[tuple[tuple[str, ...], object]] = []

    async def append(self, user: int, message: str, **given: Any) -> Appended | Rejected:  # noqa: ANN401 - see there
        """See `ReplyStore`."""
        assert (user, message) == (USER, MESSAGE)
        assert len(given["text"]) == given["after"] - given["before"]
        assert given.pop("removal") is None
        self.appends += 1
        verdict: Appended | Rejected = await self._meet_fault(lambda: self.model.append(**given))
        return Appended(("1",)) if verdict == Appended() else verdict

    async def open(self, user: int, message: str, _question: Question, **given: Any) -> object:  # noqa: ANN401 - see there
        """See `ReplyStore`."""
        assert (user, message) == (USER, MESSAGE)
        return await self._meet_fault(lambda: self.model.open(**given))

    async def notify(self, nodes: Iterable[str], notice: object) -> None:
        """See `Inbox`."""
        await self.inboxes.wait()
        self.told.append((tuple(nodes), notice))

    async def _meet_fault(self, command: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the command answers
        fault = self.faults.pop(0) if self.faults else ""
        await asyncio.sleep(0)
        if fault == "away":
            raise StoreUnavailable(fault)
        answer = command()
        if fault:
            raise StoreUnavailable(fault)
        return answer


def writing(store: PlayedStore) -> tuple[ReplyBuffer, ReplyWriter]:
    """An attempt that has just begun."""
    store.model.open(request=REQUEST)
    reply = ReplyBuffer(USER, MESSAGE)
    stream, inbox = cast("ReplyStore", store), cast("Inbox", store)
    return reply, ReplyWriter(reply, stream, inbox, request=REQUEST, opened=Opened(1))


async def test_text_is_shown_at_once_and_recorded_with_the_next_flush() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    writer.append("你好")
    assert reply.text_from(0) == "你好"
    assert store.model.read() == Record(1, "", None)
    assert writer.needs_flush
    assert await writer.flush() == Appended()
    assert store.model.read() == Record(1, "你好", None)
    assert not writer.needs_flush


async def test_that_the_model_thinks_is_recorded_once_and_not_beside_text() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    for piece in ("let ", "me "):
        writer.think(piece)
        await writer.flush()
    assert store.appends == 1
    assert (record := store.model.read()) is not None
    assert (record.text, record.thinking) == ("", True)
    writer.append("yes")
    await writer.flush()
    assert (record := store.model.read()) is not None
    assert (record.text, record.thinking) == ("yes", False)
    writer.think("again")
    writer.append(", and no")
    assert writer.needs_flush
    await writer.flush()
    assert not writer.needs_flush
    assert store.appends == 3
    reply.end(DONE)
    writer.think("too late")
    assert not reply.is_thinking


async def test_all_that_has_gathered_is_one_append_and_nothing_is_none() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    for piece in "abc":
        writer.append(piece)
    for _ in range(3):
        await writer.flush()
    assert store.appends == 1


async def test_the_last_text_and_the_end_are_one_step() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("abc")
    assert await writer.end(DONE) == Appended()
    assert store.model.read() == Record(1, "abc", DONE)
    assert store.appends == 1


async def test_nodes_with_sockets_of_the_user_are_told_of_what_is_recorded_and_of_nothing_else() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("a")
    await writer.flush()
    store.model.cancel()
    writer.append("b")
    await writer.flush()
    assert store.told == [(("1",), ReplyGrew(USER, MESSAGE))]


async def test_notices_of_the_beginning_and_the_end_hold_up_nothing_and_are_sent_in_their_order() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    store.inboxes.clear()
    writer.announce(("0", "1"), begun=True)
    assert writer.has_remote_readers
    writer.append("a")
    assert await writer.end(DONE) == Appended()
    assert store.told == []
    sent = asyncio.create_task(writer.settle())
    store.inboxes.set()
    await sent
    notices = [notice for _, notice in store.told]
    assert notices == [ReplyGrew(USER, MESSAGE, begun=True), ReplyGrew(USER, MESSAGE)]


async def test_a_later_writer_of_a_reply_begins_after_all_notices_of_an_earlier_one() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    store.inboxes.clear()
    writer.announce(("1",), begun=True)
    closed = asyncio.create_task(writer.close())
    await asyncio.sleep(0)
    assert not closed.done()
    store.inboxes.set()
    await closed
    assert len(store.told) == 1


async def test_a_reply_that_only_this_node_reads_is_not_announced() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.announce(("0",), begun=True)
    await writer.settle()
    assert not writer.has_remote_readers
    assert store.told == []


async def test_what_could_not_be_recorded_is_there_for_the_next_time() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("a")
    store.faults = ["away"]
    with pytest.raises(StoreUnavailable):
        await writer.flush()
    writer.append("b")
    await writer.flush()
    assert store.model.read() == Record(1, "ab", None)


async def test_an_append_whose_answer_was_lost_is_not_repeated() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("a")
    store.faults = ["answer is lost"]
    with pytest.raises(StoreUnavailable):
        await writer.flush()
    writer.append("b")
    await writer.flush()
    assert store.model.read() == Record(1, "ab", None)


async def test_a_reply_that_redis_lost_is_recorded_once_more() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    writer.append("a")
    await writer.flush()
    store.model.entries.clear()
    writer.append("b")
    assert await writer.flush() == Appended()
    assert store.model.read() == Record(1, "ab", None)
    assert reply.attempt == 1


async def test_a_reply_that_redis_lost_and_another_request_has_begun_is_the_others() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    store.model.entries.clear()
    store.model.open(request="0/2-0", after=1)
    writer.append("a")
    assert await writer.flush() == Rejected("superseded")


async def test_an_end_that_redis_lost_the_beginning_of_is_recorded_whole() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("ab")
    await writer.flush()
    store.model.entries.clear()
    assert await writer.end(DONE) == Appended()
    assert store.model.read() == Record(1, "ab", DONE)


@in_virtual_time
async def test_the_end_is_recorded_however_long_redis_is_away() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("a")
    store.faults = ["away"] * 50 + ["answer is lost"]
    assert await writer.end(DONE) == Appended()
    assert store.model.read() == Record(1, "a", DONE)


async def test_nothing_is_written_after_the_end() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    reply.end(Terminal("cancelled"))
    writer.append("late")
    assert reply.text_from(0) == ""
    assert writer.needs_flush  # the flush finds out that it has ended


async def test_an_attempt_that_was_overtaken_writes_no_more() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    reply.begin(2)
    writer.append("late")
    assert reply.text_from(0) == ""
    assert await writer.flush() == Rejected("superseded")
    assert store.appends == 0
    writer.release()
    assert reply.has_writer  # the later attempt's


async def test_a_later_attempt_elsewhere_is_found_out_with_the_next_flush() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    store.model.open(request=REQUEST)
    writer.append("a")
    assert await writer.flush() == Rejected("superseded")
    writer.release()
    assert not reply.has_writer


async def test_a_reply_that_has_ended_is_left_as_it_is() -> None:
    store = PlayedStore()
    reply, writer = writing(store)
    reply.end(DONE)
    writer.release()
    assert (reply.has_writer, reply.terminal) == (True, DONE)


async def test_two_flushes_at_once_do_not_overtake_each_other() -> None:
    store = PlayedStore()
    _, writer = writing(store)
    writer.append("a")
    first = asyncio.create_task(writer.flush())
    await asyncio.sleep(0)
    writer.append("b")
    assert set(await asyncio.gather(first, writer.flush(), writer.end(DONE))) == {Appended()}
    assert store.model.read() == Record(1, "ab", DONE)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.text("ab你", min_size=1, max_size=4)),
        st.tuples(st.just("flush"), st.sampled_from(["", "away", "answer is lost"])),
        st.tuples(st.just("loss"), st.sampled_from(["everything", "the last batch"])),
    )
)


@given(STEPS, st.lists(st.sampled_from(["", "away", "answer is lost"])))
def test_whatever_redis_does_the_record_is_what_followers_saw(steps: list[tuple[str, str]], faults: list[str]) -> None:
    async def play() -> None:
        store = PlayedStore()
        reply, writer = writing(store)
        shown = ""
        for what, how in steps:
            match what, how:
                case "write", text:
                    writer.append(text)
                    shown += text
                case "loss", "everything":
                    store.model.entries.clear()
                case "loss", _:
                    if store.model.last is not None and store.model.last.event == "text":
                        store.model.entries.pop()
                case _:
                    store.faults = [how]
                    try:
                        assert await writer.flush() == Appended()
                    except StoreUnavailable:
                        assert how
            assert reply.text_from(0, limit=None) == shown
        store.faults = list(faults)
        assert await writer.end(DONE) == Appended()
        record = store.model.read()
        assert record is not None
        assert (record.text, record.terminal) == (shown, DONE)
        assert record.attempt == reply.attempt

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(play())
