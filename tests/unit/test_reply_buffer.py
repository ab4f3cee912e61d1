"""The reply buffer: in any order of writes, records and reads, a client assembles the recorded text (I5)."""

# ruff: noqa: D102 - the rules of the state machine have sentences for names

import asyncio
import gc
import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from imstream.codes import Want
from imstream.gateway.cursor import (
    Cursor,
    QuestionAsked,
    ReplyEnded,
    StateChanged,
    Step,
    TextGrown,
    TextReset,
    ThoughtsGrown,
)
from imstream.model import Continued, Record, Terminal, Waiting
from imstream.reply_buffer import MAX_DELTA, ReplyBuffer, ReplyBuffers
from tests.support.tiers import examples

DONE = Terminal("done", "stop")
CANCELLED = Terminal("cancelled")


def reply_with(*pieces: str, attempt: int = 1) -> ReplyBuffer:
    reply = ReplyBuffer(10001, "m")
    reply.begin(attempt)
    for piece in pieces:
        reply.append(piece)
    return reply


def all_steps(cursor: Cursor) -> list[Step]:
    """All steps up to the end."""
    steps = []
    while (step := cursor.advance()) is not None:
        steps.append(step)
        if isinstance(step, ReplyEnded):
            break
    return steps


# Its text


def test_a_text_of_many_small_pieces_takes_little_memory_and_is_read_from_anywhere() -> None:
    characters = [chr(0x4E00 + number % 20_000) for number in range(50_000)]
    tracemalloc.start()
    reply = reply_with(*characters)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 10 * len(characters)
    whole = "".join(characters)
    for offset in (0, 1, 1023, 1024, 1025, 40_000, 49_999):
        assert reply.text_from(offset, limit=None) == whole[offset:]


# Its record


async def test_it_is_recorded_as_soon_as_a_worker_has_begun_it_or_its_record_is_read() -> None:
    begun, read = ReplyBuffer(10001, "begun"), ReplyBuffer(10001, "read")
    recorded = asyncio.gather(begun.wait_until_recorded(60), read.wait_until_recorded(60))
    await asyncio.sleep(0)  # they wait
    begun.begin(1)
    read.load(Record(0, "", CANCELLED))
    assert all(await recorded)


async def test_it_is_not_recorded_when_nobody_begins_it_in_time() -> None:
    reply = reply_with("of an attempt before")  # its record may be lost
    assert not await reply.wait_until_recorded(0.01)


# One follower


def test_a_follower_is_told_each_piece_and_the_end() -> None:
    reply = reply_with("你好")
    cursor = Cursor(reply)
    assert all_steps(cursor) == [TextGrown(1, "你好", 2)]
    reply.append(",世界")
    assert all_steps(cursor) == [TextGrown(1, ",世界", 5)]
    reply.end(DONE)
    assert all_steps(cursor) == [ReplyEnded(1, 5, DONE)]


def test_a_slow_follower_gets_in_one_piece_what_has_gathered() -> None:
    assert all_steps(Cursor(reply_with("a", "b", "c"))) == [TextGrown(1, "abc", 3)]


def test_a_follower_goes_on_where_its_client_was() -> None:
    reply = reply_with("abc", "def", "ghi")
    assert all_steps(Cursor(reply, attempt=1, offset=4)) == [TextGrown(1, "efghi", 9)]


def test_a_follower_of_an_earlier_attempt_is_told_to_start_over() -> None:
    reply = reply_with("new", attempt=3)
    assert all_steps(Cursor(reply, attempt=1, offset=2)) == [TextReset(3), TextGrown(3, "new", 3)]


def test_a_follower_notices_nothing_of_an_attempt_that_continues_the_text() -> None:
    reply = reply_with("Once ")
    cursor = Cursor(reply)
    assert all_steps(cursor) == [TextGrown(1, "Once ", 5)]
    reply.begin(2, Continued(1, {}, None, "Once "))
    reply.append("upon")
    assert all_steps(cursor) == [TextGrown(1, "upon", 9)]


def test_a_follower_of_text_that_another_worker_continues_keeps_its_number() -> None:
    reply = reply_with("Once ")
    cursor = Cursor(reply)
    assert all_steps(cursor) == [TextGrown(1, "Once ", 5)]
    reply.begin(2, Continued(2, {1: 5}, None, "Once "))
    reply.append("upon")
    assert all_steps(cursor) == [TextGrown(1, "upon", 9)]
    assert all_steps(Cursor(reply)) == [TextGrown(2, "Once upon", 9)]
    reply.end(DONE)
    assert all_steps(cursor) == [ReplyEnded(1, 9, DONE)]


