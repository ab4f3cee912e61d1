"""Chunks that are read by comparison with an earlier one: the text is always what a parser finds."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.answer_reader import _plain_text
from imstream.ai.chunk_template import MAX_EXAMPLES, ChunkTemplate

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


def parsed(chunk: bytes) -> str | None:
    """The text of a chunk by a parser."""
    try:
        return _plain_text(json.loads(chunk))
    except ValueError:
        return None


def taught(example: bytes) -> ChunkTemplate:
    """A template that has learned from an example, if a parser finds text in it."""
    template = ChunkTemplate()
    if text := parsed(example):
        template.learn(example, text, _plain_text)
    return template


@given(
    example=st.builds(written, TEXTS, style=st.integers(0, 7), before=TEXTS, blank=BLANKS),
    others=st.lists(
        st.builds(written, TEXTS, style=st.integers(0, 7), number=st.integers(0, 2), before=TEXTS, blank=BLANKS)
    ),
)
def test_whatever_the_example_no_chunk_is_read_as_another_text(example: bytes, others: list[bytes]) -> None:
    template = taught(example)
    for chunk in [example, *others]:
        assert template.read(chunk) in {None, parsed(chunk)}


@given(data=st.data(), example=st.text(max_size=4).map(written), text=TEXTS)
def test_no_damage_to_a_chunk_yields_another_text_than_a_parser_finds(
    data: st.DataObject, example: bytes, text: str
) -> None:
    template = taught(example)
    chunk = written(text)
    begin = data.draw(st.integers(0, len(chunk)))
    end = data.draw(st.integers(begin, len(chunk)))
    damaged = chunk[:begin] + data.draw(st.binary(max_size=3)) + chunk[end:]
    assert template.read(damaged) in {None, parsed(damaged)}


def test_a_chunk_with_another_text_is_read_and_any_other_difference_is_not() -> None:
    assert ChunkTemplate().read(written("a")) is None
    template = taught(written("a"))
    assert template.read(written('say "hi"\n你好')) == 'say "hi"\n你好'
    assert template.read(written("a", number=2)) is None
    assert template.read(written("a", style=6)) is None


def test_a_server_that_varies_its_chunks_is_learned_from_a_few_times_only() -> None:
    calls = list[Any]()

    def text_of(value: Any) -> str | None:  # noqa: ANN401 - JSON
        calls.append(value)
        return _plain_text(value)

    template = ChunkTemplate()
    for number in range(10):
        template.learn(written("a", number=number), "a", text_of)
    assert len(calls) == MAX_EXAMPLES
    assert template.read(written("b", number=MAX_EXAMPLES - 1)) == "b"
