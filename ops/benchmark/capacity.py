"""The capacity model: figures of `ops/bench scale`, formulas, and two worked examples.

`python -m ops.benchmark.capacity scale.json` writes the tables of ops/docs/capacity.md. The examples are computed from
the figures as the document shows them, so that a reader can compute them again.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.benchmark.report import BUSY
from ops.benchmark.units import parse, show
from ops.generated import replace, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "capacity.md"

TOLERANCE = 0.25
"""Maximum deviation of the prediction from the measurement, as a share of it."""


@dataclass(frozen=True)
class Symbol:
    """A value that formulas use."""

    name: str
    unit: str
    meaning: str


FIGURES = (
    Symbol("M0", "MB", "memory of a node without sockets"),
    Symbol("Ms", "KB", "memory of an idle socket, in its node"),
    Symbol("Ma", "KB", "memory of an answer under way, in its node"),
    Symbol("Cl", "µs", "CPU of a login (handshake and INIT), in the node"),
    Symbol("Ch", "µs", "CPU of a heartbeat, with the checks of its socket until the next one"),
    Symbol("C0", "ms", "CPU of a chat, in the node: the part that does not depend on the length of the answer"),
    Symbol("C1", "ms", "the same, for each second of the answer"),
    Symbol("Rl", "µs", "CPU of a login, in Redis"),
    Symbol("R0", "ms", "CPU of a chat, in Redis"),
    Symbol("R1", "ms", "the same, for each second of the answer"),
    Symbol("K0", "", "Redis commands of a chat, with those inside of scripts"),
    Symbol("K1", "", "the same, for each second of the answer"),
    Symbol("Y0", "KB", "bytes of a chat between node and Redis, both directions"),
    Symbol("Y1", "KB", "the same, for each second of the answer"),
    Symbol("X0", "KB", "bytes of a chat to the client"),
    Symbol("X1", "KB", "the same, for each second of the answer"),
    Symbol("I0", "KB", "bytes of a reply in its stream"),
    Symbol("I1", "KB", "the same, for each second of the answer"),
    Symbol("Q0", "KB", "Redis memory of a kept reply without its listpacks, with its place in the user's list"),
    Symbol("Q1", "KB", "Redis memory of a listpack"),
    Symbol("Qu", "KB", "Redis memory of a user with a socket"),
    Symbol("Qm", "KB", "Redis memory of a queued message of 200 characters without history, with its reply"),
    Symbol("Qd", "KB", "Redis memory of a dead letter of such a message, without its reply"),
)

ASSUMED = (
    (Symbol("H", "s", "heartbeat interval (`IMSTREAM_HEARTBEAT`)"), 25.0),
    (Symbol("T", "s", "time that a reply is kept (`IMSTREAM_REPLY_TTL`)"), 900.0),
    (Symbol("F", "s", "time between two renewals of a user's route"), 600.0),
    (Symbol("O", "", "maximum bytes of a listpack (`stream-node-max-bytes`)"), 1024.0),
    (Symbol("L", "", "maximum sockets of a node (`IMSTREAM_NODE_SOCKETS`)"), 10_000.0),
    (
        Symbol(
            "U", "", "share of a core that a node is to use: the rest is for peaks and for the death of another node"
        ),
        0.6,
    ),
    (Symbol("V", "", "share of a core that a Redis master is to use"), 0.5),
    (Symbol("G", "GB", "memory that a Redis master is to use"), 8e9),
    (Symbol("Z", "MB", "maximum memory of a node's dead letters (`IMSTREAM_DEAD_BYTES`)"), 33_554_432.0),
)
"""Values that are no measurements, with their defaults."""


@dataclass(frozen=True)
class Formula:
    """A quantity of a deployment. `expression` is evaluated as it stands; later ones use earlier ones."""

    name: str
    unit: str
    meaning: str
    expression: str


FORMULAS = (
    Formula("A", "", "answers under way", "R * D"),
    Formula("C", "cores", "CPU of all nodes", "S * Ch / H + R * (C0 + C1 * D)"),
    Formula("N", "", "nodes; one of them may be lost", "max(ceil(C / U), ceil(S / L)) + 1"),
    Formula("M", "GB", "memory of all nodes", "N * M0 + S * Ms + A * Ma"),
    Formula(
        "E",
        "s",
        "CPU-bound time until the users of a lost node are logged in elsewhere",
        "S / N / (N - 1) * Cl / (1 - U)",
    ),
    Formula("P", "cores", "CPU of Redis", "S * Rl / F + R * (R0 + R1 * D)"),
    Formula("J", "", "listpacks of a reply: each is allocated in full", "ceil((I0 + I1 * D) / O)"),
    Formula("B", "GB", "memory of Redis", "R * (T + D) * (Q0 + Q1 * J) + S * Qu + N * Z"),
    Formula("W", "", "Redis masters", "max(ceil(P / V), ceil(B / G))"),
    Formula("K", "per s", "Redis commands", "R * (K0 + K1 * D)"),
    Formula("Y", "Mbit/s", "network between nodes and Redis", "8 * R * (Y0 + Y1 * D)"),
    Formula("X", "Mbit/s", "network to clients", "8 * R * (X0 + X1 * D)"),
)

EXAMPLES = {"100,000 sockets": (100_000, 500, 12), "1,000,000 sockets": (1_000_000, 5_000, 12)}
"""S, R and D of the worked examples."""

Values = Mapping[str, float]


def figures(scale: Mapping[str, Any]) -> dict[str, float]:
    """The measured values, from the JSON of `ops/bench scale`, rounded as the document shows them."""
    idle, short, long = scale["idle"], scale["short"], scale["long"]

    def line(*names: str, over: str = "length") -> tuple[float, float]:
        """The straight line through the two loads: the part of a chat, and that of a second of its answer (`over`)."""
        low, high = (sum(load[name] for name in names) for load in (short, long))
        slope = (high - low) / ((long[over] - short[over]) or 1)
        return max(0.0, low - slope * short[over]), slope

    lines = {
        "C": line("node_cpu"),
        "R": line("redis_cpu"),
        "K": line("commands"),
        "Y": line("redis_in", "redis_out"),
        "X": line("client_bytes"),
        "I": line("reply_bytes"),
        "Q": line("reply_memory", over="reply_listpacks"),
    }
    found = {f"{name}{part}": value for name, parts in lines.items() for part, value in enumerate(parts)}
    found |= {
        "M0": idle["node_memory_empty"],
        "Ms": idle["memory_per_socket"],
        "Ma": scale["storm"]["memory_per_answer"],
        "Cl": idle["cpu_per_login"],
        "Ch": idle["cpu_per_heartbeat"],
        "Rl": idle["redis_cpu_per_login"],
        "Qu": idle["redis_memory_per_user"],
        "Qm": scale["messages"]["queued"],
        "Qd": scale["messages"]["dead"],
    }
    return {symbol.name: parse(show(found[symbol.name], symbol.unit)) for symbol in FIGURES}


def compute(figures: Values, sockets: float, chats: float, seconds: float, **assumed: float) -> dict[str, float]:
    """All quantities of a deployment with this number of sockets, chats a second, and seconds of an answer."""
    values: dict[str, Any] = {symbol.name: value for symbol, value in ASSUMED}
    values |= {**figures, **assumed, "S": sockets, "R": chats, "D": seconds}
    functions = {"__builtins__": {}, "ceil": _ceil, "max": max}
    for formula in FORMULAS:
        values[formula.name] = eval(formula.expression, functions, values)  # noqa: S307 - our own formulas
    return {formula.name: values[formula.name] for formula in FORMULAS}


def _ceil(value: float) -> int:
    return math.ceil(round(value, 6))  # 19.2 / 0.6 is 32


@dataclass(frozen=True)
class Prediction:
    """A quantity of the check, as predicted and as measured."""

    meaning: str
    unit: str
    predicted: float
    measured: float

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of the measurement."""
        return self.predicted / self.measured - 1 if self.measured else math.inf

    def __str__(self) -> str:
        predicted, measured = show(self.predicted, self.unit), show(self.measured, self.unit)
        return f"{self.meaning}: predicted {predicted}, measured {measured} ({self.deviation:+.0%})"


