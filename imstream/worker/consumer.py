"""Takes requests from one stream as long as there are free slots, and takes up what a dead worker left.

The same worker runs on the node's own stream for as long as the node lives, and on an adopted one (see `adopter`) until
that is empty or its node is back.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from imstream.errors import StoreDenied, StoreError
from imstream.model import SCHEMA_VERSION, ChatRequest, MalformedEntry, NewerVersion
from imstream.store.leases import Leases
from imstream.store.requests import Entry, GroupMissing, PendingEntry
from imstream.worker.deps import WorkerDeps
from imstream.worker.disposition import MALFORMED, Bury
from imstream.worker.job import Job
from imstream.worker.jobs import Jobs, Slots
from imstream.worker.lease_keeper import LeaseKeeper

SUSPECT = 3
"""From this delivery on, a request is run beside no other suspect: if the worker dies again, it is known with which."""

_REDIS_PAUSE = 0.2
"""Seconds between two tries while Redis is away."""

log = structlog.get_logger()


class StreamConsumer:
    """The consumer of one requests stream. `run` until `stop`, or until it has left the stream."""

    def __init__(self, parts: WorkerDeps, jobs: Jobs, leases: Leases, lease_keeper: LeaseKeeper) -> None:
        self._parts = parts
        self._requests = parts.requests
        self._settings = parts.settings
        self._all_jobs = jobs
        self._leases = leases
        self._lease_keeper = lease_keeper
        self._jobs: dict[str, Job] = {}
        self._inherited: dict[str, int] | None = None
        """Deliveries of the entries that were pending when this process began: they died with the process before."""
        self._newer: set[str] = set()
        """Entries in a schema of a newer release."""
        self._newest = SCHEMA_VERSION
        self._suspect: str | None = None
        self._stopping = False
        self._leaving = False
        self._left = False
        self._reachable = False
        self._loss_told = False
        self._denied = False
        self._next_sweep = 0.0
        self._progressed = float("-inf")
        self._turned = asyncio.get_running_loop().time()

    @property
    def stopping(self) -> bool:
        """Whether new requests are taken no more."""
        return self._stopping

    @property
    def newer_requests(self) -> int:
        """How many requests are left to a node that knows their schema."""
        return len(self._newer)

    @property
    def denied(self) -> bool:
        """Whether Redis was there when last asked, and denied what it was asked for."""
        return self._denied

    def reached_redis_within(self, seconds: float) -> bool:
        """Whether the worker has heard from Redis that lately: what `/readyz` asks."""
        return self._reachable and asyncio.get_running_loop().time() - self._progressed <= seconds

    def looped_within(self, seconds: float) -> bool:
        """Whether its loop has gone round that lately, with or without Redis: what `/healthz` asks."""
        return self._stopping or asyncio.get_running_loop().time() - self._turned <= seconds

    async def run(self) -> None:
        """Take requests until `stop`, then wait for those begun. Redis may come and go meanwhile."""
        self._all_jobs.join(self)
        try:
            async with asyncio.TaskGroup() as group:
                while not self._stopping and not self._left:
                    try:
                        await self._intake(group)
                    except (StoreError, GroupMissing) as error:
                        await self._after_loss(error)
                while self._jobs:
                    await self._something_changed()
        finally:
            self._all_jobs.leave(self)

    def stop(self) -> None:
        """Take no new requests. A read that blocks ends by itself."""
        self._stopping = True
        self._all_jobs.changed.set()

    def leave(self) -> None:
        """Take no new requests; finish what was taken, also what has slipped through meanwhile, and end."""
        self._leaving = True
        self._all_jobs.changed.set()

    def stay(self) -> None:
        """Go on as ever, if it has not left by now: there is more to do."""
        if self._leaving:
            self._leaving, self._next_sweep = False, 0.0
            self._all_jobs.changed.set()

    async def _intake(self, group: asyncio.TaskGroup) -> None:
        first = self._progressed == float("-inf")
        await self._prepare(first=first)
        self._heard()
        self._next_sweep = 0.0
        while not self._stopping and not self._left:
            await self._round(group)
            self._heard()

    async def _prepare(self, *, first: bool) -> None:
        if await self._requests.ensure_group():
            if first:
                log.info("consumer group made", node=self._requests.node)
            else:
                log.error("requests stream or its group was gone and is made again: accepted requests may be lost")

    async def _round(self, group: asyncio.TaskGroup) -> None:
        if self._lease_keeper.held:
            await self._sweep_if_due(group)
        if self._leaving:
            self._left = not self._jobs and not await self._requests.pending(exclude=self._newer)
        with self._all_jobs.reserve(self._wanted(), self) as slots:
            if slots.free:
                # Another node's stream gets nothing new, or hardly ever: no connection is kept for waiting there.
                block = self._settings.read_block if self._requests.is_own else None
                for entry in await self._requests.read(count=slots.free, block=block):
                    if entry.entry_id in self._jobs:
                        continue  # a group that was made again delivers it once more
                    if self._may_begin():
                        await self._start(group, entry, slots)
                    else:
                        await self._put_off(entry)
                if self._requests.is_own:
                    await self._let_them_begin()
                    return
        await self._wait_for_change()
        await self._requests.ping()

    async def _let_them_begin(self) -> None:
        """Let the jobs just started ask Redis before it is asked for more: somebody waits for them."""
        await asyncio.sleep(0)  # they queue their commands
        await asyncio.sleep(0)  # which leave

    async def _put_off(self, entry: Entry) -> None:
        """Leave for the sweep what a read brought that was blocked when the backend began to want a pause."""
        await self._requests.hand_back(entry)
        self._next_sweep = 0.0

    def _wanted(self) -> int:
        """How many requests to ask for."""
        return 0 if self._leaving or not self._lease_keeper.held else self._may_begin()

    def _may_begin(self) -> int:
        """How many requests may be begun: none while the backend wants a pause, one to try whether it is back."""
        breaker = self._parts.breaker
        if breaker.remaining() > 0:
            return 0
        return 1 if breaker.tripped else self._settings.concurrency

    async def _wait_for_change(self) -> None:
        """Wait for a free slot or the end of a pause, but not so long that the node seems stuck."""
        limit = self._settings.read_block.total_seconds()
        pause = self._parts.breaker.remaining()
        try:
            async with asyncio.timeout(min(limit, pause) if pause else limit):
                await self._something_changed()
        except TimeoutError:
            return

    async def _something_changed(self) -> None:
        self._all_jobs.changed.clear()
        await self._all_jobs.changed.wait()

    async def _sweep_if_due(self, group: asyncio.TaskGroup) -> None:
        """Take up what is pending and not worked on: left by a process that died, or lost on its way."""
        now = asyncio.get_running_loop().time()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._settings.sweep_interval.total_seconds()
        if self._inherited is None:  # only now: the deliveries were looked through when the lease was taken
            await self._inherit()
        busy = {*self._jobs, *self._newer}
        pending = await self._requests.pending(exclude=busy)
        if not self._lease_keeper.can_declare_dead:
            self._next_sweep = 0.0  # for those of the dead, as soon as they can be told from the living
        elif not self._leaving:
            for consumer in await self._dead_consumers():
                died = not await self._leases.redis_restarted_since(consumer)
                left = await self._requests.pending(consumer, exclude=busy)
                pending += [replace(one, deliveries=one.deliveries + died) for one in left]
        for one in pending:
            with self._all_jobs.reserve(min(1, self._may_begin()), self) as slots:
                if not slots.free:
                    self._next_sweep = 0.0  # the next that may begin is the next of these, not a newer request
                    return
                await self._take_up(group, one, slots)

    async def _inherit(self) -> None:
        """Note what is pending under our name before this process takes anything: it ended with the one before."""
        # In the node's own stream, the script that took the lease has judged that.
        died = self._requests.is_own or not self._lease_keeper.redis_restarted
        self._inherited = {one.entry_id: one.deliveries + died for one in await self._requests.pending()}

    async def _dead_consumers(self) -> list[str]:
        """The nodes that took from this stream, have not finished, and hold no lease; those without a request go."""
        others = await self._requests.other_consumers()
        if not others:
            return []
        left = await self._leases.time_left(others)
        dead = [consumer for consumer in others if left[consumer] is None]
        for consumer in dead:
            if others[consumer] == 0 and consumer != self._requests.node:
                await self._requests.remove_consumer(consumer)
        return [consumer for consumer in dead if others[consumer] > 0]

    async def _take_up(self, group: asyncio.TaskGroup, pending: PendingEntry, slots: Slots) -> None:
        inherited = self._inherited or {}
        # A sum made now would count a claim twice whose answer was lost.
        deliveries = max(1, inherited.get(pending.entry_id, pending.deliveries))
        # One that is to be buried is run no more, so it needs no isolation and waits for nobody.
        suspect = SUSPECT <= deliveries <= self._settings.max_deliveries
        if suspect and self._suspect is not None:
            return
        entry = await self._requests.claim(pending, deliveries=deliveries)
        inherited.pop(pending.entry_id, None)
        if entry is None:
            return
        log.info("request taken up again", of=self._requests.node, entry=entry.entry_id, deliveries=deliveries)
        await self._start(group, entry, slots)
        if suspect and entry.entry_id in self._jobs:
            self._suspect = entry.entry_id

    async def _start(self, group: asyncio.TaskGroup, entry: Entry, slots: Slots) -> None:
        verdict = None
        try:
            request = ChatRequest.from_fields(entry.fields, entry.entry_id)
        except NewerVersion as error:
            await self._leave_to_newer(entry, error.version)
            return
        except MalformedEntry as error:
            if error.partial is None:
                log.error("request buried", reason=MALFORMED, error=str(error), entry=entry.entry_id)  # noqa: TRY400 - no defect
                await self._requests.bury(entry, reason=MALFORMED, error=str(error), attempts=0)
                return
            request, verdict = error.partial, Bury(MALFORMED, str(error))
        if verdict is None and self._parts.breaker.tripped:
            self._parts.breaker.record_probe()
        job = self._jobs[entry.entry_id] = Job(entry, request, self._parts, verdict)
        self._all_jobs.add(job, slots)
        group.create_task(self._work(job))

    async def _leave_to_newer(self, entry: Entry, version: int) -> None:
        """Leave a request that a newer release wrote pending, under the name of the node whose stream it is."""
        if version > self._newest:
            self._newest = version
            log.error(
                "requests of a newer release are left to a node that knows it",
                of=self._requests.node,
                entry=entry.entry_id,
                version=version,
                known=SCHEMA_VERSION,
            )
        await self._requests.hand_back(entry, to=self._requests.node)
        self._newer.add(entry.entry_id)

    async def _work(self, job: Job) -> None:
        try:
            if self._stopping:  # it was on its way when the node was told to stop
                await job.uncount_delivery()
            await job.run()
        except StoreError as error:
            # The end is recorded; the entry is still pending, and the next sweep finishes it.
            log.warning("redis away, request will be taken up again", entry=job.entry.entry_id, error=str(error))
        except Exception:
            # Its reply stream holds what only a hand from outside can have written. The others must go on.
            log.exception("request cannot be ended, will be taken up again", entry=job.entry.entry_id)
        finally:
            del self._jobs[job.entry.entry_id]
            if self._suspect == job.entry.entry_id:
                self._suspect, self._next_sweep = None, 0.0
            self._all_jobs.remove(job)

    def _heard(self) -> None:
        self._progressed = self._turned = asyncio.get_running_loop().time()
        if not self._reachable:
            self._reachable = True
            self._loss_told = self._denied = False
            if self._requests.is_own:
                log.info("redis reached", node=self._requests.node)

    async def _after_loss(self, error: Exception) -> None:
        self._turned = asyncio.get_running_loop().time()
        if isinstance(error, GroupMissing):
            log.warning("redis says that the requests stream or its group is gone", error=str(error))
        elif isinstance(error, StoreDenied):
            pass  # the connection has said so, and how to mend it
        elif self._lease_keeper.stall.stalled_recently():
            await asyncio.sleep(_REDIS_PAUSE)
            return  # it has said so; whether Redis is there will be seen
        elif not self._loss_told and self._requests.is_own:
            log.error("redis lost" if self._reachable else "redis not reached", error=str(error))
            self._loss_told = True
        self._denied = isinstance(error, StoreDenied)
        self._reachable = False
        await asyncio.sleep(_REDIS_PAUSE)
