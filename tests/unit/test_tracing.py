"""Traceparents: which are accepted, made and read from entries; and that nothing is imported without tracing."""

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.frame_parser import parse_frame
from imstream.model import ChatRequest
from imstream.tracing import Span, new_traceparent, parse_traceparent, read_traceparent, wants_tracing
from imstream.wire import ClientChat
from tests.support.tiers import examples

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (GIVEN, GIVEN),
        (f"00-{TRACE}-{PARENT}-00", f"00-{TRACE}-{PARENT}-00"),
        (f"00-{TRACE}-{PARENT}-ff", f"00-{TRACE}-{PARENT}-03"),  # flags that are not known are not passed on
        (f"cc-{TRACE}-{PARENT}-01", GIVEN),  # of a later version
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", GIVEN),
    ],
)
def test_a_valid_traceparent_is_accepted_as_one_of_version_00(sent: str, read: str) -> None:
    assert parse_traceparent(sent) == read


@pytest.mark.parametrize(
    "sent",
    [
        *("", "x", GIVEN.upper(), f" {GIVEN}", f"{GIVEN}\n", GIVEN[:-1], f"{GIVEN}-more", f"ff{GIVEN[2:]}"),
        *(f"cc-{TRACE}-{PARENT}-01more", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"),
        *(None, 7, [GIVEN], {"traceparent": GIVEN}, True),
    ],
)
def test_an_invalid_traceparent_is_ignored_and_never_an_error(sent: object) -> None:
    import json

    assert parse_traceparent(sent) is None
    frame = {"msgType": "CHAT", "userId": 10001, "contents": "hello", "traceparent": sent}
    read = parse_frame(json.dumps(frame))
    assert isinstance(read, ClientChat)
    assert read.traceparent is None


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    assert parse_traceparent(text) is None
    assert parse_traceparent(read_traceparent(text)) is not None


def test_a_new_traceparent_is_valid_unique_and_not_sampled() -> None:
    made = {new_traceparent() for _ in range(examples(1000))}
    assert all(parse_traceparent(one) == one and one.endswith("-00") for one in made)
    assert len({one[3:35] for one in made}) == len({one[36:52] for one in made}) == len(made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_forked_processes_make_different_ones() -> None:
    program = (
        "import os\nfrom imstream.tracing import new_traceparent\nnew_traceparent()\n"
        "child = os.fork()\nos.write(1, f'{new_traceparent()}\\n'.encode())\nif child: os.waitpid(child, 0)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(told) == len(set(told)) == 2


def test_a_node_imports_nothing_of_tracing_by_itself() -> None:
    program = "import sys\nimport imstream.cli.main\nimport imstream.node_process\nprint(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "imstream.node_process" in imported
    # redis-py imports other parts of OpenTelemetry, where it is installed.
    of_tracing = r"imstream\.otel|opentelemetry\.(exporter|proto|sdk\.trace)|google\.protobuf|requests|urllib3"
    assert [name for name in imported if re.match(of_tracing, name)] == []


def test_without_tracing_a_clients_trace_is_passed_on_and_each_call_has_an_id_of_its_own() -> None:
    calls = [Span(GIVEN).call("b", "m", "h", None).traceparent for _ in range(2)]
    assert all(re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-01", one) for one in calls)
    assert len({GIVEN, *calls}) == 3
    assert parse_traceparent(Span().call("b", "m", "h", None).traceparent) is not None


@pytest.mark.parametrize(
    ("written", "trace"),
    [
        (GIVEN, TRACE),
        ("9f86d081884c7d65", f"{'0' * 16}9f86d081884c7d65"),  # an older release: the id that its log lines have
    ],
)
def test_a_request_has_the_trace_of_its_entry(written: str, trace: str) -> None:
    fields = {"user": "10001", "message_id": "m", "contents": "hello", "trace": written}
    request = ChatRequest.from_fields(fields)
    assert request.trace == trace
    assert parse_traceparent(request.traceparent) == request.traceparent
    parts = iter(request.fields())
    assert ChatRequest.from_fields(dict(zip(parts, parts, strict=True))).traceparent == request.traceparent


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "chat"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "TRUE"}, False),
    ],
)
def test_the_standard_variables_turn_tracing_on(environment: dict[str, str], *, wanted: bool) -> None:
    assert wants_tracing(environment) is wanted
