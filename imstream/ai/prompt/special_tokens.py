"""Escapes special tokens in texts from users.

Chat templates mark the start of a message and its role with special tokens such as `<|im_start|>system`. Some servers
parse them inside messages, too: a user could then speak as the system, or end the conversation. A space after the first
character escapes each of them: `< |im_start|>`. The text stays readable.
"""

import re
from collections.abc import Iterable

# Capitals with underscores, which are rarely anything else in brackets. Quantifiers are possessive: no backtracking.
_WORDS = r"[A-Z][A-Z0-9]*+(?:_[A-Z0-9]++)++"
_ANGLED = (
    r"/?(?:"
    rf"{_WORDS}"  # Cohere: <BOS_TOKEN>; Nemotron: <SPECIAL_11>, <TOOL_RESPONSE>; Mistral: <SPECIAL_20>
    r"|BOS|EOS|PAD|UNK|CLS|SEP|MASK|EOP|EOT|PRE|SUF|MID|TOOLCALL|AI|用户"  # Cohere, CodeLlama, MiniCPM
    r"|s|bos|eos|pad|unk|cls|sep|mask|sop|eop|eoh|eoa|eom|eod|eot|role"  # Llama 2, Mistral, GLM, InternLM, Ling
    r"|(?:start|end|begin|beginning)_of_\w{1,32}+"  # Gemma: <start_of_turn>; MiniMax: <end_of_sentence>
    r"|(?:extra_id|reserved|unused|mask)[_:]?\d{1,6}+"  # Nemotron, Baichuan, Gemma, ERNIE
    r"|(?:seed|minimax|longcat)[:_][\w/:]{1,32}+"  # Seed-OSS: <seed:bos>; LongCat
    r"|_(?:system|user|bot|start|end)"  # TeleChat
    r"|fim[_-]\w{1,16}+"
    r")>"
)
_SQUARE = (
    r"/?(?:"
    rf"{_WORDS}"  # Mistral: [SYSTEM_PROMPT], [TOOL_CONTENT], [IMG_BREAK]; InternLM: [UNUSED_TOKEN_145]
    r"|INST|ARGS|AUDIO|IMG|MIDDLE|PREFIX|REF|SUFFIX|THINK|TRANSCRIBE"  # Mistral
    r"|BOS|EOS|EOT|PAD|UNK|CLS|SEP|BOT|USER|[gs]?MASK"  # EXAONE, Kimi, GLM
    r"|control_\d{1,4}+"  # Mistral
    r")\]"
)

_COMMON = {
    "<": (
        r"\|[^\s<>|]{1,64}+\|?>",  # ChatML, Qwen, Llama 3 and 4, GLM, Phi, Cohere: <|im_start|>; Gemma 4: <|turn>
        r"[^\s<>|]{1,64}+\|>",  # Gemma 4: <turn|>
        r"｜[^\s<>｜]{1,64}+｜>",  # DeepSeek, Hunyuan: <｜User｜>, with bars of full width
        r"</?SYS>>",  # Llama 2
        _ANGLED,
    ),
    "[": (
        r"\|[^\s\[\]|]{1,64}+\|\]",  # EXAONE, BlueLM: [|system|], [|endofturn|]
        _SQUARE,
        r"e~\[",  # MiniMax M1, M2
    ),
    "]": (
        r"[~!]!?[a-z]{1,2}~?[\[\]]",  # MiniMax M1, M2: ]~b], ]~!b[, ]!p~[
        r"<\][^\[\]<>]{1,32}+\[>\[",  # ]<]image[>[
    ),
    ">": (r">[A-Z][A-Z0-9_]{1,32}+<<",),  # Falcon: >>QUESTION<<
}
"""Special tokens of common chat templates, by first character: patterns of the rest. They match families of
tokens, and so are likely to cover future models. Those of a configured tokenizer are escaped, too."""


class SpecialTokenEscaper:
    """Escapes the special tokens of common chat templates and those of the model."""

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        patterns = {first: list(rest) for first, rest in _COMMON.items()}
        for token in special_tokens:
            # A space cannot split a single character.
            if len(token.strip()) > 1 and not token[0].isspace():
                patterns.setdefault(token[0], []).append(re.escape(token[1:]))
        self._firsts = tuple(patterns)
        # Lookahead, because two tokens may overlap and both must be escaped.
        self._token = re.compile(
            "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in patterns.items())
        )

    def may_match(self, text: str) -> bool:
        """Whether a text contains the first character of a special token. Nearly no text does."""
        for first in self._firsts:  # noqa: SIM110 - a generator would double the cost
            if first in text:
                return True
        return False

    def escape(self, text: str) -> str:
        """Insert a space into each special token."""
        if not self.may_match(text):
            return text
        while self._token.search(text):  # repeated, because a model may have a token that contains such a space
            text = self._token.sub(r"\g<0> ", text)
        return text
