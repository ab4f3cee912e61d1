"""Reasoning in tags at the beginning of a text, however the text is cut into pieces."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.reasoning import TAGS, ReasoningFilter, reasoning_of, without_reasoning

TEXTS = {
    "<think>hm\n</think>\n\nThe answer": "The answer",
    "\n <think></think>\n\nThe answer": "The answer",
    "<think>one</think> <think>two</think>The answer": "The answer",
    "</think>\n\nThe answer": "The answer",
    "<think>a < b </thin> c</think>yes": "yes",
    "<think>never closed": "",
    "<think>": "",
    "<think>hm</think>": "",
    "[THINK]hm[/THINK]Bonjour": "Bonjour",
    "◁think▷嗯◁/think▷你好": "你好",
    # Text that stays as it is.
    "The answer <think>is</think> here": "The answer <think>is</think> here",
    "<table>": "<table>",
    "<thi": "<thi",
    "<": "<",
    " \n": " \n",
    "  indented": "  indented",
    " " * 2000 + "<think>x</think>": " " * 2000 + "<think>x</think>",
    "": "",
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.items(), ids=[text.strip()[:24] for text in TEXTS])
def test_reasoning_at_the_beginning_is_removed_and_nothing_else(text: str, shown: str) -> None:
    assert without_reasoning(text) == shown
    assert without_reasoning(shown) == shown


@given(st.sampled_from(list(TEXTS)), st.integers(1, 9))
def test_pieces_do_not_change_the_shown_text(text: str, size: int) -> None:
    reasoning = ReasoningFilter()
    pieces = [reasoning.feed(text[begin : begin + size]) for begin in range(0, len(text), size)]
    assert "".join(pieces) + reasoning.end() == without_reasoning(text)


@pytest.mark.parametrize(("opening", "closing"), TAGS)
def test_every_pair_of_tags_is_known(opening: str, closing: str) -> None:
    assert without_reasoning(f"{opening}hm{closing}yes") == "yes"


def test_text_is_shown_as_soon_as_it_cannot_be_a_tag() -> None:
    reasoning = ReasoningFilter()
    assert [reasoning.feed(piece) for piece in ("<", "th", "e", " answer")] == ["", "", "<the", " answer"]
    assert reasoning.passed


OPENED = {
    "hm\n</think>\n\nThe answer": "The answer",
    "<think>hm</think>The answer": "The answer",
    "hm[/THINK]Bonjour": "Bonjour",
    "a < b </thin> c</think>yes </think>": "yes </think>",
    "no reasoning": "no reasoning",
    "<think>never closed": "",
    "</think>yes": "yes",
    "hm " * 40_000 + "</think>yes": "yes",
    "hm " * 40_000: "",
    "": "",
}


@pytest.mark.parametrize(("text", "shown"), OPENED.items(), ids=[text.strip()[:24] for text in OPENED])
def test_reasoning_without_its_opening_tag_is_removed(text: str, shown: str) -> None:
    for size in (1, 7, 1000) if len(text) < 1000 else (1000,):
        reasoning = ReasoningFilter(opened=True)
        pieces = [reasoning.feed(text[begin : begin + size]) for begin in range(0, len(text), size)]
        assert "".join(pieces) + reasoning.end() == shown


REASONING = {
    "<think>hm\n</think>\n\nThe answer": "hm\n",
    "\n <think></think>\n\nThe answer": "",
    "<think>one</think> <think>two</think>The answer": "onetwo",
    "</think>\n\nThe answer": "",
    "<think>a < b </thin> c</think>yes": "a < b </thin> c",
    "◁think▷嗯◁/think▷你好": "嗯",
    "The answer <think>is</think> here": "",
    "<thi": "",
}


@pytest.mark.parametrize(("text", "reasoning"), REASONING.items(), ids=[text.strip()[:24] for text in REASONING])
def test_reasoning_is_found_whole_and_without_its_tags_however_the_text_is_cut(text: str, reasoning: str) -> None:
    for size in range(1, len(text) + 1):
        assert found(ReasoningFilter(), text, size) == reasoning


OPENED_REASONING = {
    "hm\n</think>\n\nThe answer": "hm\n",
    "<think>hm</think>The answer": "hm",
    "a < b </thin> c</think>yes </think>": "a < b </thin> c",
    "a longer thought, word by word</think>yes": "a longer thought, word by word",
    "hm " * 40_000 + "</think>yes": "hm " * 40_000,
    "</think>yes": "",
}


@pytest.mark.parametrize(
    ("text", "reasoning"), OPENED_REASONING.items(), ids=[text.strip()[:24] for text in OPENED_REASONING]
)
def test_reasoning_without_its_opening_tag_is_found_too(text: str, reasoning: str) -> None:
    for size in (1, 2, 7, 1000) if len(text) < 1000 else (1000,):
        assert found(ReasoningFilter(opened=True), text, size) == reasoning


def test_reasoning_is_found_as_it_comes() -> None:
    reasoning = ReasoningFilter()
    assert [reasoning.feed(piece) or reasoning.reasoning for piece in ("<think>", "let me see </", "think>yes")] == [
        "",
        "let me",
        "yes",
    ]
    assert reasoning.reasoning == " see "
    opened = ReasoningFilter(opened=True)
    opened.feed("a thought that is longer than any tag")
    assert opened.reasoning == "a thought that is"


def found(reasoning: ReasoningFilter, text: str, size: int) -> str:
    """The removed reasoning of a text that comes in pieces of this size."""
    removed = ""
    for begin in range(0, len(text), size):
        reasoning.feed(text[begin : begin + size])
        removed += reasoning.reasoning
    reasoning.end()
    return removed


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        ({"reasoning_content": "hm"}, "hm"),
        ({"reasoning_content": None, "reasoning": "hm", "content": ""}, "hm"),
        ({"reasoning": "hm", "reasoning_content": "hm"}, "hm"),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "h"}, {"type": "reasoning.encrypted"}]}, "h"),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "h"}, "x", None]}, "h"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}, "hm"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]}, "hm"),
        ({"content": "yes"}, ""),
        ({"reasoning": {"effort": "high"}, "reasoning_details": 7, "content": {"text": "yes"}}, ""),
        ({}, ""),
    ],
)
def test_reasoning_in_fields_of_its_own_is_found(message: dict[str, Any], reasoning: str) -> None:
    assert reasoning_of(message) == reasoning
