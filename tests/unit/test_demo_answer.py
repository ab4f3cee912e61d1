"""The canned answer, as a pure function."""

from hypothesis import given
from hypothesis import strategies as st

from imstream.demo.answer import canned_answer, pieces

# No single surrogates: JSON requests with them are rejected.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_pieces_of_any_text_join_to_that_text(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_english_is_cut_into_words_and_chinese_into_pairs() -> None:
    assert pieces("Hi there, 你好吗 x\n\nbye") == ["Hi", " there,", " ", "你好", "吗", " x", "\n\n", "bye"]


def test_the_answer_says_that_it_is_a_demo_and_quotes_the_question() -> None:
    answer = "".join(canned_answer("What is a Redis Stream?"))
    assert "demo" in answer
    assert "not a model" in answer
    assert "> What is a Redis Stream?" in answer


def test_a_chinese_question_is_answered_in_chinese() -> None:
    answer = "".join(canned_answer("什么是 Redis Stream?"))
    assert "演示" in answer
    assert "> 什么是 Redis Stream?" in answer


def test_the_same_question_has_the_same_answer() -> None:
    assert canned_answer("why?") == canned_answer("why?")
    assert canned_answer("why?") != canned_answer("how?")


def test_a_long_question_is_quoted_in_part_and_on_one_line() -> None:
    answer = "".join(canned_answer("a\nb " * 500))
    assert "> a b a b" in answer
    assert len(answer) < 1500


@given(st.integers(1, 2000), st.sampled_from(["why?", "为什么?"]))
def test_a_length_is_kept_to_the_delta(length: int, question: str) -> None:
    deltas = canned_answer(question, length)
    assert len(deltas) == length
    assert all(deltas)


def test_the_marker_in_a_question_wins_over_the_length_and_is_not_quoted() -> None:
    marked = canned_answer("why? [[demo length=7 fail=1]]", 20)
    assert marked == canned_answer("why?", 7)
    assert canned_answer("why? [[demo length=0]]", 20) == canned_answer("why?")
