"""The check of frames on the wire: the messages it reads, and its complaints."""

import struct
from typing import Any

import pytest

from imstream.codes import Code, Event, MsgType
from imstream.user_ids import UserId
from imstream.wire import ReceivedFrame, encode_delta
from ops.chaos_test.history import Complaint
from ops.chaos_test.tap import FrameReader, Tap

HEAD = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


def framed(text: str, first: int = 0x81) -> bytes:
    """A WebSocket frame, as servers send it."""
    payload = text.encode()
    if len(payload) < 126:
        return bytes([first, len(payload)]) + payload
    if len(payload) < 65536:
        return bytes([first, 126]) + struct.pack("!H", len(payload)) + payload
    return bytes([first, 127]) + struct.pack("!Q", len(payload)) + payload


def chat(event: Event | None, **fields: Any) -> str:  # noqa: ANN401 - any field of a frame
    """A CHAT frame about message `m`."""
    return ReceivedFrame(msg_type=MsgType.CHAT, message_id="m", event=event, **fields).encode()


def delta(text: str, offset: int, attempt: int = 1) -> str:
    """A delta of message `m`."""
    return encode_delta("m", attempt=attempt, offset=offset, text=text)


def heard(*frames: str) -> tuple[list[Complaint], list[tuple[UserId, str]]]:
    """The complaints, and the accepted messages."""
    complaints: list[Complaint] = []
    accepted: list[tuple[UserId, str]] = []
    tap = Tap(complaints.append, lambda user_id, message_id: accepted.append((user_id, message_id)))
    welcome = ReceivedFrame(msg_type=MsgType.INIT, user_id=10001).encode()
    tap.feed(HEAD + b"".join(map(framed, (welcome, *frames))))
    return complaints, accepted


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_frames_are_found_however_their_bytes_arrive(size: int) -> None:
    texts = ["你好", "x" * 125, "y" * 126, "z" * 70_000]
    data = HEAD + framed(texts[0]) + framed("ping", 0x89) + b"".join(map(framed, texts[1:])) + framed("", 0x88)
    reader = FrameReader()
    found = [text for start in range(0, len(data), size) for text in reader.feed(data[start : start + size])]
    assert found == texts


def test_the_receipt_of_a_cancel_may_come_after_the_end_and_no_other_end() -> None:
    complaints: list[Complaint] = []
    tap = Tap(complaints.append, lambda *_: None)
    payload, key = b'{"msgType":"CANCEL","messageId":"m"}', b"\x01\x02\x03\x04"
    masked = bytes(one ^ key[place % 4] for place, one in enumerate(payload))
    tap.feed_client(b"GET /ws HTTP/1.1\r\n\r\n" + bytes([0x81, 0x80 | len(payload)]) + key + masked)
    cancelled, done = (framed(chat(event, offset=0)) for event in (Event.CANCELLED, Event.DONE))
    tap.feed(HEAD + cancelled + cancelled)
    assert complaints == []
    tap.feed(done + cancelled)
    assert [(one.what, one.twice) for one in complaints] == [
        ("done after the end", True),
        ("cancelled after the end", True),
    ]


def test_what_is_no_websocket_is_not_listened_to() -> None:
    assert list(FrameReader().feed(b"HTTP/1.1 503 Service Unavailable\r\n\r\nno node")) == []


def test_a_whole_answer_is_nothing_to_complain_of() -> None:
    answer = (chat(Event.ACCEPTED, position=1), delta("the ", 4), delta("answer", 10), chat(Event.DONE, offset=10))
    assert heard(*answer) == ([], [(10001, "m")])


def test_a_resumed_answer_may_begin_anywhere_and_restart() -> None:
    frames = (delta("wer", 10), chat(Event.RESTART, attempt=2), delta("the answer", 10, 2), chat(Event.DONE, offset=10))
    assert heard(*frames) == ([], [])


def test_what_was_asked_again_may_be_answered_again() -> None:
    answer = (chat(Event.ACCEPTED), delta("yes", 3), chat(Event.DONE, offset=3))
    assert heard(*answer, *answer)[0] == []


@pytest.mark.parametrize(
    ("frames", "what", "twice"),
    [
        ((chat(Event.DONE, offset=0), chat(Event.DONE, offset=0)), "done after the end", True),
        ((chat(Event.DONE, offset=0), delta("more", 4)), "delta after the end", False),
        ((delta("the ", 4), delta("answer", 11)), "a delta from 5 on, sent up to 4", False),
        ((delta("the ", 4), delta("the ", 4)), "a delta from 0 on, sent up to 4", False),
        ((delta("the ", 4), delta("the ", 4, 2)), "a delta of attempt 2 after 1, without restart", False),
        ((delta("the ", 4), chat(Event.DONE, offset=10)), "done at 10, sent up to 4", False),
        ((chat(None, code=Code.EXPIRED),), "EXPIRED", False),
    ],
)
def test_what_must_not_be_said_is_complained_of(frames: tuple[str, ...], what: str, twice: bool) -> None:  # noqa: FBT001 - a column of the table
    (complaint,) = heard(*frames)[0]
    assert (complaint.user_id, complaint.message_id, complaint.what, complaint.twice) == (10001, "m", what, twice)


@pytest.mark.parametrize(
    "frame",
    [
        "[]",
        '{"msgType":"SHOUT"}',
        '{"msgType":"SYSTEM","code":"SUNNY"}',
        '{"msgType":"SYSTEM","code":"SYSTEM_ERROR"}',
        '{"msgType":"CHAT","messageId":"m","event":"rated"}',
        '{"msgType":"CHAT","messageId":"m","event":"done","offset":0,"colour":"red"}',
    ],
)
def test_frames_that_nobody_knows_are_complained_of(frame: str) -> None:
    assert len(heard(frame)[0]) == 1


def test_a_fragment_is_complained_of() -> None:
    complaints: list[Complaint] = []
    Tap(complaints.append, lambda *_: None).feed(HEAD + framed("half", 0x01))
    assert len(complaints) == 1
