"""Token counts with a tokenizer.json, and estimates without one."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.prompt.token_count import TokenCounter, TokenEstimate, make_token_counter
from imstream.ai.router import Backends
from imstream.errors import SettingsError
from imstream.node import Node
from imstream.settings import Settings
from tests.support.tokenizing import SPECIAL, trained

TEXTS = st.text(st.characters(exclude_categories=()))

# Maximum number of tokens in five real vocabularies of 100,000 tokens and more; measured once.
REAL = {
    "What's the difference between a list and a tuple in Python? I keep forgetting!!": 18,
    "帮我写一封请假邮件,明天要带孩子去医院。谢谢!": 21,
    "这个报错怎么解决啊:ModuleNotFoundError,我已经pip install过了😭": 19,
    "def count(self, text: str) -> int:\n    return len(self._tokenizer.encode(text).ids)\n": 28,
    "안녕하세요, 파이썬에서 리스트와 튜플의 차이를 쉽게 설명해 주세요.": 29,
    '{"user": 10001, "at": 1764000000000, "trace": "9f86d081884c7d65"}': 49,
    "Können Sie mir erklären, warum der Zug heute Morgen Verspätung hatte?": 21,
    "3.14159265358979323846264338327950288": 37,
}


@pytest.mark.parametrize("text", REAL)
def test_the_estimate_is_no_lower_than_what_real_models_make_of_a_text_and_not_far_above(text: str) -> None:
    assert 0.9 * REAL[text] <= TokenEstimate().count(text) <= 1.5 * REAL[text]


@given(TEXTS, TEXTS)
def test_the_estimate_grows_with_the_text_and_is_never_above_four_for_a_character(one: str, other: str) -> None:
    estimate = TokenEstimate()
    assert estimate.count(one) <= estimate.count(one + other) <= estimate.count(one) + 4 * len(other) + 1
    assert (estimate.count(one) == 0) == (one == "")


def test_a_tokenizer_counts_what_it_makes_of_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = trained(tmp_path)
    counter = make_token_counter(Settings(tokenizer=file))
    tokenizer = Tokenizer.from_file(str(file))
    for text in ("hello world, how are you?", "你好,世界", "x" * 20_000, ""):
        assert counter.count(text) == len(tokenizer.encode(text, add_special_tokens=False))
    assert counter.special_tokens == frozenset(SPECIAL)


def test_a_tokenizer_that_would_cut_or_fill_up_texts_counts_all_of_them_and_nothing_else(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = trained(tmp_path)
    plain = make_token_counter(Settings(tokenizer=file))
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=50)
    other = tmp_path / "for_training.json"
    tokenizer.save(str(other))
    counter = make_token_counter(Settings(tokenizer=other))
    for text in ("hi", "hello world " * 20):
        assert counter.count(text) == plain.count(text)


async def test_a_tokenizer_is_read_once_for_all_who_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[TokenCounter]()

    def make(settings: Settings) -> TokenCounter:
        made.append(make_token_counter(settings))
        return made[-1]

    monkeypatch.setattr("imstream.ai.prompt.assembler.make_token_counter", make)
    settings = Settings(tokenizer=trained(tmp_path), history="summarise")
    Node(settings, Backends(settings))
    assert len(made) == 1


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"model": {"type": "Unknown"}}', "\ud800"])
def test_a_file_that_is_no_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SettingsError, match=r"IMSTREAM_TOKENIZER=.* is not allowed: must be a tokenizer\.json"):
        make_token_counter(Settings(tokenizer=file))


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"IMSTREAM_TOKENIZER=.*No such file"):
        make_token_counter(Settings(tokenizer=tmp_path / "nothing.json"))


def test_without_the_package_a_tokenizer_is_refused_and_the_way_to_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = trained(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SettingsError, match=r"IMSTREAM_TOKENIZER=.*pip install 'imstream-server\[tokenizer\]'"):
        make_token_counter(Settings(tokenizer=file))
