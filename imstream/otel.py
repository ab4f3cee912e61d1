"""Records spans with OpenTelemetry and sends them to a collector, by OTLP over HTTP. The extra `otel` installs it.

Imported only if it is turned on, see `wants_tracing`. Its standard variables (`OTEL_*`) set where spans are sent, which
traces are sampled, and how much is buffered. Spans are sent by a thread of their own; nothing waits for it.

Names are those of the semantic conventions 1.41, the last version with both messaging and generative AI.
"""

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import time_ns

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from imstream import __version__
from imstream.errors import BackendError
from imstream.keys import GROUP
from imstream.tracing import HEADER, Span, Tracing

SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"

GEN_AI_USAGE = {"prompt_tokens": "gen_ai.usage.input_tokens", "completion_tokens": "gen_ai.usage.output_tokens"}

FLUSH_LIMIT = 2.0  # seconds at the end of a node to send buffered spans

log = structlog.get_logger()


class RecordedSpan(Span):
    """A span of the SDK."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span
        own = span.get_span_context()
        super().__init__(f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}")

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, BackendError):
            self.fail(error.reason, error.detail)
        elif isinstance(error, Exception):
            self.fail(type(error).__name__)
        elif error is not None:
            self.note("cancelled")
        self.end()

    def call(self, backend: str, model: str, host: str, port: int | None) -> Span:
        attributes: dict[str, str | int] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": model,
            "server.address": host,
            "imstream.backend": backend,
        }
        if port is not None:
            attributes["server.port"] = port
        within = trace.set_span_in_context(self._span, Context())
        span = self._tracer.start_span(f"chat {model}", within, SpanKind.CLIENT, attributes)
        return RecordedSpan(self._tracer, span)

    def answered(self, finish_reason: str, usage: Mapping[str, int] | None) -> None:
        self._span.set_attribute("gen_ai.response.finish_reasons", [finish_reason])
        for name, count in (usage or {}).items():
            if name in GEN_AI_USAGE:
                self._span.set_attribute(GEN_AI_USAGE[name], count)

    def fail(self, reason: str, detail: str = "") -> None:
        self._span.set_attribute("error.type", reason)
        self._span.set_status(Status(StatusCode.ERROR, detail or reason))

    def note(self, result: str) -> None:
        self._span.set_attribute("imstream.result", result)

    def end(self) -> None:
        self._span.end()


class OtelTracing(Tracing):
    """Records the spans of a node, as far as its sampler decides so."""

    def __init__(self, node: str) -> None:
        own = Resource.create({"service.name": "imstream", "service.version": __version__, "service.instance.id": node})
        # The operator's variables take precedence. No handler at exit: it would have no time limit.
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._exporter = _Exporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("imstream", __version__, schema_url=SCHEMA_URL)
        logging.getLogger("opentelemetry.sdk").setLevel(logging.ERROR)  # one line for each span that is not buffered
        log.info("traces are recorded")

    def receive(self, given: str | None, stream: str, message_id: str) -> Span:
        about, within = _about(stream, message_id), _within(given) if given else Context()
        span = self._tracer.start_span("receive CHAT", within, SpanKind.SERVER, about)
        return RecordedSpan(self._tracer, span)

    def queued(self, traceparent: str, stream: str, message_id: str, *, waited: int) -> None:
        about, since = _about(stream, message_id), time_ns() - waited * 1_000_000
        self._tracer.start_span(f"queue {stream}", _within(traceparent), attributes=about, start_time=since).end()

    def attempt(self, traceparent: str, stream: str, message_id: str, number: int) -> Span:
        attributes = {
            **_about(stream, message_id),
            "messaging.operation.name": "attempt",
            "messaging.operation.type": "process",
            "messaging.consumer.group.name": GROUP,
            "imstream.attempt": number,
        }
        span = self._tracer.start_span(f"attempt {stream}", _within(traceparent), SpanKind.CONSUMER, attributes)
        return RecordedSpan(self._tracer, span)

    async def stop(self) -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # too late: the loop is closed
                loop.call_soon_threadsafe(stopped.set)

        # A thread that does not keep the process alive: a collector that does not answer takes the SDK longer.
        threading.Thread(target=shut_down, name="otel-shutdown", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_LIMIT):
                await stopped.wait()
        except TimeoutError:
            if not self._exporter.failing:
                log.warning("the last traces are not sent", limit_s=FLUSH_LIMIT)


class _Exporter(SpanExporter):
    """Sends spans. Logs once that they cannot be sent, and once that they can again; the SDK would do so each time."""

    def __init__(self) -> None:
        self.failing = False
        self._error = ""
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(self._keep_error)
        self._otlp = OTLPSpanExporter()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._error = ""
        result = self._otlp.export(spans)
        was_failing, self.failing = self.failing, result is not SpanExportResult.SUCCESS
        if self.failing and not was_failing:
            log.warning("traces cannot be sent", error=self._error)
        elif was_failing and not self.failing:
            log.info("traces are sent again")
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]

    def _keep_error(self, record: logging.LogRecord) -> bool:
        self._error = self._error or record.getMessage()
        return False


def _about(stream: str, message_id: str) -> dict[str, str | int]:
    return {"messaging.system": "redis", "messaging.destination.name": stream, "messaging.message.id": message_id}


def _within(traceparent: str) -> Context:
    return TraceContextTextMapPropagator().extract({HEADER: traceparent})
