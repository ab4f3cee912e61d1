"""Takes requests from the node's stream as long as there are free slots, and takes up what a dead worker left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from imstream.disposition import MALFORMED
from imstream.errors import StoreError, StoreUnavailable
from imstream.store.requests import ChatRequest, GroupMissing, Malformed
from imstream.worker.job import Job, Parts, Stop

if TYPE_CHECKING:
    from imstream.store.replies import Receipt
    from imstream.store.requests import Entry, Pending

SUSPECT = 3
"""From this delivery on, a request is run beside no other suspect: if the worker dies again, it is known with which."""

_REDIS_PAUSE = 0.2
"""Seconds between two tries while Redis is away."""

log = structlog.get_logger()


class Worker:
    """The consumer of one requests stream. `run` until `stop`; `drain` ends what is still running."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._requests = parts.requests
        self._settings = parts.settings
        self._jobs: dict[str, Job] = {}
        self._inherited: dict[str, int] = {}
        """Deliveries of the entries that were pending when this process began: they died with the process before."""
        self._suspect: str | None = None
        self._stopping = False
        self._draining = False
        self._reachable = False
        self._changed = asyncio.Event()
        """A job has ended, or the worker shall stop: look again."""
        self._next_sweep = 0.0
        self._progressed = float("-inf")

    @property
    def stopping(self) -> bool:
        """Whether new requests are taken no more."""
        return self._stopping

    @property
    def running(self) -> int:
        """How many requests are being worked on."""
        return len(self._jobs)

    def progressed_within(self, seconds: float) -> bool:
        """Whether the worker has heard from Redis that lately: what `/readyz` asks."""
        return self._reachable and asyncio.get_running_loop().time() - self._progressed <= seconds

    def is_working_on(self, user_id: int, message_id: str) -> bool:
        """Whether an answer to this message is being made here."""
        return self._job_of(user_id, message_id) is not None

    async def run(self) -> None:
        """Take requests until `stop`, then wait for those begun. Redis may come and go meanwhile."""
        async with asyncio.TaskGroup() as group:
            flusher = group.create_task(self._flush_loop(), name="flusher")
            while not self._stopping:
                try:
                    await self._intake(group)
                except (StoreError, GroupMissing) as error:
                    await self._after_loss(error)
            while self._jobs:
                self._changed.clear()
                await self._changed.wait()
            flusher.cancel()

    def stop(self) -> None:
        """Take no new requests. A read that blocks ends by itself."""
        self._stopping = True
        self._changed.set()

    def drain(self) -> None:
        """End the running answers, and leave their requests pending for whoever takes them up."""
        self._draining = True
        for job in self._jobs.values():
            job.stop(Stop.DRAINED)

    async def cancel(self, user_id: int, message_id: str) -> Receipt:
        """Cancel a message wherever it is: at once when it is worked on here. Raises `StoreError`."""
        job = self._job_of(user_id, message_id)
        if job is None:
            receipt = await self._parts.replies.cancel(user_id, message_id)
            record = await self._parts.replies.read(user_id, message_id) if receipt == "cancelled" else None
            if record is not None:
                self._parts.board.get(user_id, message_id).load(record)
            return receipt
        job.stop(Stop.CANCELLED)
        try:
            async with asyncio.timeout(2 * self._settings.redis_timeout.total_seconds()):
                await job.ended.wait()
        except TimeoutError:
            raise StoreUnavailable("the end of the answer cannot be recorded now") from None
        if job.reply.terminal is None:
            raise StoreUnavailable("the end of the answer was not recorded")
        return "cancelled" if job.reply.terminal.event == "cancelled" else "too_late"

    async def _intake(self, group: asyncio.TaskGroup) -> None:
        first = self._progressed == float("-inf")
        if await self._requests.prepare():
            if first:
                log.info("consumer group made", node=self._requests.node)
            else:
                log.error("requests stream or its group was gone and is made again: accepted requests may be lost")
        if first:
            self._inherited = {one.entry_id: one.deliveries + 1 for one in await self._requests.pending()}
        self._heard()
        self._next_sweep = 0.0
        while not self._stopping:
            await self._sweep_if_due(group)
            wanted = self._wanted()
            if wanted == 0:
                await self._wait_for_change()
                await self._requests.ping()
                self._heard()
                continue
            for entry in await self._requests.read(count=wanted, block=self._settings.read_block):
                if entry.entry_id not in self._jobs:  # a group that was made again delivers it once more
                    await self._start(group, entry)
            self._heard()

    def _wanted(self) -> int:
        """How many requests to ask for: none while the backend wants a pause, one to try whether it is back."""
        breaker = self._parts.breaker
        free = self._settings.concurrency - len(self._jobs)
        if breaker.remaining() > 0:
            return 0
        return min(free, 1) if breaker.tripped else free

    async def _wait_for_change(self) -> None:
        """Wait for a free slot or the end of a pause, but not so long that the node seems stuck."""
        self._changed.clear()
        limit = self._settings.read_block.total_seconds()
        pause = self._parts.breaker.remaining()
        try:
            async with asyncio.timeout(min(limit, pause) if pause else limit):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _sweep_if_due(self, group: asyncio.TaskGroup) -> None:
        """Take up what is pending under our name and not worked on: left by a process that died, or lost on its way."""
        now = asyncio.get_running_loop().time()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._settings.sweep_interval.total_seconds()
        for pending in await self._requests.pending(besides=self._jobs):
            if len(self._jobs) >= self._settings.concurrency:
                self._next_sweep = 0.0  # the next free slot is for the next of these, not for a newer request
                return
            await self._take_up(group, pending)

    async def _take_up(self, group: asyncio.TaskGroup, pending: Pending) -> None:
        # A sum made now would count a claim twice whose answer was lost.
        deliveries = self._inherited.get(pending.entry_id, pending.deliveries)
        # One that is to be buried is run no more, so it needs no isolation and waits for nobody.
        suspect = SUSPECT <= deliveries <= self._settings.max_deliveries
        if suspect and self._suspect is not None:
            return
        entry = await self._requests.claim(pending, deliveries=deliveries)
        self._inherited.pop(pending.entry_id, None)
        if entry is not None:
            log.info("request taken up again", entry=entry.entry_id, deliveries=deliveries)
            await self._start(group, entry)
            if suspect and entry.entry_id in self._jobs:
                self._suspect = entry.entry_id

    async def _start(self, group: asyncio.TaskGroup, entry: Entry) -> None:
        try:
            request = ChatRequest.from_fields(entry.fields)
        except Malformed as error:
            log.error("request buried", reason=MALFORMED, error=str(error), entry=entry.entry_id)  # noqa: TRY400
            await self._requests.bury(entry, reason=MALFORMED, error=str(error), attempts=0)
            return
        if self._parts.breaker.tripped:
            self._parts.breaker.probing()
        job = self._jobs[entry.entry_id] = Job(entry, request, self._parts)
        if self._draining:  # it was on its way when the worker was told
            job.stop(Stop.DRAINED)
        group.create_task(self._work(job))

    async def _work(self, job: Job) -> None:
        try:
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
            self._changed.set()

    def _job_of(self, user_id: int, message_id: str) -> Job | None:
        for job in self._jobs.values():
            if job.request.message_id == message_id and job.request.user_id == user_id:
                return job
        return None

    async def _flush_loop(self) -> None:
        interval = self._settings.flush_interval.total_seconds()
        while True:
            await asyncio.sleep(interval)
            await self._flush_all()

    async def _flush_all(self) -> None:
        behind = [job for job in self._jobs.values() if job.behind]
        results = await asyncio.gather(*(job.flush() for job in behind), return_exceptions=True)
        for job, error in zip(behind, results, strict=True):
            if error is not None:
                log.error("text cannot be recorded", entry=job.entry.entry_id, exc_info=error)

    def _heard(self) -> None:
        self._progressed = asyncio.get_running_loop().time()
        if not self._reachable:
            self._reachable = True
            log.info("redis reached", node=self._requests.node)

    async def _after_loss(self, error: Exception) -> None:
        if isinstance(error, GroupMissing):
            log.warning("redis says that the requests stream or its group is gone", error=str(error))
        elif self._reachable:
            log.error("redis lost", error=str(error))
        self._reachable = False
        await asyncio.sleep(_REDIS_PAUSE)
