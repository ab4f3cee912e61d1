"""One request being worked on, from its first attempt to its end."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from enum import Enum

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_random_exponential

from imstream.errors import BackendError, StoreError
from imstream.guards.guard import GuardRejection
from imstream.model import ChatRequest, Terminal
from imstream.redis.errors import retry_until_available
from imstream.reply_buffer import ReplyBuffer
from imstream.store.inbox import ReplyGrew
from imstream.store.replies import Appended, CancelRecorded, Duplicate, Ended, Opened, Rejected
from imstream.store.requests import Entry
from imstream.worker.attempt import AttemptRunner, refusal
from imstream.worker.deps import WorkerDeps
from imstream.worker.disposition import (
    INTERNAL_ERROR,
    Bury,
    Decline,
    Disposition,
    Finish,
    Leave,
    Limits,
    Retry,
    after_failure,
    after_opening,
    before_start,
)
from imstream.worker.reply_writer import ReplyWriter

log = structlog.get_logger()


def _wait(state: RetryCallState) -> float:
    job: Job = state.args[0]
    assert state.outcome is not None  # noqa: S101 - tenacity asks after an outcome only
    return job.pause(state.outcome.result(), state)


_RETRYING = AsyncRetrying(retry=retry_if_result(lambda decision: isinstance(decision, Retry)), wait=_wait)
"""The one retry loop. It is shared and knows no job: one that did would keep it alive in a cycle."""


class Stop(Enum):
    """Why a job ends before its answer does."""

    CANCELLED = "cancelled"
    OVERRULED = "overruled"
    """The reply stream takes nothing more from us: cancelled elsewhere, or a later attempt has begun."""
    DRAINED = "drained"


class Job:
    """Has one request answered. `run` does all of it; `stop` ends it early; `flush` records what has gathered."""

    def __init__(self, entry: Entry, request: ChatRequest, parts: WorkerDeps, verdict: Bury | None = None) -> None:
        """`verdict`: what has been decided before: the request is not tried at all."""
        self.entry = entry
        self.request = request
        self.reply: ReplyBuffer = parts.buffers.get(request.user_id, request.message_id)
        self.ended = asyncio.Event()
        self.is_finished = False
        """Whether its request has ended, or was found to be another node's."""
        self._parts = parts
        self._limits = Limits.of(parts.settings)
        self._id = f"{parts.requests.node}/{entry.entry_id}"
        self._asking = AttemptRunner(request, parts)
        self._verdict = verdict
        self._showed_text = False
        """Whether an attempt here has shown any, recorded or not."""
        self._recorder: ReplyWriter | None = None
        self._scope: asyncio.Timeout | None = None
        self._stopped: Stop | None = None
        self._attempts = 0
        self._began = asyncio.get_running_loop().time()

    @property
    def stream(self) -> str:
        """The node whose stream its request is in."""
        return self._parts.requests.node

    async def run(self) -> None:
        """Answer the request, and take it out of the stream when its end is recorded. Raises `StoreError`."""
        try:
            disposition = await self._decide_safely()
            if isinstance(disposition, Bury | Decline):
                disposition = await self._give_up(disposition)
            match disposition:
                case Finish():
                    await self._parts.requests.finish(self.entry)
                case Bury(reason, error):
                    await self._give_back()
                    await self._parts.requests.bury(self.entry, reason=reason, error=error, attempts=self._attempts)
                    self._log.error("request buried", reason=reason, error=error, attempts=self._attempts)
                case Decline(refusal=refusal):
                    if not refusal.violation:
                        await self._give_back()
                    await self._parts.requests.finish(self.entry)
            self.is_finished = not (isinstance(disposition, Leave) and self._stopped is Stop.DRAINED)
        finally:
            if self._recorder is not None:
                self._recorder.leave()
            self.ended.set()

    def stop(self, why: Stop) -> None:
        """End the attempt, and close its AI call, now. Without effect when the answer is complete already."""
        if self._stopped is None:
            self._stopped = why
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())

    def is_behind(self, *, for_others: bool) -> bool:
        """Whether `flush` has anything to do; `for_others`: that somebody on another node may be waiting for."""
        recorder = self._recorder
        if recorder is None or self._scope is None or self._stopped is not None:
            return False
        return recorder.behind and (recorder.read_elsewhere or not for_others)

    async def uncount_delivery(self) -> None:
        """Do not count this delivery as a death: the process was told to stop. Raises `StoreError`."""
        await self._parts.requests.hand_back(self.entry)

    async def flush(self) -> None:
        """Record the text so far. When Redis is away it stays for the next time."""
        recorder = self._recorder
        if recorder is None:
            return
        try:
            result = await recorder.flush()
        except StoreError:
            return
        # A retry is not concerned by what becomes of the attempt before.
        if isinstance(result, Rejected) and recorder is self._recorder:
            self._log.warning("reply stream refuses this attempt", why=result.reason, attempt=self.reply.attempt)
            self.stop(Stop.OVERRULED)

    async def look(self) -> None:
        """Another node has said something about the message: stop, if it has ended or is answered elsewhere by now."""
        reply = self.reply
        if self._recorder is None:
            return  # its opening will tell
        try:
            record = await self._parts.replies.read(reply.user_id, reply.message_id)
        except StoreError:
            return  # the next batch will be told
        if record is not None and (record.terminal is not None or record.attempt > reply.attempt):
            self.stop(Stop.OVERRULED)

    async def _give_back(self) -> None:
        """Take back what the message has cost its user, unless that has got something for it: some text."""
        user_id, message_id = self.request.user_id, self.request.message_id
        if not (
            self._showed_text
            or await retry_until_available(lambda: self._parts.replies.has_shown_text(user_id, message_id))
        ):
            await retry_until_available(lambda: self._parts.guards.on_failure(self.request))

    async def _decide_safely(self) -> Disposition:
        try:
            verdict = self._verdict or before_start(self.entry.deliveries, self._limits)
            return verdict or await self._decide()
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - logged with its trace, and the client is told
            # A defect of ours: this one request ends, with a trace for us, and the others go on.
            self._log.exception("job failed")
            return Bury(INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    async def _decide(self) -> Disposition:
        try:
            async with asyncio.timeout(None) as self._scope:
                if self._stopped is not None:
                    raise TimeoutError  # noqa: TRY301 - stopped before it began
                decision = await self._attempt()
                if isinstance(decision, Retry):
                    # Only now: nearly every call succeeds at once and should not pay for what retries need.
                    decision = await _RETRYING.copy()(Job._retry, self, [decision])
                return decision
        except TimeoutError:
            if self._stopped is None:
                raise
            return await self._after_stop()
        finally:
            self._scope = None

    async def _attempt(self) -> Disposition:
        opened = await self._open()
        if not isinstance(opened, Opened):
            return await self._already(opened)
        assert self._recorder is not None  # noqa: S101 - there is one from the first opening on
        if (verdict := after_opening(opened.attempt, self._limits)) is not None:
            return verdict
        try:
            completion = await self._asking.ask(self._recorder.write)
        except GuardRejection as refused:
            return refusal(refused.verdict, self.request.lang)
        except BackendError as error:
            elapsed = timedelta(seconds=asyncio.get_running_loop().time() - self._began)
            decision = after_failure(error, attempt=opened.attempt, elapsed=elapsed, limits=self._limits)
            if isinstance(decision, Retry):
                self._log.warning("attempt failed, will retry", reason=error.reason, attempt=opened.attempt)
            return decision
        self._scope = None  # complete: from here on, nothing stops it but its record
        return await self._end(Terminal("done", completion.finish_reason, completion.usage))

    async def _retry(self, known: list[Disposition]) -> Disposition:
        if known:
            return known.pop()
        # Our lease may have run out during the attempt that failed: whoever has the request now is at work on it (I7).
        if await retry_until_available(lambda: self._parts.requests.is_taken_over(self.entry)):
            self._log.warning("request was taken over by another node", attempt=self.reply.attempt)
            return Leave()
        return await self._attempt()

    def pause(self, decision: Retry, state: RetryCallState) -> float:
        """Seconds to wait before the next attempt: as long as the backend asked for, and a random while on top."""
        settings = self._parts.settings
        backoff = wait_random_exponential(
            multiplier=settings.retry_wait.total_seconds(), max=settings.retry_wait_max.total_seconds()
        )
        return backoff(state) + max(decision.after.total_seconds(), self._parts.breaker.remaining())

    @property
    def _log(self) -> structlog.typing.FilteringBoundLogger:
        bound: structlog.typing.FilteringBoundLogger = log.bind(
            trace=self.request.trace, user=self.request.user_id, message_id=self.request.message_id
        )
        return bound

    async def _open(self) -> Opened | Ended | Duplicate:
        before, self._recorder = self._recorder, None
        if before is not None:
            self._showed_text = self._showed_text or self.reply.offset > 0
            await before.retire()
        opened = await self._try_open()
        if isinstance(opened, Duplicate) and await self._is_lost(lost := opened.owner):
            self._log.warning("taking over a message whose request is lost", lost=lost)
            opened = await self._try_open(lost)
        if isinstance(opened, Opened):
            self._attempts = opened.attempt
            parts = self._parts
            self._recorder = ReplyWriter(
                self.reply, parts.replies, parts.inbox, request=self._id, attempt=opened.attempt
            )
            begun = opened.attempt == 1
            if begun:
                parts.begun(self.reply)
            notice = ReplyGrew(self.reply.user_id, self.reply.message_id, begun=begun)
            self._recorder.read_elsewhere = await parts.inbox.notify(opened.nodes, notice)
        return opened

    async def _try_open(self, lost: str = "") -> Opened | Ended | Duplicate:
        reply, replies = self.reply, self._parts.replies
        return await retry_until_available(
            # After the attempt that is known here: should Redis have lost it, none is begun with the same number.
            lambda: replies.open(reply.user_id, reply.message_id, request=self._id, lost=lost, after=reply.attempt)
        )

    async def _is_lost(self, owner: str) -> bool:
        """An entry stays in its stream until its terminal event is recorded (I3): without one, it is lost."""
        return not await retry_until_available(lambda: self._parts.requests.is_unfinished(owner))

    async def _already(self, opened: Ended | Duplicate) -> Disposition:
        """There is nothing to do: the message has ended, or another request has it."""
        await self._show_record()
        if isinstance(opened, Duplicate):
            return Finish()
        if opened.event == "failed" and opened.owner == self._id:  # the worker died before the burial
            terminal = self.reply.terminal or Terminal("failed")
            why = (terminal.reason or "unknown", terminal.error or "")
            return Bury(*why) if terminal.refusal is None else Decline(*why, terminal.refusal)
        return Finish()

    async def _give_up(self, verdict: Bury | Decline) -> Disposition:
        if self._recorder is None and not isinstance(opened := await self._open(), Opened):
            return await self._already(opened)
        if self.reply.terminal is not None:
            return verdict
        refusal = verdict.refusal if isinstance(verdict, Decline) else None
        disposition = await self._end(Terminal("failed", reason=verdict.reason, error=verdict.error, refusal=refusal))
        return verdict if disposition == Finish() and self._ended_as("failed") else disposition

    async def _end(self, terminal: Terminal) -> Disposition:
        """Record the end; only then do clients see it."""
        assert self._recorder is not None  # noqa: S101 - there is one from the first opening on
        match await self._recorder.end(terminal):
            case Appended():
                self.reply.end(terminal)
                return Finish()
            case Rejected("ended"):
                await self._show_record()
                return Finish()
            case rejected:
                self._log.warning("reply stream refuses the end", why=rejected.reason, attempt=self.reply.attempt)
                return Leave()

    async def _after_stop(self) -> Disposition:
        user_id, message_id = self.request.user_id, self.request.message_id
        replies = self._parts.replies
        match self._stopped:
            case Stop.CANCELLED:
                # The text so far stays, all that clients saw of it.
                if self._recorder is not None:
                    await retry_until_available(self._recorder.flush)
                receipt = await retry_until_available(lambda: replies.cancel(user_id, message_id))
                if isinstance(receipt, CancelRecorded):
                    await self._parts.inbox.notify(receipt.nodes, ReplyGrew(user_id, message_id))
                elif receipt == "unknown":  # Redis lost it, and nobody asks for it any more
                    self.reply.end(Terminal("cancelled"))
                await self._show_record()
                return Finish()
            case Stop.OVERRULED:
                if self._recorder is not None:
                    self._recorder.leave()  # the record knows better from now on
                await self._show_record()
                return Finish() if self.reply.terminal is not None else Leave()
            case _:
                await self.flush()
                await self._parts.requests.hand_back(self.entry)
                return Leave()

    async def _show_record(self) -> None:
        """Give followers what is recorded."""
        record = await retry_until_available(
            lambda: self._parts.replies.read(self.reply.user_id, self.reply.message_id)
        )
        if record is not None:
            self.reply.load(record)

    def _ended_as(self, event: str) -> bool:
        return self.reply.terminal is not None and self.reply.terminal.event == event
