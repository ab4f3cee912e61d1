"""The report of the benchmark: a table, the bars (limits that imstream is to meet), and the same as JSON."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from statistics import median
from typing import Any

from ops.benchmark.runs import Run

SERVICES = ("imstream", "baseline", "typical")

BUSY = 0.2
"""CPUs used by other processes above which ratios are not reliable: two runs of the same code then differed by a third.
Shared caches affect the service with the larger code most."""

_HEADER = (
    "load sockets service  CPU s/1000 +Redis  ×base   chats/s  first ms p50/p95/p99   done ms p50/p95/p99  frames "
    "late ms p99"
)


@dataclass(frozen=True)
class Results:
    """All measurements.

    Attributes:
        rounds: Runs of one load, one list for each round: within a round the services alternate.
        idle: Bytes of memory for each idle socket, by service.
        capacity: Number of concurrent paced answers without late deltas, by service.
        capacity_runs: The runs that determined `capacity`.
        circumstances: Machine, versions and options.
    """

    rounds: list[list[Run]]
    idle: dict[str, float]
    capacity: dict[str, int]
    capacity_runs: list[Run]
    circumstances: dict[str, Any]

    def runs(self, service: str, load: str, sockets: int) -> list[Run]:
        """The runs of one service under one load, by round."""
        return [
            run
            for runs in self.rounds
            for run in runs
            if (run.service, run.load, run.sockets) == (service, load, sockets)
        ]

    def ratio(self, load: str, sockets: int, *, to: str, of: str = "imstream") -> float | None:
        """CPU of one service and its Redis divided by that of another, within each round; the median of the rounds."""
        pairs = list(zip(self.runs(of, load, sockets), self.runs(to, load, sockets), strict=True))
        return median(one.cost / other.cost for one, other in pairs) if pairs else None

    def median_ms(self, service: str, load: str, sockets: int, what: str) -> float | None:
        """The median of a time of the load generator, and of the rounds, in milliseconds."""
        times = [run.seen[what]["p50"] * 1000 for run in self.runs(service, load, sockets) if run.seen[what]]
        return median(times) if times else None


def _ms(runs: Iterable[Run], what: str) -> str:
    """Median of each quantile over the rounds, in milliseconds."""
    values = [run.seen[what] for run in runs if run.seen[what]]
    if not values:
        return "-"
    return "/".join(_short(median(value[name] for value in values) * 1000) for name in ("p50", "p95", "p99"))


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"  # noqa: PLR2004 - three digits are enough


def _row(found: Results, load: str, sockets: int, service: str) -> str:
    runs = found.runs(service, load, sockets)

    def mid(value: Callable[[Run], float]) -> float:
        return median(map(value, runs))

    ratio = found.ratio(load, sockets, of=service, to="baseline") or 0.0
    late = _ms(runs, "late").rpartition("/")[2]
    return (
        f"{load:<6} {sockets:>5} {service:<9} {mid(lambda run: run.cpu / run.seen['chats'] * 1000):>8.3f} "
        f"{mid(lambda run: run.redis_cpu / run.seen['chats'] * 1000):>7.3f} {ratio:>7.2f} "
        f"{mid(lambda run: run.seen['chats'] / run.seen['seconds']):>9.0f} {_ms(runs, 'first'):>21} "
        f"{_ms(runs, 'done'):>21} {mid(lambda run: run.seen['frames'] / run.seen['chats']):>7.1f} {late:>11}"
    )


def table(found: Results) -> str:
    """One line for each load and service; medians over the rounds."""
    kinds = dict.fromkeys((run.load, run.sockets) for runs in found.rounds for run in runs if run.load != "single")
    lines = [_HEADER]
    for load, sockets in kinds:
        lines += [_row(found, load, sockets, service) for service in SERVICES]
    for service in SERVICES:
        single = _ms(found.runs(service, "single", 1), "to_backend")
        lines.append(
            f"{service:<9} CHAT to backend, ms p50/p95/p99: {single}; "
            f"idle socket: {found.idle[service] / 1024:.1f} KB; "
            f"concurrent paced answers: {found.capacity.get(service, 'not tried')}"
        )
    return "\n".join(lines)


def summary(found: Results) -> list[dict[str, Any]]:
    """The medians over the rounds: CPU for 1,000 chats, as a multiple of baseline's, frames of a chat, and times."""
    kinds = dict.fromkeys((run.load, run.sockets) for runs in found.rounds for run in runs)
    lines = []
    for (load, sockets), service in ((kind, service) for kind in kinds for service in SERVICES):
        if not (runs := found.runs(service, load, sockets)):
            continue
        lines.append(
            {
                "load": load,
                "sockets": sockets,
                "service": service,
                "cpu_s_per_1000_chats": median(run.cpu / run.seen["chats"] * 1000 for run in runs),
                "redis_cpu_s_per_1000_chats": median(run.redis_cpu / run.seen["chats"] * 1000 for run in runs),
                "times_baseline": found.ratio(load, sockets, of=service, to="baseline"),
                "frames_per_chat": median(run.seen["frames"] / run.seen["chats"] for run in runs),
                "first_ms_p50": found.median_ms(service, load, sockets, "first"),
                "to_backend_ms_p50": found.median_ms(service, load, sockets, "to_backend"),
                "done_ms_p50": found.median_ms(service, load, sockets, "done"),
                "late_ms_p99": median(run.seen["late"]["p99"] * 1000 for run in runs) if runs[0].seen["late"] else None,
            }
        )
    return lines