def check(scale: Mapping[str, Any]) -> list[Prediction]:
    """The prediction of the load that no figure was derived from, beside its measurement."""
    point, known = scale["check"], figures(scale)
    load = (point["sockets"], point["chats_per_second"], point["length"])
    # Its sockets send no heartbeats, and it is one node.
    made = compute({**known, "Ch": 0.0, "Rl": 0.0}, *load)
    memory = known["M0"] + point["sockets"] * known["Ms"] + point["under_way"] * known["Ma"]
    rate = point["chats_per_second"]
    return [
        Prediction("CPU of the node", "cores", made["C"], point["node_cores"]),
        Prediction("CPU of Redis", "cores", made["P"], point["redis_cores"]),
        Prediction("memory of the node", "MB", memory, point["node_memory"]),
        Prediction("memory of a reply in Redis", "KB", known["Q0"] + known["Q1"] * made["J"], point["reply_memory"]),
        Prediction("Redis commands", "per s", made["K"], point["commands"] * rate),
        Prediction("network to Redis", "Mbit/s", made["Y"], 8 * rate * (point["redis_in"] + point["redis_out"])),
        Prediction("network to clients", "Mbit/s", made["X"], 8 * rate * point["client_bytes"]),
    ]


def read_figures(document: str) -> dict[str, float]:
    """The measured values, from the text of capacity.md."""
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", document, re.MULTILINE))
    return {symbol.name: parse(rows[symbol.name]) for symbol in FIGURES}


