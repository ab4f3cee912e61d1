"""One AI call for a request, with the guards before and after it; and the dependencies of a worker's jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog

from imstream.ai.backend import Completion
from imstream.ai.call_gate import CallGate
from imstream.ai.failures import may_be_about_request
from imstream.ai.prompt.prompter import Prompter
from imstream.ai.router import Backends
from imstream.ai.upstream import Upstream
from imstream.errors import BackendError
from imstream.guards.chain import GuardChain
from imstream.guards.guard import GuardRejection
from imstream.metrics import Metrics, reason_label
from imstream.model import ChatRequest
from imstream.reply_buffer import ReplyBuffer, ReplyBuffers
from imstream.settings import Settings
from imstream.store.inbox import Inbox
from imstream.store.leases import Leases
from imstream.store.pauses import Pauses
from imstream.store.replies import ReplyStore
from imstream.tracing import Tracing
from imstream.worker.account import RequestLog
from imstream.worker.disposition import Limits
from imstream.worker.lease_keeper import LeaseKeeper, StallDetector
from imstream.worker.reply_writer import ReplyWriter

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class WorkerDeps:
    """Dependencies of the consumers and jobs of a node.

    `on_begun`: called when the first attempt at a reply begins, also after it was reopened.
    """

    settings: Settings
    limits: Limits
    replies: ReplyStore
    buffers: ReplyBuffers
    inbox: Inbox
    guards: GuardChain
    prompter: Prompter
    backends: Backends
    leases: Leases
    pauses: Pauses
    lease_keeper: LeaseKeeper
    stall: StallDetector
    tracing: Tracing
    on_begun: Callable[[ReplyBuffer], None]
    metrics: Metrics
    request_log: RequestLog

    def startable(self, stream: str) -> int:
        """Maximum requests that may start now: while backends are away or just back, those that wait go first."""
        return 0 if self.pauses.of(stream) else self.backends.startable()


class Interrupted(Exception):  # noqa: N818 - not an error
    """The work on the request ends here: an operator's pause, or the reply stream rejects the attempt."""

    def __init__(self, reason: Literal["paused", "superseded"]) -> None:
        super().__init__(reason)
        self.reason = reason


class CannotContinue(Exception):  # noqa: N818 - not an error
    """The answer cannot be continued: the backend does not do it, or its beginning is not the model's own text."""


@dataclass(slots=True, eq=False)
class AttemptRunner:
    """Calls the AI for one request of a stream. Guards check the request once, and may change it (`checked`).

    `may_continue`: no backend has refused to continue the answer.
    """

    request: ChatRequest
    stream: str
    deps: WorkerDeps
    checked: ChatRequest | None = None
    may_continue: bool = True

    def check_pause(self, error: BackendError | None = None) -> None:
        """Raise `Interrupted` during a pause: no call may begin. `error`: why the last one is to be repeated."""
        if self.deps.pauses.of(self.stream):
            if error is not None:
                log.warning("attempt failed, will retry", reason=error.reason, **self.request.ids)
            raise Interrupted("paused")

    async def run(self, upstream: Upstream, writer: ReplyWriter) -> Completion:
        """Call a backend for the rest of the answer; write text and reasoning that may be shown.

        Raises `GuardRejection`, `BackendError`, `CannotContinue`, and `Interrupted`.
        """
        deps, beginning = self.deps, writer.beginning
        request = self.checked = self.checked or await deps.guards.check_ai_call(self.request)
        filtered = deps.guards.answer_filter(request, writer.append)
        written = None
        if beginning:
            written = await deps.prompter.written(beginning) if upstream.can_continue else None
            if written is None or (filtered is not None and not filtered.seed(beginning)):
                raise CannotContinue
        messages = await deps.prompter.messages(request, upstream.backend)
        self.check_pause()  # immediately before the call: a guard may have taken long
        metrics, result, period = deps.metrics, "stopped", upstream.gate.period
        if beginning:
            metrics.continuations[upstream.name] += 1
        try:
            completion = await upstream.backend.answer(
                messages,
                on_text=_reported(upstream.gate, writer.append if filtered is None else filtered.feed),
                on_reasoning=self._on_reasoning(request, writer),
                written=written,
            )
            metrics.add_tokens(upstream.name, completion.usage)
            upstream.gate.record_success()
            if filtered is not None:
                filtered.end()
            result = "done"
        except BackendError as error:
            result = error.kind
            metrics.add_tokens(upstream.name, error.usage)
            writer.forget_reasoning()
            if beginning and not writer.has_text and may_be_about_request(error):
                self.may_continue = False
                metrics.ai_retries[upstream.name, reason_label(error.reason)] += 1
                told = {"backend": upstream.name, "error": str(error)}
                log.warning("backend refuses to continue an answer", **told, **request.ids)
                raise CannotContinue from None
            upstream.record_failure(error, user=request.user_id, period=period)
            raise
        except GuardRejection as rejection:
            result = "refused"
            await deps.guards.record_rejection(rejection.verdict, request)
            raise
        finally:
            metrics.ai_calls[upstream.name, result] += 1
        return completion

    def _on_reasoning(self, request: ChatRequest, writer: ReplyWriter) -> Callable[[str], None] | None:
        """Return the callback for reasoning. If it is shown, it passes answer filters of its own."""
        mode = self.deps.settings.thinking
        if mode != "show":
            return writer.think if mode == "status" else None
        show = partial(writer.think, keep=True)
        filtered = self.deps.guards.answer_filter(request, show)
        return show if filtered is None else lambda text: filtered.feed(text) if text else filtered.end()


def _reported(gate: CallGate, on_text: Callable[[str], None]) -> Callable[[str], None]:
    """`on_text`; while the breaker is open, the first text means that the backend is back."""
    if not gate.is_closed:
        return on_text

    def report(text: str) -> None:
        if gate.breaker.tripped:
            gate.record_success()
        on_text(text)

    return report
