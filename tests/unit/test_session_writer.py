"""The session writer: the one sender of a socket. A slow socket costs others nothing (I6)."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.codes import CloseCode, Code
from imstream.gateway.cursor import Cursor
from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.session_writer import MAX_BATCH, MAX_BATCH_SIZE, MAX_OUTBOX, SessionWriter
from imstream.gateway.websocket_protocol import SocketProtocol
from imstream.model import Terminal
from imstream.reply_buffer import MAX_DELTA, ReplyBuffer
from imstream.texts import Text

DONE = Terminal("done", "stop")


class FakeSocket:
    """A socket whose peer the test controls: it takes `room` writes, then none until it reads again."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.writes: list[list[str]] = []
        self.ended: tuple[int, str] | None = None
        self.on_writable: Callable[[], None] | None = None

    @property
    def is_writable(self) -> bool:
        """See `SocketProtocol`."""
        return self.room > 0

    @property
    def frames(self) -> list[dict[str, Any]]:
        """All frames that were sent."""
        return [json.loads(text) for texts in self.writes for text in texts]

    def write(self, texts: Sequence[str]) -> None:
        """See `SocketProtocol`."""
        assert self.is_writable
        assert self.ended is None
        self.room -= 1
        self.writes.append(list(texts))

    def end(self, code: int, last_text: str) -> None:
        """See `SocketProtocol`."""
        self.ended = (code, json.loads(last_text)["contents"])

    def reads(self, writes: int = 1_000_000) -> None:
        """The peer reads: the socket takes more writes."""
        self.room += writes
        if self.on_writable is not None:
            self.on_writable()


def writer_on(socket: FakeSocket) -> SessionWriter:
    frames = FrameBuilder("en", "0")
    frames.user_id = 10001
    return SessionWriter(cast("SocketProtocol", socket), frames, FlushScheduler(clock=lambda: 0.0))


def heartbeat() -> Any:  # noqa: ANN401 - a frame
    return FrameBuilder("en", "0").heartbeat()


def begun(message_id: str = "m") -> ReplyBuffer:
    reply = ReplyBuffer(10001, message_id)
    reply.begin(1)
    return reply


