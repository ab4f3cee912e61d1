"""The report of the benchmark: a table, the bars (limits that imstream is to meet), and the same as JSON."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ops.benchmark.runs import Run

SERVICES = ("imstream", "baseline", "typical")

BUSY = 0.2
"""CPUs used by other processes above which ratios are not reliable: two runs of the same code then differed by a third.
Shared caches affect the service with the larger code most."""

REFERENCE = 0.68
"""Seconds of CPU for 1,000 chats of baseline in a burst with 100 sockets, on the machine that the bars were set for."""

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


def circumstances_lines(found: Results) -> str:
    """Other uses of CPU: backend and load generator, which must not dominate, and other processes."""
    costs = [run.others_cpu / run.seen["chats"] * 1000 for run in found.runs("imstream", "burst", 100)]
    foreign = [run.foreign for runs in found.rounds for run in runs]
    machine = found.circumstances
    baseline = median(run.cost for run in found.runs("baseline", "burst", 100))
    doubt = "; TOO MUCH for reliable ratios: run again on an idle machine" if median(foreign) > BUSY else ""
    return (
        f"backend and load generator, burst, 100 sockets: {median(costs):.3f} CPU s/1000 chats\n"
        f"baseline, burst, 100 sockets: {baseline:.2f} CPU s/1000 chats, {baseline / REFERENCE:.1f} times that of the "
        "machine that the bars were set for: milliseconds and concurrent answers depend on the machine\n"
        f"{machine['cpus']} CPUs, Python {machine['python']}, {machine['event_loop']}; CPUs used by other processes: "
        f"{median(foreign):.2f} (median of the runs), maximum {max(foreign):.2f}{doubt}"
    )


def bars(found: Results) -> list[tuple[bool, str]]:
    """Whether imstream meets each bar, and a sentence for it."""
    single = [run.seen["to_backend"]["p50"] * 1000 for run in found.runs("imstream", "single", 1)]
    checks = [
        (
            found.ratio("burst", 100, to="baseline"),
            1.0,
            "burst, 100 sockets: {:.2f} of baseline's CPU, at most 1.0 (goal 0.85)",
        ),
        (found.ratio("burst", 100, to="typical"), 0.5, "burst, 100 sockets: {:.2f} of typical's CPU, at most 0.5"),
        (found.ratio("paced", 100, to="baseline"), 1.3, "paced, 100 sockets: {:.2f} of baseline's CPU, at most 1.3"),
        (median(single) if single else None, 3.0, "CHAT to backend, idle node, p50: {:.2f} ms, under 3"),
        (found.idle["imstream"] / 1024, 30.0, "idle socket: {:.1f} KB, at most 30"),
    ]
    results = [(value <= limit, text.format(value)) for value, limit, text in checks if value is not None]
    answers = found.capacity["imstream"]
    return [*results, (answers >= 400, f"concurrent paced answers: {answers}, at least 400")]  # noqa: PLR2004 - a bar


def bar_lines(results: Sequence[tuple[bool, str]]) -> str:
    """The bars, one line each."""
    return "\n".join(f"{'met   ' if met else 'MISSED'} {text}" for met, text in results)


def as_json(found: Results) -> dict[str, Any]:
    """All measurements, for programs."""
    return {**asdict(found), "bars": [{"met": met, "text": text} for met, text in bars(found)]}
