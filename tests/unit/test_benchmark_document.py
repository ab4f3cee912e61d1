"""The results of the benchmark in the documents: every generated part has a source, and its place."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from ops.benchmark import document, guards, rollup
from ops.benchmark.report import as_json
from ops.benchmark.runs import Run
from ops.generated import replace, table
from tests.unit.test_benchmark_report import results, run

ABOUT = {"date": "2026-11-30", "cpus": 2, "python": "3.11.2", "event_loop": "uvloop"}


def written(report: dict[str, Any]) -> dict[str, Any]:
    """The results as they are read from a file."""
    found: dict[str, Any] = json.loads(json.dumps(report))
    return found


def full_run() -> dict[str, Any]:
    found = as_json(results(cpu=0.5, ms=10)) | {"circumstances": ABOUT}
    guarded = [[run(name, load=load, sockets=100, cpu=cpu, ms=1) for name, cpu in costs] for load in guards.LOADS]
    return written(found | guards.as_json(guarded))


costs = ((guards.OFF, 1.0), (guards.ON, 1.1))


def rollups() -> list[list[Run]]:
    return [
        [
            run(name, load="paced", sockets=sockets, cpu=cpu, ms=5)
            for name, cpu in zip(rollup.ROLLUPS, (2, 1.5, 1), strict=True)
        ]
        for sockets in rollup.SOCKETS
    ]


def test_every_part_of_the_document_is_filled_from_the_files_of_runs() -> None:
    text = document.DOCUMENT.read_text("utf-8")
    parts = document.parts(full_run()) | document.parts(written(rollup.as_json(rollups(), ABOUT)))
    assert text.count("<!-- generated: ") == len(parts)
    filled = replace(text, parts)
    assert "| burst | 100 | 0.50 + 0.00 | **0.50** | 3.0 | 10 ms | 10 ms | 20 | – |" in filled
    assert "| 400 | 40ms | 1.00 | 0.50 | 20.0 | 5.0 ms | 5.0 ms | 5.0 ms |" in filled
    assert "| `on` | 1.10 | 1.10 |" in filled
    assert "met: burst, 100 sockets" in filled


def test_a_run_of_one_kind_leaves_the_other_parts_as_they_are() -> None:
    assert set(document.parts(written(rollup.as_json(rollups(), ABOUT)))) == {"roll-up", "machine of the roll-up"}


def test_figures_of_a_busy_machine_are_marked() -> None:
    busy = [[Run(**{**asdict(one), "foreign": 0.7}) for one in runs] for runs in rollups()]
    assert "not reliable" in document.parts(written(rollup.as_json(busy, ABOUT)))["machine of the roll-up"]
    assert "not reliable" not in document.parts(written(rollup.as_json(rollups(), ABOUT)))["machine of the roll-up"]


def test_a_part_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no part 'other'"):
        replace("<!-- generated: one -->\n<!-- end -->\n", {"other": "text"})


def test_generated_parts_are_replaced_and_the_rest_stays() -> None:
    text = "before\n<!-- generated: one -->\nold\n<!-- end -->\nafter\n"
    new = replace(text, {"one": table(("a", "b"), [("x|y", "z")])})
    assert new == "before\n<!-- generated: one -->\n\n| a | b |\n| --- | --- |\n| x\\|y | z |\n\n<!-- end -->\nafter\n"
