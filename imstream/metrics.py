"""What a node measures, for Prometheus: every series with its labels, in a registry of its own.

Counters and histograms change where something happens. Gauges of things that can be asked are set when a scrape asks,
by `Metrics.on_scrape`: it reads memory only, never Redis. No label holds a user, a message, or free text.
"""

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from imstream import __version__

BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
"""Upper bounds of the histograms of messages, in seconds."""

SHORT_BUCKETS = (0.0005, 0.001, 0.0025, *BUCKETS[:10])
"""Those of a round trip to Redis and of the event loop."""

OTHER = "other"
"""The label of everything that is not in a closed set."""

OUTCOMES = ("done", "failed", "cancelled")
ADMISSIONS = ("accepted", "busy", "user_busy", "rate_limited", "quota", "refused", "unavailable")
CALL_RESULTS = ("done", "away", "broken", "impossible", "misconfigured", "refused", "stopped")
TOKEN_KINDS = ("prompt", "completion", "reasoning", "cached")


@dataclass(slots=True)
class StreamState:
    """What is known of a requests stream that this node consumes. `oldest`: entry id of its first request, if known."""

    unfinished: int = 0
    oldest: str = ""


class Metrics:
    """All series of one node."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # the library's gap
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry, buckets=BUCKETS)
        short = partial(Histogram, registry=registry, buckets=SHORT_BUCKETS)

        messages = counter("imstream_messages_total", "Messages whose end this node has recorded.", ["outcome"])
        self.messages = _bound(messages, OUTCOMES)
        self.queue_wait = histogram(
            "imstream_queue_wait_seconds", "Time from the admission of an answered message to its first attempt."
        )
        self.first_delta = histogram(
            "imstream_first_delta_seconds", "Time from the admission of an answered message to its first text."
        )
        self.answer = histogram("imstream_answer_seconds", "Time from the admission of an answered message to its end.")

        admissions = counter("imstream_admissions_total", "CHAT frames, by what became of them.", ["result"])
        self.admissions = _bound(admissions, ADMISSIONS)
        self.unfinished = gauge(
            "imstream_requests_unfinished", "Requests in a stream that this node consumes (XLEN).", ["stream"]
        )
        self.running = gauge("imstream_requests_running", "Requests that this node works on, by stream.", ["stream"])
        self.oldest_age = gauge(
            "imstream_oldest_request_age_seconds",
            "Age of the oldest unfinished request; 0 if there is none.",
            ["stream"],
        )
        self.dead_letters = counter(
            "imstream_dead_letters_total", "Requests moved to a dead stream by this node.", ["reason"]
        )

        self.dead_letters_dropped = counter(
            "imstream_dead_letters_dropped_total", "Dead letters that this node has dropped, beyond their bounds."
        )

        self.ai_calls = counter("imstream_ai_calls_total", "Calls of a backend that have ended.", ["backend", "result"])
        self.ai_retries = counter(
            "imstream_ai_retries_total",
            "Calls that were, or will be, made again, here or elsewhere.",
            ["backend", "reason"],
        )
        self.breaker_open = gauge(
            "imstream_ai_breaker_open",
            "1 while no call of a backend has succeeded since its breaker opened.",
            ["backend"],
        )
        self.ai_tokens = counter("imstream_ai_tokens_total", "Tokens that a backend has reported.", ["backend", "kind"])
        self.continuations = counter(
            "imstream_continuations_total", "Calls that continued a broken answer.", ["backend"]
        )

        self.sessions = gauge("imstream_sessions", "Open sockets.")
        self.session_closes = counter("imstream_session_closes_total", "Closed sockets, by close code.", ["code"])
        self.slow_readers = counter(
            "imstream_slow_readers_total",
            "Sockets that took nothing for a second although there was something to send.",
        )

        self.redis_roundtrip = short("imstream_redis_roundtrip_seconds", "Round trips of pipelines to Redis, sampled.")
        self.redis_up = gauge("imstream_redis_up", "1 while Redis answers this node.")
        self.lease_held = gauge("imstream_lease_held", "1 while this node holds its lease.")
        self.adoptions = counter("imstream_adoptions_total", "Streams of dead nodes that this node has adopted.")
        self.loop_lag = short("imstream_loop_lag_seconds", "How late a timer of the event loop was, twice a second.")
        build = Info("imstream_build", "Versions.", registry=registry)
        build.info({
            "version": __version__,
            "python": platform.python_version(),
            "redis_py": version("redis"),
        })  # fmt: skip

        self.on_scrape: Callable[[], None] = lambda: None
        self.streams: dict[str, StreamState] = {}
        self._redis_ahead = 0
        """Milliseconds by which the clock of Redis is ahead of ours."""

    def expose(self, accept: str) -> tuple[bytes, str]:
        """All series, and their media type, in the format that an Accept header asks for."""
        self.on_scrape()
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


def replace(gauge: Gauge, values: Mapping[str, float]) -> None:
    """Set a gauge with one label; other values of the label are gone."""
    gauge.clear()
    for label, value in values.items():
        gauge.labels(label).set(value)


def _bound(counter: Counter, labels: Iterable[str]) -> dict[str, Counter]:
    """The children of a counter with one label, which also begin at 0."""
    return {label: counter.labels(label) for label in labels}
