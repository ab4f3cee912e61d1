"""Special tokens in what a person wrote, made harmless.

A chat template marks with special tokens where a message begins and who speaks, such as `<|im_start|>system`. Some
servers read them as such wherever they stand, also in a message: whoever writes them could speak as the system, or end
the conversation. So a space is put after the first character of each: `< |im_start|>`. It stays readable, and is no
special token any more.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_USUAL = {
    "<": (
        r"\|[^\s<>|]{1,64}\|>",  # ChatML, Qwen, Llama 3, GLM, Phi: <|im_start|>, <|eot_id|>, <|endoftext|>, …
        r"｜[^\s<>｜]{1,64}｜>",  # DeepSeek: <｜User｜>, with bars of full width
        r"/?s>|</?SYS>>",  # Llama 2, Mistral
        r"(?:start|end)_of_turn>",  # Gemma
        r"(?:bos|eos|pad|unk|sop|eop)>",
    ),
    "[": (r"/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]", r"gMASK\]"),  # Mistral, GLM
}
"""Those of the usual chat templates: their first character, and patterns of what follows it."""


class Defuser:
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
