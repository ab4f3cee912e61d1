"""A collector of traces, over a real socket: it decodes the requests of OpenTelemetry's exporter.

async with collector() as traces:
    ...                                  # nodes with OTEL_EXPORTER_OTLP_ENDPOINT=traces.url
    await traces.received("receive CHAT")
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support.scripted_backend import Exchange, ScriptedBackend, scripted_backend
from tests.support.waiting import wait_until

Value = str | int | list[str]


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it was received. `error`: the description of its status; None unless that is an error."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    begin: int
    end: int
    attributes: dict[str, Value]
    error: str | None
    resource: dict[str, Value]
    schema_url: str


@dataclass(frozen=True)
class Collector:
    """The spans that nodes have sent to a collector."""

    backend: ScriptedBackend

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.backend.port}"

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans so far, in the order of their begin."""
        found = list[ReceivedSpan]()
        for request in self.backend.requests:
            assert (request.method, request.target) == ("POST", "/v1/traces")
            for group in ExportTraceServiceRequest.FromString(request.body).resource_spans:
                resource = _decoded(group.resource.attributes)
                for scope in group.scope_spans:
                    found += [_span(one, resource, scope.schema_url) for one in scope.spans]
        return sorted(found, key=lambda span: span.begin)

    def named(self, name: str, **attributes: Value) -> list[ReceivedSpan]:
        """The spans whose name begins so, with these attributes, whose names have `_` for a dot here."""
        wanted = {key.replace("_", "."): value for key, value in attributes.items()}
        return [one for one in self.spans if one.name.startswith(name) and wanted.items() <= one.attributes.items()]

    async def received(self, name: str, count: int = 1) -> list[ReceivedSpan]:
        """Wait for spans with this beginning of their name."""
        await wait_until(lambda: len(self.named(name)) >= count, f"{count} spans {name!r} are received")
        return self.named(name)


@asynccontextmanager
async def collector(port: int = 0) -> AsyncIterator[Collector]:
    """Run a collector on a port of 127.0.0.1, by default a free one."""
    async with scripted_backend(_accepts, port=port) as backend:
        yield Collector(backend)


async def _accepts(exchange: Exchange) -> None:
    await exchange.start(content_type="application/x-protobuf", framing=0)


def _span(span: Span, resource: dict[str, Value], schema_url: str) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_decoded(span.attributes),
        error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
        resource=resource,
        schema_url=schema_url,
    )


def _decoded(attributes: "list[KeyValue]") -> dict[str, Value]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: AnyValue) -> Value:
    if value.HasField("array_value"):
        return [one.string_value for one in value.array_value.values]
    return value.int_value if value.HasField("int_value") else value.string_value
