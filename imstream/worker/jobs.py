"""The registry of the jobs of one node, for all streams it consumes, and their slots."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from imstream.ai.router import Backends
from imstream.errors import StoreUnavailable
from imstream.redis.errors import retry_until_available
from imstream.reply_buffer import ReplyBuffers
from imstream.settings import Settings
from imstream.store.inbox import CancelRequested, Inbox, ReplyGrew
from imstream.store.replies import CancelOutcome, CancelRecorded, ReplyStore, RunsElsewhere
from imstream.user_ids import UserId
from imstream.worker.job import Job
from imstream.worker.waiting_line import WaitingLine

UNREAD_ROUNDS = 3
"""Flush rounds per flush of an answer that no other node reads: it takes 40 to 60 µs of CPU of a node and Redis."""

TOGETHER = 32
"""Maximum answers flushed at once, before other tasks run. 400 paced answers, a third per round and in such parts, take
5 % less CPU than all of them at once."""

CANCEL_WAIT = 1.0  # seconds that another node has to cancel its message; then it is cancelled without its last text


@dataclass
class Slots:
    """Slots reserved for jobs; `free` of them are not used yet."""

    free: int


class Jobs:
    """The jobs of this node. Its stream consumers share the slots; each is identified by the node of its stream."""

    def __init__(
        self, settings: Settings, *, backends: Backends, replies: ReplyStore, buffers: ReplyBuffers, inbox: Inbox
    ) -> None:
        self._settings = settings
        self._backends = backends
        self._replies = replies
        self._buffers = buffers
        self._inbox = inbox
        self.line = WaitingLine(slots=backends.slots, limit=settings.queue_limit)
        self._jobs: list[Job] = []
        self._taken = 0  # slots with a job, or reserved for one
        self._draining = False
        self._left: Counter[str] | None = None  # once the node stops: requests whose jobs ended without them, by stream
        self._consumers: set[str] = set()
        self._next_consumer: str | None = None
        """The consumer that found no free slot. It gets the next one, which a blocked read would keep otherwise."""
        self.changed = asyncio.Event()  # a slot is free, or a consumer is to stop

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    @property
    def free_slots(self) -> int:
        """Slots without a job, reserved or not."""
        return self._backends.slots() - len(self._jobs)

    @contextmanager
    def shared_with(self, stream: str) -> Iterator[None]:
        """Share the slots with a consumer."""
        self._consumers.add(stream)
        try:
            yield
        finally:
            self._consumers.discard(stream)
            self._forget(stream)

    @contextmanager
    def reserve(self, maximum: int, stream: str) -> Iterator[Slots]:
        """Reserve free slots for a consumer; on leaving, give back those without a job.

        One of several consumers gets at most half of them, so that some are left for the others.
        """
        unreserved = self._backends.slots() - self._taken
        free = unreserved if len(self._consumers) <= 1 else (unreserved + 1) // 2
        if self._next_consumer not in (None, stream):
            free = min(free, unreserved - 1)
        slots = Slots(max(0, min(maximum, free)))
        if maximum == 0 or slots.free > 0:
            self._forget(stream)
        elif self._next_consumer is None:
            self._next_consumer = stream
        self._taken += slots.free
        try:
            yield slots
        finally:
            self._taken -= slots.free
            if slots.free and len(self._consumers) > 1:
                self.changed.set()

    @contextmanager
    def take_one(self, reserved: Slots) -> Iterator[Slots]:
        """Take one of the slots that are reserved for a read; on leaving, free it if it has no job."""
        reserved.free -= 1
        slots = Slots(1)
        try:
            yield slots
        finally:
            if slots.free:
                self._taken -= 1
                self.changed.set()

    def _forget(self, stream: str) -> None:
        if self._next_consumer == stream:
            self._next_consumer = None

    def add(self, job: Job, slots: Slots) -> None:
        """Register a job in one of the slots."""
        slots.free -= 1
        self._jobs.append(job)
        self.line.start(job, job.entry.entry_id if job.stream.is_own else None)
        if self._draining:  # it was read before the drain and arrived after it
            job.stop("drained")

    def remove(self, job: Job) -> None:
        """Remove a job that has ended, and free its slot."""
        self._jobs.remove(job)
        self.line.end(job, is_measured=job.is_finished and job.was_opened)
        if self._left is not None and not job.is_finished:
            self._left[job.stream.node] += 1
        self._taken -= 1
        self.changed.set()

    async def wait_for_change(self, seconds: float) -> None:
        """Wait for `changed`, at most so long."""
        self.changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()

    def find(self, user_id: UserId, message_id: str) -> Job | None:
        """Return the job that answers a message, if there is one on this node."""
        own = (job for job in self._jobs if job.request.user_id == user_id and job.request.message_id == message_id)
        return next(own, None)

    async def uncount_deliveries(self) -> None:
        """Do not count the deliveries of running requests as deaths of the worker: this process is stopping."""
        self._left = Counter()
        uncounted = (retry_until_available(job.uncount_delivery) for job in self._jobs)
        await asyncio.gather(*uncounted, return_exceptions=True)

    def unfinished(self) -> Counter[str]:
        """Count the requests left to other nodes since this one began to stop, by stream."""
        return Counter(job.stream.node for job in self._jobs) + (self._left or Counter())

    def drain(self) -> None:
        """Stop the running answers; leave their requests pending for other nodes."""
        self._draining = True
        for job in self._jobs:
            job.stop("drained")

    async def cancel(self, user_id: UserId, message_id: str) -> CancelOutcome:
        """Cancel a message on whichever node it is. Raises `StoreError`."""
        job = self.find(user_id, message_id)
        if job is None:
            return await self._cancel_remotely(user_id, message_id)
        if job.was_opened and job.reply.terminal is not None:
            return "too_late"  # its end is recorded, and its request about to be removed
        job.stop("cancelled")
        try:
            async with asyncio.timeout(2 * self._settings.redis_timeout.total_seconds()):
                await job.ended.wait()
        except TimeoutError:
            raise StoreUnavailable("the end of the answer cannot be recorded now") from None
        if job.reply.terminal is None:
            raise StoreUnavailable("the end of the answer was not recorded")
        return "cancelled" if job.reply.terminal.event == "cancelled" else "too_late"

    async def _cancel_remotely(self, user_id: UserId, message_id: str) -> CancelOutcome:
        receipt = await self._replies.cancel(user_id, message_id, unless_elsewhere=True)
        if isinstance(receipt, CancelRecorded) and receipt.repeated:
            return "too_late"
        if isinstance(receipt, RunsElsewhere):
            reply = self._buffers.get(user_id, message_id)
            await self._inbox.notify([receipt.node], CancelRequested(user_id, message_id))
            await reply.wait_until_ended(CANCEL_WAIT)
            receipt = await self._replies.cancel(user_id, message_id)  # it may be dead, or of an older release
        if not isinstance(receipt, CancelRecorded):
            assert not isinstance(receipt, RunsElsewhere)  # noqa: S101 - cancelled in any case
            return receipt
        await self._inbox.notify(receipt.nodes, ReplyGrew(user_id, message_id))
        record = await self._replies.read(user_id, message_id)
        if record is not None:
            self._buffers.get(user_id, message_id).load(record)
        return "cancelled"

    async def flush_periodically(self) -> None:
        """Record the running answers, batch by batch. Run until cancelled."""
        for number in itertools.count():
            await asyncio.sleep(self._settings.flush_interval.total_seconds())
            await self.flush(number)

    async def flush(self, number: int) -> None:
        """Run one round: flush each answer that another node reads, and a share of the others."""
        number %= UNREAD_ROUNDS
        due = [
            job for job in self._jobs if job.needs_flush(if_unread=hash(job.entry.entry_id) % UNREAD_ROUNDS == number)
        ]
        for begin in range(0, len(due), TOGETHER):
            jobs = due[begin : begin + TOGETHER]
            results = await asyncio.gather(*(job.flush() for job in jobs), return_exceptions=True)
            for job, error in zip(jobs, results, strict=True):
                if error is not None:
                    job.log.error("text cannot be recorded", entry=job.entry.entry_id, exc_info=error)
