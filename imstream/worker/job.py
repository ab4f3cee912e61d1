"""The processing of one request, from its first attempt to its end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

import structlog
from structlog.typing import FilteringBoundLogger

from imstream.clock import time_of
from imstream.errors import StoreError
from imstream.model import ChatRequest, Terminal, Waiting
from imstream.redis.errors import retry_until_available
from imstream.store.inbox import ReplyGrew
from imstream.store.replies import (
    Appended,
    Beginning,
    CancelRecorded,
    Duplicate,
    Ended,
    Opened,
    Opening,
    OtherQuestion,
    Rejected,
    new_word,
)
from imstream.store.requests import Entry, RequestStream
from imstream.tracing import CURRENT
from imstream.worker.account import Account
from imstream.worker.attempt import CannotContinue, Interrupted, WorkerDeps
from imstream.worker.calls import Calls, retrying
from imstream.worker.disposition import (
    INTERNAL_ERROR,
    Bury,
    Decline,
    Disposition,
    Finish,
    Leave,
    Retry,
    Wait,
    after_opening,
    before_start,
)
from imstream.worker.reply_writer import ReplyWriter

log: FilteringBoundLogger = structlog.get_logger()

StopReason = Literal["cancelled", "drained", "paused", "superseded"]
"""Why a job stops before its answer is complete. Superseded: the reply stream rejects further text of the attempt."""


class Job:
    """Answers one request. `run` does all of it; `stop` ends it early; `flush` records the text so far."""

    def __init__(  # noqa: PLR0913 - what it works on, and two options
        self,
        entry: Entry,
        request: ChatRequest,
        stream: RequestStream,
        deps: WorkerDeps,
        verdict: Bury | None = None,
        *,
        opened: Opening | None = None,
        word: str = "",
    ) -> None:
        """With a `verdict`, the request is buried without an attempt. `opened`: its first attempt, if it has begun.

        `word`: of its opening by this process, whose answer was lost; see `ReplyStore.open`.
        """
        self.entry = entry
        self.request = request
        self.stream = stream
        self.reply = deps.buffers.get(request.user_id, request.message_id)
        self.reply.has_job = True
        self.ended = asyncio.Event()
        self.is_finished = False
        """Whether the request has ended, or belongs to another node."""
        self.is_left = False
        """Whether the request is left pending: stopped here, or its attempt was superseded."""
        self.calls = Calls(request, stream.node, deps)
        self._deps = deps
        self._id = stream.request_id(entry.entry_id)
        # A message that an operator retries has waited since then.
        received_at = request.at if request.reopens is None else time_of(entry.entry_id)
        self._account = Account(deps.metrics.redis_clock, received_at=received_at)
        self._is_ours = False
        """Whether the message belongs to this request. A message that is sent again has several, and one answer."""
        self._verdict = verdict
        self._opened = opened
        self._word = word
        self._unanswered: Callable[[], Awaitable[Opening]] | None = None
        """Repeats an opening that was sent, and whose answer has not been read: Redis may still have to run it."""
        self._removed: bool | None = None
        """Whether recording the end has removed the request from the stream; None: not yet."""
        self._writer: ReplyWriter | None = None
        self._scope: asyncio.Timeout | None = None
        """The cancel scope of the attempts; None when there is nothing left to stop."""
        self._stop_reason: StopReason | None = None
        self._attempts = 0

    async def run(self, *, is_stopping: bool = False) -> None:
        """Answer the request, and remove it from the stream when its end is recorded. Raises `StoreError`.

        `is_stopping`: the process began to stop before the request arrived.
        """
        try:
            if is_stopping:
                await self.uncount_delivery()
            disposition = await self._decide()
            if isinstance(disposition, Bury | Decline):
                disposition = await self._record_failure(disposition)
            if self._is_ours and self._account.opened_at is None and disposition != Leave():
                # Unless its request is removed already, it is claimed again.
                known = self._beginning() if self._removed is None else retry_until_available(self._beginning)
                self._account.load(await known)
            was_there = False
            match disposition:
                case Finish():
                    was_there = await self.stream.finish(self.entry) if self._removed is None else self._removed
                case Bury(reason, error):
                    await self._refund()
                    was_there = await self.stream.bury(self.entry, reason=reason, error=error, attempts=self._attempts)
                    self.log.error("request buried", reason=reason, error=error, attempts=self._attempts)
                case Decline(refusal=refusal):
                    if not refusal.violation:
                        await self._refund()
                    was_there = await self.stream.finish(self.entry)
            if was_there and self._is_ours:  # it is removed once, and so counted once
                self._account.backend = self.calls.backend
                self._deps.request_log.write(self._account, self.request, self.reply, stream=self.stream.node)
            self.is_left = disposition == Leave()
            self.is_finished = not (self.is_left and self._stop_reason in {"drained", "paused"})
        finally:
            self.reply.end_job(has_begun=self.was_opened)
            self.calls.release()
            CURRENT.get().end()
            self.ended.set()
            if self._writer is not None:
                self._writer.release()
                await self._writer.settle()

    @property
    def was_opened(self) -> bool:
        """Whether it has begun an attempt: it is not a duplicate, and the message had not ended before."""
        return self._attempts > 0

    def stop(self, reason: StopReason) -> None:
        """Cancel the attempts and their AI call. No effect when the answer is complete."""
        if self._stop_reason is None:
            self._stop_reason = reason
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())

    def needs_flush(self, *, if_unread: bool) -> bool:
        """Whether there is something to record. Without `if_unread`, only if another node reads the reply."""
        writer = self._writer
        if writer is None or self._scope is None or self._stop_reason is not None:
            return False
        return writer.needs_flush and (writer.has_remote_readers or if_unread)

    async def uncount_delivery(self) -> None:
        """Do not count this delivery as a death of the worker. Raises `StoreError`."""
        await self.stream.hand_back(self.entry)

    async def flush(self) -> None:
        """Record the text so far. Without Redis, the next flush records it."""
        writer = self._writer
        if writer is None:
            return
        try:
            result = await writer.flush()
        except StoreError:
            return
        # Else it was the attempt before, or the end was recorded meanwhile.
        if isinstance(result, Rejected) and writer is self._writer and self._scope is not None:
            self.log.warning("reply stream rejects this attempt", why=result.reason, attempt=self.reply.fence)
            self.stop("superseded")

    async def recheck(self) -> None:
        """Stop if another node has ended the reply or begun a later attempt."""
        if self._writer is None:
            return  # opening the next attempt finds out
        try:
            record = await self._deps.replies.read(self.reply.user_id, self.reply.message_id)
        except StoreError:
            return  # the next flush finds out
        if record is not None and (record.terminal is not None or record.attempt > self.reply.fence):
            self.stop("superseded")

    @property
    def log(self) -> FilteringBoundLogger:
        """A logger for lines about this request."""
        return log.bind(**self.request.ids)

    async def _decide(self) -> Disposition:
        try:
            return self._verdict or before_start(self.entry.deliveries, self._deps.limits) or await self._answer()
        except StoreError:
            raise
        except Exception as error:
            # A defect of ours ends this request only.
            self.log.exception("job failed")
            return Bury(INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    async def _answer(self) -> Disposition:
        if self._stop_reason is None:
            try:
                async with asyncio.timeout(None) as self._scope:
                    return await self._make_attempts()
            except TimeoutError:
                if self._stop_reason is None:
                    raise
            except Interrupted as interrupted:
                self._stop_reason = self._stop_reason or interrupted.reason
            finally:
                self._scope = None
        return await self._after_stop()

    async def _make_attempts(self) -> Disposition:
        outcome = await self._attempt()
        if isinstance(outcome, Retry | Wait):
            outcome = await self._repeat(outcome)
        if isinstance(outcome, Terminal):
            self._scope = None  # the answer is complete: from here on, nothing stops it but its record
            return await self._end(outcome)
        return outcome

    async def _repeat(self, outcome: Terminal | Disposition) -> Terminal | Disposition:
        """Repeat a failed call. The first one is made without tenacity, which takes 40 µs of CPU per call."""
        async for attempt in retrying(self._deps.backends):
            if attempt.retry_state.attempt_number > 1:
                self.calls.runner.check_pause()
                # If the lease has run out meanwhile, another node may be working on the request (I7).
                if await retry_until_available(lambda: self.stream.is_taken_over(self.entry)):
                    self.log.warning("request was taken over by another node", attempt=self.reply.fence)
                    return Leave()
                outcome = await self._attempt(opens=isinstance(outcome, Retry))
            attempt.retry_state.set_result(outcome)
        return outcome

    async def _attempt(self, *, opens: bool = True) -> Terminal | Disposition:
        """Open an attempt, or go on with one that waits for its backend, and make its calls."""
        unused = False
        while True:
            if opens:
                opened = await self._open(continues=not unused, unused=unused)
                if not isinstance(opened, Opened):
                    return await self._not_opened(opened)
                verdict = after_opening(opened.attempt - self.request.earlier_attempts, self._deps.limits)
                if verdict is not None:
                    return verdict
            assert self._writer is not None  # noqa: S101 - there is one after opening
            try:
                return await self.calls.make(self._writer)
            except CannotContinue:
                self.calls.runner.check_pause()
                opens = unused = True

    async def _open(self, *, continues: bool = False, unused: bool = False) -> Opening:
        """Begin an attempt; with `continues`, at the end of the text, if possible. `unused`: see `ReplyStore.open`."""
        deps, reply, before, shown = self._deps, self.reply, self._writer, None
        continues = continues and self.calls.runner.may_continue and deps.backends.can_continue
        if before is not None:
            if continues:
                await retry_until_available(before.flush)
                shown = reply.offset
            self._writer = None
            await before.close()

        # If Redis has lost earlier attempts, or they have expired, their numbers are not used again.
        after = max(reply.fence, self.request.earlier_attempts)
        word, self._word = self._word or new_word(), ""

        async def open_reply(lost: str = "") -> Opening:
            self._unanswered = lambda: retry_until_available(
                lambda: deps.replies.open(
                    reply.user_id,
                    reply.message_id,
                    self.request.question,
                    request=self._id,
                    lost=lost,
                    after=after,
                    continues=deps.settings.max_answer if continues else 0,
                    shown=shown,
                    usage=self.calls.usage,
                    unused=unused,
                    resumed=deps.pauses.since_end(self.stream.node),
                    reopens=self.request.reopens is not None,
                    word=word,
                )
            )
            opened = await self._unanswered()
            self._unanswered = None
            return opened

        opened, self._opened = self._opened or await open_reply(), None
        if isinstance(opened, Duplicate):
            # An entry stays in its stream until its terminal event is recorded (I3): without one, it is lost.
            owner = opened.owner
            if not await retry_until_available(lambda: self.stream.is_unfinished(owner)):
                opened = await open_reply(lost=owner)
                if isinstance(opened, Opened):  # else it has just ended
                    self.log.warning("taking over a message whose request is lost", lost=owner)
        if isinstance(opened, Opened):
            self._attempts, self._is_ours = opened.attempt, True
            self.calls.open(opened)
            is_first = opened.attempt == self.request.earlier_attempts + 1
            self._begin_span(opened, is_first=is_first)
            reply.question = self.request.question
            removal = self.stream.removal(self.entry)
            self._writer = ReplyWriter(
                reply, deps.replies, deps.inbox, request=self._id, opened=opened, removal=removal
            )
            self._account.open(reply, is_first=is_first)
            if is_first:
                deps.on_begun(reply)
                deps.request_log.begin(self.request, stream=self.stream.node)
            self._writer.announce(opened.nodes, begun=is_first)
        return opened

    def _begin_span(self, opened: Opened, *, is_first: bool) -> None:
        tracing, about = self._deps.tracing, (self.request.traceparent, self.stream.key, self.request.message_id)
        if is_first:
            tracing.queued(*about, waited=max(0, opened.at - time_of(self.entry.entry_id)))
        CURRENT.get().end()
        CURRENT.set(tracing.attempt(*about, opened.attempt))

    async def _not_opened(self, opened: Ended | Duplicate | OtherQuestion) -> Disposition:
        """Decide about a message that has ended or belongs to another request."""
        await self._load_record()
        if isinstance(opened, Ended) and opened.event == "failed" and opened.owner == self._id:
            # The worker died before it removed the request.
            terminal, self._attempts = self.reply.terminal or Terminal("failed"), self.reply.fence
            why = (terminal.reason or "unknown", terminal.error or "")
            return Bury(*why) if terminal.refusal is None else Decline(*why, terminal.refusal)
        return Finish()

    async def _record_failure(self, verdict: Bury | Decline) -> Disposition:
        if self._writer is None and not isinstance(opened := await self._open(), Opened):
            return await self._not_opened(opened)
        if self.reply.terminal is not None:
            return verdict
        refusal = verdict.refusal if isinstance(verdict, Decline) else None
        kind = verdict.kind if isinstance(verdict, Bury) else None
        disposition = await self._end(
            Terminal("failed", reason=verdict.reason, error=verdict.error, refusal=refusal, kind=kind)
        )
        has_failed = self.reply.terminal is not None and self.reply.terminal.event == "failed"
        return verdict if disposition == Finish() and has_failed else disposition

    async def _end(self, terminal: Terminal) -> Disposition:
        """Record the end, then show it to clients."""
        assert self._writer is not None  # noqa: S101 - there is one after opening
        if terminal.reason is not None:
            CURRENT.get().fail(terminal.reason, terminal.error or "")
        match await self._writer.end(terminal):
            case Appended(removed=removed):
                self._removed = removed
                self._account.end(self.reply, self._deps.request_log.sockets)
                self.reply.end(terminal)
                return Finish()
            case Rejected("ended"):
                await self._load_record()
                return Finish()
            case rejected:
                self.log.warning("reply stream rejects the end", why=rejected.reason, attempt=self.reply.fence)
                return Leave()

    async def _after_stop(self) -> Disposition:
        reply, replies = self.reply, self._deps.replies
        CURRENT.get().note(self._stop_reason or "")
        match self._stop_reason:
            case "cancelled":
                if self._writer is not None:  # clients have seen the text so far
                    await retry_until_available(self._writer.flush)
                if self._unanswered is not None:  # run after the end is recorded, it could begin a reply without an end
                    await self._unanswered()
                receipt = await retry_until_available(lambda: replies.cancel(reply.user_id, reply.message_id))
                if isinstance(receipt, CancelRecorded):
                    await self._deps.inbox.notify(receipt.nodes, ReplyGrew(reply.user_id, reply.message_id))
                elif receipt == "unknown":  # Redis has lost the reply
                    self._account.end(reply, self._deps.request_log.sockets)
                    reply.end(Terminal("cancelled"))
                await self._load_record()
                return Finish()
            case "superseded":
                if self._writer is not None:
                    self._writer.release()
                await self._load_record()
                return Leave() if reply.terminal is None else Finish()
            case _:
                await self.flush()
                if self._writer is not None and self._deps.pauses.of(self.stream.node):
                    why = Waiting(self.calls.backend or "?", "paused")
                    await self._writer.wait(why, pause=self._deps.settings.queued_ttl, counts=False)
                await self.uncount_delivery()
                return Leave()

    async def _refund(self) -> None:
        """Refund the message in the user's quota, unless an attempt has shown text."""
        if self.reply.first_text_at is None:  # none of this job
            beginning = await retry_until_available(self._beginning)
            if beginning.text_at is None:
                await retry_until_available(lambda: self._deps.guards.on_failure(self.request))

    async def _beginning(self) -> Beginning:
        return await self._deps.replies.beginning(self.reply.user_id, self.reply.message_id)

    async def _load_record(self) -> None:
        """Show followers the recorded reply."""
        reply, replies, position = self.reply, self._deps.replies, None
        while position != reply.position:  # else another task has loaded a later record during the read
            position = reply.position
            record = await retry_until_available(lambda: replies.read(reply.user_id, reply.message_id))
        if record is not None:
            self._is_ours = self._is_ours or record.request in {self._id, ""}
            if record.terminal is not None:
                self._account.end(reply, self._deps.request_log.sockets, record.position)
            reply.load(record)
