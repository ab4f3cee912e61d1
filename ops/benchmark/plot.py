"""The plot of a run of the benchmark, as SVG: CPU of each load and service, for light or dark pages."""

from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, BAR, GAP = 720, 190, 14, 12

SCHEMES = {
    "light": {"text": "#1f2328", "imstream": "#0969da", "baseline": "#8c959f", "typical": "#bf8700"},
    "dark": {"text": "#e6edf3", "imstream": "#58a6ff", "baseline": "#8b949e", "typical": "#d29922"},
}
"""Colours of text and services. The background is the page's."""


def _style(scheme: str) -> str:
    colours = SCHEMES[scheme]
    services = " ".join(f".{name} {{ fill: {colour} }}" for name, colour in colours.items() if name != "text")
    text = f"text {{ font: 12px system-ui, sans-serif; fill: {colours['text']} }}"
    return f"{text} {services} .redis {{ fill-opacity: 0.45 }}"


def plot(summary: Sequence[dict[str, Any]], scheme: str, note: str = "") -> str:
    """Draw the summary of `ops.benchmark.report`: a group of bars for each load, node and Redis side by side.

    `note` is added to the title.
    """
    lines = [line for line in summary if line["load"] != "single"]
    most = max((_total(line) for line in lines), default=1.0)
    parts, y = list[str](), 44
    for kind in dict.fromkeys((line["load"], line["sockets"]) for line in lines):
        for line in lines:
            if (line["load"], line["sockets"]) == kind:
                parts += _bar(line, y, (WIDTH - LEFT - 110) / most)
                y += BAR + 3
        y += GAP
    title = "CPU seconds for 1,000 chats; the lighter part is Redis" + escape(note)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{title}">'
        f'<style>{_style(scheme)}</style><text x="8" y="22">{title}</text>{"".join(parts)}</svg>\n'
    )


def _total(line: dict[str, Any]) -> float:
    return float(line["cpu_s_per_1000_chats"] + line["redis_cpu_s_per_1000_chats"])


def _bar(line: dict[str, Any], y: int, scale: float) -> Iterator[str]:
    service, own, x = escape(line["service"]), line["cpu_s_per_1000_chats"] * scale, LEFT
    label = f"{line['load']}, {line['sockets']} sockets: {line['service']}"
    yield f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(label)}</text>'
    yield f'<rect class="{service}" x="{x}" y="{y}" width="{own:.1f}" height="{BAR}"/>'
    redis = line["redis_cpu_s_per_1000_chats"] * scale
    yield f'<rect class="{service} redis" x="{x + own:.1f}" y="{y}" width="{redis:.1f}" height="{BAR}"/>'
    ratio = "" if line["times_baseline"] is None else f" (× {line['times_baseline']:.2f})"
    yield f'<text x="{x + own + redis + 6:.1f}" y="{y + 11}">{_total(line):.2f}{ratio}</text>'
