"""Normalization: which letters are the same, and which characters are separators."""

import sys
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imstream.guards.words.normalization import (
    HEAVY,
    IGNORED,
    LIGHT,
    SEPARATORS,
    SPACE,
    is_dependent,
    is_spaced,
    last_letter,
    normalize,
    source_indexes,
)
from tests.support.tiers import examples

SAME = {
    "FUCK": "fuck",
    "ＦｕＣｋ": "fuck",
    "𝐟𝓾𝕔𝗸": "fuck",
    "ⓕⓤⓒⓚ": "fuck",
    "🅕🅤🅒🅚": "fuck",
    "🅵🆄🅲🅺": "fuck",
    "fùçk": "fuck",
    "Straße": "strasse",
    "ﬁ": "fi",
    "１８禁": "18禁",
    "㊙": "秘",
    "ガ": "カ\u3099",
    "ｶﾞ": "カ\u3099",
    "ДЁШЕВО": "дешево",
    "ΣΑΣ": "σασ",
    "한": "\u1112\u1161\u11ab",
}


@pytest.mark.parametrize("text", SAME)
def test_letters_are_the_same_in_every_case_width_and_style(text: str) -> None:
    assert normalize(text) == SAME[text]


KINDS = {
    IGNORED: "\u200b\u200d\u2060\ufeff\u00ad\u202e\ufe0f\u0301\u0336\u20dd\u064b\u3164\x00\x07"
    "\x0b\x0c\x1c\x1f\x85\ue000\ufffc\ufffd\U000e0041\U00100000",
    LIGHT: ".-_*·•~+=|/\\@#$%^&．＊★☆●→│😀🍆",
    SPACE: " \t\u00a0\u3000\u2003",
    HEAVY: ",，、。｡!！?？:：;；'\"‘’“”()（）[]【】《》「」{}…—\n\r\u2028",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_letter_is_one_of_four_kinds(kind: str) -> None:
    assert [(char, normalize(char)) for char in KINDS[kind] if normalize(char) != kind] == []


def test_vowel_signs_stay_and_accents_go() -> None:
    assert normalize("เด็ก") == "เด็ก"
    assert normalize("z\u0351\u036fa\u0321") == f"z{IGNORED}{IGNORED}a{IGNORED}"


def test_every_character_has_a_form_without_other_white_space() -> None:
    for code in (*range(0x3400), *range(0x3400, 0x20000, 3), *range(0x20000, sys.maxunicode, 101)):
        form = normalize(chr(code))
        assert form
        assert form.encode()  # half a surrogate pair, too
        assert all(part in SEPARATORS or not part.isspace() for part in form), hex(code)


def test_scripts_with_and_without_spaces_are_told_apart() -> None:
    assert all(map(is_spaced, "azé9жλأ"))
    assert not any(map(is_spaced, "中あカ한ไ𠀀" + SEPARATORS))


def test_a_vowel_sign_or_voicing_mark_continues_the_character_before_it() -> None:
    assert all(map(is_dependent, "\u3099\u0e31\u11ab\u1161\ud7b0\ud7cb"))
    assert not any(map(is_dependent, "中カ"))


def _of_block(number: int) -> st.SearchStrategy[str]:
    """Texts of 128 characters next to each other: usually letters and marks of one script."""
    return st.text(st.integers(number * 128, number * 128 + 127).map(chr), min_size=1, max_size=6)


_SCRIPTS = st.lists(st.one_of(st.integers(0, 0x1E7FF // 128).flatmap(_of_block), st.text(max_size=3)), max_size=4)
"""Parts of texts that mix scripts."""


@settings(max_examples=examples(1000))
@given(st.one_of(st.text(), _SCRIPTS.map("".join)))
@example("\u0904\u093a")
@example("a\u093a\u0904.\u093aa\u093a")
@example("か\u3099あ\u0e31ー\u3099")
def test_each_character_of_the_form_has_its_origin(text: str) -> None:
    form = normalize(text)
    origin = source_indexes(text, form)
    assert len(origin) == len(form)
    letter = ""
    for index, char in enumerate(text):
        part = normalize(char, after=letter)  # whether a mark is ignored depends on the letter before it
        assert "".join(part for part, at in zip(form, origin, strict=True) if at == index) == part
        letter = last_letter(part) or letter


def test_composed_or_not_a_text_has_the_same_letters() -> None:
    for text in ("Ångström", "ガギグ", "한국어", "Việt Nam"):
        composed, decomposed = (
            "".join(normalize(unicodedata.normalize(form, text)).split()) for form in ("NFC", "NFD")
        )
        assert composed == decomposed


def test_whoever_sends_all_characters_there_are_does_not_make_ordinary_ones_slow() -> None:
    at_first = _cost("".join(map(chr, range(0x4E00, 0x4F00))))
    normalize("".join(map(chr, range(0x20000, 0x20000 + 100_001))))
    assert _cost("".join(map(chr, range(0x9A00, 0x9B00)))) < 5 * at_first


def _cost(text: str) -> float:
    """The CPU time of the fastest of some rounds: others may find the caches of the CPU empty."""

    def measured() -> float:
        begin = time.thread_time()
        for _ in range(5):
            normalize(text)
        return time.thread_time() - begin

    normalize(text)
    return min(measured() for _ in range(10))