def model_tables(known: Values) -> dict[str, str]:
    """The parts of capacity.md that follow from the measured values: everything but the observations of the run."""
    made = {name: compute(known, *example) for name, example in EXAMPLES.items()}
    inputs = (("S", "sockets"), ("R", "chats a second"), ("D", "seconds of an answer"))
    given = [
        (f"`{name}`", meaning, *(f"{example[place]:,}" for example in EXAMPLES.values()))
        for place, (name, meaning) in enumerate(inputs)
    ]
    rows = [
        (f"`{it.name}`", it.meaning, *(show(values[it.name], it.unit) for values in made.values())) for it in FORMULAS
    ]
    head = ("symbol", "meaning")
    return {
        "figures": table(
            (*head, "measured"), ((f"`{it.name}`", it.meaning, show(known[it.name], it.unit)) for it in FIGURES)
        ),
        "assumptions": table(
            (*head, "value"), ((f"`{it.name}`", it.meaning, show(value, it.unit)) for it, value in ASSUMED)
        ),
        "formulas": table((*head, "formula"), ((f"`{it.name}`", it.meaning, f"`{it.expression}`") for it in FORMULAS)),
        "examples": table((*head, *EXAMPLES), [*given, *rows]),
    }


def run_tables(scale: Mapping[str, Any]) -> dict[str, str]:
    """The parts of capacity.md with observations of the run."""
    idle, seen, point = scale["idle"], scale["storm"], scale["check"]
    machine = scale["circumstances"]
    doubt = " (too much: these figures are not reliable)" if scale["foreign"] > BUSY else ""
    predictions = (
        (it.meaning, show(it.predicted, it.unit), show(it.measured, it.unit), f"{it.deviation:+.0%}")
        for it in check(scale)
    )
    load = f"{point['chats_per_second']:.0f} chats a second of {point['length']:g} s for {point['seconds']:.0f} s"
    return {
        "machine": f"{machine['date']}: {machine['cpus']} cores, Python {machine['python']}; CPUs used by other "
        f"processes: {scale['foreign']:.2f}{doubt}.\n",
        "idle": table(("sockets on one node", ""), idle_rows(idle)),
        "storm": table((f"{seen['clients']:,} users lose their node", ""), storm_rows(seen)),
        "check": table((load, "predicted", "measured", "deviation"), predictions),
    }


def idle_rows(idle: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The cost of idle sockets."""
    yield "open at the same time", f"{idle['sockets']:,} (limit of open files: {idle['file_limit']:,})"
    yield (
        "memory of the node",
        f"{show(idle['node_memory'], 'MB')}, {show(idle['memory_per_socket'], 'KB')} for each socket",
    )
    yield "logins a second while they were opened", f"{idle['logins_per_second']:,.0f}"
    yield (
        "CPU of a heartbeat of each within 25 s",
        f"{idle['heartbeat_cpu']:.1%} of a core; answered within {idle['heartbeat_p99'] * 1000:.0f} ms (p99)",
    )


def storm_rows(seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The effects of a reconnect storm."""

    def times(name: str) -> str:
        return " / ".join(f"{seen[name][quantile]:.1f} s" for quantile in ("p50", "p99")) if seen[name] else "-"

    yield "answers under way at the death", f"{seen['under_way']:,}"
    yield (
        "complete and right in the end",
        f"{seen['right']:,} of {seen['clients']:,} ({seen['right'] / seen['clients']:.2%})",
    )
    yield "logged in at the other node, p50 / p99", times("back")
    yield "new text of the answer, p50 / p99", times("again")
    yield "as much text as before the death, p50 / p99", times("whole")
    for name, what in (("refusals", "tries to connect that failed"), ("codes", "closes and codes")):
        counts = ", ".join(f"{cause}: {count:,}" for cause, count in sorted(seen[name].items()))
        yield what, counts or "none"
    yield "CPU of the other node", f"{seen['node_cpu'] / seen['seconds']:.2f} cores for {seen['seconds']:.0f} s"


def text(scale: Mapping[str, Any]) -> Iterator[str]:
    """The report for a terminal, of those parts that were measured."""
    sections: dict[str, Iterable[tuple[str, str]]] = {}
    if "idle" in scale:
        sections["sockets on one node"] = idle_rows(scale["idle"])
    sections[f"{scale['storm']['clients']:,} users lose their node"] = storm_rows(scale["storm"])
    if "check" in scale:
        known = figures(scale)
        sections["figures"] = ((f"{it.meaning} ({it.name})", show(known[it.name], it.unit)) for it in FIGURES)
        sections["the check"] = ((it.meaning, str(it).partition(": ")[2]) for it in check(scale))
    for title, rows in sections.items():
        yield title
        for meaning, value in rows:
            yield f"  {meaning:<88} {value}"


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    parts = {**run_tables(results), **model_tables(figures(results))}
    DOCUMENT.write_text(replace(DOCUMENT.read_text("utf-8"), parts), "utf-8")