def test_a_follower_that_saw_more_than_is_continued_starts_over_at_once() -> None:
    reply = ReplyBuffer(10001, "m")
    reply.load(Record(3, "abcd", None, continued=Continued(3, {1: 2, 2: 4})))
    whole = [TextReset(3), TextGrown(3, "abcd", 4)]
    assert all_steps(Cursor(reply, attempt=1, offset=2)) == [TextGrown(1, "cd", 4)]
    assert all_steps(Cursor(reply, attempt=1, offset=3)) == whole
    assert all_steps(Cursor(reply, attempt=2, offset=4)) == []
    assert all_steps(Cursor(reply, attempt=2, offset=5)) == whole


def test_a_follower_that_was_at_a_node_of_an_older_release_goes_on_with_the_number_of_the_record() -> None:
    reply = ReplyBuffer(10001, "m")
    reply.load(Record(2, "abcd", None, continued=Continued(1, {})))
    assert all_steps(Cursor(reply, attempt=2, offset=3)) == [TextGrown(2, "d", 4)]
    assert all_steps(Cursor(reply, attempt=1, offset=3)) == [TextGrown(1, "d", 4)]


def test_a_follower_without_text_is_not_told_to_discard_it() -> None:
    assert all_steps(Cursor(reply_with("new", attempt=3))) == [TextGrown(3, "new", 3)]


def test_nothing_is_told_before_anything_is_known() -> None:
    assert Cursor(ReplyBuffer(10001, "m")).advance() is None
    assert Cursor(ReplyBuffer(10001, "m"), attempt=2, offset=7).advance() is None


def test_a_message_cancelled_before_its_turn_ends_without_text() -> None:
    reply = ReplyBuffer(10001, "m")
    reply.load(Record(0, "", CANCELLED))
    assert all_steps(Cursor(reply)) == [ReplyEnded(0, 0, CANCELLED)]


def test_a_client_that_saw_more_than_was_recorded_starts_over_once_it_is_sure_that_nobody_says_it_again() -> None:
    reply = ReplyBuffer(10001, "m")
    reply.load(Record(1, "abc", None))
    cursor = Cursor(reply, attempt=1, offset=5)
    assert cursor.advance() is None
    reply.load(Record(1, "abc", CANCELLED))
    assert all_steps(cursor) == [TextReset(1), TextGrown(1, "abc", 3), ReplyEnded(1, 3, CANCELLED)]


def test_a_delta_is_never_longer_than_clients_take() -> None:
    reply = reply_with("a" * MAX_DELTA, "b", "c" * (2 * MAX_DELTA))
    steps = all_steps(Cursor(reply))
    assert "".join(step.text for step in steps if isinstance(step, TextGrown)) == reply.text_from(0, limit=None)
    assert max(len(step.text) for step in steps if isinstance(step, TextGrown)) == MAX_DELTA


# The buffer


def test_followers_wake_with_every_change_until_they_leave() -> None:
    reply, woken = ReplyBuffer(10001, "m"), list[ReplyBuffer]()
    reply.subscribe(woken.append)
    reply.begin(1)
    reply.append("a")
    reply.end(DONE)
    assert woken == [reply] * 3
    reply.unsubscribe(woken.append)
    reply.unsubscribe(woken.append)  # may be repeated
    reply.begin(2)
    assert len(woken) == 3


def test_text_is_read_from_anywhere() -> None:
    reply = reply_with("ab", "", "cde", "f")
    assert [reply.text_from(offset) for offset in range(8)] == ["abcdef", "bcdef", "cdef", "def", "ef", "f", "", ""]
    assert [reply.text_from(offset, limit=2) for offset in range(6)] == ["ab", "bc", "cd", "de", "ef", "f"]


def test_a_record_is_taken_over_where_no_worker_writes() -> None:
    reply = ReplyBuffer(10001, "m")
    reply.load(Record(2, "abc", None))
    assert (reply.attempt, reply.text_from(0), reply.has_writer) == (2, "abc", False)
    reply.load(Record(2, "abcd", DONE))
    assert (reply.text_from(0), reply.terminal) == ("abcd", DONE)


