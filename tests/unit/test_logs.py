"""Log lines, as an operator or a log collector reads them."""

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from imstream import logs
from imstream.logs import event_writer
from imstream.settings import Settings

pytestmark = pytest.mark.usefixtures("restored_logging")


def configure(**settings: object) -> None:
    """Configure logging as a node with these settings does."""
    logs.configure(Settings.load(**settings))


def test_outside_a_terminal_a_line_is_json_with_the_event_up_front(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    structlog.get_logger().info("accepted", user=10001, place="上海")
    line = capsys.readouterr().out
    assert list(json.loads(line)) == ["timestamp", "level", "event", "user", "place"]
    assert json.loads(line)["event"] == "accepted"
    assert "上海" in line


def test_a_line_has_the_time_in_utc_and_its_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    for write in (structlog.get_logger().info, structlog.get_logger().exception, logging.getLogger("a.library").error):
        write("something")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["level"] for line in lines] == ["info", "error", "error"]
    times = [datetime.fromisoformat(line["timestamp"]) for line in lines]
    assert times == sorted(times)
    assert timedelta(0) <= datetime.now(UTC) - times[0] < timedelta(minutes=1)


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="console")
    structlog.get_logger().info("accepted", user=10001)
    line = capsys.readouterr().out
    assert "accepted" in line
    assert "user=10001" in line
    assert "{" not in line


def test_a_terminal_gets_console_lines_in_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    configure()
    structlog.get_logger().info("accepted")
    assert "\x1b[" in capsys.readouterr().out


def test_lines_of_libraries_take_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    logging.getLogger("some.library").warning("%d things", 3)
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["level"], line["logger"]) == ("3 things", "warning", "some.library")


def test_query_strings_are_taken_out_of_what_libraries_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    logging.getLogger("uvicorn.error").warning('%s - "WebSocket %s" 403', "peer", "/ws?userId=10001&token=secret")
    line = capsys.readouterr().out
    assert "/ws?…" in line
    assert "10001" not in line
    assert "secret" not in line


def test_a_line_for_each_connection_is_written_on_debug_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    logging.getLogger("uvicorn.error").info("connection open")
    assert capsys.readouterr().out == ""
    configure(log_level="debug")
    logging.getLogger("uvicorn.error").info("connection open")
    assert json.loads(capsys.readouterr().out)["event"] == "connection open"


def test_what_goes_over_a_socket_is_never_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_level="debug")
    for name in ("uvicorn.error", "websockets.server", "websockets.client"):
        logging.getLogger(name).debug("< TEXT 'a message'")
    assert capsys.readouterr().out == ""


def test_below_the_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_level="warning")
    structlog.get_logger().info("accepted")
    structlog.get_logger().warning("careful")
    assert json.loads(capsys.readouterr().out)["event"] == "careful"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_never_shows_local_variables(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format=log_format)

    def fail(contents: str) -> None:
        raise RuntimeError(f"{len(contents)} characters")

    try:
        fail("what a person " + "wrote")
    except RuntimeError:
        structlog.get_logger().exception("it failed")
        logging.getLogger("some.library").exception("it failed")
    out = capsys.readouterr().out
    assert out.count("RuntimeError: 19 characters") == 2
    assert "what a person wrote" not in out


def test_configured_twice_a_library_still_logs_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    configure()
    logging.getLogger("some.library").warning("once")
    assert capsys.readouterr().out.count("once") == 1


def test_a_logger_made_before_configuring_writes_as_configured(capsys: pytest.CaptureFixture[str]) -> None:
    logger = structlog.get_logger()
    configure()
    logger.info("accepted")
    assert json.loads(capsys.readouterr().out)["event"] == "accepted"


def test_a_line_that_cannot_be_written_is_lost_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as unread:  # noqa: PTH123 - a file descriptor
        monkeypatch.setattr(sys, "stdout", unread)
        configure()
        structlog.get_logger().info("accepted")
        logging.getLogger("some.library").warning("something")
        monkeypatch.undo()
        sink = os.open(os.devnull, os.O_WRONLY)  # so that the rest of the buffer can be flushed
        os.dup2(sink, writing)
        os.close(sink)


def test_what_goes_over_a_socket_is_not_printed_even_on_debug() -> None:
    configure(log_level="debug")
    assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_writer_of_one_event_writes_the_line_that_a_logger_would(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(log_format=log_format)
    values: dict[str, object] = {"user": 10001, "reason": "stop", "continued": False, "backend": None}
    write = event_writer("request ended")
    assert write is not None
    write(values)
    structlog.get_logger().info("request ended", **values)
    line, like = (re.sub(r"\d\d\d\d-\S*Z", "<time>", line) for line in capsys.readouterr().out.splitlines())
    assert line == like
    assert "<time>" in line


def test_the_writer_of_an_event_below_the_level_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in ("json", "console"):
        configure(log_format=log_format)
        if (write := event_writer("request begun", "debug")) is not None:
            write({"user": 10001})
    assert capsys.readouterr().out == ""
    configure(log_format="json", log_level="debug")
    write = event_writer("request begun", "debug")
    assert write is not None
    write({"user": 10001})
    assert json.loads(capsys.readouterr().out)["level"] == "debug"
