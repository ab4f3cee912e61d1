"""Admission of requests to the stream of this node. One that need not wait begins at once."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from imstream.errors import StoreUnavailable
from imstream.model import ChatRequest
from imstream.store.replies import new_word
from imstream.store.requests import Admitted, Entry, QueueFull, RequestStream
from imstream.user_ids import UserId
from imstream.worker.attempt import WorkerDeps
from imstream.worker.job import Job
from imstream.worker.jobs import Jobs, Slots

MAX_UNANSWERED = 1000  # openings without an answer that are remembered; of another one, an attempt is used up


@dataclass(eq=False, repr=False)
class Admission:
    """Admits requests, and begins those that fit beside the read that the consumer waits for.

    `start`: run a job in a slot; `sweep_soon`: look for entries that are delivered and have no job.
    """

    requests: RequestStream
    deps: WorkerDeps
    jobs: Jobs
    start: Callable[[Job, Slots], None]
    sweep_soon: Callable[[], None]
    slots: Slots | None = None  # reserved for the read under way; None: no request may begin beside it
    _unanswered: dict[tuple[UserId, str, int], str] = field(default_factory=dict)
    """The words of openings that may have begun an attempt without a job, because the answer was lost."""
    _under_way: int = 0
    _one_ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def admit(self, request: ChatRequest) -> Admitted | QueueFull:
        """Append a request; begin it at once if it needs not wait, which saves two round trips. Raises `StoreError`."""
        slots = self.slots
        if slots is None or not self._may_begin(slots):
            return await self.requests.admit(request)
        reply = self.deps.buffers.get(request.user_id, request.message_id)
        had_ended = reply.terminal is not None
        with self.jobs.take_one(slots) as one, self._counted():
            admitted = await self._begin(request, after=reply.fence)
            if isinstance(admitted, Admitted) and admitted.opened is not None:
                entry = Entry(admitted.entry_id, {"user": str(request.user_id)})
                is_cancelled = reply.terminal is not None and not had_ended  # meanwhile: the job is to find it
                opened = None if is_cancelled else admitted.opened
                self.start(Job(entry, request, self.requests, self.deps, opened=opened), one)
            elif isinstance(admitted, Admitted) and admitted.position <= 1:
                self.sweep_soon()  # it may be delivered to us
        await asyncio.sleep(0)  # its job notes that the reply is recorded
        return admitted

    async def wait(self) -> None:
        """Wait until each request that may be delivered to us has its job. None begins meanwhile, without a read."""
        while self._under_way:
            self._one_ended.clear()
            await self._one_ended.wait()

    def take_word(self, request: ChatRequest) -> str:
        """Return the word of an opening of this request whose answer was lost, and forget it; empty without one."""
        return self._unanswered.pop((request.user_id, request.message_id, request.at), "")

    def _may_begin(self, slots: Slots) -> bool:
        """Whether a request may begin in one of the slots. One stays, for what is read at any time."""
        deps = self.deps
        is_open = deps.lease_keeper.held and not deps.backends.is_closed and deps.startable(self.requests.node) > 0
        return is_open and slots.free > 1 and self.jobs.line.reason is None and self.requests.shares_server

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._one_ended.set()

    async def _begin(self, request: ChatRequest, *, after: int) -> Admitted | QueueFull:
        user_id, message_id, request_id = request.user_id, request.message_id, self.requests.request_id("")
        word = new_word()
        opening = self.deps.replies.opening(
            user_id, message_id, request.question, request=request_id, after=after, word=word
        )
        try:
            return await self.requests.begin(request, opening)
        except (StoreUnavailable, asyncio.CancelledError):
            self._unanswered[user_id, message_id, request.at] = word
            if len(self._unanswered) > MAX_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]
            self.sweep_soon()
            raise
