"""The rest of an answer: the request to each kind of backend, its response, and the continued guards."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imstream.ai.answer_reader import AnswerReader
from imstream.ai.backend import Completion, PromptMessage
from imstream.ai.dialect import Written
from imstream.ai.failures import may_be_about_request
from imstream.errors import BackendError
from imstream.guards.chain import FilterChain
from imstream.guards.guard import GuardRejection
from imstream.guards.words.normalization import normalize
from imstream.guards.words.word_filter import MASK, WordFilter
from imstream.guards.words.word_guard import IN_ANSWER
from imstream.guards.words.word_list import WordList
from imstream.model import usage_sum
from tests.support.asking import Asking, asking
from tests.support.backend_scripts import breaks_off, continues
from tests.support.scripted_backend import DONE, chunk, event, says, usage_chunk

BEGINNING = Written("Once upon ", 3)
TEXTS = ("Once ", "upon ", "a ", "time")


async def the_rest(asked: Asking, written: Written = BEGINNING) -> Completion:
    return await asked.client.answer([PromptMessage("user", "hi")], on_text=asked.pieces.append, written=written)


# Requests


@pytest.mark.parametrize(
    ("option", "last", "more"),
    [
        ("assistant", {}, {}),
        ("vllm", {}, {"continue_final_message": True, "add_generation_prompt": False}),
        ("prefix", {"prefix": True}, {}),
    ],
)
async def test_the_beginning_is_sent_in_the_form_of_the_backend_and_leaves_fewer_tokens(
    option: str, last: dict[str, Any], more: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"ai_continue": option, "ai_max_tokens": "max_tokens", "answer_tokens": 100}
    async with asking(continues(*TEXTS), **settings) as asked:
        await the_rest(asked)
        request = asked.backend.requests[0].json
    assert asked.text == "a time"
    assert request["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Once upon ", **last},
    ]
    assert (request["max_tokens"], request.items() >= more.items()) == (97, True)
    assert ("continue_final_message" in request) == (option == "vllm")


async def test_the_beginning_stays_the_last_message_and_is_not_merged() -> None:
    async with asking(continues(*TEXTS), ai_continue="assistant", ai_roles="merge") as asked:
        turns = [PromptMessage("user", "hi"), PromptMessage("assistant", "hello"), PromptMessage("user", "and?")]
        await asked.client.answer(turns, on_text=asked.pieces.append, written=BEGINNING)
        roles = [message["role"] for message in asked.backend.requests[0].json["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


async def test_the_longest_answer_is_that_of_both_calls_together() -> None:
    async with asking(continues(*TEXTS), ai_continue="assistant", max_answer=12) as asked:
        assert (await the_rest(asked)).finish_reason == "length"
    assert asked.text == "a "


async def test_a_call_that_broke_reports_the_usage_it_knew() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    async with asking(breaks_off(event(chunk("Once", usage=usage)))) as asked:
        with pytest.raises(BackendError) as failed:
            await asked.ask()
    assert failed.value.usage == usage


def test_usages_are_added_by_name() -> None:
    assert usage_sum(None, None) is None
    assert usage_sum(None, {"total_tokens": 3}) == {"total_tokens": 3}
    assert usage_sum({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a": 1, "b": 5, "c": 4}


# Answers


def read(*parts: bytes, beginning: str = BEGINNING.text, **options: Any) -> tuple[str, AnswerReader]:  # noqa: ANN401 - those of the reader
    reader = AnswerReader(limit=1000, beginning=beginning, **options)
    text = "".join([reader.feed(part) for part in parts])
    return text + reader.end(), reader


STOP = event(chunk(finish_reason="stop"))


def test_an_answer_that_lacked_only_its_end_has_no_more_text() -> None:
    text, reader = read(STOP, event(usage_chunk(total_tokens=7)), DONE)
    assert (text, reader.finish_reason, reader.usage) == ("", "stop", {"total_tokens": 7})


@pytest.mark.parametrize("parts", [(), (DONE,), (event(chunk("")),)])
def test_an_answer_that_goes_on_with_nothing_at_all_is_broken(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(BackendError) as failed:
        read(*parts)
    assert failed.value.kind == "broken"


def test_reasoning_in_front_of_the_rest_is_removed() -> None:
    parts = (event(chunk("<think>where was")), event(chunk(" I?</think>\n")), event(chunk("a time")), STOP)
    for reasoning in ("tags", "open_tags"):
        assert read(*parts, reasoning=reasoning)[0] == "a time"
    assert read(event(chunk("a ")), event(chunk("time")), STOP, reasoning="open_tags")[0] == "a time"


def test_a_rest_after_nothing_but_reasoning_may_still_come() -> None:
    reader = AnswerReader(limit=1000, beginning="Once ")
    finished = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": "stop"}]}
    assert reader.feed(event(finished)) == ""
    assert not reader.complete
    assert reader.feed(event(chunk("upon")) + STOP) == "upon"
    assert reader.complete


def document(content: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()


LONG = "Once upon a time there was a miller who had three sons and a cat, "


@pytest.mark.parametrize("repeated", ["", LONG])
def test_a_document_may_repeat_the_beginning(repeated: str) -> None:
    assert read(document(f"{repeated}nothing else"), beginning=LONG)[0] == "nothing else"


def test_a_document_that_begins_as_a_short_beginning_is_neither_cut_nor_shown_twice() -> None:
    assert read(document("0 %"), beginning="1")[0] == "0 %"
    with pytest.raises(BackendError) as failed:
        read(document("1 %"), beginning="1")  # 1 %, or 11 %?
    assert may_be_about_request(failed.value)


def test_a_model_that_only_reasons_up_to_its_limit_has_not_continued() -> None:
    reasons = event({"choices": [{"delta": {"reasoning_content": "where was I?"}}]})
    with pytest.raises(BackendError) as failed:
        read(reasons, event(chunk(finish_reason="length")), DONE)
    assert may_be_about_request(failed.value)
    assert read(reasons, STOP, DONE)[0] == ""


def test_a_whole_message_after_the_deltas_is_not_read_twice() -> None:
    whole = {"choices": [{"delta": {}, "message": {"content": "Once upon a time"}, "finish_reason": "stop"}]}
    assert read(event(chunk("a ")), event(chunk("time")), event(whole))[0] == "a time"


async def test_the_rest_is_read_as_it_comes() -> None:
    async with asking(says(event(chunk("a ")), event(chunk("time")), STOP, DONE), ai_continue="assistant") as asked:
        assert await the_rest(asked) == Completion("stop", None)
    assert asked.pieces == ["a ", "time"]


# Guards

LIST = WordList(map(normalize, ("bad word", "敏感词", "感冒")))


def filtered(*, masks: bool = False) -> tuple[FilterChain, list[str]]:
    shown = list[str]()
    return FilterChain([WordFilter(LIST, None if masks else IN_ANSWER)], shown.append), shown


def test_a_word_is_found_across_the_boundary() -> None:
    chain, shown = filtered()
    assert chain.seed("so 敏感")
    with pytest.raises(GuardRejection):
        chain.feed("词, and more")
    assert shown == []


def test_shown_text_is_not_shown_again() -> None:
    chain, shown = filtered()
    assert chain.seed("so 敏感")  # its end may begin a word, and was shown because it did not
    chain.feed("度")
    chain.feed("很高")
    chain.end()
    assert "".join(shown) == "度很高"


def test_text_that_was_masked_or_may_have_to_be_is_not_continued() -> None:
    for beginning in (f"so {MASK}{MASK}", "so 敏感", "so 敏感词"):
        chain, _ = filtered(masks=True)
        assert not chain.seed(beginning)
    chain, shown = filtered(masks=True)
    assert chain.seed("so ")
    chain.feed("敏感词!")
    chain.end()
    assert "".join(shown) == f"{MASK * 3}!"


def test_text_with_a_word_that_was_listed_meanwhile_is_not_continued() -> None:
    chain, _ = filtered()
    assert not chain.seed("so 敏感词, and more")


@given(st.text("敏感词冒badwor \u200b.", max_size=20), st.integers(0, 20), st.integers(1, 4))
@example("so 敏感度", 4, 1)
def test_a_filter_goes_on_as_if_it_had_not_been_interrupted(text: str, cut: int, size: int) -> None:
    def run(feed: Callable[[str], None], end: Callable[[], None], rest: str) -> bool:
        try:
            for begin in range(0, len(rest), size):
                feed(rest[begin : begin + size])
            end()
        except GuardRejection:
            return False
        return True

    whole, shown = filtered()
    passed = run(whole.feed, whole.end, text)
    # It breaks after some text was received; the text shown until then is recorded.
    first, before = filtered()
    if run(first.feed, lambda: None, text[:cut]):
        beginning = "".join(before)
        second, after = filtered()
        assert second.seed(beginning)
        assert run(second.feed, second.end, text[len(beginning) :]) == passed
        if passed:
            assert beginning + "".join(after) == "".join(shown) == text
