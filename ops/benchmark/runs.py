"""Runs of the load generator against services: once, alternating, or in steps up to the capacity of a service."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ops.benchmark.load import DEADLINE
from ops.benchmark.processes import ROOT, Process, Stage, cpu_of, machine_cpu

SETTLE = 0.3
"""Seconds that a service gets to finish its work after the client has its answer."""

WITHOUT_REDIS = frozenset({"baseline", "typical"})

LATE = 0.050
"""Seconds from the backend's write to the client from which on a delta is late."""


@dataclass(frozen=True)
class Run:
    """One load on one service.

    Attributes:
        service: Name of the service.
        load: `burst`, `paced` or `single`.
        sockets: Number of sockets.
        seen: Measurements of the load generator; see `ops.benchmark.load.Seen`.
        cpu: Seconds of CPU of the service.
        redis_cpu: Seconds of CPU of its Redis; 0 if it has none.
        others_cpu: Seconds of CPU of the backend and the generator.
        foreign: CPUs used by other processes; they make the measurement less reliable.
    """

    service: str
    load: str
    sockets: int
    seen: dict[str, Any]
    cpu: float
    redis_cpu: float
    others_cpu: float
    foreign: float

    @property
    def cost(self) -> float:
        """Seconds of CPU of the service and its Redis for 1,000 chats."""
        chats: int = self.seen["chats"]
        return (self.cpu + self.redis_cpu) / chats * 1000

    @property
    def late(self) -> bool:
        """Whether more than 1 % of the deltas were late."""
        return bool(self.seen["late"]["p99"] >= LATE)


class Child:
    """A program of the benchmark that is driven by lines. A context manager: it ends when its standard input does."""

    def __init__(self, *command: str) -> None:
        self._popen = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            process_group=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._popen.stdin is not None  # noqa: S101 - `PIPE` was passed
        assert self._popen.stdout is not None  # noqa: S101 - same
        with suppress(BrokenPipeError):  # it has ended
            self._popen.stdin.close()
        if error is not None:
            self._popen.terminate()
        try:
            self._popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return cpu_of(self._popen.pid)

    def answer(self) -> str:
        """Read the next line of its output."""
        assert self._popen.stdout is not None  # noqa: S101 - `PIPE` was passed
        line = self._popen.stdout.readline()
        if not line:
            sys.exit("the load generator failed; see above")
        return line

    def send(self, line: str) -> None:
        """Write a line to its input."""
        assert self._popen.stdin is not None  # noqa: S101 - `PIPE` was passed
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()


class Generator(Child):
    """The load generator in its own process. Inside the context, its sockets are open."""

    def __init__(self, service: Process, load: str, sockets: int, seconds: float, *options: str) -> None:
        self.load = load
        self.sockets = sockets
        command = ["ops.benchmark.load", "--url", f"ws://127.0.0.1:{service.port}/ws"]
        command += ["--sockets", str(sockets), "--load", load, "--seconds", str(seconds), *options]
        super().__init__(*command)

    def __enter__(self) -> Self:
        self.answer()
        return self

    def go(self) -> None:
        """Let it continue."""
        self.send("go")


def measure_once(stage: Stage, name: str, generator: Generator) -> Run:
    """Apply its load once to the service for which it was started, after a warm-up."""
    service, load, sockets = stage.services[name], generator.load, generator.sockets
    generator.go()
    generator.answer()
    time.sleep(SETTLE)
    began = time.monotonic()
    before = service.cpu(), stage.redis.cpu(), stage.backend.cpu(), machine_cpu()
    generator.go()
    seen = json.loads(generator.answer())
    time.sleep(SETTLE)
    after = service.cpu(), stage.redis.cpu(), stage.backend.cpu(), machine_cpu()
    seconds = time.monotonic() - began
    cpu, redis_cpu, backend_cpu, all_cpu = (end - start for start, end in zip(before, after, strict=True))
    if seen["errors"]["count"] or not seen["chats"]:
        sys.exit(f"{name}: {load} with {sockets} sockets failed: {seen['errors']}, {seen['chats']} chats answered")
    others = backend_cpu + seen["cpu"]
    foreign = max(0.0, all_cpu - cpu - redis_cpu - others) / seconds
    own_redis = 0.0 if name in WITHOUT_REDIS else redis_cpu
    return Run(name, load, sockets, seen, cpu, own_redis, others, foreign)


def alternate(  # noqa: PLR0913 - the load and its options
    stage: Stage,
    names: Sequence[str],
    load: str,
    sockets: int,
    seconds: float,
    *options: str,
    rounds: int,
    measure: Callable[[Stage, str, Generator], Run] = measure_once,
) -> list[list[Run]]:
    """Apply one load to several services alternately; one list for each round. Sockets stay open between rounds.

    Every other round has the reverse order, so that a drift of the machine favours no service.
    """
    with ExitStack() as stack:
        generators = {
            name: stack.enter_context(Generator(stage.services[name], load, sockets, seconds, *options))
            for name in names
        }
        return [
            [measure(stage, name, generators[name]) for name in (names[::-1] if number % 2 else names)]
            for number in range(rounds)
        ]


def memory_per_socket(service: Process, sockets: int) -> float:
    """Bytes of memory for each idle socket. Some are opened before, so that the pools of the service are filled."""
    with Generator(service, "idle", sockets // 10, 0):
        time.sleep(SETTLE)
        before = service.memory()
        with Generator(service, "idle", sockets, 0):
            time.sleep(SETTLE)
            return (service.memory() - before) / sockets


def capacity(stage: Stage, name: str, steps: list[int], seconds: float) -> tuple[int, list[Run]]:
    """The maximum number of concurrent paced answers without late deltas, among `steps`, and the runs."""
    runs: list[Run] = []
    for step in steps:
        with Generator(stage.services[name], "paced", step, seconds) as generator:
            run = measure_once(stage, name, generator)
            if run.late:  # again: another process may have used the machine
                run = measure_once(stage, name, generator)
        runs.append(run)
        if run.late:
            break
    return max((run.sockets for run in runs if not run.late), default=0), runs
