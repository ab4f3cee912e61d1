"""`imstream top`: the load of all nodes, from their metrics and Redis; as text, JSON or a live view."""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count as numbers
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import click

from imstream.cli.admin import redis_command
from imstream.cli.node_metrics import Growth, History, MetricsUnavailable, address_of, scrape
from imstream.cli.options import TimeSpan
from imstream.cli.output import age, echo, json_option, json_text, table
from imstream.cli.terminal_text import printable_line
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.inspection import StreamOverview, Unfinished, inspect_stream
from imstream.store.nodes import NodeOverview, inspect_nodes

if TYPE_CHECKING:
    from rich.console import Group

MAX_OLDEST = 10  # maximum number of requests that are listed, of all nodes

_HISTOGRAMS = {
    "queue_wait": "imstream_queue_wait_seconds",
    "first_text": "imstream_first_delta_seconds",
    "answer": "imstream_answer_seconds",
    "redis": "imstream_redis_roundtrip_seconds",
    "loop_lag": "imstream_loop_lag_seconds",
}
_GAUGES = {"sessions": "sessions", "running": "requests_running"}
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

HINT = "for a live view: pip install '.[terminal]' in a checkout"


@dataclass(slots=True)
class Snapshot:
    """The values of one moment, named as in `--json`."""

    at: datetime
    seconds: float | None  # time over which rates and percentiles are taken; None: since each node began
    nodes: list[dict[str, Any]]
    total: dict[str, Any]
    backends: list[dict[str, Any]]
    oldest: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)  # values that could not be read, with reasons


class Observer:
    """Takes snapshots of all nodes. While Redis is away, it shows the last values from Redis."""

    def __init__(self, redis: RedisClient, settings: Settings, session: aiohttp.ClientSession) -> None:
        self._redis, self._keys, self._session = redis, Keys(settings.key_prefix), session
        self._histories = defaultdict[str, History](History)
        self._known: list[tuple[NodeOverview, StreamOverview]] = []

    async def snapshot(self) -> Snapshot:
        """Look at everything once. Raises `StoreError` if Redis cannot be read for the first time."""
        problems = list[str]()
        try:
            nodes = await inspect_nodes(self._redis, self._keys)
            streams = (inspect_stream(self._redis, self._keys, one.node, newest=0) for one in nodes)
            self._known = list(zip(nodes, await asyncio.gather(*streams), strict=True))
        except StoreError as error:
            if not self._known:
                raise
            problems.append(f"Redis cannot be read, its part is old: {error}")
        is_first = not self._histories
        growths = await asyncio.gather(*(self._growth(one, problems) for one, _ in self._known))
        known = [one for one in growths if one is not None]
        total = sum(known, Growth())
        views = [(*pair, growth) for pair, growth in zip(self._known, growths, strict=True)]
        oldest = [
            _request(one.node, work)
            for one, stream in self._known
            for work in (*stream.oldest, *filter(None, [stream.next]))
        ]
        return Snapshot(
            at=datetime.now(UTC),
            seconds=None if is_first else total.seconds,
            nodes=[_node(*view) for view in views],
            total=_measured(total) if known else {},
            backends=[row for view in views for row in _backends(*view)],
            oldest=sorted(oldest, key=lambda one: one["age"], reverse=True)[:MAX_OLDEST],
            problems=problems,
        )

    async def _growth(self, node: NodeOverview, problems: list[str]) -> Growth | None:
        if node.state == "dead":
            return None
        try:
            return self._histories[node.node].add(await scrape(self._session, address_of(node)))
        except MetricsUnavailable as error:
            problems.append(f"metrics of node {node.node}: {error}")
            return None


def _node(one: NodeOverview, stream: StreamOverview, growth: Growth | None) -> dict[str, Any]:
    known: dict[str, Any] = {"node": one.node, "state": one.condition, "version": one.version}
    known |= {"sessions": one.sessions, "running": one.running}
    known |= {"unfinished": stream.unfinished, "waiting": stream.waiting, "oldest": one.oldest, "dead": stream.dead}
    if growth is not None:
        known |= _measured(growth)
        known |= {name: round(growth.gauge(f"imstream_{series}")) for name, series in _GAUGES.items()}
    return known | {"adopter": one.adopter}


def _request(node: str, work: Unfinished) -> dict[str, Any]:
    why = work.waiting and f"{work.waiting.backend}: {work.waiting.reason}"
    known = {"node": node, "user": work.user, "message_id": work.message_id, "age": work.since}
    return known | {"deliveries": work.deliveries, "waits_for": why}


def _measured(growth: Growth) -> dict[str, Any]:
    accepted = growth.rate("imstream_admissions_total", ("result", "accepted"))
    rates = {
        "accepted": accepted,
        "refused": growth.rate("imstream_admissions_total") - accepted,
        **{name: growth.rate("imstream_messages_total", ("outcome", name)) for name in ("done", "failed", "cancelled")},
        "cpu": growth.rate("process_cpu_seconds_total"),
    }
    return rates | {
        name: {label: growth.quantile(series, quantile) for label, quantile in _QUANTILES.items()}
        for name, series in _HISTOGRAMS.items()
    }


def _backends(one: NodeOverview, stream: StreamOverview, growth: Growth | None) -> Iterator[dict[str, Any]]:
    if one.state == "dead":
        return
    for name, state in stream.backends.items():
        row = {"node": one.node, "backend": name, "state": state.get("state"), "in_flight": state.get("inFlight")}
        row |= {"slots": state.get("slots"), "last_error": state.get("lastError")}
        if growth is not None:
            calls, done = "imstream_ai_calls_total", ("result", "done")
            of_backend = ("backend", name)
            rate = growth.rate(calls, of_backend)
            row |= {"calls": rate, "failed": rate - growth.rate(calls, of_backend, done)}
        yield row


