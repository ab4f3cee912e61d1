"""Rates, percentiles and addresses of the metrics of nodes."""

import socket
import time
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from imstream.cli.node_metrics import Growth, History, MetricsUnavailable, Series, address_of
from imstream.store.nodes import NodeOverview


def overview(metrics: str | None, host: str) -> NodeOverview:
    return NodeOverview("a", "running", timedelta(), host=host, metrics=metrics)


HERE = socket.gethostname()


@pytest.mark.parametrize(
    ("metrics", "host", "url"),
    [
        ("http://127.0.0.1:8080", HERE, "http://127.0.0.1:8080/metrics"),
        ("http://0.0.0.0:9100", HERE, "http://127.0.0.1:9100/metrics"),
        ("http://0.0.0.0:9100", "elsewhere", "http://elsewhere:9100/metrics"),
        ("http://[::1]:9100", HERE, "http://[::1]:9100/metrics"),
        ("http://10.0.0.5:9100", "elsewhere", "http://10.0.0.5:9100/metrics"),
    ],
)
def test_metrics_are_read_where_the_node_publishes_them(metrics: str, host: str, url: str) -> None:
    assert address_of(overview(metrics, host)) == url


@pytest.mark.parametrize(
    ("metrics", "host", "why"),
    [
        (None, HERE, "its release does not publish where they are"),
        ("", HERE, "it serves none: see IMSTREAM_METRICS"),
        ("http://127.0.0.1:8080", "elsewhere", "they are for elsewhere only"),  # here, another node may have the port
        ("http://[::1", HERE, "Invalid IPv6 URL"),  # written by hand
        ("http://10.0.0.5:99999", HERE, "Port out of range"),
    ],
)
def test_metrics_that_cannot_be_read_from_here_are_explained(metrics: str | None, host: str, why: str) -> None:
    with pytest.raises(MetricsUnavailable, match=why):
        address_of(overview(metrics, host))


def series(registry: CollectorRegistry) -> Series:
    return {
        (one.name, frozenset(one.labels.items())): one.value for family in registry.collect() for one in family.samples
    }


def test_quantiles_are_interpolated_and_none_without_a_value() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h", "h", buckets=(1, 2, 4), registry=registry)
    assert Growth(1, series(registry)).quantile("h", 0.5) is None
    for value in (0.5, 1.5, 1.5, 3):
        histogram.observe(value)
    growth = Growth(1, series(registry))
    assert [growth.quantile("h", one) for one in (0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 4]
    histogram.observe(100)  # beyond the last bound: at least 4
    assert Growth(1, series(registry)).quantile("h", 1) == 4
    assert (growth + growth).quantile("h", 0.5) == 1.5


def test_rates_are_those_of_the_time_since_the_first_look_and_begin_again_with_a_new_process() -> None:
    registry, history = CollectorRegistry(), History()
    counter = Counter("c", "c", ["result"], registry=registry)
    born = ("process_start_time_seconds", frozenset[tuple[str, str]]())
    counter.labels("a").inc(30)
    counter.labels("b").inc(60)
    first = history.add(series(registry) | {born: time.time() - 30})
    assert first.rate("c_total") == pytest.approx(3, rel=0.1)
    assert first.rate("c_total", ("result", "a")) == pytest.approx(1, rel=0.1)
    same_process = {born: time.time() - 60}
    history = History()
    history.add(series(registry) | same_process)
    counter.labels("a").inc(5)
    second = history.add(series(registry) | same_process)
    assert second.rate("c_total") * second.seconds == pytest.approx(5)
    assert second.rate("c_total", ("result", "b")) == 0
    reborn = history.add(series(registry) | {born: time.time() - 10})
    assert reborn.rate("c_total") == pytest.approx(9.5, rel=0.5)
