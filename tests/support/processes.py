"""Real processes for tests, on free ports, ended by their own pid."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.fork_server import ForkedProcess
from tests.support.users import VARIABLE
from tests.support.waiting import SLOW

PYTHON = sys.executable


_FIRST, _LAST, _SHARES = 10_000, 30_000, 8


def _own_ports() -> Iterator[int]:
    """Cycle through the ports of this test process, from a random start.

    They lie below Linux' ephemeral ports, and concurrent test processes use different ones: a killed server's port
    is still free when it restarts.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = (_LAST - _FIRST) // _SHARES
    first = _FIRST + worker % _SHARES * count
    start = random.randrange(count)  # noqa: S311 - no secret
    for number in itertools.count(start):
        yield first + number % count


_ports = _own_ports()


def free_port() -> int:
    """A free port of 127.0.0.1."""
    return consecutive_ports(1)


def consecutive_ports(count: int) -> int:
    """The first of several consecutive free ports."""
    while True:
        row = [next(_ports) for _ in range(count)]
        with ExitStack() as held:
            try:
                for port in row:
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            if row[-1] - row[0] == count - 1:
                return row[0]


@dataclass
class Running:
    """A child process; as a context manager, it is terminated at the end, by force if necessary."""

    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def output(self) -> str:
        """Its output so far."""
        return self.log.read_text("utf-8", errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and wait for its end."""
        self.process.kill()
        self.process.wait(10)

    def wait(self, limit: float = 15.0 * SLOW) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(limit)

    def terminate(self, limit: float = 15.0 * SLOW) -> int:
        """Send SIGTERM, wait for its end and return the exit code."""
        self.process.terminate()
        return self.process.wait(limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)  # a stopped process does not handle SIGTERM
            self.process.terminate()
            try:
                self.process.wait(8)
            except subprocess.TimeoutExpired:
                self.kill()


def start(
    command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Running:
    """Start a command with its output in `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(env),
            cwd=cwd,
        )
    return Running(process, log)


def start_python(
    arguments: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Running:
    """Start a Python program of this checkout; `arguments` are those after `python`.

    It is forked from a process that has imported imstream, which is cheap, unless coverage or `LD_PRELOAD` need a fresh
    interpreter.
    """
    if "LD_PRELOAD" in os.environ or "COVERAGE_PROCESS_CONFIG" in os.environ:
        return start([PYTHON, *arguments], log, env=env, cwd=cwd)
    log.touch()  # it is read before the child has opened it
    return Running(ForkedProcess(arguments, log, _environment(env), cwd), log)


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of the test run without imstream settings but `IMSTREAM_USER_IDS` (users.py), plus additions."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMSTREAM_") or name == VARIABLE}
    return {**clean, **(added or {})}


def wait_for(ready: Callable[[], bool], process: Running, what: str, limit: float = 15.0 * SLOW) -> None:
    """Wait until a new process is ready. Fails with its output if it ends or takes too long."""
    deadline = time.monotonic() + limit
    while not ready():
        if process.process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{what} did not start:\n{process.output()}")
        time.sleep(0.02)


def http_status(url: str) -> int | None:
    """The status of a GET; None without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - a URL of the test's own
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
