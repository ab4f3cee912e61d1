"""Runs of the load generator against services: once, in turns, in steps up to what a service carries; and the cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ops.benchmark.load import DEADLINE
from ops.benchmark.processes import ROOT, Process, Stage, machine_cpu

SETTLE = 0.3
"""Seconds that a service gets to finish what it does after the client has its answer."""

WITHOUT_REDIS = frozenset({"floor", "usual"})

LATE = 0.050
"""A delta that reaches the client this many seconds after the backend wrote it is late."""


@dataclass(frozen=True)
class Run:
    """One load on one service.

    Attributes:
        service: Name of the service.
        load: `burst`, `paced` or `single`.
        sockets: Sockets that made it.
        seen: What the load generator saw; see `ops.benchmark.load.Seen`.
        cpu: Seconds of CPU that the service used.
        redis_cpu: Seconds of CPU that its Redis used; 0 when it has none.
        others_cpu: Seconds of CPU that the backend and the generator used.
        foreign: CPUs that were busy with something else meanwhile: the less, the more the figures tell.
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
        """Whether more than one delta in a hundred was late."""
        return bool(self.seen["late"]["p99"] >= LATE)


class Generator:
    """The load generator in its own process. Use as a context manager; inside it, its sockets are open."""

    def __init__(self, service: Process, load: str, sockets: int, seconds: float, *options: str) -> None:
        self.load = load
        self.sockets = sockets
        command = [sys.executable, "-m", "ops.benchmark.load", "--url", f"ws://127.0.0.1:{service.port}/ws"]
        command += ["--sockets", str(sockets), "--load", load, "--seconds", str(seconds), *options]
        self._popen = subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, process_group=0
        )

    def __enter__(self) -> Self:
        self.answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._popen.stdin is not None  # noqa: S101 - it was asked for
        assert self._popen.stdout is not None  # noqa: S101 - same
        self._popen.stdin.close()
        if error is not None:
            self._popen.terminate()
        try:
            self._popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()

    def answer(self) -> str:
        """The next line that it prints."""
        assert self._popen.stdout is not None  # noqa: S101 - it was asked for
        line = self._popen.stdout.readline()
        if not line:
            sys.exit("the load generator has failed; see above")
        return line

    def go(self) -> None:
        """Let it go on."""
        assert self._popen.stdin is not None  # noqa: S101 - it was asked for
        self._popen.stdin.write("go\n")
        self._popen.stdin.flush()


def measure_once(stage: Stage, name: str, generator: Generator) -> Run:
    """Make its load once, on the service for which it was started; warmed up, for it may have been idle for long."""
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
        sys.exit(f"{name}: {load} with {sockets} sockets went wrong: {seen['errors']}, {seen['chats']} chats answered")
    others = backend_cpu + seen["cpu"]
    foreign = max(0.0, all_cpu - cpu - redis_cpu - others) / seconds
    own_redis = 0.0 if name in WITHOUT_REDIS else redis_cpu
    return Run(name, load, sockets, seen, cpu, own_redis, others, foreign)


def in_turns(  # noqa: PLR0913 - what is measured, and how
    stage: Stage,
    names: Sequence[str],
    load: str,
    sockets: int,
    seconds: float,
    *options: str,
    rounds: int,
    once: Callable[[Stage, str, Generator], Run] = measure_once,
) -> list[list[Run]]:
    """Make one load on several services in turns; one list for each round. Their sockets stay open meanwhile.

    Every other round goes the other way, so that what drifts favours none. `once` makes the load once.
    """
    with ExitStack() as stack:
        generators = {
            name: stack.enter_context(Generator(stage.services[name], load, sockets, seconds, *options))
            for name in names
        }
        return [
            [once(stage, name, generators[name]) for name in (names[::-1] if number % 2 else names)]
            for number in range(rounds)
        ]


def memory_per_socket(service: Process, sockets: int) -> float:
    """Bytes by which a service grows for each idle socket. Some are opened before, so that its pools are filled."""
    with Generator(service, "idle", sockets // 10, 0):
        time.sleep(SETTLE)
        before = service.memory()
        with Generator(service, "idle", sockets, 0):
            time.sleep(SETTLE)
            return (service.memory() - before) / sockets


def capacity(stage: Stage, name: str, steps: list[int], seconds: float) -> tuple[int, list[Run]]:
    """The most paced answers at once without late deltas, among `steps`, and the runs that tell."""
    runs: list[Run] = []
    for step in steps:
        with Generator(stage.services[name], "paced", step, seconds) as generator:
            run = measure_once(stage, name, generator)
            if run.late:  # once more: another process may have held the machine
                run = measure_once(stage, name, generator)
        runs.append(run)
        if run.late:
            break
    return max((run.sockets for run in runs if not run.late), default=0), runs
