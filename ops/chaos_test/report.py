"""The report of a run: one table, and every problem with the place to look."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ops.chaos_test.accounting import DUPLICATED, FAILED, LOST, UNEXPECTED, Account, Problem
from ops.chaos_test.audit import Resources
from ops.chaos_test.history import Recorded

SHOWN = 20
"""Maximum number of problems that are printed."""

_WIDTH = 22


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        injected: Number of faults, by kind.
        leftovers: Remains at the end, one sentence each.
        unforeseen: Events that no fault explains: a process exited or logged an exception.
        before: Resources of a node at its start.
        after: Resources of the nodes at the end, by name.
        folder: The folder of the logs.
    """

    account: Account
    injected: Mapping[str, int]
    leftovers: Sequence[str]
    unforeseen: Sequence[str]
    before: Resources
    after: Mapping[str, Resources]
    folder: Path

    @property
    def clean(self) -> bool:
        """Whether there is no problem."""
        return not (self.account.problems or self.leftovers or self.unforeseen)


def table(results: Results) -> str:
    """The table."""
    sums = results.account
    faults = ", ".join(f"{count} × {kind}" for kind, count in sorted(results.injected.items()))
    waits = sorted(sums.waits)
    rows = {
        "asked": f"{sums.asked}",
        "accepted": f"{sums.accepted}",
        "answered": f"{sums.answered} ({sums.cancelled} of them cancelled by their client)",
        LOST: f"{sums.count(LOST)}",
        DUPLICATED: f"{sums.count(DUPLICATED)}",
        UNEXPECTED: f"{sums.count(UNEXPECTED)}",
        FAILED: f"{sums.count(FAILED)}",
        "recovered": f"{sums.recovered} (acceptance was in doubt)",
        "more than one attempt": f"{sums.restarted}",
        "on more than one node": f"{sums.moved}",
        "AI calls per message": f"{sums.attempts / max(1, sums.asked):.2f}",
        "accepted → end": f"p50 {_quantile(waits, 0.5):.2f} s, p99 {_quantile(waits, 0.99):.2f} s, "
        f"longest {_quantile(waits, 1):.2f} s",
        "faults": faults,
        "left over": f"{len(results.leftovers)}",
        "unforeseen": f"{len(results.unforeseen)} (a process exited unexpectedly, or logged an exception)",
        "idle nodes": ", ".join(f"{name}: {idle.files} files, {_mb(idle)}" for name, idle in results.after.items())
        + f" (at the start: {results.before.files} files, {_mb(results.before)})",
    }
    return "\n".join(f"{name:<{_WIDTH}} {value}" for name, value in rows.items())


def problems(results: Results, recorded: Recorded) -> str:
    """All problems, and where to look."""
    every = results.account.problems
    lines = [line for problem in every[:SHOWN] for line in _problem(problem, recorded)]
    if len(every) > SHOWN:
        lines.append(f"and {len(every) - SHOWN} more")
    lines += [f"left over: {sentence}" for sentence in results.leftovers]
    lines += [f"unforeseen: {sentence}" for sentence in results.unforeseen]
    return "\n".join([*lines, f"logs of all processes, faults.log and messages.jsonl: {results.folder}"])


def _problem(problem: Problem, recorded: Recorded) -> list[str]:
    entries = recorded.get((problem.user_id, problem.message_id), [])
    return [
        f"{problem.verdict}: user {problem.user_id}, message {problem.message_id or '-'}: {problem.what}",
        *(f"    {json.dumps(entry.fields, ensure_ascii=False)}" for entry in entries),
    ]


def _mb(idle: Resources) -> str:
    return f"{idle.memory / 2**20:.0f} MB"


def _quantile(values: Sequence[float], share: float) -> float:
    """A quantile of sorted values; 0 if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
