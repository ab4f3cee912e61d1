"""The metrics of a node, for Prometheus: every series with its labels, in a registry of its own.

Counters and histograms change where something happens; gauges are set for each scrape, by `Metrics.on_scrape`, from
the node's memory, never from Redis. No label holds a user, a message, or free text.
"""

import collections
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import accumulate, product
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from imstream import __version__
from imstream.clock import RedisClock, time_of
from imstream.codes import CloseCode
from imstream.errors import FailureKind

BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
"""Upper bounds of the histograms of messages, in seconds."""

SHORT_BUCKETS = (0.0005, 0.001, 0.0025, *BUCKETS[:10])  # those of a round trip to Redis and of the event loop
OTHER = "other"  # the label of everything that is not in a closed set

REASONS = frozenset({
    *(f"http_{status}" for status in range(300, 600)),
    *("connect_timeout", "first_token_timeout", "idle_timeout", "total_timeout"),
    *("connect_failed", "connection_lost", "proxy_failed", "overloaded"),
    *("insufficient_quota", "unauthorized", "misconfigured", "model_not_found", "encoded"),
    *("aborted", "backend_error", "bad_stream", "broken_stream", "empty_answer", "not_continued"),
    *("bad_prompt", "content_filter", "context_too_long", "refusal", "tool_calls", "too_large"),
    *("moderation_unavailable", "worker_died", "malformed", "internal_error"),
})  # fmt: skip
"""Why calls are made again, and requests are given up."""

Admission = Literal["accepted", "busy", "user_busy", "rate_limited", "quota", "refused", "unavailable"]
"""Results of a CHAT frame. Unavailable: Redis, a service or this node could not serve it."""

CALL_RESULTS = ("done", *get_args(FailureKind), "refused", "stopped")
"""How a call of a backend ended. Refused: a guard rejected the answer; stopped: cancelled, drained or superseded."""

ADMISSION_RESULTS = get_args(Admission)
OUTCOMES = ("done", "failed", "cancelled")
TOKEN_KINDS = ("prompt", "completion", "reasoning", "cached")
_TOKEN_FIELDS = {f"{kind}_tokens": kind for kind in TOKEN_KINDS}

_CLIENT_CLOSES = (1000, 1001, 1005)


def reason_label(reason: str) -> str:
    """A reason as a label."""
    return reason if reason in REASONS else OTHER


Counts = collections.Counter[str | tuple[str, ...]]  # the values of a counter, by label or labels


@dataclass(eq=False)
class LabelledCounter(Collector):
    """Shows counts. Only the event loop changes and reads them: they need no locks, unlike prometheus-client's own."""

    name: str
    documentation: str
    labels: Sequence[str]
    counts: Counts

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        family = CounterMetricFamily(self.name, self.documentation, labels=self.labels)
        for labels, count in self.counts.items():
            family.add_metric([labels] if isinstance(labels, str) else labels, count)
        yield family

    describe = collect


@dataclass(eq=False)
class Histogram(Collector):
    """A histogram without labels, and without locks, as `LabelledCounter`. `bounds`: the upper ones of its buckets."""

    name: str
    documentation: str
    bounds: Sequence[float]
    labels: Sequence[str] = ()
    sum: float = 0.0
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        buckets = list(zip((*map(str, self.bounds), "+Inf"), accumulate(self.counts), strict=True))
        yield HistogramMetricFamily(self.name, self.documentation, buckets, self.sum)

    describe = collect


@dataclass(slots=True)
class StreamState:
    """The state of a requests stream that this node consumes, as far as it is known."""

    unfinished: int | None = None  # its length; None while it is unknown
    oldest: str = ""  # the id of its first entry; empty if the stream is empty, or the next entry is not known yet

    def admitted(self, entry_id: str, unfinished: int) -> None:
        """A request was added; with it, there are so many."""
        self.unfinished = unfinished
        if unfinished == 1:
            self.oldest = entry_id

    def ended(self, entry_id: str, unfinished: int) -> None:
        """A request was removed; so many are left."""
        self.unfinished = unfinished
        if entry_id == self.oldest:
            self.oldest = ""


