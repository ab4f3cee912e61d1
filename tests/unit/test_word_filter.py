"""Search and masking of listed words, in whole texts and in streamed answers."""

import random
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imstream.codes import Code
from imstream.guards.guard import GuardRejection, Reject
from imstream.guards.words.normalization import HEAVY, SPACE, normalize
from imstream.guards.words.word_filter import WordFilter, has_word, mask
from imstream.guards.words.word_list import MAX_GAP, WordList
from imstream.texts import Sentence
from tests.support.slow_words import slowly_masked
from tests.support.tiers import examples

WORDS = (
    *("fuck", "ass", "hell", "penis", "two words", "e-mail", "11"),
    *("敏感词", "性感", "K粉", "傻b", "法轮", "日、本", "ガ", "キ", "가", "한국", "ခွင့်"),
)
LIST = WordList(map(normalize, WORDS))

FOUND = {
    # other cases, widths and styles
    "fuck": "＊＊＊＊",
    "oh, Fuck!": "oh, ＊＊＊＊!",
    "ＦＵＣＫ": "＊＊＊＊",
    "fu\u200bck": "＊＊＊＊＊",
    "fu\u00adck": "＊＊＊＊＊",
    "f\u200b\u2800\U000e0041\U000e0fff\u3164uck": "＊＊＊＊＊＊＊＊＊",
    "f\u0e31u\u093fc\u3099k\u0e31": "＊＊＊＊＊＊＊\u0e31",  # marks of other scripts
    "敏\u0e31感\u3099词": "＊＊＊＊＊",
    "f\u00a8u\u02bcck": "＊＊＊＊＊＊",  # signs that Unicode decomposes to a space, or calls letters
    "f\u0336u\u0336c\u0336k": "＊＊＊＊＊＊＊",
    "fùck": "＊＊＊＊",
    "这是敏感词吗": "这是＊＊＊吗",
    "ｶﾞ": "＊＊",
    "\u1001\u103d\u1004\u1037\u103a": "＊＊＊＊＊",  # marks in each of two equivalent orders
    "\u1001\u103d\u1004\u103a\u1037": "＊＊＊＊＊",
    # separators between the letters
    "f.u.c.k": "＊＊＊＊＊＊＊",
    "f**u-ck": "＊＊＊＊＊＊＊",
    "敏-感 词": "＊＊＊＊＊",
    "敏★感😀词": "＊＊＊＊＊",
    "性 感": "＊＊＊",
    "a_ss": "＊＊＊＊",
    "big_ass": "big_＊＊＊",
    "K 粉": "＊＊＊",
    # all letters alone
    "f u c k": "＊＊＊＊＊＊＊",
    "h'e'l'l": "＊＊＊＊＊＊＊",
    "敏，感，词": "＊＊＊＊＊",
    "敏\n感\n词": "＊＊＊＊＊",
    "p\ne\nn\ni\ns": "＊＊＊＊＊＊＊＊＊",
    # a gap in the listed word
    "two words": "＊＊＊＊＊＊＊＊＊",
    "Two\nWords": "＊＊＊＊＊＊＊＊＊",
    "twowords": "＊＊＊＊＊＊＊＊",
    "e-mail, email, e mail": "＊＊＊＊＊＊, ＊＊＊＊＊, ＊＊＊＊＊＊",
    "日，本": "＊＊＊",
    # words next to other scripts
    "你ass他": "你＊＊＊他",
    "大傻B了": "大＊＊了",
    "ass": "＊＊＊",
    "法轮法轮": "＊＊＊＊",
    "(ass)": "(＊＊＊)",
    "sex11 11": "sex11 ＊＊",
}

NOT_FOUND = (
    *("class", "assume", "ass1", "1ass", "bass", "ässe", "a\u200bass", "ass\u200bx", "hello", "fucks"),
    *("pen is", "he'll", "as s", "a ss", "two, worlds", "f u ck", "he ll"),
    *("男性，感觉", "男性。感", "法\n轮", "敏感\n词", "法（轮", "性、感"),
    *("ギ", "ｷﾞ", "각", "가\ud7cb"),
    *("AK粉", "傻bb", "カ", "하국", "한구", "1 1, 1,1", "111"),
    "f" + "." * (MAX_GAP + 1) + "uck",
    "",
    "。" * 20,
)


