"""What commands print: lines and aligned tables for people, or JSON with `--json`."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import click
from pydantic_core import to_json

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def show(value: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print the value as JSON, with time spans in seconds, or else the lines."""
    click.echo(to_json(value, indent=2, timedelta_mode="float").decode() if as_json else "\n".join(lines))


def table(rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Align the columns of rows, the first of which is the heading. None is shown as a hyphen."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def age(span: timedelta | None) -> str | None:
    """Format a time span for people: tenths of a second below a minute, else whole seconds."""
    if span is None:
        return None
    return (
        f"{span.total_seconds():.1f} s"
        if span < timedelta(minutes=1)
        else str(timedelta(seconds=span // timedelta(seconds=1)))
    )
