"""The processing of one request, from its first attempt to its end."""

import asyncio
import itertools
from datetime import timedelta
from typing import Literal

import structlog
from structlog.typing import FilteringBoundLogger
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_random_exponential

from imstream.ai.router import Backends
from imstream.ai.upstream import Upstream
from imstream.clock import time_of
from imstream.errors import BackendError, StoreError
from imstream.guards.guard import GuardRejection
from imstream.metrics import reason_label
from imstream.model import ChatRequest, Terminal, Usage, Waiting, usage_sum
from imstream.redis.errors import retry_until_available
from imstream.settings import Settings
from imstream.store.inbox import ReplyGrew
from imstream.store.replies import (
    Appended,
    CancelRecorded,
    Duplicate,
    Ended,
    Opened,
    OtherQuestion,
    Rejected,
    WaitRecorded,
)
from imstream.store.requests import Entry, RequestStream
from imstream.tracing import CURRENT, NO_SPAN, Span, Tracing
from imstream.worker.account import Account
from imstream.worker.attempt import AttemptRunner, CannotContinue, WorkerDeps
from imstream.worker.disposition import (
    INTERNAL_ERROR,
    Bury,
    Decline,
    Disposition,
    Finish,
    Leave,
    Retry,
    Wait,
    after_failure,
    after_opening,
    after_rejection,
    before_start,
    may_move_on,
)
from imstream.worker.reply_writer import ReplyWriter

log: FilteringBoundLogger = structlog.get_logger()


StopReason = Literal["cancelled", "drained", "paused", "superseded"]
"""Why a job stops before its answer is complete. Superseded: the reply stream rejects further text of the attempt."""

_HANDED_BACK = ("drained", "paused")


_Opening = Opened | Ended | Duplicate | OtherQuestion