async def a_tick() -> None:
    """Let the writer run."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def text_of(socket: FakeSocket, message_id: str = "m") -> str:
    """The text that the client has assembled."""
    text = ""
    for frame in socket.frames:
        if frame.get("messageId") == message_id:
            if frame["event"] == "restart":
                text = ""
            elif frame["event"] == "delta":
                text += frame["contents"]
                assert frame["offset"] == len(text)
    return text


# Order


async def test_a_frame_goes_out_in_the_next_tick() -> None:
    socket = FakeSocket()
    writer_on(socket).send(heartbeat())
    assert socket.frames == []
    await a_tick()
    assert [frame["msgType"] for frame in socket.frames] == ["HEARTBEAT"]


async def test_each_piece_is_sent_as_it_comes_and_the_end_last() -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    for piece in ("a", "b"):
        reply.append(piece)
        await a_tick()
    reply.end(DONE)
    await a_tick()
    assert [(frame["event"], frame.get("contents")) for frame in socket.frames] == [
        ("delta", "a"),
        ("delta", "b"),
        ("done", None),
    ]
    assert writer.followed == []


async def test_pieces_of_one_tick_are_one_frame() -> None:
    socket, reply = FakeSocket(), begun()
    writer_on(socket).follow(Cursor(reply))
    for piece in "abc":
        reply.append(piece)
    await a_tick()
    assert [frame["contents"] for frame in socket.frames] == ["abc"]


async def test_what_is_said_goes_before_what_is_new_in_replies() -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    reply.append("a")
    writer.send(heartbeat())
    await a_tick()
    assert [frame["msgType"] for frame in socket.frames] == ["HEARTBEAT", "CHAT"]
    assert len(socket.writes) == 1


async def test_a_message_that_is_followed_keeps_its_place_when_it_is_followed_again() -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    reply.append("a")
    await a_tick()
    writer.follow(Cursor(reply))
    reply.append("b")
    await a_tick()
    assert text_of(socket) == "ab"


async def test_a_message_followed_anew_is_told_from_where_the_client_says_it_is() -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    reply.append("abc")
    await a_tick()
    writer.follow(Cursor(reply, attempt=1, offset=1), restart=True)
    await a_tick()
    assert [frame["contents"] for frame in socket.frames] == ["abc", "bc"]


# A slow socket


async def test_a_reply_that_goes_on_after_failed_begins_with_a_restart_and_a_late_notice_repeats_nothing() -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    reply.append("half")
    reply.end(Terminal("failed", reason="http_503"))
    await a_tick()
    writer.follow_new(reply)  # the notice of its beginning was late
    await a_tick()
    assert [frame["event"] for frame in socket.frames] == ["delta", "failed"]
    again = ReplyBuffer(10001, "m")
    again.begin(2)
    writer.follow_new(again)
    again.append("whole")
    again.end(DONE)
    await a_tick()
    writer.follow_new(again)
    await a_tick()
    assert [frame["event"] for frame in socket.frames[2:]] == ["restart", "delta", "done"]
    assert text_of(socket) == "whole"


async def test_a_socket_that_does_not_read_gets_later_all_that_has_gathered_in_one_frame() -> None:
    socket, reply = FakeSocket(room=1), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    reply.append("a")
    await a_tick()
    assert writer.blocked_since is not None
    for piece in "bcdef":
        reply.append(piece)
        await a_tick()
    assert len(socket.frames) == 1
    socket.reads()
    await a_tick()
    assert [frame["contents"] for frame in socket.frames] == ["a", "bcdef"]
    assert writer.blocked_since is None


async def test_the_time_of_blocking_is_that_of_its_beginning() -> None:
    socket = FakeSocket(room=0)
    writer = writer_on(socket)
    writer.send(heartbeat())
    await a_tick()
    since = writer.blocked_since
    await asyncio.sleep(0.01)
    writer.send(heartbeat())
    await a_tick()
    assert writer.blocked_since == since is not None


async def test_one_slow_socket_keeps_nothing_from_another() -> None:
    slow, fast, reply = FakeSocket(room=0), FakeSocket(), begun()
    writers = [writer_on(slow), writer_on(fast)]
    for writer in writers:
        writer.follow(Cursor(reply))
    reply.append("a")
    reply.end(DONE)
    await a_tick()
    assert slow.frames == []
    assert [frame["event"] for frame in fast.frames] == ["delta", "done"]


async def test_what_a_stalled_socket_holds_besides_its_replies_is_bounded() -> None:
    socket = FakeSocket()
    writer = writer_on(socket)
    for n in range(4 * MAX_BATCH):
        reply = begun(f"m{n}")
        writer.follow(Cursor(reply))
        reply.append("x" * MAX_DELTA)
    await a_tick()
    assert all(len(texts) <= MAX_BATCH for texts in socket.writes)
    assert all(sum(map(len, texts[:-1])) < MAX_BATCH_SIZE for texts in socket.writes)
    assert len(socket.frames) == 4 * MAX_BATCH


async def test_who_does_not_read_answers_is_not_read_from() -> None:
    socket = FakeSocket(room=0)
    writer = writer_on(socket)
    for _ in range(MAX_OUTBOX - 1):
        writer.send(heartbeat())
    await asyncio.wait_for(writer.drain(), 1)
    writer.send(heartbeat())
    waiting = asyncio.create_task(writer.drain())
    await a_tick()
    assert not waiting.done()
    socket.reads()
    await asyncio.wait_for(waiting, 1)


# The end


async def test_a_socket_closes_when_all_that_is_known_was_sent() -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    reply.append("a")
    writer.close(CloseCode.DRAINING, FrameBuilder("en", "0").system(Code.SYSTEM_ERROR, Text.DRAINING))
    await a_tick()
    assert text_of(socket) == "a"
    assert socket.ended == (CloseCode.DRAINING, Text.DRAINING.en)


async def test_last_words_wait_for_room_as_all_else_does() -> None:
    socket = FakeSocket(room=0)
    writer = writer_on(socket)
    writer.close(CloseCode.DRAINING, heartbeat())
    await a_tick()
    assert socket.ended is None
    socket.reads()
    await a_tick()
    assert socket.ended is not None


async def test_an_abandoned_socket_is_sent_nothing_and_keeps_nobody_waiting() -> None:
    socket, reply = FakeSocket(room=0), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    for _ in range(MAX_OUTBOX):
        writer.send(heartbeat())
    waiting = asyncio.create_task(writer.drain())
    await a_tick()
    writer.stop()
    await asyncio.wait_for(waiting, 1)
    writer.follow(Cursor(reply))
    writer.follow(Cursor(reply), restart=True)
    reply.append("a")
    socket.reads()
    await a_tick()
    assert socket.frames == []
    assert writer.followed == []


async def test_a_defect_ends_this_socket_with_words_for_the_person(monkeypatch: pytest.MonkeyPatch) -> None:
    socket, reply = FakeSocket(), begun()
    writer = writer_on(socket)

    def broken(*_: object) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr(FrameBuilder, "reply_step", broken)
    writer.follow(Cursor(reply))
    reply.append("a")
    await a_tick()
    assert socket.ended == (CloseCode.INTERNAL_ERROR, Text.INTERNAL.en)


# Any order

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("mn"), st.text("ab你", min_size=1, max_size=4)),
        st.tuples(st.just("restart"), st.sampled_from("mn"), st.just("")),
        st.tuples(st.just("say"), st.just(""), st.just("")),
        st.tuples(st.just("read"), st.just(""), st.just("")),
        st.tuples(st.just("tick"), st.just(""), st.just("")),
    )
)


@given(STEPS)
def test_however_a_client_reads_it_gets_every_word_once(steps: list[tuple[str, str, str]]) -> None:
    async def play() -> None:
        socket = FakeSocket(room=0)
        writer = writer_on(socket)
        replies = {message_id: begun(message_id) for message_id in "mn"}
        for reply in replies.values():
            writer.follow(Cursor(reply))
        said = 0
        for what, message_id, text in steps:
            match what:
                case "write":
                    replies[message_id].append(text)
                case "restart":
                    replies[message_id].begin(replies[message_id].attempt + 1)
                case "say":
                    writer.send(heartbeat())
                    said += 1
                case "read":
                    socket.reads(1)
                case _:
                    await a_tick()
        for reply in replies.values():
            reply.end(DONE)
        socket.reads()
        await a_tick()
        for message_id, reply in replies.items():
            assert text_of(socket, message_id) == reply.text_from(0, limit=None)
            own = [frame["event"] for frame in socket.frames if frame.get("messageId") == message_id]
            assert own.count("done") == 1
            assert own[-1] == "done"
        assert sum(frame["msgType"] == "HEARTBEAT" for frame in socket.frames) == said

    asyncio.run(play())


async def test_a_socket_that_takes_nothing_is_slow_until_it_reads() -> None:
    socket, reply = FakeSocket(room=1), begun()
    writer = writer_on(socket)
    writer.follow(Cursor(reply))
    assert writer.follows("m")
    assert not writer.is_slow
    reply.append("more than its buffer takes")
    await a_tick()
    assert writer.is_slow
    socket.reads()
    await a_tick()
    assert not writer.is_slow
    reply.end(DONE)
    await a_tick()
    assert not writer.follows("m")


class _Recorder(FlushScheduler):
    """Records which flushes are urgent."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0)
        self.urgent: list[bool] = []

    def schedule(self, flush: Callable[[], None], *, urgent: bool = False) -> None:
        """See `FlushScheduler`."""
        self.urgent.append(urgent)
        super().schedule(flush, urgent=urgent)


