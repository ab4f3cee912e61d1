"""`ops/respawn`, which restarts a killed program, and passes signals on, at any time."""

import signal
from pathlib import Path

import pytest

from tests.support.processes import start
from tests.support.servers import OPS
from tests.support.waiting import wait_until

RESPAWN = str(OPS / "respawn")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_the_command_is_started_ends_it(number: signal.Signals, tmp_path: Path) -> None:
    """The command itself sends it, as its first step, and would go on for ever."""
    script = f"kill -{number.value} $PPID; exec sleep 1000"
    for _ in range(10):
        with start([RESPAWN, "sh", "-c", script], tmp_path / "log") as running:
            assert running.wait(30) == 0, running.output()


async def test_a_command_that_was_killed_is_started_again_and_one_that_ends_is_not(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"echo >>{count}; test $(wc -l <{count}) = 3 && exit 7; test $(wc -l <{count}) = 2 && exit 137; kill -9 $$"
    with start([RESPAWN, "sh", "-c", script], tmp_path / "log") as running:
        await wait_until(lambda: running.process.poll() is not None, "it has ended", limit=30)
        assert running.wait() == 7
        assert running.output().count("was killed by signal 9 and is started again") == 2


async def test_a_signal_within_the_second_before_the_next_start_ends_it(tmp_path: Path) -> None:
    with start([RESPAWN, "sh", "-c", "kill -9 $$"], tmp_path / "log") as running:
        await wait_until(lambda: "is started again" in running.output(), "it was killed")
        running.signal(signal.SIGTERM)
        assert running.wait(30) == 0
