"""Markdown for the terminal chat, with the optional package `rich`."""

import re

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax

from imstream.cli.terminal_text import without_directions

_FENCE = re.compile(r" *(`{3,}|~{3,})")


class _PlainHeading(Heading):
    """A heading at the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _PlainCode(CodeBlock):
    """Code without empty lines around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 1))


class _Markdown(Markdown):
    """Shows HTML as it is written, and the target of links, which an answer could otherwise disguise."""

    elements = Markdown.elements | {"heading_open": _PlainHeading, "fence": _PlainCode, "code_block": _PlainCode}

    def __init__(self, markup: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = parser.parse(markup)


class MarkdownRenderer:
    """Renders the blocks of one answer after the other."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._follows = False

    def begin(self, *, follows: bool = False) -> None:
        """Begin an answer, or the next block of one, which an empty line separates from the block before."""
        self._follows = follows

    def lines(self, markup: str) -> list[str]:
        """The lines of a block on this terminal, with escape sequences."""
        with self._console.capture() as captured:
            self._console.print(_Markdown(markup))
        text = without_directions(captured.get())  # entities may stand for them
        lines = [line.rstrip() for line in text.strip("\n").split("\n")]
        return [""] * self._follows + lines

    @staticmethod
    def split(markup: str) -> tuple[str, str]:
        """Split an incomplete text into blocks that later text cannot change, and the rest.

        A block is complete before an unindented line that follows an empty one, outside of fenced code.
        """
        fence, cut, offset, is_after_blank = "", 0, 0, False
        for line in markup.splitlines(keepends=True):
            content = line.strip()
            if not fence:
                if is_after_blank and content and not line[0].isspace():
                    cut = offset
                found = _FENCE.match(line)
                fence = found[1] if found else ""
            elif content.startswith(fence) and not content.strip(fence[0]):
                fence = ""
            is_after_blank = not content and not fence
            offset += len(line)
        return markup[:cut], markup[cut:]