class Job:
    """Answers one request. `run` does all of it; `stop` ends it early; `flush` records the text so far."""

    def __init__(
        self, entry: Entry, request: ChatRequest, stream: RequestStream, deps: WorkerDeps, verdict: Bury | None = None
    ) -> None:
        """With a `verdict`, the request is buried without an attempt."""
        self.entry = entry
        self.request = request
        self.stream = stream
        self.reply = deps.buffers.get(request.user_id, request.message_id)
        self.reply.has_job = True
        self.ended = asyncio.Event()
        self.is_finished = False
        """Whether the request has ended, or belongs to another node."""
        self.upstream: Upstream | None = None
        """The backend of its call. At the start, one whose breaker is half-open, if this request is to try it."""
        self._deps = deps
        self._id = stream.request_id(entry.entry_id)
        self._account = Account(entry.entry_id)
        self._is_ours = False
        """Whether the message belongs to this request. A message that is sent again has several, and one answer."""
        self._runner = AttemptRunner(request, deps)
        self._verdict = verdict
        self._writer: ReplyWriter | None = None
        self._scope: asyncio.Timeout | None = None
        """The cancel scope of the attempts; None when there is nothing left to stop."""
        self._stop_reason: StopReason | None = None
        self._span: Span = NO_SPAN
        """That of the attempt."""
        self._earlier = request.earlier_attempts
        self._attempts = 0
        self._showed_text = False
        """Whether an attempt of this job has shown text, recorded or not."""
        self._counted = 0
        """Attempts before this one that count."""
        self._usage: Usage | None = None
        """That of the calls that wrote the text so far."""
        self._tokens: int | None = None
        """Those of its prompt, once they are counted."""
        self._last_wait: Wait | None = None
        self._broke: tuple[Upstream, ...] = ()
        """The backend that broke the last attempt: the next one prefers others."""
        self._waits_since: float | None = None
        """Loop time of the first failure that made the message wait, on any node."""

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
                self._account.load(await self._deps.replies.beginning(self.reply.user_id, self.reply.message_id))
            was_there = False
            match disposition:
                case Finish():
                    was_there = await self.stream.finish(self.entry)
                case Bury(reason, error):
                    await self._refund()
                    was_there = await self.stream.bury(self.entry, reason=reason, error=error, attempts=self._attempts)
                    self.log.error("request buried", reason=reason, error=error, attempts=self._attempts)
                case Decline(refusal=refusal):
                    if not refusal.violation:
                        await self._refund()
                    was_there = await self.stream.finish(self.entry)
            if was_there and self._is_ours:  # it is removed once, and so counted once
                self._deps.request_log.write(self._account, self.request, self.reply, stream=self.stream.node)
            self.is_finished = not (disposition == Leave() and self._stop_reason in _HANDED_BACK)
        finally:
            self.reply.has_job = False
            self._release_upstream()
            self._span.end()
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
        if isinstance(result, Rejected) and writer is self._writer:  # else it was the attempt before
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
                    decision = await self._attempt()
                    return await self._repeat(decision) if isinstance(decision, Retry | Wait) else decision
            except TimeoutError:
                if self._stop_reason is None:
                    raise
            finally:
                self._scope = None
        return await self._after_stop()

    async def _repeat(self, decision: Disposition) -> Disposition:
        """Repeat a failed call. The first one is made without tenacity, which takes 40 µs of CPU per call."""
        async for attempt in retrying(self._deps.settings, self._deps.backends):
            if attempt.retry_state.attempt_number > 1:
                if self._deps.pauses.of(self.stream.node):
                    self.stop("paused")  # it takes effect below
                # If the lease has run out meanwhile, another node may be working on the request (I7).
                if await retry_until_available(lambda: self.stream.is_taken_over(self.entry)):
                    self.log.warning("request was taken over by another node", attempt=self.reply.fence)
                    return Leave()
                decision = await (self._call() if isinstance(decision, Wait) else self._attempt())
            attempt.retry_state.set_result(decision)
        return decision

    async def _attempt(self) -> Disposition:
        opened = await self._open(continues=True)
        if not isinstance(opened, Opened):
            return await self._not_opened(opened)
        if (verdict := after_opening(opened.attempt - self._earlier, self._deps.limits)) is not None:
            return verdict
        self._counted, waited = opened.counted, opened.waited
        self._waits_since = None if waited is None else asyncio.get_running_loop().time() - waited.total_seconds()
        if waited is None:
            self._last_wait = None
        return await self._call()

    async def _call(self) -> Disposition:
        """Call the AI in this attempt: one backend after the other, as long as they are away."""
        backends, writer = self._deps.backends, self._writer
        assert writer is not None  # noqa: S101 - there is one after opening
        continuing = writer.beginning != ""
        tokens = await self._count_tokens() if backends.limits_prompts or self._tokens is not None else 0
        taken = self._take_upstream(continuing=continuing, tokens=tokens)
        upstream = taken or await self._wait_for_upstream(continuing=continuing)
        if isinstance(upstream, Bury):
            return upstream
        called: list[Upstream] = []
        while True:
            self._account.backend = upstream.name
            try:
                completion = await self._runner.run(upstream, writer)
            except GuardRejection as rejection:
                return after_rejection(rejection.verdict, self.request.lang)
            except CannotContinue:
                if not isinstance(opened := await self._open(unused=True), Opened):
                    return await self._not_opened(opened)
                writer = self._writer or writer
            except BackendError as error:
                self._usage = usage_sum(self._usage, error.usage)
                self._release_upstream()
                called.append(upstream)
                if error.reason == "context_too_long" and not writer.has_text and backends.have_larger(upstream):
                    self._tokens = upstream.prompt_limit + 1  # by its own count
                    self._count_retry(error, upstream)
                    return await self._call()
                if (other := await self._take_other(called, error, writer)) is None:
                    return await self._after_failure(error, upstream, has_text=writer.has_text)
                self._count_retry(error, upstream)
                self.log.info("next backend is called", backend=upstream.name, reason=error.reason, instead=other.name)
                upstream = other
            else:
                self._scope = None  # the answer is complete: from here on, nothing stops it but its record
                self._release_upstream()
                usage = usage_sum(self._usage, completion.usage)
                return await self._end(Terminal("done", completion.finish_reason, usage))

    def _take_upstream(self, *, continuing: bool, tokens: int) -> Upstream | None:
        """Take a backend that may be called now, unless there is one that takes the prompt."""
        if self.upstream is not None and tokens > self.upstream.prompt_limit:
            self._release_upstream()
        if self.upstream is None:
            self.upstream = self._deps.backends.take(tried=self._broke, continuing=continuing, tokens=tokens)
        return self.upstream

    async def _take_other(self, called: list[Upstream], error: BackendError, writer: ReplyWriter) -> Upstream | None:
        """Take a backend that may be called after those that were, if another one may answer."""
        if may_move_on(error, has_text=writer.has_text):
            tokens, continuing = await self._count_tokens(), writer.beginning != ""
            self.upstream = self._deps.backends.take_other(called, continuing=continuing, tokens=tokens)
        return self.upstream

    async def _count_tokens(self) -> int:
        """Tokens of the prompt: a reload may add a backend that is too small for it, while it waits or is called."""
        if self._tokens is None:
            self._tokens = await self._deps.prompter.tokens(self.request)
        return self._tokens

    async def _wait_for_upstream(self, *, continuing: bool) -> Upstream | Bury:
        """Wait until a backend may be called; give up when the retry window is over."""
        last, tokens = self._last_wait, await self._count_tokens()
        try:
            async with asyncio.timeout(None if last is None else last.window.total_seconds()):
                wait = self._deps.backends.wait
                self.upstream = await wait(tried=self._broke, continuing=continuing, tokens=tokens)
                return self.upstream
        except TimeoutError:
            assert last is not None  # noqa: S101 - else there is no limit
            return Bury(last.error.reason, last.error.detail, last.error.kind)

    def _release_upstream(self) -> None:
        if self.upstream is not None:
            self._deps.backends.release(self.upstream)
            self.upstream = None

    async def _after_failure(self, error: BackendError, upstream: Upstream, *, has_text: bool) -> Disposition:
        """Decide after a call that has failed, and was not made at another backend."""
        since, now = self._waits_since, asyncio.get_running_loop().time()
        assert self._writer is not None  # noqa: S101 - there is one after opening
        went_on = has_text and self._writer.beginning != ""
        decision = after_failure(
            error,
            counted=1 if went_on else self._counted + 1,
            has_text=has_text,
            waited=timedelta(seconds=0 if since is None else now - since),
            limits=self._deps.limits,
        )
        self._broke = (upstream,) if isinstance(decision, Retry) else ()
        if not isinstance(decision, Bury):
            self._count_retry(error, upstream)
        if isinstance(decision, Wait):
            await self._wait(decision, upstream)
        elif isinstance(decision, Retry):
            self._span.fail(error.reason, error.detail)
            self.log.warning("attempt failed, will retry", reason=error.reason, attempt=self.reply.fence)
        return decision

    def _count_retry(self, error: BackendError, upstream: Upstream) -> None:
        self._deps.metrics.ai_retries[upstream.name, reason_label(error.reason)] += 1

    async def _wait(self, decision: Wait, upstream: Upstream) -> None:
        """Record that the message waits."""
        assert self._writer is not None  # noqa: S101 - there is one after opening
        error, self._last_wait = decision.error, decision
        pause = max(decision.after.total_seconds(), self._deps.backends.remaining())
        why = Waiting(upstream.name, error.reason, error.detail, round(pause * 1000))
        result = await self._writer.wait(why, pause=decision.window + self._deps.settings.retry_wait_max)
        if isinstance(result, WaitRecorded):
            self.reply.wait(why)
            since = asyncio.get_running_loop().time() - result.waited.total_seconds()
            if self._waits_since is None:
                self.log.warning("message waits for its backend", backend=why.backend, reason=why.reason)
            self._waits_since = min(self._waits_since or since, since)  # Redis may have lost when it began
        else:
            self.stop("superseded")

    async def _open(self, *, continues: bool = False, unused: bool = False) -> _Opening:
        """Begin an attempt; with `continues`, at the end of the text, if possible. `unused`: see `ReplyStore.open`."""
        deps, reply, before, shown = self._deps, self.reply, self._writer, None
        continues = continues and self._runner.may_continue and deps.backends.can_continue
        if before is not None:
            self._showed_text = self._showed_text or reply.offset > 0
            if continues:
                await retry_until_available(before.flush)
                shown = reply.offset
            self._writer = None
            await before.close()

        async def open_reply(lost: str = "") -> _Opening:
            tries = itertools.count()
            return await retry_until_available(
                lambda: deps.replies.open(
                    reply.user_id,
                    reply.message_id,
                    self.request.question,
                    request=self._id,
                    lost=lost,
                    # If Redis has lost earlier attempts, or they have expired, their numbers are not used again.
                    after=max(reply.fence, self._earlier),
                    continues=deps.settings.max_answer if continues else 0,
                    shown=shown,
                    usage=self._usage,
                    unused=unused,
                    reopens=self.request.reopens is not None,
                    repeated=next(tries) > 0,
                )
            )

        opened = await open_reply()
        if isinstance(opened, Duplicate):
            # An entry stays in its stream until its terminal event is recorded (I3): without one, it is lost.
            owner = opened.owner
            if not await retry_until_available(lambda: self.stream.is_unfinished(owner)):
                opened = await open_reply(lost=owner)
                if isinstance(opened, Opened):  # else it has just ended
                    self.log.warning("taking over a message whose request is lost", lost=owner)
        if isinstance(opened, Opened):
            self._attempts, self._is_ours = opened.attempt, True
            self._usage = None if opened.continued is None else opened.continued.usage
            is_first = opened.attempt == self._earlier + 1
            if deps.tracing is None:
                CURRENT.set(Span(self.request.traceparent))
            else:
                self._begin_span(deps.tracing, opened, is_first=is_first)
            reply.question = self.request.question
            self._writer = ReplyWriter(reply, deps.replies, deps.inbox, request=self._id, opened=opened)
            self._account.open(opened, reply, is_first=is_first)
            if is_first:
                deps.on_begun(reply)
                deps.request_log.begin(self.request, stream=self.stream.node)
            self._writer.announce(opened.nodes, begun=is_first)
        return opened

    def _begin_span(self, tracing: Tracing, opened: Opened, *, is_first: bool) -> None:
        about = self.request.traceparent, self.stream.key, self.request.message_id
        if is_first:
            tracing.queued(*about, waited=max(0, opened.at - time_of(self.entry.entry_id)))
        self._span.end()
        self._span = tracing.attempt(*about, opened.attempt)
        CURRENT.set(self._span)

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
            self._span.fail(terminal.reason, terminal.error or "")
        match await self._writer.end(terminal):
            case Appended():
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
        self._span.note(self._stop_reason or "")
        match self._stop_reason:
            case "cancelled":
                if self._writer is not None:  # clients have seen the text so far
                    await retry_until_available(self._writer.flush)
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
                await self.uncount_delivery()
                if self._deps.pauses.of(self.stream.node):  # which may outlast it
                    await replies.keep(reply.user_id, reply.message_id)
                return Leave()

    async def _refund(self) -> None:
        """Refund the message in the user's quota, unless an attempt has shown text."""
        reply, replies, guards = self.reply, self._deps.replies, self._deps.guards
        if not self._showed_text:
            beginning = await retry_until_available(lambda: replies.beginning(reply.user_id, reply.message_id))
            self._showed_text = beginning.text_at is not None
        if not self._showed_text:
            await retry_until_available(lambda: guards.on_failure(self.request))

    async def _load_record(self) -> None:
        """Show followers the recorded reply."""
        reply, replies = self.reply, self._deps.replies
        record = await retry_until_available(lambda: replies.read(reply.user_id, reply.message_id))
        if record is not None:
            self._is_ours = self._is_ours or record.request in {self._id, ""}
            if record.terminal is not None:
                self._account.end(reply, self._deps.request_log.sockets, record.position)
            reply.load(record)


def retrying(settings: Settings, backends: Backends) -> AsyncRetrying:
    """Return a loop over calls. It must not refer to the job: it is part of a reference cycle."""
    backoff = wait_random_exponential(
        multiplier=settings.retry_wait.total_seconds(), max=settings.retry_wait_max.total_seconds()
    )

    def pause(state: RetryCallState) -> float:
        """Seconds before the next call: the wait of the backend, plus a random backoff; or the backends decide."""
        assert state.outcome is not None  # noqa: S101 - set by the loop
        failed: Retry | Wait = state.outcome.result()
        waits = isinstance(failed, Wait) and (backends.is_closed or not backends.may_be_called)
        return 0.0 if waits else backoff(state) + failed.after.total_seconds()

    return AsyncRetrying(retry=retry_if_result(lambda decision: isinstance(decision, Retry | Wait)), wait=pause)
