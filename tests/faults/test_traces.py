"""Traces: one trace id from the client to the backend, over two nodes; its spans; and faults of a collector."""

import asyncio
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

import pytest

from imstream.client import Client
from imstream.keys import Keys
from tests.support.backend_scripts import breaks_off, by_question
from tests.support.many_nodes import standing_nodes
from tests.support.one_node import NODE, QUICK, OneNode, one_node
from tests.support.otlp import Collector, ReceivedSpan, collector
from tests.support.processes import free_port
from tests.support.scripted_backend import (
    ScriptedBackend,
    chunk,
    event,
    hangs,
    refuses,
    scripted_backend,
    streams,
)
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

USER = 10001
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"
OFF = "traces are not recorded: install imstream-server[otel]"
AWAY, BACK = "traces cannot be sent", "traces are sent again"

OF_TRACING = r"imstream\.otel|opentelemetry\.(exporter|proto|sdk\.trace)|google\.protobuf|requests|urllib3"
"""Modules that are imported for traces only. redis-py imports other parts of OpenTelemetry, where it is installed."""

SOON, LATER = "100", "600000"
"""Milliseconds after which spans are sent, unless the node ends before."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the nodes of a test, without variables of OpenTelemetry."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", SOON)
    return monkeypatch


def lines(node: OneNode, **fields: object) -> list[dict[str, Any]]:
    """The log lines of a node that have these fields."""
    return node.logged(None, **fields)


def sent_traces(backend: ScriptedBackend) -> list[str]:
    """The trace ids of the calls."""
    return [request.headers["traceparent"].split("-")[1] for request in backend.requests]


async def chat(node: OneNode, message_id: str, contents: str = "hello", **fields: object) -> str:
    """Ask a question, and return how it ended."""
    async with node.peer(USER) as someone:
        await someone.send_frame("CHAT", userId=USER, messageId=message_id, contents=contents, **fields)
        told = await someone.end_of(message_id)
        return told.events[-1]


async def test_one_trace_is_found_at_the_client_in_redis_in_the_logs_of_two_nodes_at_the_backend_and_the_collector(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with collector() as traces, scripted_backend() as backend:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", traces.url)
        part = event(chunk("All "))
        backend.then(breaks_off(part), hangs(part), streams("All ", "well", usage={"prompt_tokens": 5}))
        settings: dict[str, Any] = {"log_format": "json", "sweep_interval": "1m"}
        with standing_nodes(tmp_path, backend.url, "a", "b", **settings) as nodes:
            async with Client(nodes.urls("a"), USER) as client:
                reply = await client.send("hello", message_id="m1", traceparent=GIVEN)
                await backend.request(1)
                entries: Any = nodes.redis.xrange(Keys().requests("a"))
                [(_, entry)] = entries
                assert entry["trace"].split("-")[1] == TRACE
                await traces.received("attempt")
                await wait_until(lambda: lines(nodes["a"], trace=TRACE), "the first node has logged the failed attempt")
                await nodes.killed("a")
                assert await reply.text() == "All well"
            await wait_until(lambda: lines(nodes["b"], trace=TRACE, event="request ended"), "the end is logged")
            assert lines(nodes["a"], trace=TRACE, event="attempt failed, will retry")
            assert sent_traces(backend) == [TRACE] * 3
            _, second = await traces.received("attempt", 2)
            calls = await traces.received("chat", 2)
            await nodes["a"].all_finished()
    [received], [queued], first = traces.named("receive"), traces.named("queue"), traces.named("attempt")[0]
    assert {span.trace_id for span in traces.spans} == {TRACE}
    assert (received.parent_id, received.kind) == (PARENT, "server")
    assert (queued.parent_id, queued.kind) == (received.span_id, "internal")
    assert entry["trace"].split("-")[1:3] == [TRACE, received.span_id]
    assert (first.parent_id, second.parent_id) == (received.span_id, received.span_id)
    assert (first.kind, second.kind) == ("consumer", "consumer")
    assert (first.attributes["imstream.attempt"], second.attributes["imstream.attempt"]) == (1, 3)
    assert [(call.parent_id, call.kind) for call in calls] == [(first.span_id, "client"), (second.span_id, "client")]
    # The second call died with its node: its span was never sent.
    callers = [request.headers["traceparent"].split("-")[2] for request in backend.requests]
    assert [callers[0], callers[2]] == [call.span_id for call in calls]
    assert len({PARENT, callers[1], *(span.span_id for span in traces.spans)}) == len(traces.spans) + 2
    assert [span.resource["service.instance.id"] for span in (received, queued, first, second)] == ["a", "a", "a", "b"]
    assert first.attributes["error.type"] == calls[0].attributes["error.type"] == "broken_stream"
    assert None not in (first.error, calls[0].error)
    assert (second.error, calls[1].error) == (None, None)


async def test_spans_have_the_names_attributes_and_statuses_of_the_conventions(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with collector() as traces, scripted_backend() as backend:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", traces.url)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", LATER)
        too_long = '{"error": {"message": "maximum context length exceeded", "code": "context_length_exceeded"}}'
        well = streams("well", usage={"prompt_tokens": 5, "completion_tokens": 7})
        one, two = hangs(event(chunk("never "))), refuses(400, too_long)
        script = by_question({"wait": [one], "too long": [two]}, otherwise=well)
        backend.then(*[script] * 5)
        settings: dict[str, Any] = {"ai_model": "small", "user_limit": 1}
        async with one_node(tmp_path, redis_server, backend.url, **settings) as node:
            async with node.peer(USER) as someone:
                await someone.send_frame("CHAT", userId=USER, messageId="m1", contents="hello")
                await someone.end_of("m1")
                await node.all_finished()
                await someone.send_frame("CHAT", userId=USER, messageId="m2", contents="too long")
                assert (await someone.end_of("m2")).events[-1] == "failed"
                await node.all_finished()
                await someone.send_frame("CHAT", userId=USER, messageId="m3", contents="wait")
                await someone.some_text("m3")
                await someone.send_frame("CHAT", userId=USER, messageId="m4", contents="one too many")
                await someone.until(code="BUSY")
                await someone.send_frame("CANCEL", messageId="m3")
                assert (await someone.end_of("m3")).events[-1] == "cancelled"
            await node.all_finished()
            assert not traces.spans
            assert await node.terminated() == 0  # the node sends the rest when it drains
    stream = Keys().requests("0")
    assert _tree(traces) == [
        ("receive CHAT", "server", {"result": "accepted"}),
        (f"queue {stream}", "internal", {}),
        (f"attempt {stream}", "consumer", {"attempt": 1}),
        ("chat small", "client", {"backend": "default"}),
        ("receive CHAT", "server", {"result": "accepted"}),
        (f"queue {stream}", "internal", {}),
        (f"attempt {stream}", "consumer", {"attempt": 1, "error": "context_too_long"}),
        ("chat small", "client", {"backend": "default", "error": "context_too_long"}),
        ("receive CHAT", "server", {"result": "accepted"}),
        (f"queue {stream}", "internal", {}),
        (f"attempt {stream}", "consumer", {"attempt": 1, "result": "cancelled"}),
        ("chat small", "client", {"backend": "default", "result": "cancelled"}),
        ("receive CHAT", "server", {"result": "user_busy"}),
    ]
    received, _, attempt, call = traces.spans[:4]
    about = {
        "messaging.system": "redis",
        "messaging.destination.name": stream,
        "messaging.message.id": "m1",
    }
    assert about.items() <= received.attributes.items()
    processing = {"messaging.operation.type": "process", "messaging.consumer.group.name": "workers"}
    assert (about | processing).items() <= attempt.attributes.items()
    assert call.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "small",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
        "server.address": "127.0.0.1",
        "server.port": backend.port,
        "imstream.backend": "default",
    }
    assert {span.schema_url for span in traces.spans} == {"https://opentelemetry.io/schemas/1.41.0"}
    service = {"service.name": "imstream", "service.instance.id": "0", "telemetry.sdk.language": "python"}
    assert all(service.items() <= span.resource.items() for span in traces.spans)
    assert "hello" not in str(traces.spans)
    assert str(USER) not in str(traces.spans)


def _tree(traces: Collector) -> list[tuple[str, str, dict[str, Any]]]:
    """The spans, each below its parent, with the attributes that distinguish them."""
    spans = traces.spans
    by_parent = {
        parent: [span for span in spans if span.parent_id == parent] for parent in {s.parent_id for s in spans}
    }

    def below(parent: str) -> list[ReceivedSpan]:
        return [one for span in by_parent.get(parent, []) for one in (span, *below(span.span_id))]

    told = list[tuple[str, str, dict[str, Any]]]()
    for span in below(""):
        own = {name.removeprefix("imstream."): value for name, value in span.attributes.items() if "imstream." in name}
        assert (span.error is None) == ("error.type" not in span.attributes)
        assert span.begin <= span.end
        error = {} if span.error is None else {"error": span.attributes["error.type"]}
        told.append((span.name, span.kind, own | error))
    return told


@pytest.mark.long
async def test_the_client_decides_whether_a_trace_is_recorded_and_the_operator_whether_that_counts(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with collector() as traces, scripted_backend(streams("well")) as backend:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", traces.url)
        environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=chat,deployment.environment.name=test")
        async with one_node(tmp_path, redis_server, backend.url) as node:
            unsampled = f"{GIVEN[:-2]}00"
            assert await chat(node, "m1", traceparent=unsampled) == "done"
            assert await chat(node, "m2", traceparent="no traceparent") == "done"
            [recorded] = await traces.received("chat")
            assert recorded.trace_id != TRACE
            assert recorded.resource["service.name"] == "chat"
            environment.setenv("OTEL_TRACES_SAMPLER", "always_off")
            assert await node.terminated() == 0
            await node.start()
            assert await chat(node, "m3", traceparent=GIVEN) == "done"
            assert await node.terminated() == 0
        assert {span.attributes.get("messaging.message.id", "m2") for span in traces.spans} == {"m2"}
    assert sent_traces(backend) == [TRACE, recorded.trace_id, TRACE]
    flags = [int(request.headers["traceparent"][-2:], 16) for request in backend.requests]
    assert [one & 1 for one in flags] == [0, 1, 0]


@pytest.mark.long
async def test_a_collector_that_is_away_costs_one_line_and_no_answer(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, tmp_path: Path
) -> None:
    port = free_port()
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")  # one retry, whose line has the reason
    async with scripted_backend(streams("well")) as backend:
        async with one_node(tmp_path, redis_server, backend.url, log_format="json") as node:
            assert await chat(node, "m1") == "done"
            await wait_until(lambda: lines(node, event=AWAY), "the node has noticed it")
            assert await chat(node, "m2") == "done"
            async with collector(port) as traces:
                await wait_until(lambda: lines(node, event=BACK), "the node has noticed that it is back")
                assert traces.spans
            assert await chat(node, "m3") == "done"
            await wait_until(lambda: len(lines(node, event=AWAY)) == 2, "the node has noticed that it is away again")
            for number in range(4, 7):
                assert await chat(node, f"m{number}") == "done"
            assert await node.terminated() == 0
        assert len(lines(node, event=AWAY)) == 2
        assert "refused" in lines(node, event=AWAY)[0]["error"]
        others = [line for line in lines(node) if line["level"] != "info" and line["event"] != AWAY]
        assert [line["event"] for line in others if "authenticated" not in line["event"]] == []


@pytest.mark.long
async def test_a_collector_that_accepts_and_does_not_answer_does_not_delay_the_end_of_a_node(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with scripted_backend(hangs(head=False)) as silent, scripted_backend(streams("well")) as backend:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.port}")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", LATER)
        async with one_node(tmp_path, redis_server, backend.url, log_format="json") as node:
            assert await chat(node, "m1") == "done"
            assert await node.terminated() == 0
            assert len(lines(node, event="the last traces are not sent")) == 1


@pytest.mark.long
async def test_without_the_extra_a_node_logs_it_and_serves(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ModuleNotFoundError('No module named opentelemetry')", "utf-8")
    environment.setenv("PYTHONPATH", str(tmp_path))
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    with redis_server.client() as client:
        async with scripted_backend(streams("well")) as backend:
            known = {**QUICK, "log_format": "json"}
            node = OneNode(tmp_path, client, redis_server.url, backend.url, known, python=sys.executable)
            await node.start()
            with node.now.process:
                [line] = lines(node, event=OFF)
                assert (line["level"], line["error"]) == ("error", "No module named opentelemetry")
                assert await chat(node, "m1", traceparent=GIVEN) == "done"
                assert sent_traces(backend) == [TRACE]


@pytest.mark.long
async def test_without_tracing_nothing_of_it_is_imported_and_a_trace_is_passed_on(
    environment: pytest.MonkeyPatch, redis_server: RedisServer, tmp_path: Path
) -> None:
    environment.setenv("TRACEPARENT", GIVEN)
    with redis_server.client() as client:
        async with scripted_backend(streams("well")) as backend:
            node = OneNode(tmp_path, client, redis_server.url, backend.url, {**QUICK}, python=sys.executable)
            await node.start(command=("-X", "importtime", *NODE))
            with node.now.process:
                words = ("-m", "imstream", "chat", "--url", node.now.ws(), "--user", str(USER))
                for question in (b"one", b"two"):
                    terminal = await asyncio.create_subprocess_exec(
                        sys.executable, *words, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
                    )
                    answer, _ = await terminal.communicate(question)
                    assert answer.decode() == "well\n"
                assert sent_traces(backend) == [TRACE, TRACE]
                assert len({request.headers["traceparent"] for request in backend.requests}) == 2
                imported = set(re.findall(r"\| +([\w.]+)$", node.now.process.output(), re.MULTILINE))
                assert "imstream.node_process" in imported
                assert {name for name in imported if re.match(OF_TRACING, name)} == set()
