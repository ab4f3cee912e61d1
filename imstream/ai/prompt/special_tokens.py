"""Special tokens in what a person wrote, made harmless.

A chat template marks with special tokens where a message begins and who speaks, such as `<|im_start|>system`. Some
servers read them as such wherever they stand, also in a message: whoever writes them could speak as the system, or end
the conversation. So a space is put after the first character of each: `< |im_start|>`. It stays readable, and is no
special token any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORDS = r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+"
"""Capitals with underscores. Hardly anything else is written like that within brackets; what is only gets a space."""

_ANGLED = (
    r"/?(?:"
    rf"{_WORDS}"  # Cohere: <BOS_TOKEN>; Nemotron: <SPECIAL_11>, <TOOL_RESPONSE>; Mistral: <SPECIAL_20>
    r"|BOS|EOS|PAD|UNK|CLS|SEP|MASK|EOP|EOT|PRE|SUF|MID|TOOLCALL|AI|用户"  # Cohere, CodeLlama, MiniCPM
    r"|s|bos|eos|pad|unk|cls|sep|mask|sop|eop|eoh|eoa|eom|eod|eot|role"  # Llama 2, Mistral, GLM, InternLM, Ling
    r"|(?:start|end|begin|beginning)_of_\w{1,32}"  # Gemma: <start_of_turn>; MiniMax: <end_of_sentence>
    r"|(?:extra_id|reserved|unused|mask)[_:]?\d{1,6}"  # Nemotron, Baichuan, Gemma, ERNIE
    r"|(?:seed|minimax|longcat)[:_][\w/:]{1,32}"  # Seed-OSS: <seed:bos>; LongCat
    r"|_(?:system|user|bot|start|end)"  # TeleChat
    r"|fim[_-]\w{1,16}"
    r")>"
)
_SQUARE = (
    r"/?(?:"
    rf"{_WORDS}"  # Mistral: [SYSTEM_PROMPT], [TOOL_CONTENT], [IMG_BREAK]; InternLM: [UNUSED_TOKEN_145]
    r"|INST|ARGS|AUDIO|IMG|MIDDLE|PREFIX|REF|SUFFIX|THINK|TRANSCRIBE"  # Mistral
    r"|BOS|EOS|EOT|PAD|UNK|CLS|SEP|BOT|USER|[gs]?MASK"  # EXAONE, Kimi, GLM
    r"|control_\d{1,4}"  # Mistral
    r")\]"
)

_USUAL = {
    "<": (
        r"\|[^\s<>|]{1,64}\|?>",  # ChatML, Qwen, Llama 3 and 4, GLM, Phi, Cohere: <|im_start|>; Gemma 4: <|turn>
        r"[^\s<>|]{1,64}\|>",  # Gemma 4: <turn|>
        r"｜[^\s<>｜]{1,64}｜>",  # DeepSeek, Hunyuan: <｜User｜>, with bars of full width
        r"</?SYS>>",  # Llama 2
        _ANGLED,
    ),
    "[": (
        r"\|[^\s\[\]|]{1,64}\|\]",  # EXAONE, BlueLM: [|system|], [|endofturn|]
        _SQUARE,
        r"e~\[",  # MiniMax M1, M2
    ),
    "]": (
        r"[~!]!?[a-z]{1,2}~?[\[\]]",  # MiniMax M1, M2: ]~b], ]~!b[, ]!p~[
        r"<\][^\[\]<>]{1,32}\[>\[",  # ]<]image[>[
    ),
    ">": (r">[A-Z][A-Z0-9_]{1,32}<<",),  # Falcon: >>QUESTION<<
}
"""Those of the usual chat templates: their first character, and patterns of what follows it.

Whole families by their shape, so that the next model's are among them. A model with others must be given its tokenizer
(`IMSTREAM_TOKENIZER`), whose special tokens are known.
"""


class SpecialTokenEscaper:
    """Makes special tokens harmless: the usual ones, and those of the model."""

    def __init__(self, special: Iterable[str] = ()) -> None:
        follows = {first: list(patterns) for first, patterns in _USUAL.items()}
        for token in special:
            # A single character can not be taken apart, with a space or without.
            if len(token.strip()) > 1 and not token[0].isspace():
                follows.setdefault(token[0], []).append(re.escape(token[1:]))
        self._firsts = tuple(follows)
        # What follows is only looked at: two tokens may share characters, and both are to be taken apart.
        self._token = re.compile("|".join(f"{re.escape(one)}(?={'|'.join(rest)})" for one, rest in follows.items()))

    def defuse(self, text: str) -> str:
        """The text without special tokens. Nothing else of it changes."""
        for first in self._firsts:
            if first in text:
                break
        else:  # nearly every text: nothing in it could begin one
            return text
        while self._token.search(text):  # again, for those of a model that have a space where one was put
            text = self._token.sub(r"\g<0> ", text)
        return text
