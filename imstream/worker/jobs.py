"""The jobs of one node, whichever stream their requests came from, and the free slots for more."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from imstream.errors import StoreUnavailable
from imstream.redis.errors import retry_until_available
from imstream.store.inbox import ReplyGrew
from imstream.store.replies import CancelRecorded
from imstream.worker.job import Stop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imstream.reply_buffer import ReplyBuffers
    from imstream.settings import Settings
    from imstream.store.inbox import Inbox
    from imstream.store.replies import CancelOutcome, ReplyStore
    from imstream.worker.consumer import StreamConsumer
    from imstream.worker.job import Job

UNREAD_ROUNDS = 3
"""Rounds in which an answer is recorded once while nobody reads it on another node. Its own sockets never wait for the
record, and a batch costs a node and Redis 40 to 60 µs of CPU."""

TOGETHER = 32
"""Most answers that are recorded at once; then everything else has its turn. To record 400 paced answers a third at a
time, and that in such parts, takes a node 5 % less CPU than to record all of them at once."""

log = structlog.get_logger()


@dataclass
class Slots:
    """Slots that are reserved for jobs. `free`: how many are left."""

    free: int


class Jobs:
    """What this node works on, and how much more it may take. Its workers share the slots."""

    def __init__(self, settings: Settings, replies: ReplyStore, buffers: ReplyBuffers, inbox: Inbox) -> None:
        self._settings = settings
        self._replies = replies
        self._buffers = buffers
        self._inbox = inbox
        self._jobs: list[Job] = []
        self._free = settings.concurrency
        self._draining = False
        self._left: Counter[str] | None = None
        """Once the node was told to stop: requests whose jobs have ended without them, by the node of their stream."""
        self._workers: set[StreamConsumer] = set()
        self._next: StreamConsumer | None = None
        """Who found no free slot and gets the next: else the one that waits for requests would keep the last."""
        self.changed = asyncio.Event()
        """A job has ended, or a worker shall stop: look again."""

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def free_slots(self) -> int:
        """How many more jobs there may be."""
        return self._settings.concurrency - len(self._jobs)

    def join(self, worker: StreamConsumer) -> None:
        """A worker shares the slots from now on."""
        self._workers.add(worker)

    def leave(self, worker: StreamConsumer) -> None:
        """It takes none any more."""
        self._workers.discard(worker)
        self._forget(worker)

    @contextmanager
    def reserve(self, most: int, worker: StreamConsumer) -> Iterator[Slots]:
        """Reserve up to so many free slots for a worker, and give back on leaving what no job was added to.

        Who shares them with other workers gets half, so that some are left for the next one that asks. Who gets none
        is the next to get one.
        """
        free = self._free if len(self._workers) <= 1 else (self._free + 1) // 2
        if self._next not in (None, worker):
            free = min(free, self._free - 1)
        slots = Slots(max(0, min(most, free)))
        if most == 0 or slots.free > 0:
            self._forget(worker)
        elif self._next is None:
            self._next = worker
        self._free -= slots.free
        try:
            yield slots
        finally:
            self._free += slots.free
            if slots.free and len(self._workers) > 1:
                self.changed.set()

    def _forget(self, worker: StreamConsumer) -> None:
        if self._next is worker:
            self._next = None

    def add(self, job: Job, slots: Slots) -> None:
        """A job begins, in one of the slots."""
        slots.free -= 1
        self._jobs.append(job)
        if self._draining:  # it was on its way when the node was told to end
            job.stop(Stop.DRAINED)

    def remove(self, job: Job) -> None:
        """A job has ended; its slot is free."""
        self._jobs.remove(job)
        if self._left is not None and not job.is_finished:
            self._left[job.stream] += 1
        self._free += 1
        self.changed.set()

    def is_working_on(self, user_id: int, message_id: str) -> bool:
        """Whether an answer to this message is being made here."""
        return self._job_of(user_id, message_id) is not None

    async def uncount_deliveries(self) -> None:
        """Do not count the deliveries of running requests as deaths: this process was told to stop, however it ends."""
        self._left = Counter()
        await asyncio.gather(
            *(retry_until_available(job.uncount_delivery) for job in self._jobs), return_exceptions=True
        )

    def unfinished(self) -> Counter[str]:
        """Requests that are left to others now that the node was told to stop, by the node of their stream."""
        return Counter(job.stream for job in self._jobs) + (self._left or Counter())

    def drain(self) -> None:
        """End the running answers, and leave their requests pending for whoever takes them up."""
        self._draining = True
        for job in self._jobs:
            job.stop(Stop.DRAINED)

    async def cancel(self, user_id: int, message_id: str) -> CancelOutcome:
        """Cancel a message wherever it is: at once when it is worked on here. Raises `StoreError`."""
        job = self._job_of(user_id, message_id)
        if job is None:
            return await self._cancel_elsewhere(user_id, message_id)
        job.stop(Stop.CANCELLED)
        try:
            async with asyncio.timeout(2 * self._settings.redis_timeout.total_seconds()):
                await job.ended.wait()
        except TimeoutError:
            raise StoreUnavailable("the end of the answer cannot be recorded now") from None
        if job.reply.terminal is None:
            raise StoreUnavailable("the end of the answer was not recorded")
        return "cancelled" if job.reply.terminal.event == "cancelled" else "too_late"

    async def _cancel_elsewhere(self, user_id: int, message_id: str) -> CancelOutcome:
        receipt = await self._replies.cancel(user_id, message_id)
        if not isinstance(receipt, CancelRecorded):
            return receipt
        await self._inbox.notify(receipt.nodes, ReplyGrew(user_id, message_id))
        record = await self._replies.read(user_id, message_id)
        if record is not None:
            self._buffers.get(user_id, message_id).load(record)
        return "cancelled"

    async def recheck(self, user_id: int, message_id: str) -> None:
        """Another node has said something about a message: stop the job here, if it is that node's now or has ended."""
        job = self._job_of(user_id, message_id)
        if job is not None:
            await job.look()

    async def flush_periodically(self) -> None:
        """Record, batch by batch, what the answers say. Cancel it to end."""
        interval = self._settings.flush_interval.total_seconds()
        for number in itertools.count():
            await asyncio.sleep(interval)
            await self.flush(number)

    async def flush(self, number: int) -> None:
        """One round: a batch of each answer that has grown and is read on another node, and of some of the others."""
        behind = [job for job in self._jobs if job.is_behind(for_others=_turn(job) != number % UNREAD_ROUNDS)]
        for begin in range(0, len(behind), TOGETHER):
            await self._flush_together(behind[begin : begin + TOGETHER])

    async def _flush_together(self, jobs: list[Job]) -> None:
        results = await asyncio.gather(*(job.flush() for job in jobs), return_exceptions=True)
        for job, error in zip(jobs, results, strict=True):
            if error is not None:
                log.error("text cannot be recorded", entry=job.entry.entry_id, exc_info=error)

    def _job_of(self, user_id: int, message_id: str) -> Job | None:
        for job in self._jobs:
            if job.request.message_id == message_id and job.request.user_id == user_id:
                return job
        return None


def _turn(job: Job) -> int:
    """The round in which it is recorded although nobody waits for it: not the same for all."""
    return hash(job.entry.entry_id) % UNREAD_ROUNDS
