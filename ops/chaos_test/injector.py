"""Injects the faults of a schedule."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from ops.chaos_test.network import Network
from ops.chaos_test.parts import Part
from ops.chaos_test.schedule import NODE_KINDS, Fault, Kind
from ops.chaos_test.stage import Stage

LEAVER_DIES = 0.3
"""Share of the duration after which one node is killed for good."""


class Injector:
    """Injects faults, and logs them with the time of day, for comparison with the logs of the processes.

    Attributes:
        injected: Number of faults, by kind.
    """

    def __init__(self, stage: Stage, network: Network, log: TextIO) -> None:
        self.injected: Counter[str] = Counter()
        self._stage = stage
        self._network = network
        self._log = log

    async def run(self, faults: Sequence[Fault], seconds: float) -> None:
        """Inject faults for this time, and wait until the last outage is over."""
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                group.create_task(self._inject_at(fault))
            group.create_task(self._kill_leaver(seconds * LEAVER_DIES))
            await asyncio.sleep(seconds)

    async def _inject_at(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at)
        part = self._part(fault)
        if part is None and fault.kind is not Kind.CLIENT_DROP:
            return
        self.injected[fault.kind] += 1
        if part is None:
            self._network.drop(fault.target)
            return
        self.note(f"{fault.kind}: {part.name}, back after {fault.outage:.1f} s")
        await self._inject(fault, part)
        self.note(f"back: {part.name}")

    async def _inject(self, fault: Fault, part: Part) -> None:
        match fault.kind:
            case Kind.NODE_FREEZE | Kind.REDIS_FREEZE:
                part.freeze()
                await asyncio.sleep(fault.outage)
                part.thaw()
                return
            case Kind.NODE_RESTART | Kind.BALANCER_RESTART:
                await part.terminate()
            case _:
                await part.kill()
        await asyncio.sleep(fault.outage)
        await part.start()

    def _part(self, fault: Fault) -> Part | None:
        stage = self._stage
        if fault.kind in NODE_KINDS:
            return stage.nodes[fault.target]
        return {
            Kind.REDIS_KILL: stage.redis,
            Kind.REDIS_FREEZE: stage.redis,
            Kind.AI_KILL: stage.ai,
            Kind.BALANCER_RESTART: stage.balancer,
        }.get(fault.kind)

    async def _kill_leaver(self, after: float) -> None:
        await asyncio.sleep(after)
        self.injected["node killed for good"] += 1
        self.note(f"killed for good: {self._stage.leaver.name}")
        await self._stage.leaver.kill()

    def note(self, what: str) -> None:
        """Write a line to the log."""
        now = time.time()
        self._log.write(f"{time.strftime('%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03} {what}\n")
        self._log.flush()
