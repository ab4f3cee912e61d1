"""Chaos with a seed that causes most kinds of faults early; for a random minute in the `long` tier."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ops.chaos_test.schedule import Kind, draw
from tests.support.processes import start
from tests.support.waiting import SLOW

ROOT = Path(__file__).parents[2]
SEED, SECONDS, CLIENTS = 241, 10, 12


def chaos(folder: Path, *options: str) -> tuple[int, str]:
    """Run it; return the exit code and the output."""
    command = [sys.executable, "-m", "ops.chaos_test", "--folder", str(folder / "logs"), *options]
    with start(command, folder / "chaos.log", cwd=ROOT) as running:
        return running.wait(110 * SLOW), running.output()


def counts(output: str, rows: Sequence[str]) -> list[int]:
    """Return the numbers in some rows of the table."""
    return [int(found[1]) for row in rows if (found := re.search(rf"^{row} +(\d+)", output, re.MULTILINE))]


@pytest.mark.timeout(400)
def test_whatever_is_killed_every_accepted_message_is_answered_once(tmp_path: Path) -> None:
    kinds = {fault.kind for fault in draw(SEED, SECONDS, nodes=3, clients=CLIENTS)}
    assert len(kinds) >= len(Kind) - 1
    code, output = chaos(tmp_path, "--seed", str(SEED), "--seconds", str(SECONDS), "--clients", str(CLIENTS))
    assert code == 0, output
    asked, accepted, answered = counts(output, ("asked", "accepted", "answered"))
    assert asked == accepted == answered > 20
    assert counts(output, ("lost", "duplicated", "unexpected", "failed", "left over", "unforeseen")) == [0] * 6


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_minute_of_random_faults_loses_and_repeats_nothing(tmp_path: Path) -> None:
    code, output = chaos(tmp_path, "--seconds", "60")  # prints the seed it drew
    assert code == 0, output