Section = tuple[str, list[Sequence[object]]]  # a title, and the rows of a table; the first is its heading

_LOAD = ["node", "state", "sockets", "work", "wait", "oldest", "dead", "in/s", "refused/s", "done/s", "failed/s", "CPU"]
_BACKEND = ["node", "backend", "state", "calls now", "slots", "calls/s", "failed/s", "last error"]
_REQUEST = ["node", "user", "message", "age", "delivery", "waits for backend"]

_COLORS = {
    **dict.fromkeys(("dead", "not ready", "away"), "red"),
    **dict.fromkeys(("stopping", "paused", "recovering"), "yellow"),
}


def sections(found: Snapshot) -> Iterator[Section]:
    """A snapshot as sections for people."""
    over = "since each node began" if found.seconds is None else f"over {found.seconds:.0f} s"
    nodes = list(found.nodes)
    if len(nodes) > 1:
        names = ("sessions", "running", "waiting", "dead")
        sums = {name: sum(one[name] or 0 for one in nodes) for name in names}
        nodes.append({"node": "all", "state": "", "oldest": None, **sums, **found.total})
    yield f"{found.at:%H:%M:%S} UTC, rates and percentiles {over}", [_LOAD, *map(_load, nodes)]
    times = ("node", "queue", "first text", "answer", "Redis", "event loop")
    yield "50th / 95th / 99th percentile in seconds", [times, *map(_times, nodes)]
    if found.backends:
        yield "backends", [_BACKEND, *map(_backend, found.backends)]
    if found.oldest:
        yield "oldest requests", [_REQUEST, *(tuple((one | {"age": age(one["age"])}).values()) for one in found.oldest)]


def _backend(one: Mapping[str, Any]) -> tuple[object, ...]:
    known = (one[name] for name in ("node", "backend", "state", "in_flight", "slots"))
    return (*known, _rate(one, "calls"), _rate(one, "failed"), one["last_error"])


def _load(one: Mapping[str, Any]) -> tuple[object, ...]:
    counts = (one[name] for name in ("node", "state", "sessions", "running", "waiting"))
    rates = (_rate(one, name) for name in ("accepted", "refused", "done", "failed"))
    return (*counts, age(one["oldest"]), one["dead"], *rates, f"{one['cpu']:.0%}" if "cpu" in one else None)


def _rate(one: Mapping[str, Any], name: str) -> str | None:
    return f"{one[name]:.1f}" if name in one else None


def _times(one: Mapping[str, Any]) -> tuple[object, ...]:
    found = (one.get(name, {}).values() for name in _HISTOGRAMS)
    return (one["node"], *(" / ".join(map(_seconds, values)) if any(values) else None for values in found))


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.1f}"  # noqa: PLR2004 - as many digits as matter


def lines(found: Snapshot) -> Iterator[str]:
    """A snapshot as plain text."""
    for title, rows in sections(found):
        yield from (title, *(f"  {line}" for line in table(rows)))
    yield from (f"warning: {problem}" for problem in found.problems)


def _picture(found: Snapshot) -> "Group":
    from rich.console import Group  # noqa: PLC0415 - optional
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    parts: list[Table | Text] = []
    for title, (heading, *rows) in sections(found):
        picture = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
        for name in heading:
            picture.add_column(str(name), overflow="ellipsis", no_wrap=True)
        for row in rows:
            style = next((_COLORS[cell] for cell in row if isinstance(cell, str) and cell in _COLORS), None)
            picture.add_row(*(Text("-" if cell is None else printable_line(str(cell))) for cell in row), style=style)
        parts += [picture, Text()]
    parts += [Text(printable_line(f"warning: {problem}"), style="red") for problem in found.problems]
    return Group(*parts, Text("Ctrl-C ends", style="dim"))


@click.command()
@redis_command()
@json_option
@click.option("--interval", type=TimeSpan(), help="Time between two snapshots; default 2s.")
@click.option("--count", type=click.IntRange(1), help="Number of snapshots; then they are plain text.")
async def top(
    redis: RedisClient, settings: Settings, *, as_json: bool, interval: timedelta | None, count: int | None
) -> None:
    """Show all nodes now: queues, rates, percentiles, backends.

    Reads Redis, and the metrics of each node where it publishes them. In a terminal it is a live view. Elsewhere it is
    plain text: one snapshot, or with --interval one after the other. With --json, each is a line.

    The first snapshot shows rates and percentiles since the start of each node, later ones those of the last 30 s.
    """
    is_live = sys.stdout.isatty() and count is None and not as_json
    if is_live:
        try:
            import rich.live as _  # noqa: F401, PLC0415 - optional
        except ImportError:
            echo(HINT, err=True)
            is_live, interval = False, interval or timedelta(seconds=2)
    rounds = count or (None if is_live or interval else 1)
    pause = (interval or timedelta(seconds=2)).total_seconds()
    with suppress(asyncio.CancelledError):  # Ctrl-C
        async with aiohttp.ClientSession() as session:
            observer = Observer(redis, settings, session)
            if is_live:
                await _show_live(observer, pause)
            for number in numbers(1):
                found = await observer.snapshot()
                echo(*([json_text(found)] if as_json else lines(found)))
                if number == rounds:
                    return
                await asyncio.sleep(pause)


async def _show_live(observer: Observer, pause: float) -> NoReturn:
    from rich.live import Live  # noqa: PLC0415 - optional

    with Live(_picture(await observer.snapshot()), screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(pause)
            live.update(_picture(await observer.snapshot()), refresh=True)
