"""Real processes for tests: started on free ports, ended by the pid that was started."""

from __future__ import annotations

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
from tests.support.waiting import SLOW

PYTHON = sys.executable


_FIRST, _LAST, _SHARES = 10_000, 30_000, 8


def _own_ports() -> Iterator[int]:
    """The ports of this process of the test run, round and round, beginning anywhere.

    They lie below those that Linux gives to outgoing connections, and no two of the processes that run tests at the
    same time share one: what a server that was killed has left is still free when it starts again.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = (_LAST - _FIRST) // _SHARES
    first = _FIRST + worker % _SHARES * count
    start = random.randrange(count)  # noqa: S311 - no secret
    for number in itertools.count(start):
        yield first + number % count


_ports = _own_ports()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    return consecutive_ports(1)


def consecutive_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on now."""
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
    """A child process. Use as a context manager: it is ended on leaving, by force if it must be."""

    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def output(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text("utf-8", errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(10)

    def wait(self, limit: float = 15.0 * SLOW) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(limit)

    def terminate(self, limit: float = 15.0 * SLOW) -> int:
        """SIGTERM, and wait for its end; the exit code."""
        self.process.terminate()
        return self.process.wait(limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)  # a stopped process would not end
            self.process.terminate()
            try:
                self.process.wait(8)
            except subprocess.TimeoutExpired:
                self.kill()


def start(
    command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Running:
    """Start a command; what it prints goes to `log`."""
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
    """Start a Python program of this checkout, given as what would follow `python` on the command line.

    It is forked from a process that has imported imstream, which is cheap; not when its coverage is measured or a
    library is loaded before it, both of which begin with the interpreter.
    """
    if "LD_PRELOAD" in os.environ or "COVERAGE_PROCESS_CONFIG" in os.environ:
        return start([PYTHON, *arguments], log, env=env, cwd=cwd)
    log.touch()  # it is looked at before the child has opened it
    return Running(ForkedProcess(arguments, log, _environment(env), cwd), log)


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of the test run without settings of imstream, and what is added."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMSTREAM_")}
    return {**clean, **(added or {})}


def wait_for(ready: Callable[[], bool], process: Running, what: str, limit: float = 15.0 * SLOW) -> None:
    """Wait until a process that was just started is ready. Fails with its output when it ends or takes too long."""
    deadline = time.monotonic() + limit
    while not ready():
        if process.process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{what} did not start:\n{process.output()}")
        time.sleep(0.02)


def http_status(url: str) -> int | None:
    """The status of a GET, None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - a URL of the test's own
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
