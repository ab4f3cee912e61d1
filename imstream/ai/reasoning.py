"""Removes reasoning that a model writes at the beginning of its text, between tags such as `<think>` and `</think>`."""

TAGS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, MiniMax and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # Gemma
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Mistral
    ("◁think▷", "◁/think▷"),  # Kimi
)

_FIRSTS = tuple({tag[0] for pair in TAGS for tag in pair})  # first characters, for a quick look
_MAX_BLANKS = 1024  # characters that are held because a tag may follow them


class ReasoningFilter:
    """Filters one text, which arrives in pieces. Further tags at the beginning of the rest are removed, too.

    Attributes:
        passed: The beginning is over: from now on, all text passes.
    """

    def __init__(self) -> None:
        self.passed = False
        self._held = ""  # a possible prefix of a tag, or the end of the reasoning
        self._closing = ""  # the tag that ends the reasoning
        self._removed = False

    def feed(self, text: str) -> str:
        """Return what passes of the next piece."""
        self._held += text
        while not self.passed:
            if self._closing and not self._skip_reasoning():
                return ""
            start = self._held.lstrip()
            if len(self._held) - len(start) <= _MAX_BLANKS:
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
        if self._closing:
            return ""
        text, self._held = self._held, ""
        return text.lstrip() if self._removed else text

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
        _, found, rest = self._held.partition(self._closing)
        self._held = rest if found else self._held[-len(self._closing) + 1 :]
        if found:
            self._closing = ""
        return bool(found)


def without_reasoning(text: str) -> str:
    """A whole text without the reasoning at its beginning."""
    if not text.lstrip().startswith(_FIRSTS):
        return text
    reasoning = ReasoningFilter()
    return reasoning.feed(text) + reasoning.end()
