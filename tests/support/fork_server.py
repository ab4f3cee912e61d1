"""Python processes that are forked from one which has already imported imstream.

Starting an interpreter and importing a node takes 0.6 to 1.4 s of CPU; forking takes a hundredth of that. The child has
its own environment, working directory and log, and can be killed and waited for. Tests of the commands themselves
(`ops/up`, the Procfile, the supervisor) start fresh interpreters.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])

_lock = threading.Lock()
"""multiprocessing reads a child's exit code from a pipe, once; only one thread may do so at a time."""


class ForkedProcess:
    """A child process with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path | None) -> None:
        """Start the process.

        Args:
            arguments: As after `python`: `-m` and a module, or the path of a program; then its arguments.
            log: Its output is appended to this file.
            env: Its whole environment.
            cwd: Its working directory; None for that of the test run.
        """
        target = (list(arguments), str(log), dict(env), str(cwd or os.getcwd()))  # noqa: PTH109 - passed on as text
        with _lock:
            self._process = _context.Process(target=_run, args=target, daemon=True)
            self._process.start()
        pid = self._process.pid
        assert pid is not None
        self.pid = pid

    def poll(self) -> int | None:
        """Return the exit code (negative for a signal), or None while it runs."""
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises `subprocess.TimeoutExpired`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], log: str, env: dict[str, str], cwd: str) -> None:
    """Turn the child into the requested process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(out)
    os.close(nothing)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
