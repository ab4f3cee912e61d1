"""Writes the results of `ops/bench --json` into ops/docs: the tables of benchmark.md, and the plot, light and dark.

`python -m ops.benchmark.document FILE …`: the files of several runs (`ops/bench`, `ops/bench --rollup`, `ops/bench
--guards`). A part of the document that none of them has results for is left as it is.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ops.benchmark import guards
from ops.benchmark.plot import SCHEMES, plot
from ops.benchmark.report import BUSY, SERVICES
from ops.benchmark.runs import Run
from ops.generated import replace, table

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENT = DOCS / "benchmark.md"


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of benchmark.md that these results are enough for."""
    found = {}
    if "summary" in results:
        found["loads"] = _loads(results["summary"])
        found["services"] = _services(results)
        found["bars"] = "".join(
            f"- {'met' if bar['met'] else '**missed**'}: {bar['text']}\n" for bar in results["bars"]
        )
        found["machine"] = _machine(results, [run for runs in results["rounds"] for run in runs])
    if "rollup" in results:
        found["roll-up"] = _rollup(results["rollup"])
        runs = [run for runs in results["rollup_runs"] for run in runs]
        found["machine of the roll-up"] = _machine(results, runs)
    if "guards" in results:
        found["guards"] = _guards([[Run(**run) for run in runs] for runs in results["guards"]])
    return found


def _loads(summary: Sequence[Mapping[str, Any]]) -> str:
    head = (
        *("load", "sockets", "imstream: CPU s for 1,000 chats, node + Redis", "× baseline", "typical, × baseline"),
        *("first delta, p50: imstream", "baseline", "frames of a chat", "deltas late, p99"),
    )
    return table(head, _load_rows(summary))


def _load_rows(summary: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for load, sockets in dict.fromkeys((line["load"], line["sockets"]) for line in summary):
        lines = {line["service"]: line for line in summary if (line["load"], line["sockets"]) == (load, sockets)}
        own, baseline, typical = (lines.get(name, {}) for name in SERVICES)
        yield (
            load,
            str(sockets),
            f"{own['cpu_s_per_1000_chats']:.2f} + {own['redis_cpu_s_per_1000_chats']:.2f}",
            f"**{own['times_baseline']:.2f}**",
            _number(typical.get("times_baseline"), "", 1),
            _number(own["first_ms_p50"], " ms"),
            _number(baseline.get("first_ms_p50"), " ms"),
            f"{own['frames_per_chat']:.0f}",
            _number(own["late_ms_p99"], " ms"),
        )


def _number(value: float | None, unit: str, digits: int | None = None) -> str:
    if value is None:
        return "–"
    digits = (1 if value < 10 else 0) if digits is None else digits  # noqa: PLR2004 - two digits are enough
    return f"{value:,.{digits}f}{unit}"


def _services(results: Mapping[str, Any]) -> str:
    services = [name for name in SERVICES if name in results["idle"]]
    single = {line["service"]: line["to_backend_ms_p50"] for line in results["summary"] if line["load"] == "single"}
    rows = (
        ("CHAT to backend, idle node, p50", *(_number(single.get(name), " ms", 1) for name in services)),
        ("memory of an idle socket", *(f"{results['idle'][name] / 1024:.0f} KB" for name in services)),
        (
            "paced answers at once with 99 % of deltas less than 50 ms late",
            *(str(results["capacity"].get(name, "–")) for name in services),
        ),
    )
    return table(("", *services), rows)


def _machine(results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    about, rounds = results["circumstances"], Counter((run["service"], run["load"], run["sockets"]) for run in runs)
    return (
        f"{about['date']}: {about['cpus']} cores, Python {about['python']}, {about['event_loop']}, "
        f"{min(rounds.values())} rounds; CPUs used by other processes: {_foreign(runs):.2f}{_doubt(runs)}.\n"
    )


def _foreign(runs: Sequence[Mapping[str, Any]]) -> float:
    return float(median(run["foreign"] for run in runs))


def _doubt(runs: Sequence[Mapping[str, Any]]) -> str:
    return " (too much: these figures are not reliable)" if _foreign(runs) > BUSY else ""


def _rollup(summary: Sequence[Mapping[str, Any]]) -> str:
    head = (
        *("paced sockets", "`IMSTREAM_ROLLUP`", "CPU s for 1,000 chats", "× 0", "frames of a chat (32 deltas)"),
        *("first delta, p50", "deltas late, p50", "p99"),
    )
    return table(
        head,
        (
            (
                str(line["sockets"]),
                line["rollup"],
                f"{line['cpu_s_per_1000_chats']:.2f}",
                f"{line['times_off']:.2f}",
                f"{line['frames_per_chat']:.1f}",
                *(_number(line[name], " ms") for name in ("first_ms_p50", "late_ms_p50", "late_ms_p99")),
            )
            for line in summary
        ),
    )


def _guards(rounds: Sequence[Sequence[Run]]) -> str:
    names = [name for name in dict.fromkeys(run.service for runs in rounds for run in runs) if name != guards.OFF]
    rows = ((f"`{name}`", *(f"{guards.ratio(rounds, load, name):.2f}" for load in guards.LOADS)) for name in names)
    return table(("guards, × `off`", *guards.LOADS), rows)


def main(files: Sequence[str]) -> None:
    """Write the results of these files."""
    for file in files:
        results = json.loads(Path(file).read_text("utf-8"))
        DOCUMENT.write_text(replace(DOCUMENT.read_text("utf-8"), parts(results)), "utf-8")
        if "summary" in results:
            busy = (
                _doubt([run for runs in results["rounds"] for run in runs]) and " (not reliable: the machine was busy)"
            )
            for scheme in SCHEMES:
                (DOCS / f"benchmark-{scheme}.svg").write_text(plot(results["summary"], scheme, busy), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
