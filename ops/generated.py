"""Generated parts of documents, between `<!-- generated: name -->` and `<!-- end -->`."""

from collections.abc import Iterable, Mapping

_END = "<!-- end -->"


def replace(current: str, parts: Mapping[str, str]) -> str:
    """The text of a document with these parts replaced; raises ValueError if one has no place in it."""
    for name, part in parts.items():
        begin = f"<!-- generated: {name} -->\n"
        before, found, rest = current.partition(begin)
        _, end, after = rest.partition(_END)
        if not found or not end:
            raise ValueError(f"the document has no part {name!r}")
        current = f"{before}{begin}\n{part}\n{_END}{after}"
    return current


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = ([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in (head, ["---"] * len(head), *rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
