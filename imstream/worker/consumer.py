"""The consumer of one requests stream, its own or an adopted one: reads requests, and claims those of dead nodes."""

import asyncio
from dataclasses import replace

import structlog

from imstream.errors import StoreDenied, StoreError
from imstream.model import NEWEST_VERSION, ChatRequest, MalformedEntry, NewerVersion
from imstream.redis.errors import describe_problem
from imstream.store.requests import Entry, GroupMissing, PendingEntry, RequestStream
from imstream.worker.admission import Admission
from imstream.worker.attempt import WorkerDeps
from imstream.worker.disposition import MALFORMED, Bury
from imstream.worker.job import Job
from imstream.worker.jobs import Jobs, Slots

SUSPECT = 3
"""From this delivery on, a request runs beside no other suspect: if the worker dies again, the cause is known."""

CLAIMS = 64  # maximum at once: one by one, a round trip for each of thousands of requests took a minute
_REDIS_PAUSE = 0.2  # seconds between two tries while Redis is away

log = structlog.get_logger()


class StreamConsumer:
    """Consumes one requests stream. `run` until `stop`, or until it has finished the pending entries."""

    def __init__(self, requests: RequestStream, deps: WorkerDeps, jobs: Jobs) -> None:
        self._requests = requests
        self._deps = deps
        self._jobs = jobs
        self._running: set[str] = set()  # entries that have a job
        self._inherited: dict[str, int] | None = None
        """Deliveries of the entries that an earlier process left pending under our name, or that we handed back."""
        self.newer: set[str] = set()  # entries of a newer release, left to a node that supports their schema
        self._newest_version = NEWEST_VERSION
        self._suspect: str | None = None
        self._group: asyncio.TaskGroup | None = None  # of the jobs; None before `run`
        self._admission = Admission(requests, deps, jobs, start=self._add, sweep_soon=self.sweep_soon)
        self.admit = self._admission.admit
        self.stopping = False  # whether reading new requests has ended
        self.redis_problem = describe_problem(None)  # why Redis was not usable at the last try, if it was not
        self._finishing = self._finished = False
        self._reachable = self._loss_logged = False
        self._next_sweep = 0.0
        self._answered_at: float | None = None
        self._looped_at = asyncio.get_running_loop().time()

    def reached_redis_within(self, seconds: float) -> bool:
        """Whether the last answer of Redis is at most so old (`/readyz`)."""
        now = asyncio.get_running_loop().time()
        return self._reachable and self._answered_at is not None and now - self._answered_at <= seconds

    def looped_within(self, seconds: float) -> bool:
        """Whether the last round of the loop is at most so old, with or without Redis (`/healthz`)."""
        return self.stopping or asyncio.get_running_loop().time() - self._looped_at <= seconds

    async def run(self) -> None:
        """Consume the stream, then wait for the jobs. Redis may come and go meanwhile."""
        with self._jobs.shared_with(self._requests.node):
            async with asyncio.TaskGroup() as self._group:
                while not self.stopping and not self._finished:
                    try:
                        await self._consume()
                    except (StoreError, GroupMissing) as error:
                        await self._after_error(error)
                await self._admission.wait()

    def stop(self) -> None:
        """Read no new requests. A blocked read ends by its time limit."""
        self.stopping, self._admission.slots = True, None
        self._jobs.changed.set()

    def finish_pending(self) -> None:
        """Read no new requests; finish those that are pending under our name, then end."""
        self._finishing = True
        self._jobs.changed.set()

    def resume(self) -> None:
        """Read new requests again, unless it has ended."""
        if self._finishing:
            self._finishing = False
            self.sweep_soon()
            self._jobs.changed.set()

    async def _consume(self) -> None:
        if await self._requests.ensure_group():
            if self._answered_at is None:
                log.info("consumer group created", node=self._requests.node)
            else:
                log.error("requests stream or its group was gone and is created again: accepted requests may be lost")
        self._on_answer()
        self.sweep_soon()
        while not self.stopping and not self._finished:
            await self._run_round()
            self._on_answer()

    async def _run_round(self) -> None:
        if self._deps.lease_keeper.held:
            await self._sweep_if_due()
        if self._finishing:
            running = {*self._running}  # a job that ends meanwhile may leave its entry pending: then look again
            left = await self._requests.pending(exclude=self.newer | running)
            if self._deps.pauses.is_known and self._deps.pauses.of(self._requests.node):
                for one in left:  # nothing starts here: another node may answer them
                    await self._requests.claim(one, deliveries=one.deliveries, to=self._requests.node)
            self._finished = not running and not left
        wanted = 0 if self._finishing or not self._deps.lease_keeper.held else self._deps.startable(self._requests.node)
        with self._jobs.reserve(wanted, self._requests.node) as slots:
            if slots.free:
                # The stream of another node gets hardly any new requests: no connection blocks on it.
                block = self._deps.settings.read_block if self._requests.is_own else None
                self._admission.slots = None if self.stopping else slots
                try:
                    entries = await self._requests.read(count=slots.free, block=block)
                finally:
                    self._admission.slots = None
                for entry in entries:
                    if entry.entry_id in self._running:
                        continue  # a group that was created again delivers it again
                    if self._deps.startable(self._requests.node) and slots.free:
                        await self._start(entry, slots)
                    else:  # the breaker has opened during the read, or `admit` has used the slot
                        await self._requests.hand_back(entry)
                        self.sweep_soon()
                if self._requests.is_own:
                    # Let the new jobs open their replies before the next read: their clients wait for it.
                    await asyncio.sleep(0)  # the jobs queue their commands
                    await asyncio.sleep(0)  # the pipeline sends them
                    return
        limit, pause = self._deps.settings.read_block.total_seconds(), self._deps.backends.remaining()
        await self._jobs.wait_for_change(min(limit, pause) if pause else limit)
        await self._requests.ping()

    def sweep_soon(self) -> None:
        """Look for pending entries without a job in the next round: a node may have left some here."""
        self._next_sweep = 0.0

    async def _sweep_if_due(self) -> None:
        """Claim pending entries without a job: left by a process that died, or whose delivery was lost."""
        now = asyncio.get_running_loop().time()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._deps.settings.sweep_interval.total_seconds()
        await self._requests.trim_dead()
        if self._inherited is None:  # before this process reads anything
            # In the node's own stream, the script that took the lease has looked through the deliveries.
            died = self._requests.is_own or not self._deps.lease_keeper.redis_restarted
            self._inherited = {one.entry_id: one.deliveries + died for one in await self._requests.pending()}
        await self._admission.wait()
        known = {*self._running, *self.newer}
        pending = await self._requests.pending(exclude=known)
        if not self._deps.lease_keeper.can_declare_dead:
            self.sweep_soon()  # for the entries of the dead, as soon as they are known
        elif not self._finishing:
            pending += await self._left_by_dead(known)
        while pending:
            with self._jobs.reserve(
                min(CLAIMS, len(pending), self._deps.startable(self._requests.node)), self._requests.node
            ) as slots:
                if not slots.free:
                    self.sweep_soon()  # the next slot is for the next of these, not for a new request
                    return
                batch, pending = pending[: slots.free], pending[slots.free :]
                claims = (self._claim(one, slots) for one in batch)
                for error in await asyncio.gather(*claims, return_exceptions=True):  # all stop when one has failed
                    if error is not None:
                        raise error

    async def _left_by_dead(self, known: set[str]) -> list[PendingEntry]:
        """Return what nodes without a lease have left pending; remove those that left nothing from the group."""
        others, left = await self._requests.other_consumers(), list[PendingEntry]()
        leases = await self._deps.leases.time_left(others)
        for consumer in (one for one in others if leases[one] is None):
            if others[consumer] > 0:
                died = not await self._deps.leases.redis_restarted_since(consumer)
                entries = await self._requests.pending(consumer, exclude=known)
                left += [replace(one, deliveries=one.deliveries + died) for one in entries]
            elif consumer != self._requests.node:
                await self._requests.remove_consumer(consumer)
        return left

    async def _claim(self, pending: PendingEntry, slots: Slots) -> None:
        inherited = self._inherited or {}
        # Counted when this process began: a sum made now would count a claim twice whose answer was lost.
        deliveries = max(1, pending.deliveries, inherited.get(pending.entry_id, 0))
        # With more deliveries than the maximum, it is buried without a run.
        is_suspect = SUSPECT <= deliveries <= self._deps.settings.max_deliveries
        if is_suspect and self._suspect is not None:
            return
        if is_suspect:
            self._suspect = pending.entry_id
        try:
            entry = await self._requests.claim(pending, deliveries=deliveries)
            inherited.pop(pending.entry_id, None)
            if entry is None:
                return
            job = await self._start(entry, slots)
            told = {"stream": self._requests.node, "worker": pending.consumer, "entry": entry.entry_id}
            (log if job is None else job.log).info("request claimed", **told, deliveries=deliveries)
        finally:
            if is_suspect and pending.entry_id not in self._running:
                self._suspect = None
                self.sweep_soon()

    async def _start(self, entry: Entry, slots: Slots) -> Job | None:
        verdict = None
        try:
            request = ChatRequest.from_fields(entry.fields, entry.entry_id, user_ids=self._deps.settings.user_ids)
        except NewerVersion as error:
            await self._leave_to_newer(entry, error.version)
            return None
        except MalformedEntry as error:
            if error.partial is None:
                log.error("request buried", reason=MALFORMED, error=str(error), entry=entry.entry_id)  # noqa: TRY400 - no defect
                await self._requests.bury(entry, reason=MALFORMED, error=str(error), attempts=0)
                return None
            request, verdict = error.partial, Bury(MALFORMED, str(error))
        job = Job(entry, request, self._requests, self._deps, verdict, word=self._admission.take_word(request))
        if verdict is None:
            job.calls.upstream = self._deps.backends.take_probe()
        self._add(job, slots)
        return job

    def _add(self, job: Job, slots: Slots) -> None:
        assert self._group is not None  # noqa: S101 - there is one while it runs
        self._running.add(job.entry.entry_id)
        self._jobs.add(job, slots)
        self._group.create_task(self._run_job(job))

    async def _leave_to_newer(self, entry: Entry, version: int) -> None:
        """Leave a request of a newer release pending under the name of the node whose stream it is in."""
        if version > self._newest_version:
            self._newest_version = version
            log.error(
                "requests of a newer release are left to a node that knows it",
                stream=self._requests.node,
                entry=entry.entry_id,
                version=version,
                known=NEWEST_VERSION,
            )
        await self._requests.hand_back(entry, to=self._requests.node)
        self.newer.add(entry.entry_id)

    async def _run_job(self, job: Job) -> None:
        entry_id = job.entry.entry_id
        try:
            await job.run(is_stopping=self.stopping)
            if job.is_left:  # it begins again at once, unless it is paused or another node has taken it over
                self.sweep_soon()
        except StoreError as error:
            # The end is recorded; the entry is still pending, and the next sweep finishes it.
            job.log.warning("redis away, request will be claimed again", entry=entry_id, error=str(error))
        except Exception:
            # For example, its reply stream was changed by hand. Other requests continue.
            job.log.exception("request cannot be ended, will be claimed again", entry=entry_id)
        finally:
            if job.entry.deliveries > 1 and not job.is_finished and self._inherited is not None:
                self._inherited[entry_id] = job.entry.deliveries
            self._running.discard(entry_id)
            if self._suspect == entry_id:
                self._suspect = None
                self.sweep_soon()
            self._jobs.remove(job)

    def _on_answer(self) -> None:
        self._answered_at = self._looped_at = asyncio.get_running_loop().time()
        if not self._reachable:
            self._reachable = True
            self._loss_logged = False
            if self._requests.is_own:
                log.info("redis reached", node=self._requests.node)

    async def _after_error(self, error: Exception) -> None:
        self._looped_at = asyncio.get_running_loop().time()
        is_stall = not isinstance(error, GroupMissing | StoreDenied) and self._deps.stall.stalled_recently()
        if isinstance(error, GroupMissing):
            log.warning("requests stream or its group is gone", error=str(error))
        elif not (isinstance(error, StoreDenied) or is_stall or self._loss_logged) and self._requests.is_own:
            log.error("redis lost" if self._reachable else "redis not reached", error=str(error))
            self._loss_logged = True
        if not is_stall:  # else it was this process that did not listen
            self.redis_problem, self._reachable = describe_problem(error), False
        await asyncio.sleep(_REDIS_PAUSE)
