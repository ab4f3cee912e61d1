"""The bars of the benchmark are relative to the baseline of the same run; its plot is well-formed."""

from typing import Any
from xml.etree import ElementTree as ET

from ops.benchmark.plot import plot
from ops.benchmark.report import Results, as_json, bars
from ops.benchmark.runs import Run


def run(service: str, *, load: str, sockets: int, cpu: float, ms: float) -> Run:
    times = {"p50": ms / 1000, "p95": ms / 1000, "p99": ms / 1000}
    seen: dict[str, Any] = {"chats": 1000, "frames": 20_000, "seconds": 1.0, "late": times if load == "paced" else {}}
    seen |= {"first": times, "done": times, "to_backend": times}
    return Run(service, load, sockets, seen, cpu, 0.0, 0.0, 0.0)


def results(*, cpu: float, ms: float, machine: float = 1.0, answers: int = 400, rounds: int = 3) -> Results:
    """A run in which baseline takes a second of CPU for 1,000 chats, and 10 ms, on a machine of speed 1."""
    loads = [("single", 1), *((load, sockets) for load in ("burst", "paced") for sockets in (1, 20, 100, 400))]
    found = [
        [
            run("imstream", load=load, sockets=sockets, cpu=cpu * machine, ms=ms * machine),
            run("baseline", load=load, sockets=sockets, cpu=machine, ms=10 * machine),
            run("typical", load=load, sockets=sockets, cpu=3 * machine, ms=30 * machine),
        ]
        for load, sockets in loads
        for _ in range(rounds)
    ]
    idle = dict.fromkeys(("imstream", "baseline", "typical"), 22 * 1024.0)
    return Results(found, idle, {"imstream": answers, "baseline": 200}, [], {})


def missed(found: Results) -> list[str]:
    return [text.partition(":")[0] for met, text in bars(found) if not met]


def test_bars_hold_on_a_machine_of_any_speed() -> None:
    for machine in (0.5, 1.0, 4.0):
        assert missed(results(cpu=0.60, ms=10, machine=machine)) == []


def test_each_bar_can_be_missed() -> None:
    assert missed(results(cpu=0.61, ms=10)) == ["burst, 100 sockets", "burst, 400 sockets"]
    assert len(missed(results(cpu=1.7, ms=10))) == 5
    assert len(missed(results(cpu=0.5, ms=31))) == 4
    assert missed(results(cpu=0.5, ms=14)) == [f"first delta, paced, {count} sockets, p50" for count in (20, 100)]
    assert missed(results(cpu=0.5, ms=10, answers=300)) == ["concurrent paced answers"]


def test_missing_measurements_have_no_bar() -> None:
    found = results(cpu=0.5, ms=10)
    quick = Results(found.rounds[-3:], found.idle, {"imstream": 400}, [], {})  # paced, 400 sockets
    assert [text.partition(":")[0] for _, text in bars(quick)] == ["paced, 400 sockets", "idle socket"]


def test_the_plot_is_drawn_from_the_summary() -> None:
    svg = plot(as_json(results(cpu=0.5, ms=10))["summary"], "dark", " <busy>")
    root = ET.fromstring(svg)  # noqa: S314 - our own
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "burst, 100 sockets: imstream" in texts
    assert "0.50 (× 0.50)" in texts
    assert texts[0] == "CPU seconds for 1,000 chats; the lighter part is Redis <busy>"
    assert "#e6edf3" in svg
    assert "single" not in svg
