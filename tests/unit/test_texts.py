"""Texts for people in both languages, and the choice of the language."""

from string import Formatter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imstream.texts import Lang, Text, choose_lang, localize


def braces(sentence: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(sentence) if name is not None}


@pytest.mark.parametrize("text", Text)
def test_both_sentences_say_the_same_things(text: Text) -> None:
    assert text.zh
    assert text.en
    assert braces(text.zh) == braces(text.en)


@pytest.mark.parametrize("text", Text)
def test_the_english_sentence_is_english(text: Text) -> None:
    assert text.en.replace("…", "").isascii()
    assert not text.zh.isascii()


def test_no_two_situations_are_told_alike() -> None:
    assert len({text.zh for text in Text}) == len({text.en for text in Text}) == len(Text)


def test_braces_are_filled_in() -> None:
    assert localize(Text.WELCOME, "zh", user_id=10001) == "用户标识: 10001 登录成功"
    assert localize(Text.WELCOME, "en", user_id=10001) == "User id 10001: logged in"


def test_what_is_filled_in_may_hold_braces() -> None:
    assert localize(Text.BAD_FRAME, "en", problem="{0} {x} {") == "The message is not valid: {0} {x} {"


@pytest.mark.parametrize(
    ("accept_language", "lang"),
    [
        (None, "zh"),
        ("", "zh"),
        ("en", "en"),
        ("EN-gb", "en"),
        ("zh-Hans-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh-CN;q=0.8", "en"),
        ("zh;q=0.5, en;q=0.8", "en"),
        ("fr, de;q=0.9, en;q=0.1", "en"),
        ("fr, de", "en"),
        ("fr, zh;q=0.1", "zh"),
        ("zh;q=0.1, fr", "zh"),
        ("en;q=0", "zh"),
        ("fr;q=0", "zh"),
        ("zh;q=0.5, en;q=much", "zh"),
        ("en ; q=0.9 , zh ; q=0.1", "en"),
        ("en;level=1", "en"),
        ("english", "en"),
        ("zh_TW", "zh"),
        ("de_AT", "en"),
        ("*", "zh"),
        ("fr, *;q=0.1", "en"),
        (";;,=", "zh"),
        ("中文", "zh"),
    ],
)
def test_the_language_is_the_preferred_one_of_those_there_are(accept_language: str | None, lang: str) -> None:
    assert choose_lang(accept_language, "zh") == lang


@pytest.mark.parametrize(
    ("accept_language", "lang"),
    [(None, "en"), ("", "en"), ("*", "en"), ("zh;q=0", "en"), ("zh", "zh"), ("fr, zh", "zh"), ("fr", "en")],
)
def test_a_client_that_asks_for_no_language_gets_the_default(accept_language: str | None, lang: str) -> None:
    assert choose_lang(accept_language, "en") == lang


@given(
    st.text()
    | st.lists(st.sampled_from(["en", "zh", "-", ";", "q", "=", ",", "0.5", "1", " ", "nan", "inf"])).map("".join)
)
@example("en;q=nan,zh;q=nan")
@example("en;q=1e999")
def test_no_header_makes_it_fail(header: str) -> None:
    assert choose_lang(header, "zh") in {"zh", "en"}


@given(st.text().filter(lambda header: "zh" not in header.lower()), st.sampled_from(["zh", "en"]))
def test_a_client_that_does_not_ask_for_chinese_gets_english_or_the_default(header: str, default: Lang) -> None:
    assert choose_lang(header, default) in {"en", default}
