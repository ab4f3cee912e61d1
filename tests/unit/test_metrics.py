"""The series of a node: closed sets of labels, and the known values of streams."""

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imstream.ai.failures import RULES
from imstream.ai.router import Backends
from imstream.clock import now_ms
from imstream.metrics import OTHER, REASONS, Metrics, reason_label
from imstream.node import Node
from imstream.settings import Settings
from ops.metrics_table import DOCUMENT, document
from tests.support.scraping import Series, parse

IMSTREAM = Path(__file__).parents[2] / "imstream"

INTERNAL = {
    *("bad_answer", "timeout", "paused"),  # of moderation: it becomes moderation_unavailable
    *("nothing_to_summarise", "empty_summary", "summary_timeout"),  # the turns are dropped instead
}
"""Reasons of errors that end no call and no request."""


def series(metrics: Metrics) -> Series:
    return parse(metrics.expose("")[0].decode())


def test_the_document_lists_every_series() -> None:
    assert DOCUMENT.read_text("utf-8") == document()


def reasons() -> Iterator[str]:
    """The reasons of failed calls in the code."""
    yield from (rule.reason for rule in RULES)
    position = {"failure": 1, "Bury": 0, "expect": 0, "BackendError": 0}
    for file in (IMSTREAM / "ai", IMSTREAM / "guards", IMSTREAM / "worker"):
        for path in file.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else name
                if isinstance(node, ast.Call) and name in position and len(node.args) > position[name]:
                    reason = node.args[position[name]]
                    if isinstance(reason, ast.Constant) and isinstance(reason.value, str):
                        yield reason.value


def test_every_reason_of_the_code_is_a_label() -> None:
    found = set(reasons())
    assert {"broken_stream", "overloaded", "connect_timeout", "moderation_unavailable", "bad_prompt"} <= found
    assert found - INTERNAL <= REASONS


def test_other_reasons_share_a_label() -> None:
    assert reason_label("http_503") == "http_503"
    assert {reason_label(text) for text in ("http_999", "something a newer release wrote", "")} == {OTHER}


def test_counters_with_known_labels_begin_at_zero() -> None:
    metrics = Metrics()
    metrics.set_breakers({"default": False})
    found = series(metrics)
    for name in (
        'imstream_messages_total{outcome="cancelled"}',
        'imstream_admissions_total{result="user_busy"}',
        'imstream_session_closes_total{code="4002"}',
        'imstream_ai_calls_total{backend="default",result="broken"}',
        "imstream_slow_readers_total",
    ):
        assert found[name] == 0


def test_two_nodes_of_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.messages["done"] += 1
    assert series(other)['imstream_messages_total{outcome="done"}'] == 0


def test_a_stream_has_no_length_before_the_first_reply_of_redis() -> None:
    metrics = Metrics()
    stream = metrics.stream("a")
    metrics.set_streams({}, {})
    assert 'imstream_requests_unfinished{stream="a"}' not in series(metrics)
    metrics.saw_stream("a", 2, f"{now_ms() - 60_000}-0")
    stream.ended("1-0", 1)
    metrics.set_streams({}, {})
    assert series(metrics)['imstream_requests_unfinished{stream="a"}'] == 1
    metrics.forget_stream("a")
    metrics.set_streams({}, {})
    assert 'imstream_requests_unfinished{stream="a"}' not in series(metrics)


@pytest.mark.parametrize("ahead", [0, 3_600_000])
def test_the_age_of_the_oldest_request_is_by_the_clock_of_redis(ahead: int) -> None:
    metrics, redis_now = Metrics(), now_ms() + ahead

    def age(*running: str) -> float:
        metrics.set_streams({"0": running}, {})
        return series(metrics)['imstream_oldest_request_age_seconds{stream="0"}']

    oldest, younger = f"{redis_now - 60_000}-0", f"{redis_now - 20_000}-1"
    metrics.redis_clock.adjust(redis_now, sent=time.monotonic())
    metrics.saw_stream("0", 3, oldest)
    assert 60 <= age() < 65
    assert 60 <= age(oldest, younger) < 65
    metrics.stream("0").ended(oldest, 2)
    assert 20 <= age(younger) < 25
    metrics.stream("0").ended(younger, 0)
    assert age() == 0
    metrics.stream("0").admitted(f"{redis_now - 5_000}-0", 1)
    assert 5 <= age() < 10


class Sized:
    """Has a length, and nothing that could be walked over."""

    def __len__(self) -> int:
        return 5_000


async def test_a_scrape_does_not_walk_over_the_sockets() -> None:
    settings = Settings()
    node = Node(settings, Backends(settings))
    node.registry = Sized()  # type: ignore[assignment]
    found = series(node.metrics)
    assert found["imstream_sessions"] == 5_000
    assert found["imstream_redis_up"] == found["imstream_lease_held"] == 0
    assert found['imstream_ai_breaker_open{backend="default"}'] == 0


def test_a_histogram_counts_a_value_up_to_the_bounds_that_it_does_not_exceed() -> None:
    metrics = Metrics()
    for seconds in (0.02, 0.021, 1_000):
        metrics.answer.observe(seconds)
    found = series(metrics)
    counted = [found[f'imstream_answer_seconds_bucket{{le="{bound}"}}'] for bound in ("0.005", "0.02", "0.05", "+Inf")]
    assert counted == [0, 1, 2, 3]
    assert (found["imstream_answer_seconds_count"], found["imstream_answer_seconds_sum"]) == (3, 1000.041)


def test_series_without_known_labels_appear_with_their_first_count() -> None:
    metrics = Metrics()
    metrics.add_tokens("fast", {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7})
    metrics.add_tokens("fast", None)
    found = {name: value for name, value in series(metrics).items() if name.startswith("imstream_ai_tokens_total")}
    assert found == {'imstream_ai_tokens_total{backend="fast",kind="prompt"}': 7}