def circumstances(loop: str) -> dict[str, Any]:
    """Machine, versions and options of a run."""
    packages = ("imstream-server", "aiohttp", "httpx", "redis", "starlette", "uvicorn", "uvloop", "websockets")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "event_loop": loop,
        "versions": {package: metadata.version(package) for package in packages},
    }


def circumstances_lines(found: Results) -> str:
    """Other uses of CPU: backend and load generator, which must not dominate, and other processes."""
    costs = [run.others_cpu / run.seen["chats"] * 1000 for run in found.runs("imstream", "burst", 100)]
    foreign = [run.foreign for runs in found.rounds for run in runs]
    machine = found.circumstances
    baseline = median(run.cost for run in found.runs("baseline", "burst", 100))
    doubt = "; TOO MUCH for reliable ratios: run again on an idle machine" if median(foreign) > BUSY else ""
    return (
        f"backend and load generator, burst, 100 sockets: {median(costs):.3f} CPU s/1000 chats\n"
        f"baseline, burst, 100 sockets: {baseline:.2f} CPU s/1000 chats\n"
        f"{machine['cpus']} CPUs, Python {machine['python']}, {machine['event_loop']}; CPUs used by other processes: "
        f"{median(foreign):.2f} (median of the runs), maximum {max(foreign):.2f}{doubt}"
    )


CPU_BARS = {
    ("burst", 1): 1.6,
    ("burst", 100): 0.60,
    ("burst", 400): 0.60,
    ("paced", 100): 0.75,
    ("paced", 400): 0.75,
}
"""Maximum CPU of a node and its Redis, as a multiple of baseline's."""

TIME_BARS = (
    ("CHAT to backend, idle node", "single", 1, "to_backend", 3.0, 0.0),
    ("first delta, burst, 1 socket", "burst", 1, "first", 2.5, 0.0),
    ("first delta, paced, 20 sockets", "paced", 20, "first", 1.0, 3.0),
    ("first delta, paced, 100 sockets", "paced", 100, "first", 1.0, 3.0),
)
"""Each measured value with its maximum median: a multiple of baseline's, plus milliseconds."""

IDLE_BAR = 22.0
"""Maximum KB of an idle socket."""

CAPACITY_BAR = 2.0
"""Minimum of concurrent paced answers, as a multiple of baseline's."""


def bars(found: Results) -> list[tuple[bool, str]]:
    """Whether imstream meets each bar that was measured, and a sentence for it.

    All but memory are relative to *baseline* in the same run, so that they hold on any machine.
    """
    results = []
    for (load, sockets), limit in CPU_BARS.items():
        if (ratio := found.ratio(load, sockets, to="baseline")) is not None:
            results.append(
                (ratio <= limit, f"{load}, {sockets} sockets: {ratio:.2f} of baseline's CPU, at most {limit}")
            )
    for text, load, sockets, what, factor, more in TIME_BARS:
        own, other = (found.median_ms(name, load, sockets, what) for name in ("imstream", "baseline"))
        if own is not None and other is not None:
            limit = other * factor + more
            results.append((own <= limit, f"{text}, p50: {own:.1f} ms, at most {limit:.1f} (baseline: {other:.1f})"))
    idle = found.idle["imstream"] / 1024
    results.append((idle <= IDLE_BAR, f"idle socket: {idle:.1f} KB, at most {IDLE_BAR:g}"))
    if "baseline" in found.capacity:
        answers, least = found.capacity["imstream"], CAPACITY_BAR * found.capacity["baseline"]
        results.append((answers >= least, f"concurrent paced answers: {answers}, at least {least:g}"))
    return results


def bar_lines(results: Sequence[tuple[bool, str]]) -> str:
    """The bars, one line each."""
    return "\n".join(f"{'met   ' if met else 'MISSED'} {text}" for met, text in results)


def as_json(found: Results) -> dict[str, Any]:
    """All measurements, for programs; `summary` has one record for each load and service."""
    return {
        **asdict(found),
        "summary": summary(found),
        "bars": [{"met": met, "text": text} for met, text in bars(found)],
    }