@pytest.mark.parametrize("text", FOUND)
def test_a_word_is_masked_with_all_that_stands_between_its_letters(text: str) -> None:
    assert mask(text, LIST) == FOUND[text]
    assert has_word(text, LIST)
    assert slowly_masked(text, WORDS) == FOUND[text]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_is_no_whole_word_or_is_parted_stays(text: str) -> None:
    assert mask(text, LIST) == text
    assert not has_word(text, LIST)
    assert slowly_masked(text, WORDS) == text


UNSEEN = st.sampled_from(
    "\u200b\u200d\ufeff\u00ad\u0301\u2800\u3164\U000e0041\u0e31\u0e48\u093f\u0ebc\u1b04\u3099\U0001182c"
)
"""Invisible characters, accents, and marks of scripts that are not Latin."""


def _is_no_letter(char: str) -> bool:
    """Whether a character is neither a letter or digit, nor stands for one, nor separates words."""
    plain = unicodedata.normalize("NFKD", char)
    parts = {unicodedata.category(one)[0] for one in plain} & set("LN")
    return not parts and not {HEAVY, SPACE} & set(normalize(char))


# Built, not filtered: most characters are letters. All unassigned and private ones are ignored.
_SIGNS = st.characters(
    codec="utf-8",
    categories=["M", "P", "S", "C"],
    exclude_characters=[
        char
        for char in map(chr, range(0x20000))
        if unicodedata.category(char) not in {"Cn", "Co", "Cs"} and not _is_no_letter(char)
    ],
)


@settings(max_examples=60)
@given(
    st.lists(st.lists(_SIGNS, max_size=MAX_GAP), min_size=3, max_size=3),
    st.lists(st.text(UNSEEN, max_size=60), min_size=3, max_size=3),
    st.sampled_from([1, -1]),
)
@example([[], [], []], ["\u200b" * 17, "", ""], 1)
@example([["."] * 16, [], []], ["\u200b" * 5000, "\u0e31" * 5000, "\u0301" * 5000], -1)
@example([["."] * 8, ["\ue000"] * 16, ["\u0378"]], ["\u0e31", "", ""], -1)
def test_whatever_is_no_letter_between_the_letters_of_a_word_does_not_hide_it(
    signs: list[list[str]], unseen: list[str], order: int
) -> None:
    gaps = ["".join(["".join(one), other][::order]) for one, other in zip(signs, unseen, strict=True)]
    text = "oh " + "".join(letter + gap for letter, gap in zip("fuck", [*gaps, ""], strict=True))
    assert has_word(text, LIST)
    assert mask(text, LIST) == "oh " + "＊" * (len(text) - 3)
    assert _whole(text, [*range(0, len(text), 7)], LIST) == mask(text, LIST)


def test_no_mark_and_no_character_that_is_not_seen_hides_a_word() -> None:
    missed = [
        f"U+{code:04X}"
        for code in (*range(0x20000), *range(0xE0000, 0xE1000))
        if unicodedata.category(chr(code)) in {"Mn", "Mc", "Me", "Cf", "Cc", "Co"}
        and chr(code) not in "\t\n\r"
        and not has_word(f"f{chr(code) * 20}uck", LIST)
    ]
    assert missed == []
    assert has_word(f"f{chr(0x1E08F) * 20}uck", LIST), "a mark that some supported versions of Python do not know"


def test_marks_of_its_own_script_make_another_word() -> None:
    words = WordList(map(normalize, ["ตด", "कम", "は"]))
    for other in ("ตุด", "किम", "ば"):
        assert not has_word(other, words)
    for same in ("ต\u0301ด", "ตिด", "क\u0e31म", "は\u0e31", "は\U0001133b"):
        assert has_word(same, words)


@given(st.text("\u0e34\u0e38\u0e39\u0e3a\u0e48\u0e49", max_size=5).flatmap(st.permutations))
@example([*"\u0e48\u0e38"])
def test_marks_in_an_equivalent_order_are_the_same_word(marks: list[str]) -> None:
    words = WordList([normalize("น" + "".join(sorted(marks)))])
    for text in ("น" + "".join(marks), "น" + "".join(marks[::-1])):
        same = unicodedata.normalize("NFD", text) == unicodedata.normalize("NFD", "น" + "".join(sorted(marks)))
        assert has_word(text, words) == same
    assert len(words) == 1


