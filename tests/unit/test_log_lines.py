"""Untrusted values in log lines are cut and escaped, and lines that clients can cause are limited."""

import json
import logging

import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imstream import logs
from imstream.clock import RedisClock
from imstream.logs import LIMITED, MAX_VALUE_LENGTH, sanitize
from imstream.metrics import Metrics
from imstream.model import ChatRequest, Terminal
from imstream.reply_buffer import ReplyBuffer
from imstream.settings import Settings
from imstream.tracing import new_traceparent
from imstream.worker.account import Account, RequestLog
from tests.support.waiting import wait_until

FORMATS = ["json", "console"]
OBEYED = "\x1b[2J\x9b31m\x85\u2028\u202e\u2066\u200b\ufeff\x7f\0\r\n\ud800"
"""Control characters that a terminal, line reader or editor interprets, and text that cannot be encoded."""


pytestmark = pytest.mark.usefixtures("restored_logging")


def configure(log_format: str) -> None:
    """Log as a node does, without pytest's handlers: its reports must be valid Unicode."""
    logging.getLogger().handlers.clear()
    logs.configure(Settings.load(log_format=log_format))


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were written."""
    return capsys.readouterr().out.removesuffix("\n").split("\n")


@given(st.text() | st.text(st.sampled_from(OBEYED)))
@example(OBEYED * 20)
@example("x" * 8192)
@example("\U0001f468\u200d" * 40)
def test_a_foreign_value_is_short_and_has_nothing_that_is_obeyed(text: str) -> None:
    shown = sanitize(text)
    assert len(shown) <= MAX_VALUE_LENGTH
    assert shown.isprintable()
    if text.isprintable() and len(text) <= MAX_VALUE_LENGTH:
        assert shown == text


@pytest.mark.parametrize("log_format", FORMATS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.text() | st.binary() | st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
@example(OBEYED)
@example("x" * 100_000)
@example([OBEYED, "x" * 1000, 5, None] * 1000)
def test_no_value_breaks_a_line(log_format: str, capsys: pytest.CaptureFixture[str], value: object) -> None:
    configure(log_format)
    structlog.get_logger().info("something", value=value, error=value, peer=value)
    logging.getLogger("some.library").warning("%s", value)
    lines = lines_of(capsys)
    assert len(lines) == 2
    assert all(line.isprintable() and len(line) < 5000 for line in lines), lines
    if log_format == "json":
        assert json.loads(lines[0])["event"] == "something"


@pytest.mark.parametrize("reason", [OBEYED * 20, "x" * 8192])
def test_the_finish_reason_of_a_backend_cannot_break_its_line(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    reply = ReplyBuffer(10001, "m")
    reply.end(Terminal("done", reason))
    request = ChatRequest(10001, "m", "hello", (), "en", 1, new_traceparent())
    RequestLog("0", Metrics(), lambda _: (0, 0)).write(Account(RedisClock(), received_at=1), request, reply, stream="0")
    [line] = lines_of(capsys)
    assert line.isprintable()
    assert json.loads(line)["reason"] == sanitize(reason)


def fail(text: str) -> None:
    """Raise an exception with this text."""
    raise ValueError(text)


@pytest.mark.parametrize("log_format", FORMATS)
def test_an_exception_cannot_forge_a_line_nor_fill_the_log(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format)
    forged = '{"event": "forged"}'
    for text in (f"no\n{forged}\n{OBEYED}", "x" * 10_000, "x\n" * 1_000):
        try:
            fail(text)
        except ValueError:
            structlog.get_logger().exception("it failed")
            logging.getLogger("some.library").exception("it failed")
    out = capsys.readouterr().out
    assert len(out) < 20_000
    assert out.count("ValueError: ") == 6
    lines = out.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith(forged)] == []


async def test_of_lines_that_any_client_can_cause_only_some_are_written_and_the_others_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("json")
    limited = structlog.get_logger(**LIMITED)
    for number in range(500):
        limited.info("login refused", number=number)
        logging.getLogger("uvicorn.error").error("no request")
        structlog.get_logger().info("session opened", number=number)
    written = ""

    async def counted() -> int:
        nonlocal written
        written += capsys.readouterr().out
        events = [json.loads(line) for line in written.splitlines()]
        return sum(event.get("count", 0) for event in events if event["event"] == "log lines dropped")

    await wait_until(counted, "the number of lines that were left out is logged")
    events = [json.loads(line) for line in written.splitlines()]
    shared = [event for event in events if event["event"] in {"login refused", "no request"}]
    assert 20 <= len(shared) < 40
    assert len(shared) + await counted() == 1000
    assert "limited" not in shared[0]
    assert sum(event["event"] == "session opened" for event in events) == 500
