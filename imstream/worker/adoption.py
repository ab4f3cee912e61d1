"""Finds the streams of nodes that are dead, and has them worked on here until they are empty or their node is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import structlog

from imstream.errors import StoreError
from imstream.settings import Settings
from imstream.store.adoption import Adoption, NotAdopted
from imstream.store.leases import Leases
from imstream.worker.consumer import StreamConsumer
from imstream.worker.lease_keeper import LeaseKeeper

_SOON = 0.05
"""Seconds after the end of a lease at which others look again; and the least between two looks."""

_UNSURE = 0.2
"""Seconds between two looks while it cannot be told who is dead: at the start, and after Redis was away."""

log = structlog.get_logger()


class Adopter:
    """Looks after the streams of dead nodes. `run` until `stop`."""

    def __init__(
        self,
        settings: Settings,
        adoption: Adoption,
        leases: Leases,
        lease_keeper: LeaseKeeper,
        make_consumer: Callable[[str], StreamConsumer],
    ) -> None:
        self._settings = settings
        self._adoption = adoption
        self._leases = leases
        self._lease_keeper = lease_keeper
        self._make_consumer = make_consumer
        self._adopted: dict[str, StreamConsumer] = {}
        self._searched: set[str] = set()
        """Nodes in whose streams nothing is pending under our name that this process does not know of."""
        self._told: dict[str, str] = {}
        """What was logged about nodes whose streams cannot be looked at: once, and not at each look."""
        self._newer: dict[str, int] = {}
        """How many requests there are in the streams of nodes that only a newer release knows."""
        self._interval = settings.lease.total_seconds() / 3
        self._look = asyncio.Event()
        self._stopping = False

    @property
    def adopted(self) -> list[str]:
        """The nodes whose streams are looked after here."""
        return list(self._adopted)

    def scan_now(self) -> None:
        """A node is said to have gone."""
        self._look.set()

    def stop(self) -> None:
        """Adopt nothing more, take nothing more from what was adopted."""
        self._stopping = True
        for worker in self._adopted.values():
            worker.stop()
        self._look.set()

    async def run(self) -> None:
        """Look for dead nodes until `stop`, then wait for what was begun."""
        async with asyncio.TaskGroup() as group:
            while not self._stopping:
                try:
                    pause = await self._look_around(group)
                except StoreError:
                    pause = self._interval  # the worker says that Redis is away
                await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._look.wait()
        except TimeoutError:
            return
        self._look.clear()

    async def _look_around(self, group: asyncio.TaskGroup) -> float:
        """Adopt what can be adopted; seconds until the next look: at the end of the lease that ends first."""
        seen = await self._leases.other_nodes()
        left = await self._leases.time_left(seen)
        for node, since in seen.items():
            try:
                if self._lease_keeper.can_declare_dead and left[node] is None and node not in self._adopted:
                    await self._consider(group, node, since)
                if self._lease_keeper.held and node not in self._adopted and node not in self._searched:
                    await self._search(group, node)
            except StoreError as error:  # the others may be on a part of Redis that is well
                if self._told.get(node) != str(error):
                    self._told[node] = str(error)
                    log.warning("stream of another node cannot be looked at", node=node, error=str(error))
            else:
                self._told.pop(node, None)
        alive = [span.total_seconds() + _SOON for span in left.values() if span is not None]
        unsure = [] if self._lease_keeper.can_declare_dead else [_UNSURE]
        return max(_SOON, min([self._interval, *alive, *unsure]))

    async def _consider(self, group: asyncio.TaskGroup, node: str, since: timedelta) -> None:
        unfinished = await self._adoption.unfinished(node)
        if 0 < unfinished == self._newer.get(node):
            return  # for a node that knows them
        if unfinished == 0:
            if since > self._settings.retire_after and await self._adoption.retire(node):
                log.info("node retired", node=node, unseen=str(since))
            return
        verdict = await self._adoption.adopt(node)
        if isinstance(verdict, NotAdopted):
            return
        if self._stopping:  # somebody else must not wait for the end of our time
            await self._leave(node)
            return
        log.warning("stream of a dead node adopted", node=node, unfinished=verdict.unfinished)
        self._begin(group, node, self._make_consumer(node))

    async def _search(self, group: asyncio.TaskGroup, node: str) -> None:
        """Take up what an earlier process of ours had adopted and not finished: nobody else does while both live."""
        if not await self._adoption.has_pending(node):
            await self._adoption.release_stream(
                node
            )  # the node itself may have taken it up, and our consumer is still there
        elif not self._stopping:
            log.info("taking up what was adopted before", node=node)
            worker = self._make_consumer(node)
            worker.leave()
            self._begin(group, node, worker)
        self._searched.add(node)

    def _begin(self, group: asyncio.TaskGroup, node: str, worker: StreamConsumer) -> None:
        self._adopted[node] = worker
        group.create_task(self._look_after(node, worker), name=f"adopted-{node}")

    async def _look_after(self, node: str, worker: StreamConsumer) -> None:
        working = asyncio.create_task(worker.run(), name=f"worker-{node}")
        try:
            while not (await asyncio.wait([working], timeout=self._interval))[0]:
                await self._go_on_or_leave(node, worker)
            await working
        finally:
            working.cancel()
            del self._adopted[node]
            self._newer[node] = worker.newer_requests
        await self._leave(node)

    async def _go_on_or_leave(self, node: str, worker: StreamConsumer) -> None:
        try:
            verdict = await self._adoption.adopt(node)
        except StoreError:
            return  # not known: what is read meanwhile is read once all the same
        if isinstance(verdict, NotAdopted) or verdict.unfinished <= worker.newer_requests:
            worker.leave()
        else:  # also when the node was back and has died again while the last answers of its life before are made
            worker.stay()

    async def _leave(self, node: str) -> None:
        try:
            left = await self._adoption.release_stream(node)
        except StoreError as error:
            log.warning("adopted stream not left in good order", node=node, error=str(error))
            return
        log.info("adopted stream left", node=node, finished=left)