def test_a_long_word_with_many_marks_is_loaded_in_its_usual_orders() -> None:
    canonical, typed = "\u1004\u1037\u103a" * 60, "\u1004\u103a\u1037" * 60
    words = WordList([normalize(typed)])
    assert has_word(canonical, words)
    assert has_word(typed, words)


@pytest.mark.parametrize("unseen", ["\u200b", "\u0e31"])
def test_invisible_characters_cost_no_more_than_their_length(unseen: str) -> None:
    """The cost is linear, whole and in pieces: twice the length costs twice as much, not four times."""

    def cost(length: int) -> float:
        gap = unseen * length
        text = f"f{gap}u{gap}c{gap}d "
        return _best(lambda: (mask(text, LIST), _whole(text, [*range(0, len(text), 16)], LIST)), 12)

    assert cost(4000) < 3.2 * cost(2000)


def test_words_that_overlap_are_all_masked() -> None:
    words = WordList(["法轮", "轮功", "a b", "b c"])
    assert mask("法轮功 a b c", words) == "＊＊＊ ＊＊＊＊＊"


# Characters that rules depend on, and parts of words.
_ATOMS = st.sampled_from(
    [*"fuckashelpnitwowrdbK1敏感词性傻法轮日本カ한구국ガ", *"ခွင့်", *"éÉﬁ½㍿", *".-* ,，\n'\t\u200b\u0301\u3099", *WORDS]
)
_ODD_LISTS = st.lists(st.text("ab12中国", min_size=1, max_size=3), min_size=1, max_size=5)
_ODD_TEXTS = st.lists(st.sampled_from([*"ab12中国", *". ,\u200b", "½", "." * 15, "\u200b" * 16]), max_size=12).map(
    "".join
)


def _streamed(text: str, cuts: list[int], words: WordList, refusal: Reject | None = None) -> Iterator[str]:
    """The shown text of an answer that is cut at these places, for each piece and at the end."""
    stream = WordFilter(words, refusal)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    yield from (stream.feed(text[first:last]) for first, last in pairwise(places))
    yield stream.end()


def _whole(text: str, cuts: list[int], words: WordList) -> str:
    return "".join(_streamed(text, cuts, words))


@settings(max_examples=examples(300))
@given(st.lists(_ATOMS, max_size=12).map("".join))
def test_what_is_masked_is_what_the_rules_say(text: str) -> None:
    assert mask(text, LIST) == slowly_masked(text, WORDS)


@settings(max_examples=examples(300))
@given(_ODD_TEXTS, _ODD_LISTS)
def test_what_is_masked_is_what_the_rules_say_for_any_list(text: str, words: list[str]) -> None:
    assert mask(text, WordList(map(normalize, words))) == slowly_masked(text, words)


@settings(max_examples=examples(500))
@given(st.lists(_ATOMS, max_size=40).map("".join), st.lists(st.integers(0, 200)))
@example("a two wor" + "." * 80 + "ds", [*range(200)])
@example("x\u200b\u200bass", [*range(200)])
def test_an_answer_in_pieces_is_masked_as_if_it_came_at_once(text: str, cuts: list[int]) -> None:
    shown, whole = "", mask(text, LIST)
    for piece in _streamed(text, cuts, LIST):
        shown += piece
        assert whole.startswith(shown)  # shown text is never wrong later
    assert shown == whole


@settings(max_examples=examples(500))
@given(_ODD_TEXTS, _ODD_LISTS, st.lists(st.integers(0, 200)))
@example("中国a国", ["中国", "国a中"], [*range(200)])
@example("x½", ["12", "2b"], [*range(200)])
def test_an_answer_in_pieces_is_masked_as_if_it_came_at_once_by_any_list(
    text: str, words: list[str], cuts: list[int]
) -> None:
    some = WordList(map(normalize, words))
    assert _whole(text, cuts, some) == mask(text, some)