def test_a_record_that_goes_on_is_added_to_what_is_held() -> None:
    reply = ReplyBuffer(10001, "m")
    assert reply.load(Record(2, "abc", None, position="1-0"))
    assert reply.load(Record(2, "de", DONE, start=3, position="2-0"))
    assert (reply.text_from(0), reply.terminal, reply.position) == ("abcde", DONE, "2-0")


@pytest.mark.parametrize(
    "record", [Record(2, "e", None, start=4), Record(2, "c", None, start=2), Record(1, "d", None, start=3)]
)
def test_a_record_that_goes_on_from_another_text_is_to_be_read_whole(record: Record) -> None:
    reply = ReplyBuffer(10001, "m")
    reply.load(Record(2, "abc", None, position="1-0"))
    assert not reply.load(record)
    assert (reply.text_from(0), reply.position) == ("abc", "")


def test_what_is_known_already_wakes_nobody() -> None:
    reply, woken = ReplyBuffer(10001, "m"), list[ReplyBuffer]()
    reply.load(Record(2, "abc", None))
    reply.subscribe(woken.append)
    reply.load(Record(2, "abc", None))
    assert woken == []


def test_a_record_is_older_than_what_a_worker_here_writes() -> None:
    reply = reply_with("abcdef")
    reply.load(Record(1, "abc", None))
    assert reply.text_from(0) == "abcdef"
    reply.has_writer = False
    reply.load(Record(1, "abc", None))
    assert reply.text_from(0) == "abc"


def test_the_recorded_end_holds_whatever_a_worker_here_has_written() -> None:
    reply = reply_with("abcdef")
    reply.load(Record(1, "abc", CANCELLED))
    assert (reply.text_from(0), reply.terminal) == ("abc", CANCELLED)
    reply.load(Record(1, "ab", DONE))
    assert (reply.text_from(0), reply.terminal) == ("abc", CANCELLED)


# Its reasoning

WANTS = frozenset({Want.STATUS, Want.THINKING})


def told(cursor: Cursor) -> list[str]:
    """All that is new, briefly."""
    return [brief(step) for step in all_steps(cursor)]


def brief(step: Step) -> str:
    match step:
        case StateChanged(state):
            return state
        case ThoughtsGrown(attempt, text, start):
            return f"{attempt}/{start}: {text}"
        case TextReset(attempt):
            return f"restart {attempt}"
        case TextGrown(_, text, _) | QuestionAsked(text):
            return text
        case ReplyEnded(_, _, terminal):
            return terminal.event


def test_reasoning_is_sent_before_the_text_to_followers_that_request_it() -> None:
    reply = reply_with()
    curious, plain = Cursor(reply, wants=WANTS), Cursor(reply)
    assert told(curious) == ["started"]
    for piece in ("\n", "let ", "me ", "see"):
        reply.think(piece, keep=True)
    assert told(curious) == ["thinking", "1/0: let me see"]
    reply.think("!", keep=True)
    reply.append("yes")
    assert told(curious) == ["started", "1/10: !", "yes"]
    assert told(plain) == ["yes"]
    assert told(Cursor(reply, attempt=1, offset=3, wants=WANTS)) == ["started", "1/0: let me see!"]
    reply.end(DONE)
    assert (told(curious), told(plain)) == (["done"], ["done"])


def test_where_reasoning_is_not_shown_the_state_is_sent_and_nothing_is_kept() -> None:
    reply = reply_with()
    cursor = Cursor(reply, wants=WANTS)
    for piece in ("\n", "let ", "me "):
        reply.think(piece, keep=False)
    assert told(cursor) == ["thinking"]
    assert reply.thoughts is None
    reply.append("yes")
    assert told(cursor) == ["started", "yes"]


def test_reasoning_wakes_only_followers_that_request_it() -> None:
    reply, woken = reply_with(), list[ReplyBuffer]()
    reply.subscribe(woken.append)
    reply.think("hm", keep=True)
    assert woken == []
    reply.is_watched = True
    reply.think("hm", keep=True)
    assert woken == [reply]


def test_a_call_that_fails_and_a_restart_take_the_reasoning_with_them() -> None:
    reply = reply_with()
    cursor, slow = Cursor(reply, wants=WANTS), Cursor(reply, wants=WANTS)
    reply.think("one", keep=True)
    assert told(cursor) == ["thinking", "1/0: one"]
    reply.forget_reasoning()
    reply.wait(Waiting("default", "http_503"))
    assert told(cursor) == ["waiting"]
    reply.think("another", keep=True)
    assert told(cursor) == ["thinking", "1/0: another"]
    reply.append("half")
    reply.begin(2)
    reply.think("third", keep=True)
    assert told(cursor) == ["restart 2", "2/0: third"]
    assert told(slow) == ["thinking", "2/0: third"]