async def test_the_first_text_of_an_attempt_its_end_and_frames_are_urgent_and_other_text_is_not() -> None:
    scheduler, socket = _Recorder(), FakeSocket()
    frames = FrameBuilder("en", "0")
    frames.user_id = 10001
    writer, reply = SessionWriter(cast("SocketProtocol", socket), frames, scheduler), begun()
    writer.follow(Cursor(reply))
    await a_tick()

    async def urgency_of(*steps: Callable[[], None]) -> list[bool]:
        scheduler.urgent.clear()
        for step in steps:
            step()
        urgent = scheduler.urgent.copy()
        await a_tick()
        return urgent

    assert await urgency_of(lambda: reply.append("first")) == [True]
    assert await urgency_of(lambda: reply.append("second"), lambda: reply.append("third")) == [False]
    assert await urgency_of(lambda: reply.append("fourth"), lambda: writer.send(heartbeat())) == [False, True]
    assert await urgency_of(lambda: writer.send(heartbeat()), lambda: reply.append("fifth")) == [True]
    assert await urgency_of(lambda: reply.begin(2)) == [True]
    assert await urgency_of(lambda: reply.append("again")) == [True]
    assert await urgency_of(lambda: reply.append(" and"), lambda: reply.end(DONE)) == [False, True]
    assert [frame.get("event") for frame in socket.frames][-4:] == ["restart", "delta", "delta", "done"]
    assert "".join(frame["contents"] for frame in socket.frames[-3:-1]) == "again and"


async def test_nothing_is_urgent_for_a_socket_that_takes_nothing() -> None:
    scheduler, socket = _Recorder(), FakeSocket(room=0)
    frames = FrameBuilder("en", "0")
    frames.user_id = 10001
    writer, reply = SessionWriter(cast("SocketProtocol", socket), frames, scheduler), begun()
    writer.follow(Cursor(reply))
    reply.append("first")
    await a_tick()
    scheduler.urgent.clear()
    for piece in ("second", "third", "fourth"):
        reply.append(piece)
        await a_tick()
    reply.end(DONE)
    await a_tick()
    assert not any(scheduler.urgent)
    socket.reads()
    await a_tick()
    assert text_of(socket) == "firstsecondthirdfourth"
    assert [frame["event"] for frame in socket.frames] == ["delta", "done"]
