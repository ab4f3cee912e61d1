"""Events that are read by comparison with an earlier one: the text is always that of a parser."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.chunk_template import MAX_EXAMPLES, ChunkTemplate
from imstream.ai.completion_reader import plain_text
from imstream.ai.sse import EventParser

TEXTS = st.one_of(
    st.text(), st.sampled_from(['"', "\\", '","x":"', '"content":"', '\\"}', "}", "\ud83d", "\u2028", "?"])
)
BLANKS = st.sampled_from(["", " ", "\n", "\t "])


def written(text: str, *, style: int = 0, number: int = 1, before: str = "", blank: str = "") -> bytes:
    """A chunk in one of the styles of servers. `before`: a text in a member before the content."""
    head = f'{{"id":{json.dumps(before)},"number":{number},"choices":[{{"index":0,"delta":{{'
    content = f'"content":{blank}{json.dumps(text, ensure_ascii=style % 2 == 0)}'
    content = [
        content,
        f'"content":"twice",{content}',
        f'{content},"content":"twice"',
        f'"role":"assistant",{content}',
    ][style // 2]
    return f'{head}{content}}},"finish_reason":null}}]}}'.encode("utf-8", "surrogatepass")


def sent(*chunks: bytes, before: bytes = b"data: ", after: bytes = b"\n\n") -> bytes:
    """The events of chunks."""
    return b"".join(before + chunk + after for chunk in chunks)


def parsed(data: bytes) -> list[str | None]:
    """The texts of all events of a read, by a parser."""
    return [_parsed(event) for event in EventParser().feed(data)]


def _parsed(event: bytes) -> str | None:
    try:
        return plain_text(json.loads(event))
    except ValueError:
        return None


def taught(chunk: bytes, data: bytes | None = None) -> ChunkTemplate:
    """A template that has learned from a chunk of a read, if a parser finds text in it."""
    template = ChunkTemplate()
    data = sent(chunk) if data is None else data
    if (chunk,) == tuple(EventParser().feed(data)) and (text := _parsed(chunk)):
        template.learn(data, chunk, text, plain_text)
    return template


def check(template: ChunkTemplate, data: bytes) -> None:
    """Assert that the text that is read is that of the first events."""
    text, size, number = template.read(data)
    read, rest = parsed(data[:size]), parsed(data[size:])
    assert None not in read
    assert len(read) == number
    assert text == "".join(filter(None, read))
    assert read + rest == parsed(data)
    if text := template.read_all(data):
        assert text == "".join(_parsed(event) or "!" for event in EventParser().feed(data))
    events = EventParser().feed(data)
    text, number = template.read_events(events)
    assert text == "".join(_parsed(event) or "" for event in events[:number])


@given(
    example=st.builds(written, TEXTS, style=st.integers(0, 7), before=TEXTS, blank=BLANKS),
    others=st.lists(
        st.builds(written, TEXTS, style=st.integers(0, 7), number=st.integers(0, 2), before=TEXTS, blank=BLANKS)
    ),
    after=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
)
def test_whatever_the_example_no_event_is_read_as_another_text(
    example: bytes, others: list[bytes], after: bytes
) -> None:
    template = taught(example, sent(example, after=after))
    for chunk in [example, *others]:
        check(template, sent(chunk, after=after))
    check(template, sent(example, *others, after=after))


@given(data=st.data(), example=st.text(max_size=4).map(written), texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_no_damage_to_a_read_yields_another_text_than_a_parser_finds(
    data: st.DataObject, example: bytes, texts: list[str]
) -> None:
    whole = sent(*map(written, texts))
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    check(taught(example), whole[:begin] + data.draw(st.binary(max_size=3)) + whole[end:])


@pytest.mark.parametrize("before", [b"data: ", b"data:"])
@pytest.mark.parametrize("after", [b"\n\n", b"\r\n\r\n"])
def test_events_with_other_texts_are_read_and_nothing_from_the_first_other_difference_on(
    before: bytes, after: bytes
) -> None:
    def framed(*chunks: bytes) -> bytes:
        return sent(*chunks, before=before, after=after)

    assert ChunkTemplate().read(framed(written("a"))) == ("", 0, 0)
    template = taught(written("a"), framed(written("a")))
    texts = framed(written('say "hi"\n'), written("你好"))
    assert template.read(texts) == ('say "hi"\n你好', len(texts), 2)
    assert template.read(texts + framed(b"[DONE]") + b"data: {") == ('say "hi"\n你好', len(texts), 2)
    assert template.read(framed(written("a", number=2))) == ("", 0, 0)
    assert template.read(framed(written("a", style=6))) == ("", 0, 0)


def test_a_read_of_plain_texts_is_read_as_a_whole() -> None:
    template = taught(written("a"))
    assert template.read_all(sent(written("one"), written(" 二", style=1), written(" 3"))) == "one 二 3"
    for chunks in ([b"[DONE]"], [written("a", number=2)], [written("a\n")], [written('"')], [written("\ud83d")]):
        assert template.read_all(sent(written("one"), *chunks)) == ""
    assert template.read_all(sent(written("one")) + b"d") == ""
    assert template.read_all(sent(written("one").replace(b"one", b"\xff"))) == ""
    assert template.read_all(sent(written("one").replace(b"one", b"\n"))) == ""
    assert ChunkTemplate().read_all(sent(written("one"))) == ""


def test_texts_do_not_run_together_where_one_is_cut() -> None:
    template = taught(written("a"))
    head, tail = written("?").split(b'"?"')
    assert template.read(sent(head + b'"a' + tail, head + b'b","c"' + tail)) == ("", 0, 0)


def test_a_server_that_varies_its_chunks_is_learned_from_a_few_times_only() -> None:
    calls = list[Any]()

    def text_of(value: Any) -> str | None:  # noqa: ANN401 - JSON
        calls.append(value)
        return plain_text(value)

    template = ChunkTemplate()
    for number in range(10):
        chunk = written("a", number=number)
        template.learn(sent(chunk), chunk, "a", text_of)
    assert len(calls) == MAX_EXAMPLES
    assert template.read(sent(written("b", number=MAX_EXAMPLES - 1)))[0] == "b"