def test_each_wait_for_a_backend_is_sent_with_its_time() -> None:
    reply = reply_with()
    cursor = Cursor(reply, wants=WANTS)
    waits = []
    for milliseconds in (1000, 2000, 2000, 4000):
        reply.wait(Waiting("default", "http_503", retry_after=milliseconds))
        waits += [
            step.waiting.retry_after for step in all_steps(cursor) if isinstance(step, StateChanged) and step.waiting
        ]
    assert waits == [1000, 2000, 4000]


def test_much_reasoning_is_sent_in_parts_and_takes_little_memory() -> None:
    characters = [chr(0x4E00 + number % 20_000) for number in range(100_000)]
    tracemalloc.start()
    reply = reply_with()
    for character in characters:
        reply.think(character, keep=True)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 10 * len(characters)
    steps = [step for step in all_steps(Cursor(reply, wants=WANTS)) if isinstance(step, ThoughtsGrown)]
    assert "".join(step.text for step in steps) == "".join(characters)
    assert max(len(step.text) for step in steps) == MAX_DELTA


def test_the_recorded_state_is_sent_where_no_worker_writes() -> None:
    reply = ReplyBuffer(10001, "m")
    cursor = Cursor(reply, wants=WANTS)
    reply.load(Record(1, "", None, position="1-0", thinking=True))
    assert told(cursor) == ["thinking"]
    reply.load(Record(1, "yes", None, position="2-0"))
    assert told(cursor) == ["started", "yes"]
    reply.load(Record(1, "", None, start=3, position="3-0", thinking=True))
    assert told(cursor) == ["thinking"]


STEPS = st.one_of(
    st.tuples(st.just("think"), st.text(min_size=1, max_size=4)),
    st.tuples(st.just("append"), st.text(min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["fail", "restart", "read"]), st.just("")),
)


@given(st.lists(STEPS, max_size=30))
def test_reasoning_changes_no_frames_of_others(steps: list[tuple[str, str]]) -> None:
    """All orders of events, with reasoning and without, with all readers."""
    thinking, silent = reply_with(), reply_with()
    curious, plain, other = Cursor(thinking, wants=WANTS), Cursor(thinking), Cursor(silent)
    attempt, active, reasoning, seen = 1, False, "", ""
    for step, text in [*steps, ("read", "")]:
        match step:
            case "think":
                thinking.think(text, keep=True)
                active = active or text.strip() != ""
                reasoning += text if active else ""
            case "append":
                active = False
                thinking.append(text)
                silent.append(text)
            case "fail":
                thinking.forget_reasoning()
                active, reasoning = False, ""
            case "restart":
                attempt, active, reasoning = attempt + 1, False, ""
                thinking.begin(attempt)
                silent.begin(attempt)
            case _:
                assert all_steps(plain) == all_steps(other)
                for one in all_steps(curious):
                    if isinstance(one, TextReset):
                        seen = ""
                    elif isinstance(one, ThoughtsGrown):
                        assert one.start in {0, len(seen)}
                        seen = one.text if one.start == 0 else seen + one.text
                assert reasoning in {seen, ""}


# The buffers of a process


def test_writer_and_followers_of_a_message_share_one_reply() -> None:
    buffers = ReplyBuffers()
    reply = buffers.get(10001, "m")
    assert buffers.get(10001, "m") is reply
    assert buffers.get(10002, "m") is not reply
    assert buffers.get(10001, "n") is not reply


def test_a_reply_is_kept_as_long_as_somebody_holds_it() -> None:
    buffers = ReplyBuffers()
    reply = buffers.get(10001, "m")
    cursor = Cursor(reply)
    del reply
    gc.collect()
    assert len(buffers) == 1
    del cursor
    gc.collect()
    assert len(buffers) == 0


# Any order of anything


@dataclass
class Client:
    """One socket and its client.

    Attributes:
        text: The text that the client shows.
        is_quick: It reads everything at once.
        ended: The terminal event that it has seen.
    """

    cursor: Cursor
    attempt: int
    text: str
    is_quick: bool = False
    ended: Terminal | None = None


