"""Server-sent events in any fragmentation, with any line ends and fields."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imstream.ai.sse import EventParser, EventTooLong, NamedEvent


def parse(*chunks: bytes) -> list[bytes]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


# The standard


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(b"data: a\n\n", [b"a"], id="one event"),
        pytest.param(b"data: a\n\ndata: b\n\n", [b"a", b"b"], id="several events"),
        pytest.param(b"data:a\n\n", [b"a"], id="no space"),
        pytest.param(b"data:  a\n\n", [b" a"], id="only one space belongs to the field"),
        pytest.param(b"data: a\ndata: b\n\n", [b"a\nb"], id="several data lines"),
        pytest.param(b"data: a\ndata\ndata:\ndata: b\n\n", [b"a\n\n\nb"], id="empty data lines"),
        pytest.param(b"data\n\ndata:\n\n", [], id="an event without data"),
        pytest.param(b": keep-alive\n\n:\n\ndata: a\n\n", [b"a"], id="comments"),
        pytest.param(b"data: a\n: in between\ndata: b\n\n", [b"a\nb"], id="a comment within an event"),
        pytest.param(b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"], id="other fields"),
        pytest.param(b"datax: a\nxdata: b\n data: c\n\n", [], id="fields that only look alike"),
        pytest.param(b"\n\n\ndata: a\n\n\n\n", [b"a"], id="more blank lines"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", [b"a"], id="a byte order mark"),
        pytest.param(b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"], id="a byte order mark elsewhere"),
        pytest.param(b"data: a\r\n\r\ndata: b\r\rdata: c\n\r\n", [b"a", b"b", b"c"], id="mixed line ends"),
        pytest.param(b"data: a\n", [], id="an event that has not ended"),
        pytest.param(b"", [], id="nothing"),
    ],
)
def test_the_standard_says_which_bytes_make_an_event(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events
    assert parse(*(stream[at : at + 1] for at in range(len(stream)))) == events


def test_an_event_is_given_out_with_the_read_that_completes_it() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\n\r") == [b"a"]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: b\n\ndata: c") == [b"b"]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\n") == [b"c"]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: [DONE]", [b"[DONE]"]),
        (b"data: [DONE]\n", [b"[DONE]"]),
        (b"data: [DONE]\r", [b"[DONE]"]),
        (b"data: [DONE]\r\n", [b"[DONE]"]),
        (b"data: a\ndata: b", [b"a\nb"]),
        (b": comment", []),
        (b"", []),
    ],
)
def test_an_event_without_its_blank_line_is_given_out_at_the_end(stream: bytes, events: list[bytes]) -> None:
    parser = EventParser()
    assert parser.feed(stream) == []
    assert parser.close() == events


# Beyond the standard


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(b'{"a": 1}\n', [b'{"a": 1}'], id="a line of JSON"),
        pytest.param(b'data: a\n\n{"a": 1}\ndata: b\n\n', [b"a", b'{"a": 1}', b"b"], id="between events"),
        pytest.param(b'{\n  "a": 1\n}\n\n', [b'{\n  "a": 1\n}'], id="lines of JSON"),
        pytest.param(b'{\n  "a": 1\n}\ndata: b\n\n', [b'{\n  "a": 1\n}', b"b"], id="lines of JSON before an event"),
        pytest.param(b'data: {"a": 1}\ndata: {"b": 2}\n\n', [b'{"a": 1}', b'{"b": 2}'], id="no blank line"),
        pytest.param(b'data: {"a": 1}\ndata: [DONE]\n\n', [b'{"a": 1}', b"[DONE]"], id="no blank line before [DONE]"),
        pytest.param(b'data: {"a":\ndata: {"b": 2}\ndata: }\n\n', [b'{"a":\n{"b": 2}\n}'], id="JSON in several lines"),
        pytest.param(b"[DONE]\n", [b"[DONE]"], id="[DONE] alone"),
    ],
)
def test_json_is_read_without_the_frame_of_an_event(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events
    assert parse(*(stream[at : at + 1] for at in range(len(stream)))) == events


@pytest.mark.parametrize(
    ("stream", "names"),
    [
        (b"event: ping\ndata: a\n\ndata: b\n\n", [b"ping", b""]),
        (b"data: a\nevent: ping\n\n", [b"ping"]),
        (b"event: message\ndata: a\n\n", [b""]),
        (b"event: ping\n\ndata: a\n\n", [b""]),
        (b"error: a\n\n", [b"error"]),
    ],
)
def test_events_keep_their_name(stream: bytes, names: list[bytes]) -> None:
    events = parse(stream)
    assert [event.name if isinstance(event, NamedEvent) else b"" for event in events] == names


def test_the_first_line_that_is_no_field_is_kept() -> None:
    parser = EventParser()
    parser.feed(b": comment\nid: 1\ndata: a\n\nupstream reset\nsorry\n")
    assert parser.foreign == b"upstream reset"


# Bounds


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(b"data: " + b"x" * 50, id="one line without an end"),
        pytest.param(b"data: x\n", id="data lines without a blank line"),
        pytest.param(b"data:\n", id="empty data lines"),
        pytest.param(b"data: x\n\ndata: " + b"x" * 101, id="an event after a complete one"),
    ],
)
def test_an_event_that_never_ends_is_refused(chunk: bytes) -> None:
    parser = EventParser(limit=100)

    def feed() -> None:
        for _ in range(100):
            parser.feed(chunk)

    with pytest.raises(EventTooLong, match="more than 100 bytes"):
        feed()


def test_the_bound_is_one_events_and_not_the_streams() -> None:
    parser = EventParser(limit=100)
    events = []
    for _ in range(50):
        events += parser.feed(b"data: " + b"x" * 60)
        events += parser.feed(b"\n: keep-alive, which is no part of an event\n\n")
        parser.feed(b": a comment\n" * 20)
    assert events == [b"x" * 60] * 50


# Properties

NAMES = st.sampled_from(["data", "data:", "data: ", "data:  ", ":", "event: ", "id:", "dat", ""])
TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n{}[]"), max_size=12)
"""Without brackets: lines of JSON are read beyond the standard."""
LINES = st.tuples(NAMES, TEXTS).map("".join)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
BLANK_LINES = st.tuples(ENDS, ENDS).filter(lambda ends: ends != ("\r", "\n")).map("".join)
"""The ends of a line and of an empty line. CR LF is excluded: it is one line end."""
STREAMS = st.lists(st.tuples(LINES | st.just(""), ENDS)).map(lambda lines: "".join(map("".join, lines)).encode())


@st.composite
def cut(draw: st.DrawFn, streams: st.SearchStrategy[bytes] = STREAMS) -> list[bytes]:
    stream = draw(streams)
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    return [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]


def as_the_standard_says(stream: bytes) -> list[bytes]:
    """The algorithm of the HTML standard, literally, for the whole text."""
    text = stream.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    events, data = [], ""
    for line in text.split("\n")[:-1]:
        if not line:
            if data:
                events.append(data.removesuffix("\n").encode())
            data = ""
            continue
        name, _, value = line.partition(":")
        if name == "data":
            data += value.removeprefix(" ") + "\n"
    return [event for event in events if event]


@given(cut())
@example([b"data: \xe4", b"\xbd\xa0\r", b"\n", b"\r", b"\ndata", b":b", b"\n\n"])
def test_any_split_of_any_stream_gives_the_events_of_the_standard(chunks: list[bytes]) -> None:
    assert parse(*chunks) == as_the_standard_says(b"".join(chunks))


@given(st.lists(st.tuples(TEXTS.filter(bool), BLANK_LINES), min_size=1))
def test_any_mix_of_line_ends_gives_the_same_events(payloads: list[tuple[str, str]]) -> None:
    stream = "".join(f"data: {text}{ends}" for text, ends in payloads)
    assert parse(stream.encode()) == [text.encode() for text, _ in payloads]


@given(cut(st.binary()))
def test_no_bytes_at_all_make_it_fail(chunks: list[bytes]) -> None:
    parser = EventParser()
    for chunk in chunks:
        parser.feed(chunk)
    parser.close()


def test_comments_are_not_counted_as_buffered_if_each_read_ends_within_one() -> None:
    parser = EventParser()
    parser.feed(b":\n:")
    for _ in range(100):
        assert parser.feed(b"\n:" * 500) == []
        assert parser.buffered <= 1000