@settings(max_examples=examples(300))
@given(st.lists(_ATOMS, max_size=20).map("".join), st.lists(st.integers(0, 200)))
def test_an_answer_with_a_word_is_refused_before_anything_of_it_is_shown(text: str, cuts: list[int]) -> None:
    no = Reject("words_answer", Code.FORBIDDEN, Sentence("不", "No"))
    shown, refused = "", False
    try:
        for piece in _streamed(text, cuts, LIST, no):
            shown += piece
    except GuardRejection:
        refused = True
    assert refused == has_word(text, LIST)
    assert mask(text, LIST).startswith(shown)
    assert refused or shown == text


def test_ordinary_text_is_held_back_only_as_far_as_it_may_become_a_word() -> None:
    stream = WordFilter(LIST, None)
    assert stream.feed("这是一") == "这是一"
    assert stream.feed("个敏") == "个"
    assert stream.feed("锐的") == "敏锐的"
    assert stream.feed(" The ass") == " The "
    assert stream.feed("umption") == "assumption"
    assert stream.feed(" hel") == " "
    assert stream.feed("p ") == "help "
    assert stream.feed("an ass") == "an "
    assert stream.feed(".") == ""  # `ass` counts as a prefix, although no longer word begins with it
    assert stream.feed(" So") == "＊＊＊. So"
    assert stream.end() == ""


def test_no_answer_makes_the_filter_hold_back_without_bound() -> None:
    for begin in ("", "f", "敏", "two wo", "p e n i"):
        for endless in (".", "\u200b", " ", "\n", "f", "f.", "敏", "敏\u200b"):
            stream = WordFilter(LIST, None)
            shown = len(stream.feed(begin)) + sum(len(stream.feed(endless)) for _ in range(500))
            if endless == "\u200b" and begin:  # ignored: the possible word stays open
                assert len(stream.feed("x, " * 100)) > 500 + 300 - shown - 150
                continue
            assert shown > 500 * len(endless) - 150, (begin, endless)


def _hundred_thousand() -> WordList:
    chosen = random.Random(7)  # noqa: S311 - reproducible
    syllables = [one + two for one in "bcdfghklmnprstvw" for two in "aeiou"]
    hanzi = [chr(0x4E00 + number) for number in range(3000)]
    words = {"".join(chosen.choices(syllables, k=chosen.randint(2, 5))) for _ in range(60_000)}
    words |= {"".join(chosen.choices(hanzi, k=chosen.randint(2, 6))) for _ in range(60_000)}
    return WordList(sorted(words)[:100_000])


@pytest.fixture(scope="module")
def many() -> WordList:
    """A list of 100,000 words."""
    return _hundred_thousand()


def _sentences(letters: int) -> tuple[str, str]:
    chosen = random.Random(8)  # noqa: S311 - reproducible
    words = ["the", "message", "was", "banana", "sorry", "fetuvo", "accepted,"]
    english = " ".join(chosen.choice(words) for _ in range(letters))
    chinese = "".join(chr(0x4E00 + chosen.randrange(3000)) for _ in range(letters))
    return english[:letters], chinese


def _best(what: Callable[[], object], times: int = 50) -> float:
    """Minimum CPU time, scaled to a machine that adds 3,000 ones in 0.1 ms, so that slow machines fail no test."""
    best = yardstick = float("inf")
    for _ in range(times):
        best = min(best, _cpu(what))
        yardstick = min(yardstick, _cpu(lambda: sum(1 for _ in range(3_000))))
    return best / yardstick * 0.0001


def _cpu(what: Callable[[], object]) -> float:
    begin = time.thread_time()
    what()
    return time.thread_time() - begin


def test_a_hundred_thousand_words_are_looked_for_in_less_than_a_millisecond(many: WordList) -> None:
    for text in _sentences(2000):
        assert len(mask(text, many)) == 2000
        best = _best(partial(mask, text, many))
        assert best < 3 * 0.001, f"{best * 1e6:.0f} µs"  # measured: 0.2 to 0.5 ms


def test_an_answer_of_32_deltas_costs_a_tenth_of_a_millisecond(many: WordList) -> None:
    for text in _sentences(128):
        cuts = [*range(0, 128, 4)]
        assert _whole(text, cuts, many) == mask(text, many)
        best = _best(partial(_whole, text, cuts, many))
        assert best < 3 * 0.0002, f"{best * 1e6:.0f} µs"  # measured: 0.1 ms, and the overhead of the test
