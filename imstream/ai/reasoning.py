"""Finds reasoning in tags such as `<think>` and `</think>` at the beginning of a text, or in fields of its own."""

from typing import Any

TAGS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, MiniMax and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # Gemma
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Mistral
    ("◁think▷", "◁/think▷"),  # Kimi
)

_FIELDS = ("reasoning_content", "reasoning", "reasoning_details")
_FIRSTS = tuple({tag[0] for pair in TAGS for tag in pair})  # first characters, for a quick look
_MAX_TAG = max(len(tag) for pair in TAGS for tag in pair)
_MAX_HELD = 65_536  # characters of a text without a closing tag that are not taken for reasoning at its end
_MAX_BLANKS = 1024  # characters that are held because a tag may follow them


class ReasoningFilter:
    """Filters one text, which arrives in pieces. Further tags at the beginning of the rest are removed, too.

    With `opened`, the chat template writes the opening tag: the text begins with reasoning, unless it is short and has
    no closing tag at all.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self.passed = False  # whether the beginning is over: from now on, all text passes
        self.reasoning = ""
        """Text removed by the last `feed`, without the tags. With `opened`, also text that `end` may return."""
        self._held = ""  # a possible prefix of a tag, or the end of the reasoning
        self._closing = ""  # the tag that ends the reasoning
        self._removed = False
        self._opened = opened
        self._searched = 0  # characters without a closing tag

    def feed(self, text: str) -> str:
        """Return the part of the next piece that passes."""
        self.reasoning = ""
        self._held += text
        if self._opened and not self._find_end():
            return ""
        while not self.passed:
            if self._closing and not self._skip_reasoning():
                return ""
            start = self._held.lstrip()
            if len(self._held) - len(start) <= _MAX_BLANKS and (not start or start.startswith(_FIRSTS)):
                if self._open(start):
                    continue
                if any(tag.startswith(start) for pair in TAGS for tag in pair):
                    return ""
            self.passed = True
            if self._removed:
                self._held = start
        text, self._held = self._held, ""
        return text

    def end(self) -> str:
        """Return the rest, at the end of the text. Reasoning that is not closed stays removed."""
        if self._closing or (self._opened and self._removed):
            return ""
        if self._opened:
            self._opened = False
            return self.feed("") + self.end()
        text, self._held = self._held, ""
        return text.lstrip() if self._removed else text

    def _find_end(self) -> bool:
        """Without an opening tag: look for any closing tag. The text is kept until one is found."""
        if self._searched == 0 and not self._removed and self._open(self._held.lstrip()):
            self._opened = False
            return True
        begin = self._searched
        ends = [end for _, closing in TAGS if (end := self._held.find(closing, begin)) >= 0]
        self._searched = max(0, len(self._held) - _MAX_TAG)
        self.reasoning = self._held[begin : min(ends, default=self._searched)]
        if ends:
            self._opened = False
            self._held = self._held[min(ends) :]
        elif self._searched > _MAX_HELD:
            self._held, self._searched, self._removed = self._held[self._searched :], 0, True
        return bool(ends)

    def _open(self, start: str) -> bool:
        """Remove a tag from the start, if there is one. A closing tag alone ends reasoning that was empty."""
        for opening, closing in TAGS:
            for tag in (opening, closing):
                if start.startswith(tag):
                    self._removed = True
                    self._held = start[len(tag) :]
                    self._closing = closing if tag is opening else ""
                    return True
        return False

    def _skip_reasoning(self) -> bool:
        """Drop reasoning; return whether its end was found."""
        reasoning, found, rest = self._held.partition(self._closing)
        if not found:  # its end may be the beginning of the tag
            reasoning, rest = reasoning[: 1 - len(self._closing)], reasoning[1 - len(self._closing) :]
        self._held = rest
        self.reasoning += reasoning
        if found:
            self._closing = ""
        return bool(found)


def without_reasoning(text: str) -> str:
    """A whole text without the reasoning at its beginning."""
    if not text.lstrip().startswith(_FIRSTS):
        return text
    reasoning = ReasoningFilter()
    return reasoning.feed(text) + reasoning.end()


def reasoning_of(message: dict[str, Any]) -> str:
    """The reasoning of a message or delta, in a field of its own, or as parts of the content (Mistral)."""
    for name in _FIELDS:  # some servers send the same in two of them
        if (value := message.get(name)) and (text := _text_of(value)):
            return text
    content = message.get("content")
    if not isinstance(content, list):
        return ""
    return "".join(_text_of(part.get("thinking")) for part in content if isinstance(part, dict))


def _text_of(value: object) -> str:
    """A text, or the texts of a list of parts."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else ""
    texts = [part.get("text") or part.get("summary") for part in value if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))