def _mark(attempt: int) -> str:
    """A character that no piece of another attempt begins with, so that no two attempts have the same text."""
    return chr(0x2460 + attempt)


@dataclass
class Read:
    """A record that a session has read, after a position; None: from the beginning."""

    after: str | None
    record: Record


RARELY = st.sampled_from([False] * 7 + [True])
"""For what ends everything: otherwise most runs would be short."""

PIECES = st.text(max_size=5) | st.integers(0, 3 * MAX_DELTA).map(lambda size: "字" * size)


class ReplyFollowed(RuleBasedStateMachine):
    """One message, a worker here and one on another node, the record in Redis, and sockets that come and go.

    `written` holds the text of each attempt, recorded or not: clients may have seen it. `kept` holds how much of it was
    recorded in the end, `continued` how it continues earlier ones.
    """

    clients: Bundle[Client] = Bundle("clients")
    reads: Bundle[Read] = Bundle("reads")

    def __init__(self) -> None:
        super().__init__()
        self.reply = ReplyBuffer(10001, "m")
        self.everyone: list[Client] = []
        self.written: list[str] = [""]
        self.kept: list[int] = [0]
        self.continued: list[Continued | None] = [None]
        self.recorded = 0
        self.terminal: Terminal | None = None
        self.positions = [(0, 0)]
        """For each position of the record: the attempt, and the length of its recorded text."""
        self.here = 0
        """The attempt of the worker here; 0 without one."""

    @property
    def attempt(self) -> int:
        """The latest attempt."""
        return len(self.written) - 1

    def record(self, after: str = "") -> Record:
        """The record, or its part since a position."""
        if self.positions[-1] != (self.attempt, self.recorded):
            self.positions.append((self.attempt, self.recorded))
        attempt, start = self.positions[int(after)] if after else (0, 0)
        if attempt != self.attempt:
            start = 0
        text = self.written[-1][start : self.recorded]
        continued = self.continued[-1] if start == 0 else None
        return Record(self.attempt, text, self.terminal, start, str(len(self.positions) - 1), continued=continued)

    def number(self, attempt: int) -> int:
        """The number of an attempt for clients."""
        continued = self.continued[attempt]
        return attempt if continued is None else continued.wire

    def text_of(self, number: int) -> str:
        """The longest text that clients have under a number."""
        return next(self.written[one] for one in range(self.attempt, -1, -1) if self.number(one) == number)

    def open(self, *, continues: bool, shown: bool = False) -> None:
        """Begin an attempt in the record. `shown`: the worker before has recorded all of its text, and continues it."""
        continued, recorded = None, self.recorded
        if continues and recorded > 0:
            before, wire = self.continued[-1], self.number(self.attempt)
            valid = {} if before is None else dict(before.valid)
            if not shown or recorded < len(self.written[-1]):
                valid[wire] = recorded
                wire = self.attempt + 1
            continued = Continued(wire, valid, None, self.written[-1][:recorded])
        self.kept[-1] = recorded
        self.kept.append(0)
        self.written.append("" if continued is None else continued.text)
        self.continued.append(continued)
        self.recorded = len(self.written[-1])

    def is_open(self) -> bool:
        return self.terminal is None

    def is_writing_here(self) -> bool:
        return self.here > 0 and self.reply.terminal is None

    def is_run_elsewhere(self) -> bool:
        return self.terminal is None and 0 < self.attempt != self.here

    # Workers

    @precondition(is_open)
    @rule(continues=st.booleans())
    def an_attempt_begins_here(self, *, continues: bool) -> None:
        self.open(continues=continues, shown=self.here == self.attempt)
        self.here = self.attempt
        self.reply.begin(self.attempt, self.continued[-1])

    @precondition(is_open)
    @rule(continues=st.booleans(), same=st.booleans())
    def an_attempt_begins_elsewhere(self, *, continues: bool, same: bool) -> None:
        self.open(continues=continues, shown=same and self.here != self.attempt)

    @precondition(is_writing_here)
    @rule(piece=PIECES)
    def the_worker_here_writes(self, piece: str) -> None:
        """It may have been superseded without knowing it."""
        piece = _mark(self.here) + piece
        self.written[self.here] += piece
        self.reply.append(piece)

    @precondition(is_run_elsewhere)
    @rule(piece=PIECES)
    def the_worker_elsewhere_writes(self, piece: str) -> None:
        self.written[-1] += _mark(self.attempt) + piece

    @precondition(is_open)
    @rule(share=st.floats(0, 1))
    def some_text_is_recorded(self, share: float) -> None:
        self.recorded += int(share * (len(self.written[-1]) - self.recorded))

    @precondition(is_open)
    @rule(cancelled=st.booleans(), really=RARELY)
    def it_ends(self, *, cancelled: bool, really: bool) -> None:
        """Record the end. The worker here sees its own end at once, readers later."""
        if not really:
            return
        if cancelled or self.attempt == 0:
            self.terminal = CANCELLED
            return
        self.recorded, self.terminal = len(self.written[-1]), DONE
        if self.here == self.attempt:
            self.reply.end(DONE)

    @precondition(lambda self: self.here > 0)
    @rule()
    def the_worker_here_leaves(self) -> None:
        """It drains, or has found out that it was superseded."""
        self.here = 0
        if self.reply.terminal is None:
            self.reply.has_writer = False

    # Sessions

    @rule(target=reads)
    def a_session_reads_the_record(self) -> Read:
        return Read(None, self.record())

    @precondition(lambda self: not self.reply.has_writer and self.reply.terminal is None)
    @rule(target=reads)
    def a_session_reads_on(self) -> Read:
        return Read(self.reply.position, self.record(self.reply.position))

    @rule(read=consumes(reads))
    def what_was_read_is_loaded(self, read: Read) -> None:
        """More may have been recorded and loaded meanwhile."""
        if read.after in (None, self.reply.position) and not self.reply.load(read.record):
            assert self.reply.load(self.record())

    @rule(target=clients, data=st.data(), older=st.booleans(), is_quick=st.booleans())
    def a_client_comes(self, data: st.DataObject, *, older: bool, is_quick: bool) -> Client:
        """It may have followed any attempt on another node, and have seen all text written.

        It may know the attempt by its own number or, with its text, by an earlier one. Or it was at a node of an
        `older` release, where it has seen recorded text, and knows the number of the record.
        """
        attempt = data.draw(st.integers(0, self.attempt), label="attempt")
        continued = self.continued[attempt]
        if older:
            known, number = self.recorded if attempt == self.attempt else self.kept[attempt], attempt
        else:
            earlier = sorted(() if continued is None else continued.valid)
            known = len(self.written[attempt])
            number = data.draw(st.sampled_from([self.number(attempt), *earlier]), label="number")
        text = self.written[attempt][: data.draw(st.integers(0, known), label="offset")]
        client = Client(Cursor(self.reply, attempt=number, offset=len(text)), number, text, is_quick)
        self.everyone.append(client)
        return client

    @initialize(target=clients)
    def a_client_asks(self) -> Client:
        client = Client(Cursor(self.reply), 0, "")
        self.everyone.append(client)
        return client

    @rule(client=clients)
    def a_client_is_told_one_thing(self, client: Client) -> None:
        self.tell(client)

    @invariant()
    def quick_clients_are_told_everything(self) -> None:
        for client in self.everyone:
            while client.is_quick and self.tell(client):
                pass

    def tell(self, client: Client) -> bool:
        """Take one step as a socket and its client do; False when the client is up to date."""
        if client.ended is not None or (step := client.cursor.advance()) is None:
            return False
        match step:
            case TextReset(attempt):
                assert attempt >= client.attempt or client.attempt > self.reply.fence  # clients ignore lower numbers
                client.attempt, client.text = attempt, ""
            case TextGrown(attempt, text, offset):
                assert 0 < len(text) <= MAX_DELTA
                assert client.attempt in {0, attempt}
                client.attempt, client.text = attempt, client.text + text
                assert len(client.text) == offset
            case ReplyEnded(attempt, offset, terminal):
                assert client.attempt in {0, attempt}
                assert (offset, terminal) == (len(client.text), self.terminal)
                client.ended = terminal
        # No gap and no repeat, at any time.
        assert self.text_of(client.cursor.attempt).startswith(client.text)
        return True

    def teardown(self) -> None:
        """In the end the reply ends, the worker here learns of it, and all clients see the recorded text."""
        if self.terminal is None:
            self.terminal = CANCELLED
        assert self.reply.load(self.record())
        for client in self.everyone:
            while self.tell(client):
                pass
            assert client.ended == self.terminal
            assert client.text == self.record().text


TestEveryClientHoldsWhatIsRecorded = ReplyFollowed.TestCase
TestEveryClientHoldsWhatIsRecorded.settings = settings(max_examples=examples(300))
