"""The AI calls of one request: the backend of each, the wait for one, and the decision after a failure."""

import asyncio
import random
from dataclasses import replace
from datetime import timedelta

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_result

from imstream.ai.router import Backends
from imstream.ai.upstream import Upstream
from imstream.errors import BackendError
from imstream.guards.guard import GuardRejection
from imstream.metrics import reason_label
from imstream.model import ChatRequest, Terminal, Usage, Waiting, usage_sum
from imstream.store.replies import Opened, WaitRecorded
from imstream.tracing import CURRENT
from imstream.worker.attempt import AttemptRunner, Interrupted, WorkerDeps
from imstream.worker.disposition import Bury, Decline, Retry, Wait, after_failure, after_rejection, may_move_on
from imstream.worker.reply_writer import ReplyWriter

log = structlog.get_logger()


class Calls:
    """Makes the calls of one request. `open` comes first, with each attempt."""

    def __init__(self, request: ChatRequest, stream: str, deps: WorkerDeps) -> None:
        self.upstream: Upstream | None = None
        """The backend of the call. At the start, one whose breaker is half-open, if this request is to try it."""
        self.backend: str | None = None  # the name of the backend that was called last
        self.usage: Usage | None = None  # that of the calls that wrote the text so far
        self.runner = AttemptRunner(request, stream, deps)
        self._request = request
        self._deps = deps
        self._called = list[Upstream]()  # the backends that were found away since the message waited last
        self._broke: tuple[Upstream, ...] = ()  # the backend that broke the last attempt: the next one prefers others
        self._tokens: int | None = None  # those of its prompt, once they are counted
        self._backoff = deps.settings.retry_wait  # limit of the random time before the next repeated call; it doubles
        self._counted = 0  # attempts before this one that count
        self._last_wait: Wait | None = None
        self._waits_since: float | None = None  # loop time of the first failure that made the message wait, on any node

    def open(self, opened: Opened) -> None:
        """An attempt was opened."""
        self.usage = None if opened.continued is None else opened.continued.usage
        self._counted, waited = opened.counted, opened.waited
        self._waits_since = None if waited is None else asyncio.get_running_loop().time() - waited.total_seconds()
        if waited is None:
            self._last_wait = None

    async def make(self, writer: ReplyWriter) -> Terminal | Retry | Wait | Bury | Decline:
        """Call one backend after the other, as long as they are away. Raises `CannotContinue` and `Interrupted`."""
        if (given_up := await self._choose(writer)) is not None:
            return given_up
        while True:
            assert self.upstream is not None  # noqa: S101 - one is chosen
            self.backend = self.upstream.name
            try:
                completion = await self.runner.run(self.upstream, writer)
            except GuardRejection as rejection:
                return after_rejection(rejection.verdict, self._request.lang)
            except BackendError as error:
                if (decision := await self._after_failure(error, self.upstream, writer)) is not None:
                    return decision
            else:
                self.release()
                return Terminal("done", completion.finish_reason, usage_sum(self.usage, completion.usage))

    def release(self) -> None:
        """Give back the backend, if one is taken."""
        if self.upstream is not None:
            self._deps.backends.release(self.upstream)
            self.upstream = None

    async def _choose(self, writer: ReplyWriter) -> Bury | None:
        """Take a backend that may be called now, or wait for one; give up when the retry window is over."""
        backends, continuing, last = self._deps.backends, writer.beginning != "", self._last_wait
        tokens = await self._count_tokens() if backends.limits_prompts or self._tokens is not None else 0
        if self.upstream is not None and tokens > self.upstream.prompt_limit:
            self.release()
        if self.upstream is None:
            self.upstream = backends.take(tried=self._broke, continuing=continuing, tokens=tokens)
        if self.upstream is None:
            tokens = await self._count_tokens()
            try:
                async with asyncio.timeout(None if last is None else last.window.total_seconds()):
                    self.upstream = await backends.wait(tried=self._broke, continuing=continuing, tokens=tokens)
            except TimeoutError:
                assert last is not None  # noqa: S101 - else there is no limit
                return Bury(last.error.reason, last.error.detail, last.error.kind)
        return None

    async def _count_tokens(self) -> int:
        """Tokens of the prompt: a reload may add a backend that is too small for it, while it waits or is called."""
        if self._tokens is None:
            self._tokens = await self._deps.prompter.tokens(self._request)
        return self._tokens

    async def _after_failure(
        self, error: BackendError, upstream: Upstream, writer: ReplyWriter
    ) -> Retry | Wait | Bury | None:
        """Decide after a call that has failed. None: another backend is taken, and called at once."""
        backends, has_text = self._deps.backends, writer.has_text
        self.usage = usage_sum(self.usage, error.usage)
        self.release()
        self._called.append(upstream)
        told = {"backend": upstream.name, "reason": error.reason, **self._request.ids}
        is_too_long = error.reason == "context_too_long" and not has_text and backends.have_larger(upstream)
        if is_too_long or error.kind != "impossible":
            self.runner.check_pause(error)  # the call is repeated after the pause, however many have failed
        if is_too_long:
            self._tokens = upstream.prompt_limit + 1  # by its own count
            self._count_retry(error, upstream)
            return await self._choose(writer)
        if may_move_on(error, has_text=has_text):
            tokens, continuing = await self._count_tokens(), writer.beginning != ""
            self.upstream = backends.take_other(self._called, continuing=continuing, tokens=tokens)
            if self.upstream is not None:
                self._count_retry(error, upstream)
                log.info("next backend is called", **told, instead=self.upstream.name)
                return None
        since, now = self._waits_since, asyncio.get_running_loop().time()
        decision = after_failure(
            error,
            counted=1 if has_text and writer.beginning else self._counted + 1,
            has_text=has_text,
            waited=timedelta(seconds=0 if since is None else now - since),
            limits=self._deps.limits,
        )
        self._called.clear()
        self._broke = (upstream,) if isinstance(decision, Retry) else ()
        if not isinstance(decision, Bury):
            self._count_retry(error, upstream)
            decision = replace(decision, after=decision.after + self._draw_pause())
        if isinstance(decision, Wait):
            await self._wait(decision, upstream, writer)
        elif isinstance(decision, Retry):
            CURRENT.get().fail(error.reason, error.detail)
            log.warning("attempt failed, will retry", **told, attempt=writer.attempt)
        return decision

    def _count_retry(self, error: BackendError, upstream: Upstream) -> None:
        self._deps.metrics.ai_retries[upstream.name, reason_label(error.reason)] += 1

    def _draw_pause(self) -> timedelta:
        """A random time before the next call. It is drawn here, because the client is told when that will be."""
        limit = min(self._backoff, self._deps.settings.retry_wait_max)
        self._backoff = 2 * limit
        return limit * random.random()  # noqa: S311 - spreads load, no secret

    async def _wait(self, decision: Wait, upstream: Upstream, writer: ReplyWriter) -> None:
        error, self._last_wait = decision.error, decision
        pause = max(decision.after.total_seconds(), self._deps.backends.remaining())
        why = Waiting(upstream.name, error.reason, error.detail, round(pause * 1000))
        result = await writer.wait(why, pause=decision.window + self._deps.settings.retry_wait_max)
        if not isinstance(result, WaitRecorded):
            raise Interrupted("superseded")
        since = asyncio.get_running_loop().time() - result.waited.total_seconds()
        if self._waits_since is None:
            log.warning("message waits for its backend", backend=why.backend, reason=why.reason, **self._request.ids)
        self._waits_since = min(self._waits_since or since, since)  # Redis may have lost when it began


def retrying(backends: Backends) -> AsyncRetrying:
    """Return a loop over calls. It must not refer to the job: it is part of a reference cycle."""

    def pause(state: RetryCallState) -> float:
        """Seconds before the next call; none if the message waits until a backend may be called."""
        assert state.outcome is not None  # noqa: S101 - set by the loop
        failed: Retry | Wait = state.outcome.result()
        waits = isinstance(failed, Wait) and (backends.is_closed or not backends.may_be_called)
        return 0.0 if waits else failed.after.total_seconds()

    return AsyncRetrying(retry=retry_if_result(lambda outcome: isinstance(outcome, Retry | Wait)), wait=pause)
