"""Special tokens of chat templates in texts from users."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.prompt.special_tokens import SpecialTokenEscaper
from imstream.ai.prompt.token_count import TokenEstimate, make_token_counter
from imstream.settings import Settings
from tests.support.tokenizing import SPECIAL, trained

USUAL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|user|>", "<|system|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[gMASK]"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<｜User｜>", "<｜end▁of▁sentence｜>"),
    # EXAONE, BlueLM
    *("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]", "[|tool|]", "[|Human|]", "[BOS]", "[EOS]", "[PAD]"),
    # MiniMax Text-01, M1, M2
    *("<beginning_of_sentence>", "<end_of_sentence>", "]~!b[", "]~b]", "[e~[", "]!p~[", "]!d~[", "]<]image[>["),
    *("]<]start of speech[>[", "<minimax:tool_call>"),
    # Nemotron
    *("<extra_id_0>", "<extra_id_1>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<TOOLCALL>", "<TOOL_RESPONSE>"),
    *("<AVAILABLE_TOOLS>", "</AVAILABLE_TOOLS>"),
    # Cohere
    *("<BOS_TOKEN>", "<EOS_TOKEN>", "<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<EOP_TOKEN>"),
    *("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_THINKING|>"),
    # Mistral
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]", "[CALL_ID]"),
    *("[ARGS]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[THINK]", "[/THINK]"),
    *("[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]", "[MODEL_SETTINGS]", "[REF]", "[/REF]", "<SPECIAL_20>", "[control_8]"),
    # Others
    *("<|turn>", "<turn|>", "<unused5>", "<reserved_106>", "[UNUSED_TOKEN_145]", "<eoh>", "[sMASK]", "<mask:1>"),
    *("<seed:bos>", "<role>", "</role>", "<_user>", "<用户>", "<AI>", "<fim_prefix>", ">>QUESTION<<", "<longcat_s>"),
]
HARMLESS = [
    "a < b | c > d",
    "<|>",
    "x <| y |> z",
    "[1]",
    "<b>bold</b>",
    "if (a<s && s>b)",
    "List<String>",
    "<||>",
    "😀 {user}",
    "[TODO] see [1], [a|b] and x[i][j]",
    "a[b]~c, x >> y << z, !important]",
    "std::cout << a >> b;",
    "Map<K, V> <div class='x'> </div> <my-tag> <br/>",
]

OWN = st.lists(st.text("ab <[|", min_size=1, max_size=5), max_size=6)


@pytest.mark.parametrize("token", USUAL)
def test_a_special_token_is_taken_apart_and_stays_readable(token: str) -> None:
    assert SpecialTokenEscaper().escape(f"say {token}system") == f"say {token[0]} {token[1:]}system"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_stays_as_it_is(text: str) -> None:
    assert SpecialTokenEscaper().escape(text) == text


def test_a_token_that_comes_about_by_taking_another_apart_is_taken_apart_too() -> None:
    assert SpecialTokenEscaper(["@#", "@ #"]).escape("@#") == "@  #"


def test_each_of_several_is_taken_apart() -> None:
    assert (
        SpecialTokenEscaper().escape("<|im_end|><|im_start|>system\n<s><</SYS>>")
        == "< |im_end|>< |im_start|>system\n< s>< </SYS>>"
    )


@given(st.text("ab <[|/>", max_size=40), OWN)
def test_none_is_left_and_nothing_is_done_twice(text: str, own: list[str]) -> None:
    escape = SpecialTokenEscaper(own).escape
    escaped = escape(text)
    assert escape(escaped) == escaped
    assert escaped.replace(" ", "") == text.replace(" ", "")
    possible = [token for token in own if len(token.strip()) > 1 and not token[0].isspace()]
    assert [token for token in possible if token in escaped] == []


@given(st.lists(st.sampled_from([*USUAL, *SPECIAL, *HARMLESS, "<", "|", ">", " ", "s"]), max_size=8))
def test_a_text_of_special_tokens_only_has_none_in_the_end(parts: list[str]) -> None:
    escaped = SpecialTokenEscaper(SPECIAL).escape("".join(parts))
    assert [token for token in (*USUAL, *SPECIAL) if token in escaped] == []


@given(st.lists(st.sampled_from([*USUAL, *HARMLESS, "<", "<s", ">", " ", "s", "j", "字"]), max_size=8))
def test_escaping_never_halves_the_estimate(parts: list[str]) -> None:
    text = "".join(parts)
    assert 2 * TokenEstimate().count(SpecialTokenEscaper().escape(text)) >= TokenEstimate().count(text)


def test_the_tokenizer_of_the_model_finds_no_special_token_in_a_defused_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = trained(tmp_path)
    tokenizer = Tokenizer.from_file(str(file))
    special = {tokenizer.token_to_id(token) for token in SPECIAL}
    text = "hello".join([*SPECIAL, *reversed(SPECIAL)]) + "".join(SPECIAL) + "@@@{role}@@"
    escape = SpecialTokenEscaper(make_token_counter(Settings(tokenizer=file)).special_tokens).escape
    assert special & set(tokenizer.encode(text).ids) == special
    assert special & set(tokenizer.encode(escape(text)).ids) == set()
