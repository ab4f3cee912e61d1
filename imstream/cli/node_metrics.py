"""The metrics of nodes for `imstream top`: where they are, and rates and percentiles over a time."""

import time
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from imstream.errors import ImstreamError
from imstream.store.nodes import NodeOverview
from imstream.urls import host_from_here

WINDOW = 30.0  # seconds over which rates and percentiles are taken

_TIMEOUT = aiohttp.ClientTimeout(total=2)

Labels = frozenset[tuple[str, str]]
Series = dict[tuple[str, Labels], float]


class MetricsUnavailable(ImstreamError):  # noqa: N818 - reads as the state that it names
    """The metrics of a node cannot be read from here; the text is the reason."""


def address_of(node: NodeOverview) -> str:
    """The URL at which the metrics of a node are reached from here. Raises `MetricsUnavailable`."""
    if node.metrics is None:
        raise MetricsUnavailable("its release does not publish where they are")
    try:
        parts = urlsplit(node.metrics)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MetricsUnavailable(f"{node.metrics}: {error}") from None
    if not host:
        raise MetricsUnavailable("it serves none: see IMSTREAM_METRICS")
    if (host := host_from_here(host, node.host or "")) is None:
        raise MetricsUnavailable(f"they are for {node.host} only: look there, or set IMSTREAM_METRICS")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"


async def scrape(session: aiohttp.ClientSession, url: str) -> Series:
    """All series of a node. Raises `MetricsUnavailable`."""
    try:
        async with session.get(url, timeout=_TIMEOUT) as response:
            if response.status != 200:  # noqa: PLR2004 - HTTP
                raise MetricsUnavailable(f"{url} answers {response.status}")
            families = text_string_to_metric_families(await response.text())
            samples = (sample for family in families for sample in family.samples)
            return {(one.name, frozenset(one.labels.items())): one.value for one in samples}
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise MetricsUnavailable(f"{url}: {error or type(error).__name__}") from None


@dataclass(slots=True)
class Growth:
    """How much the series of a node, or of several together, have grown in so many seconds; `now`: their values."""

    seconds: float = 0.0
    series: Series = field(default_factory=dict)
    now: Series = field(default_factory=dict)

    def __add__(self, other: "Growth") -> "Growth":
        total = dict(self.series)
        for key, value in other.series.items():
            total[key] = total.get(key, 0.0) + value
        return Growth(max(self.seconds, other.seconds), total)

    def rate(self, name: str, *labels: tuple[str, str]) -> float:
        """The growth of a counter in a second, over all series with these labels."""
        wanted = frozenset(labels)
        total = sum(value for (one, known), value in self.series.items() if one == name and wanted <= known)
        return total / self.seconds if self.seconds > 0 else 0.0

    def gauge(self, name: str) -> float:
        """The value of a gauge, over all its labels."""
        return sum(value for (one, _), value in self.now.items() if one == name)

    def quantile(self, name: str, quantile: float) -> float | None:
        """A quantile of a histogram, interpolated as Prometheus does; None without a value."""
        found = ((dict(labels)["le"], value) for (one, labels), value in self.series.items() if one == f"{name}_bucket")
        buckets = sorted((float(bound), value) for bound, value in found)
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank, lower, below = quantile * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank:
                is_known = bound != float("inf") and count > below
                return lower + (bound - lower) * (rank - below) / (count - below) if is_known else lower
            lower, below = bound, count
        return lower


class History:
    """The last scrapes of one node, as long as its process lasts."""

    def __init__(self) -> None:
        self._scrapes: deque[tuple[float, Series]] = deque()

    def add(self, series: Series) -> Growth:
        """Add a scrape; returns the growth over `WINDOW`, or since the process began if it is the first."""
        now, started = time.monotonic(), ("process_start_time_seconds", frozenset[tuple[str, str]]())
        if self._scrapes and self._scrapes[-1][1].get(started) != series.get(started):
            self._scrapes.clear()
        while len(self._scrapes) > 1 and now - self._scrapes[1][0] > WINDOW:
            self._scrapes.popleft()
        before, base = self._scrapes[0] if self._scrapes else (now - time.time() + series.get(started, 0.0), Series())
        self._scrapes.append((now, series))
        return Growth(now - before, {key: value - base.get(key, 0.0) for key, value in series.items()}, series)
