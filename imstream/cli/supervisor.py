"""Runs child processes together: started in order, stopped in order, and stopped all when an essential one exits.

Each child leads its own session, so that Ctrl-C in the terminal reaches only the supervisor, which stops the children
in order. If the supervisor is killed, the kernel kills them (see `exit_with_parent`).
"""

import asyncio
import ctypes
import os
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import click

from imstream.settings_group import ENV_PREFIX

MIN_RESTART_DELAY, MAX_RESTART_DELAY = 1.0, 30.0
"""Delay before a child is restarted, in seconds: doubled each time until the child is ready, up to the maximum."""

_POLL_INTERVAL = 0.03
_CHUNK = 65536
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def exit_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends; exit if it has ended already. Linux only.

    The setting survives `execve`, so it also covers the Valkey that a child turns into; a pipe watched by the child
    would not. SIGKILL loses nothing: accepted requests are in the append-only file.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(1)


@dataclass(frozen=True, slots=True)
class Part:
    """The program of one child process.

    Attributes:
        arguments: The imstream command, with its options.
        environment: All of its `IMSTREAM_*` variables: it inherits none, because they may hold secrets of other parts.
        start_timeout: Seconds until it must be ready; by default enough to load an append-only file of gigabytes.
        stop_timeout: Seconds from SIGTERM to SIGKILL.
        restarts: Whether it is restarted when it exits by itself after it was ready; otherwise it is essential.
        noise: Lines of its output that are not printed.
    """

    name: str
    arguments: Sequence[str]
    is_ready: Callable[[], Awaitable[bool]]
    environment: dict[str, str] = field(default_factory=dict)
    start_timeout: float = 30.0
    stop_timeout: float = 5.0
    restarts: bool = False
    noise: re.Pattern[bytes] | None = None


class _ChildFailed(Exception):  # noqa: N818 - reads as the state that it names
    """A child exited by itself, or was not ready in time. The text is for the user."""


class _Stopping(Exception):  # noqa: N818 - reads as the state that it names
    """A signal asked the supervisor to stop."""


class _Child:
    """A running part."""

    def __init__(self, part: Part, process: Process, output: asyncio.StreamReader, width: int) -> None:
        self.part = part
        self.process = process
        self.output = asyncio.create_task(_relay(output, f"{part.name:<{width}} | ", part.noise))
        self.exit = asyncio.create_task(_wait_and_reap(process))

    async def stop(self) -> bool:
        """Send SIGTERM, and SIGKILL after `stop_timeout`. Returns whether SIGTERM was enough."""
        self.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self.exit], timeout=self.part.stop_timeout)
        if not done:
            _print(f"{self.part.name} did not stop within {self.part.stop_timeout:g} s and is killed")
            self.signal(signal.SIGKILL)
        await self.exit
        await self.output
        return bool(done)

    def signal(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)


class Supervisor:
    """Starts stages in order, each after all parts of the previous one are ready; stops in the order of `stopping`."""

    def __init__(self, stages: Sequence[Sequence[Part]], stopping: Sequence[Sequence[Part]] | None = None) -> None:
        self._stages = stages
        self._stopping = stages[::-1] if stopping is None else stopping
        self._width = max(len(part.name) for stage in stages for part in stage)
        self.running: list[_Child] = []
        self._stop = asyncio.Event()
        self._failed = False

    async def run(self, announce: Callable[[], None]) -> int:
        """Run the parts until a signal or a failure; returns the exit code. Calls `announce` when all are ready."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                loop.add_signal_handler(number, self._on_signal)
        _print("starting " + ", ".join(part.name for stage in self._stages for part in stage) + " …")
        try:
            for stage in self._stages:
                for child in [await self._spawn(part) for part in stage]:
                    await self._wait_until_ready(child)
            announce()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._wait_for_signal())
                for child in self.running:
                    group.create_task(self._supervise(child))
        except* _ChildFailed as failed:
            _print(f"{failed.exceptions[0]}; stopping the rest")
            self._failed = True
        except* _Stopping:
            _print("stopping; Ctrl-C again to kill")
        finally:
            for stage in self._stopping:
                stopped = await asyncio.gather(*(child.stop() for child in self.running if child.part in stage))
                self._failed |= not all(stopped)
        return 1 if self._failed else 0

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._failed = True
            for child in self.running:
                child.signal(signal.SIGKILL)
        self._stop.set()

    async def _spawn(self, part: Part) -> _Child:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
        # With asyncio's own pipe, the child would count as running while any process holds the pipe.
        read_end, write_end = os.pipe()
        output = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb", buffering=0)
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "imstream", "--parent", str(os.getpid()), *part.arguments),
                env={**inherited, "PYTHONUNBUFFERED": "1", **part.environment},
                stdin=DEVNULL,
                stdout=write_end,
                stderr=STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        child = _Child(part, process, output, self._width)
        self.running.append(child)
        return child

    async def _wait_until_ready(self, child: _Child) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + child.part.start_timeout
        while not await child.part.is_ready():
            if child.exit.done():
                raise _ChildFailed(f"{child.part.name} exited before it was ready ({_status(child.exit.result())})")
            if self._stop.is_set():
                raise _Stopping
            if loop.time() > deadline:
                raise _ChildFailed(f"{child.part.name} is not ready after {child.part.start_timeout:g} s")
            await asyncio.sleep(_POLL_INTERVAL)

    async def _wait_for_signal(self) -> None:
        await self._stop.wait()
        raise _Stopping

    async def _supervise(self, child: _Child) -> None:
        """Restart a part whenever it exits, or raise `_ChildFailed` if it is essential."""
        part, delay = child.part, MIN_RESTART_DELAY
        while True:
            await asyncio.wait([child.exit])  # `wait` does not cancel the task when it is cancelled itself
            if self._stop.is_set():
                return
            problem = f"{part.name} exited unexpectedly ({_status(child.exit.result())})"
            if not part.restarts:
                raise _ChildFailed(problem)
            _print(f"{problem}; restarting in {delay:g} s")
            await asyncio.sleep(delay)
            await child.output
            self.running.remove(child)
            child = await self._spawn(part)
            try:
                await self._wait_until_ready(child)
            except _ChildFailed as failed:
                if not child.exit.done():
                    _print(f"{failed}")
                delay = min(2 * delay, MAX_RESTART_DELAY)
            else:
                _print(f"{part.name} is back")
                delay = MIN_RESTART_DELAY


def _status(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


async def _wait_and_reap(process: Process) -> int:
    """Wait for the exit code of a child, and kill its descendants: a killed nginx leaves workers that hold its port."""
    code = await process.wait()
    with suppress(ProcessLookupError, PermissionError):  # Linux, macOS: no descendant is left
        os.killpg(process.pid, signal.SIGKILL)
    return code


async def _relay(output: asyncio.StreamReader, prefix: str, noise: re.Pattern[bytes] | None) -> None:
    """Print the output of a child in whole lines, so that lines of two children do not mix."""
    rest = b""
    while chunk := await output.read(_CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if noise is None or not noise.search(line):
                _print(prefix.encode() + line)
    if rest:
        _print(prefix.encode() + rest)


def _print(line: str | bytes) -> None:
    """Print a line, or drop it if standard output is closed: the children must not block on full pipes."""
    with suppress(BrokenPipeError):
        click.echo(line)