class Metrics:
    """All series of one node."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # the library's gap
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)

        def counts(name: str, documentation: str, labels: Sequence[str], known: Iterable[object] = ()) -> Counts:
            """Add a counter with labels. `known`: values of its label that begin at 0."""
            made = Counts({str(label): 0 for label in known})
            registry.register(LabelledCounter(name, documentation, labels, made))
            return made

        def histogram(name: str, documentation: str, bounds: Sequence[float] = BUCKETS) -> Histogram:
            registry.register(made := Histogram(name, documentation, bounds))
            return made

        self.messages = counts(
            "imstream_messages_total", "Messages whose end this node has recorded.", ["outcome"], OUTCOMES
        )
        self.queue_wait = histogram(
            "imstream_queue_wait_seconds", "Time from the receipt of an answered message to its first attempt."
        )
        self.first_delta = histogram(
            "imstream_first_delta_seconds", "Time from the receipt of an answered message to its first text."
        )
        self.answer = histogram("imstream_answer_seconds", "Time from the receipt of an answered message to its end.")

        self.admissions = counts("imstream_admissions_total", "CHAT frames, by result.", ["result"], ADMISSION_RESULTS)
        self._unfinished = gauge(
            "imstream_requests_unfinished", "Requests in a stream that this node consumes (XLEN).", ["stream"]
        )
        self._paused = gauge(
            "imstream_paused", "1 while an operator has paused a stream that this node consumes.", ["stream"]
        )
        self._running = gauge("imstream_requests_running", "Requests that this node works on, by stream.", ["stream"])
        self._oldest_age = gauge(
            "imstream_oldest_request_age_seconds",
            "Age of the first request of a stream; 0 for an empty stream.",
            ["stream"],
        )
        self.dead_letters = counts(
            "imstream_dead_letters_total", "Requests that this node has moved to a dead stream.", ["reason"]
        )

        self.dead_letters_dropped = counter(
            "imstream_dead_letters_dropped_total", "Dead letters that this node has dropped, beyond their bounds."
        )

        self.ai_calls = counts("imstream_ai_calls_total", "Calls of a backend that have ended.", ["backend", "result"])
        self.ai_retries = counts(
            "imstream_ai_retries_total", "Failed calls that are made again.", ["backend", "reason"]
        )
        self._breaker_open = gauge(
            "imstream_ai_breaker_open", "1 from the opening of a backend's breaker to its next success.", ["backend"]
        )
        self.ai_tokens = counts("imstream_ai_tokens_total", "Tokens that a backend has reported.", ["backend", "kind"])
        self.continuations = counts("imstream_continuations_total", "Calls that continue a broken answer.", ["backend"])

        self.sessions = gauge("imstream_sessions", "Open sockets.")
        self._closes = counts(
            "imstream_session_closes_total",
            "Closed sockets, by close code.",
            ["code"],
            (*_CLIENT_CLOSES, *map(int, CloseCode), OTHER),
        )
        self.slow_readers = counter(
            "imstream_slow_readers_total",
            "Sockets that took nothing for a second although there was something to send.",
        )

        self.redis_roundtrip = histogram(
            "imstream_redis_roundtrip_seconds", "Round trips of pipelines to Redis, sampled.", SHORT_BUCKETS
        )
        self.redis_refusals = counts(
            "imstream_redis_refusals_total",
            "Commands that Redis refused because it is full.",
            ["lack"],
            ("memory", "disk"),
        )
        self.redis_up = gauge("imstream_redis_up", "1 while Redis answers this node.")
        self.lease_held = gauge("imstream_lease_held", "1 while this node holds its lease.")
        self.adoptions = counter("imstream_adoptions_total", "Streams of dead nodes that this node has adopted.")
        self.loop_lag = histogram(
            "imstream_loop_lag_seconds", "How late a timer of the event loop was, twice a second.", SHORT_BUCKETS
        )
        Info("imstream_build", "Versions.", registry=registry).info({
            "version": __version__,
            "python": platform.python_version(),
            "redis_py": version("redis"),
        })  # fmt: skip

        self.on_scrape: Callable[[], None] = lambda: None
        self._streams: dict[str, StreamState] = {}
        self.redis_clock = RedisClock()

    def expose(self, accept: str) -> tuple[bytes, str]:
        """All series, and their media type, in the format that an Accept header requests."""
        self.on_scrape()
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def stream(self, node: str) -> StreamState:
        """The known state of the stream of a node."""
        return self._streams.setdefault(node, StreamState())

    def saw_stream(self, node: str, unfinished: int, oldest: str) -> None:
        """Set the length of a stream, and the id of its first entry."""
        state = self.stream(node)
        state.unfinished, state.oldest = unfinished, oldest

    def forget_stream(self, node: str) -> None:
        """Remove the series of another node's stream, which was released."""
        self._streams.pop(node, None)

    def set_streams(self, running: Mapping[str, Sequence[str]], is_paused: Mapping[str, bool]) -> None:
        """Set the gauges of streams. `running`: the entries in work, by stream."""
        _replace(self._paused, is_paused)
        known = {node: state for node, state in self._streams.items() if state.unfinished is not None}
        _replace(self._unfinished, {node: state.unfinished or 0 for node, state in known.items()})
        _replace(self._running, {node: len(running.get(node, ())) for node in {*self._streams, *running}})
        ages = {node: self._age(state, running.get(node, ())) for node, state in known.items()}
        _replace(self._oldest_age, ages)

    def set_breakers(self, is_open: Mapping[str, bool]) -> None:
        """Set the gauge of the breakers, by backend. Its calls begin at 0."""
        _replace(self._breaker_open, is_open)
        for labels in product(is_open, CALL_RESULTS):
            self.ai_calls.setdefault(labels, 0)

    def add_tokens(self, backend: str, usage: Mapping[str, int] | None) -> None:
        """Count the tokens of a call."""
        for name, count in (usage or {}).items():
            if count > 0 and name in _TOKEN_FIELDS:
                self.ai_tokens[backend, _TOKEN_FIELDS[name]] += count

    def session_closed(self, code: int) -> None:
        """Count a closed socket."""
        self._closes[str(code) if str(code) in self._closes else OTHER] += 1

    def _age(self, state: StreamState, running: Sequence[str]) -> float:
        """Seconds since the first of the known entries was added: entries are begun in their order."""
        times = [time_of(entry_id) for entry_id in (*running, state.oldest) if entry_id]
        return max(0, self.redis_clock.now() - min(times)) / 1000 if times and state.unfinished else 0.0


def _replace(gauge: Gauge, values: Mapping[str, float]) -> None:
    """Set a gauge with one label; other values of the label are gone."""
    gauge.clear()
    for label, value in values.items():
        gauge.labels(label).set(value)
