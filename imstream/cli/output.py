"""Output of commands: lines and aligned tables for people, or JSON with `--json`.

User ids, message ids, reasons, errors and names in Redis are untrusted: commands that show them print all their output
here, without control characters.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import click
from pydantic_core import to_json

from imstream.cli.terminal_text import printable_json, printable_line

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def echo(*lines: str, err: bool = False) -> None:
    """Print lines."""
    click.echo("\n".join(map(printable_line, lines)), err=err)


def json_text(value: object, *, indent: int | None = None) -> str:
    """The value as JSON, with time spans in seconds."""
    return printable_json(to_json(value, indent=indent, timedelta_mode="float").decode())


def show(value: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print the value as JSON, or else the lines."""
    if as_json:
        click.echo(json_text(value, indent=2))
    else:
        echo(*lines)


def table(rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Align the columns of rows, the first of which is the heading. None is shown as a hyphen."""
    texts = [["-" if cell is None else printable_line(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def age(span: timedelta | None) -> str | None:
    """Format a time span for people: tenths of a second below a minute, else whole seconds."""
    if span is None:
        return None
    seconds = span.total_seconds()
    return f"{seconds:.1f} s" if span < timedelta(minutes=1) else str(timedelta(seconds=int(seconds)))
