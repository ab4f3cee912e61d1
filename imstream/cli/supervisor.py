"""Runs child processes together: started in order, stopped in order, and those that matter never alone.

When a child ends by itself all end, unless it is one that the others can miss for a moment: it is started again.

A child leads a session of its own, so that a Ctrl-C in the terminal reaches only the supervisor, which then stops
them in order. If the supervisor dies without doing that, the kernel ends them (see `parent`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import click

from imstream.settings import ENV_PREFIX

START_LIMIT = 30.0
"""Seconds a child may take until it serves: an append-only file of gigabytes is loaded in that time."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a child that has ended is started again: doubled each time until it serves, up to the second one."""

_TRY_AGAIN = 0.03
_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Part:
    """One child process.

    Attributes:
        name: What its lines of output start with.
        arguments: The imstream command it runs, with its options.
        environment: Its `IMSTREAM_*` variables, all of them: secrets of other parts are not inherited.
        serves: Tells whether it answers.
        patience: Seconds it gets to stop after SIGTERM; then it is killed.
        restarts: Whether it is started again when it ends by itself after it has served; otherwise all end with it.
    """

    name: str
    arguments: Sequence[str]
    serves: Callable[[], Awaitable[bool]]
    environment: dict[str, str] = field(default_factory=dict)
    patience: float = 5.0
    restarts: bool = False


class _Ended(Exception):  # noqa: N818 - reads as the state that it names
    """A child ended by itself, or never served. The text is for the person at the terminal."""


class _Stopping(Exception):  # noqa: N818 - reads as the state that it names
    """The person at the terminal, or the system, asked for the end."""


class _Child:
    """A running part."""

    def __init__(
        self, part: Part, process: asyncio.subprocess.Process, output: asyncio.StreamReader, width: int
    ) -> None:
        self.part = part
        self.process = process
        self.output = asyncio.create_task(_relay(output, f"{part.name:<{width}} | "))
        self.end = asyncio.create_task(_end(process))

    async def stop(self) -> bool:
        """SIGTERM, and SIGKILL when its patience is over; whether it stopped by itself."""
        self.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self.end], timeout=self.part.patience)
        if not done:
            _say(f"{self.part.name} did not stop within {self.part.patience:g} s and is killed")
            self.signal(signal.SIGKILL)
        await self.end
        await self.output
        return bool(done)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.process.returncode is None:
            self.process.send_signal(number)


class Supervisor:
    """Runs stages of parts: those of one stage start together, when all of the stage before it serve.

    Args:
        stages: The parts in the order in which they start.
        stopping: The parts in the order in which they stop; when left out, the opposite.

    Attributes:
        running: The children as they are now.
    """

    def __init__(self, stages: Sequence[Sequence[Part]], stopping: Sequence[Sequence[Part]] | None = None) -> None:
        self._stages = stages
        self._stopping = stages[::-1] if stopping is None else stopping
        self._width = max(len(part.name) for stage in stages for part in stage)
        self.running: list[_Child] = []
        self._stop = asyncio.Event()
        self._failed = False

    async def run(self, announce: Callable[[], None]) -> int:
        """Run the parts until a signal or until one of them ends; returns the exit code: 0 when all stopped in order.

        Args:
            announce: Called when all parts serve.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                loop.add_signal_handler(number, self._signalled)
        _say("starting " + ", ".join(part.name for stage in self._stages for part in stage) + " …")
        try:
            for stage in self._stages:
                await self._start(stage)
            announce()
            await self._watch()
        except* _Ended as ended:
            _say(f"{ended.exceptions[0]}; stopping the rest")
            self._failed = True
        except* _Stopping:
            _say("stopping; Ctrl-C again to kill")
        finally:
            await self._stop_all()
        return 1 if self._failed else 0

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._failed = True
            for child in self.running:
                child.signal(signal.SIGKILL)
        self._stop.set()

    async def _start(self, stage: Sequence[Part]) -> None:
        started = [await self._spawn(part) for part in stage]
        for child in started:
            await self._wait_until_serving(child)

    async def _spawn(self, part: Part) -> _Child:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
        output, its_end = await _open_pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "imstream", "--parent", str(os.getpid()), *part.arguments),
                env={**inherited, "PYTHONUNBUFFERED": "1", **part.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=its_end,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(its_end)
        child = _Child(part, process, output, self._width)
        self.running.append(child)
        return child

    async def _wait_until_serving(self, child: _Child) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_LIMIT
        while not await child.part.serves():
            if child.end.done():
                raise _Ended(f"{child.part.name} ended before it served ({_how(child.end.result())})")
            if self._stop.is_set():
                raise _Stopping
            if loop.time() > deadline:
                raise _Ended(f"{child.part.name} does not serve after {START_LIMIT:g} s")
            await asyncio.sleep(_TRY_AGAIN)

    async def _watch(self) -> None:
        """Look after all children, until one ends for good or the end is asked for."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._wait_for_signal())
            for child in self.running:
                group.create_task(self._look_after(child))

    async def _wait_for_signal(self) -> None:
        await self._stop.wait()
        raise _Stopping

    async def _look_after(self, child: _Child) -> None:
        """Start a part again whenever it ends, if it is one of those; otherwise raise when it has ended."""
        part, pause = child.part, FIRST_PAUSE
        while True:
            await asyncio.wait([child.end])  # not the task itself: whoever is cancelled here must not cancel it
            if self._stop.is_set():
                return
            what = f"{part.name} ended by itself ({_how(child.end.result())})"
            if not part.restarts:
                raise _Ended(what)
            _say(f"{what}; starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            await child.output
            self.running.remove(child)
            child = await self._spawn(part)
            pause = FIRST_PAUSE if await self._came_back(child) else min(2 * pause, LONGEST_PAUSE)

    async def _came_back(self, child: _Child) -> bool:
        try:
            await self._wait_until_serving(child)
        except _Ended as ended:
            if not child.end.done():
                _say(f"{ended}")
            return False
        _say(f"{child.part.name} is back")
        return True

    async def _stop_all(self) -> None:
        for stage in self._stopping:
            stopped = await asyncio.gather(*(child.stop() for child in self.running if child.part in stage))
            self._failed |= not all(stopped)


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


async def _end(process: asyncio.subprocess.Process) -> int:
    """Wait for the end of a child, and end what it leaves behind; gives its exit code.

    A killed nginx leaves its worker processes, which would hold its port and our pipe.
    """
    code = await process.wait()
    with suppress(ProcessLookupError, PermissionError):  # nothing is left, as Linux and as macOS say it
        os.killpg(process.pid, signal.SIGKILL)
    return code


async def _open_pipe() -> tuple[asyncio.StreamReader, int]:
    """A pipe for the output of a child: what we read, and its end of it.

    With a pipe of asyncio's own, the child would count as running until the last process that holds the pipe has ended.
    """
    our_end, its_end = os.pipe()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_end, "rb", buffering=0)
    )
    return reader, its_end


async def _relay(output: asyncio.StreamReader, prefix: str) -> None:
    """Print what a child says, line by line, so that lines of two children do not mix."""
    rest = b""
    while chunk := await output.read(_CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _say(prefix.encode() + line)
    if rest:
        _say(prefix.encode() + rest)


def _say(line: str | bytes) -> None:
    """Print a line. When nobody listens any more it is lost: who then stopped reading a child would block it."""
    with suppress(BrokenPipeError):
        click.echo(line)
