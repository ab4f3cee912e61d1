"""The capacity model: its formulas, its figures from a run, and the document that shows them."""

from math import ceil
from typing import Any

import pytest

from ops.benchmark import capacity
from ops.benchmark.capacity import ASSUMED, DOCUMENT, EXAMPLES, FIGURES, FORMULAS
from ops.benchmark.scale import bars
from ops.benchmark.units import parse, show
from ops.generated import replace


def load(chats: float, length: float, *, times: float = 1.0) -> dict[str, Any]:
    """Chats of a node that needs 2 ms and 3 ms a second for each, and `times` that; all other costs in the same way.

    Their replies have 200 bytes, and 500 a second, in listpacks of 1,100 bytes; besides them, they need 500.
    """
    cost = times * (2 + 3 * length)
    return {
        "chats_per_second": chats,
        "length": length,
        "seconds": 10.0,
        "sockets": 500,
        "under_way": round(chats * length),
        "chats": 100,
        "right": 100,
        "skipped": 0,
        "foreign": 0.0,
        "node_cpu": cost / 1000,
        "redis_cpu": cost / 10_000,
        "node_cores": chats * cost / 1000,
        "redis_cores": chats * cost / 10_000,
        "node_memory": times * (80e6 + 500 * 20e3 + round(chats * length) * 10e3),
        "reply_listpacks": float(ceil((200 + 500 * length) / 1024)),
        "reply_bytes": 200 + 500 * length,
        "reply_memory": times * (500 + 1100 * ceil((200 + 500 * length) / 1024)),
        **dict.fromkeys(("commands", "redis_in", "redis_out", "client_bytes"), cost),
    }


def run(*, times: float = 1.0) -> dict[str, Any]:
    """A run of `ops/bench scale` whose check costs `times` the prediction of the model."""
    per_socket = {"cpu_per_login": 6e-4, "redis_cpu_per_login": 5e-5, "cpu_per_heartbeat": 5e-5}
    quantiles = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    storm = dict.fromkeys(("back", "again", "whole", "ended"), quantiles)
    counts = {"clients": 100, "under_way": 100, "right": 100, "refusals": {"HTTP 503": 7}, "codes": {}}
    return {
        "circumstances": {"date": "2026-11-30", "cpus": 2, "python": "3.11.2"},
        "foreign": 0.01,
        "idle": {
            "sockets": 1000,
            "heartbeats": 1000,
            "file_limit": 20_000,
            "node_memory_empty": 80e6,
            "node_memory": 100e6,
            "memory_per_socket": 20e3,
            "redis_memory_per_user": 300.0,
            "logins_per_second": 900.0,
            "heartbeat_cpu": 0.04,
            "heartbeat_p99": 0.003,
            **per_socket,
        },
        "storm": {**storm, **counts, "memory_per_answer": 10e3, "node_cpu": 20.0, "seconds": 40.0},
        "short": load(100, 2),
        "long": load(25, 8),
        "check": load(60, 4, times=times),
        "messages": {"queued": 1500.0, "dead": 900.0},
    }


def test_the_document_agrees_with_the_formulas() -> None:
    text = DOCUMENT.read_text("utf-8")
    known = capacity.read_figures(text)
    assert text == replace(text, capacity.model_tables(known)), "run ops/bench scale and ops.benchmark.capacity"


def test_a_changed_number_of_the_document_is_noticed() -> None:
    text = replace(DOCUMENT.read_text("utf-8"), capacity.model_tables(capacity.figures(run())))
    changed = text.replace("| `C1` |", "| `C1` |", 1).replace("| 3 ms |", "| 4 ms |", 1)
    assert changed != text
    assert changed != replace(changed, capacity.model_tables(capacity.read_figures(changed)))


def test_a_run_fills_every_part_of_the_document() -> None:
    text = DOCUMENT.read_text("utf-8")
    found = run()
    parts = {**capacity.run_tables(found), **capacity.model_tables(capacity.figures(found))}
    assert text.count("<!-- generated: ") == len(parts)
    filled = replace(text, parts)
    assert "HTTP 503: 7" in filled
    assert capacity.read_figures(filled) == capacity.figures(found)


def test_costs_are_split_into_those_of_a_chat_and_of_a_second_of_its_answer() -> None:
    known = capacity.figures(run())
    assert (known["C0"], known["C1"]) == pytest.approx((2e-3, 3e-3))
    assert (known["R0"], known["R1"]) == pytest.approx((2e-4, 3e-4))


def test_the_memory_of_a_reply_grows_with_each_listpack() -> None:
    known = capacity.figures(run())
    assert (known["Q0"], known["Q1"]) == pytest.approx((500, 1100))
    made = {seconds: capacity.compute(known, 0, 1, seconds) for seconds in (1.0, 1.6, 1.7, 3.6, 3.7)}
    assert [one["J"] for one in made.values()] == [1, 1, 2, 2, 3]
    memory = {seconds: one["B"] - one["N"] * 32 * 2**20 for seconds, one in made.items()}
    assert memory == pytest.approx({seconds: (900 + seconds) * (500 + 1100 * made[seconds]["J"]) for seconds in made})


def test_each_symbol_of_a_formula_is_defined_before() -> None:
    defined = {"S", "R", "D", "ceil", "max", *(it.name for it in FIGURES), *(it.name for it, _ in ASSUMED)}
    for formula in FORMULAS:
        used = set(compile(formula.expression, formula.name, "eval").co_names)
        assert used <= defined
        defined.add(formula.name)


def test_deployments_are_computed_as_by_hand() -> None:
    made = capacity.compute(capacity.figures(run()), *EXAMPLES["100,000 sockets"])
    assert made["A"] == 6000
    assert made["C"] == pytest.approx(100_000 * 5e-5 / 25 + 500 * (2e-3 + 3e-3 * 12))
    assert made["N"] == 32 + 1  # 19.2 cores, 0.6 of each node's
    assert made["M"] == pytest.approx(33 * 80e6 + 100_000 * 20e3 + 6000 * 10e3)
    assert capacity.compute(capacity.figures(run()), 1_000_000, 0, 0)["N"] == 100 + 1  # 10,000 sockets each


def test_a_run_that_the_model_predicts_meets_all_bars() -> None:
    assert [text for met, text in bars(run(), predicts=True) if not met] == []


def test_a_run_that_the_model_does_not_predict_misses_its_bars() -> None:
    assert len([text for met, text in bars(run(times=1.5), predicts=True) if not met]) == 7


def test_a_lost_answer_misses_a_bar() -> None:
    found = run()
    found["storm"]["right"] = 99
    assert [met for met, _ in bars(found, predicts=False)] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.00123456, "ms", "1.23 ms"),
        (22_345.0, "KB", "22.3 KB"),
        (60_000.0, "", "60,000"),
        (41_234.5, "per s", "41,200 per s"),
        (0.000_000_4, "µs", "0.4 µs"),
        (0.0, "KB", "0 KB"),
    ],
)
def test_values_are_shown_with_three_digits_and_read_again(value: float, unit: str, shown: str) -> None:
    assert show(value, unit) == shown
    assert show(parse(shown), unit) == shown
