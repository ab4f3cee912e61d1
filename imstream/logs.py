"""Logging: one structured line per event, as JSON or for a terminal; never the text of a message.

imstream uses structlog, its libraries (uvicorn, asyncio) through `logging`; both write to standard output in the
same format. Tracebacks have no local variables, because these hold people's messages.

Values are untrusted: characters that are not printable are escaped, and long values are cut. Lines that unauthenticated
clients can cause share one token bucket (`LIMITED`).
"""

import asyncio
import logging
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import TextIO, cast

import structlog
from pydantic_core import to_json
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from imstream.settings import Settings
from imstream.token_bucket import NEVER_USED, TokenBucket
from imstream.user_ids import MAX_USER_ID_LENGTH

MAX_VALUE_LENGTH = 64  # maximum length of a value in a log line, unless `_MAX_LENGTHS` allows its field more

_MAX_LENGTHS = {
    "event": 1000,
    "error": 1000,
    "address": 300,
    "url": 300,
    "file": 300,
    "detail": 300,
    "peer": 160,
    "user": MAX_USER_ID_LENGTH,
}
_MAX_LIST_ITEMS = 10
_NUMBERS = {int, bool, float, type(None)}
_MAX_TRACE_LINES, _MAX_TRACE_LINE_LENGTH = 200, 500

LIMITED = {"limited": True}
"""Fields of a logger for lines that unauthenticated clients can cause: `structlog.get_logger(**LIMITED)`."""

_LIMIT = TokenBucket(rate=1, size=20)
_COUNT_DELAY = 1.0  # seconds from the first dropped line until their number is logged

_QUERY = re.compile(r"\?[^\s\"'>]+")

_QUIET = ("uvicorn.error", "uvicorn.access", "asyncio")
"""Loggers with lines for each connection, some with its query string: below warning only if the level is debug."""

_NEVER_DEBUG = ("uvicorn.error", "websockets")
"""Loggers whose debug lines hold the data of sockets: tokens in headers, and messages."""

_LIMITED_LIBRARIES = ("uvicorn", "websockets")  # libraries whose lines clients can cause

log = structlog.get_logger()


def sanitize(text: str) -> str:
    """Escape and cut untrusted text to `MAX_VALUE_LENGTH` printable characters."""
    return _cut(text, MAX_VALUE_LENGTH)


def configure(settings: Settings) -> None:
    """Set up logging for this process by `log_level` and `log_format`. Another call replaces the setup."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    renderer = _renderer(settings.log_format)
    output = _Output()
    limiter = _Limiter()
    structlog.configure(
        processors=[limiter, _stamp, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: output,
        cache_logger_on_first_use=False,  # modules create their loggers before this call
    )
    handler = logging.StreamHandler(cast("TextIO", output))
    handler.addFilter(limiter.allows)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[_stamp, structlog.stdlib.add_logger_name, _remove_query],
            processors=[ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, ProcessorFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
    for name in _NEVER_DEBUG:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.INFO))


def event_writer(event: str, level: str = "info") -> Callable[[dict[str, object]], None] | None:
    """Return a function that logs an event, as JSON in a third of a logger's time. None: it is below the level.

    As JSON, its values are written as they are: numbers, and text that is printable and short.
    """
    if structlog.get_config()["processors"][-1] is not _render_json:
        method = getattr(structlog.get_logger().bind(), level)  # else each line would make a logger
        return lambda values: method(event, **values)
    if not logging.getLogger().isEnabledFor(logging.getLevelNamesMapping()[level.upper()]):
        return None
    write = _Output().info
    return lambda values: write(to_json({"timestamp": _now(), "level": level, "event": event} | values).decode())


def _renderer(log_format: str) -> list[Processor]:
    terminal = sys.stdout.isatty()
    safe: list[Processor] = [structlog.processors.format_exc_info, _sanitize_values]
    if log_format == "json" or (log_format == "auto" and not terminal):
        return [*safe, _render_json]
    # The default formatter prints local variables when `rich` is installed.
    console = structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
    return [*safe, _indent_traceback, console]


def _sanitize_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape and cut every value. A line end or U+009B in one could forge log lines."""
    for name, value in event.items():
        kind = type(value)
        if kind in _NUMBERS or (kind is str and len(value) <= MAX_VALUE_LENGTH and value.isprintable()):
            continue  # nearly all values; to cut them, too, would take half of the time of a line
        if name == "exception":
            event[name] = _cut_traceback(str(value))
        elif isinstance(value, list):
            event[name] = [_sanitize_value(item, MAX_VALUE_LENGTH) for item in value[:_MAX_LIST_ITEMS]]
        else:
            event[name] = _sanitize_value(value, _MAX_LENGTHS.get(name, MAX_VALUE_LENGTH))
    return event


def _sanitize_value(value: object, length: int) -> object:
    if value is None or isinstance(value, int | float):
        return value
    return _cut(value if isinstance(value, str) else repr(value), length)


def _cut(text: str, length: int) -> str:
    shown = text[: length + 1]
    if not shown.isprintable():  # line ends, control characters, bidirectional controls, lone surrogates
        shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def _cut_traceback(text: str) -> str:
    lines = text.split("\n")
    if len(lines) > _MAX_TRACE_LINES:
        lines = [*lines[: _MAX_TRACE_LINES // 4], "…", *lines[-_MAX_TRACE_LINES * 3 // 4 :]]
    return "\n".join(_cut(line, _MAX_TRACE_LINE_LENGTH) for line in lines)


def _indent_traceback(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Indent a traceback, so that no line of an exception's text looks like a log line."""
    if "exception" in event:
        event["exception"] = "\n".join(f"  {line}" for line in str(event["exception"]).split("\n"))
    return event


def _remove_query(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove query strings from lines of libraries: they hold user ids and perhaps tokens."""
    event["event"] = _QUERY.sub("?…", str(event["event"]))
    return event


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return to_json(event, inf_nan_mode="constants").decode()  # a third of the time of the standard library


def _stamp(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Put time, level and event first."""
    return {"timestamp": _now(), "level": method, "event": event.pop("event"), **event}


def _now() -> str:
    second, microsecond = divmod(time.time_ns() // 1000, 1_000_000)
    return f"{_format_second(second)}.{microsecond:06d}Z"


@lru_cache(maxsize=1)  # saves 2 µs for each line
def _format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class _Limiter:
    """Drops lines beyond the shared token bucket, and logs how many were dropped."""

    def __init__(self) -> None:
        self._full_at = NEVER_USED
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """Filter lines of imstream, as a structlog processor."""
        if event.pop("limited", False) and not self._take():
            raise structlog.DropEvent
        return event

    def allows(self, record: logging.LogRecord) -> bool:
        """Filter lines of libraries."""
        return record.name.partition(".")[0] not in _LIMITED_LIBRARIES or self._take()

    def _take(self) -> bool:
        now = time.monotonic()
        full_at = _LIMIT.consume(self._full_at, now)
        if not _LIMIT.wait_time(full_at, now):
            self._full_at = full_at
            return True
        self._dropped += 1
        if self._timer is None:
            with suppress(RuntimeError):  # without an event loop there are no clients
                self._timer = asyncio.get_running_loop().call_later(_COUNT_DELAY, self._log_dropped)
        return False

    def _log_dropped(self) -> None:
        count, self._dropped, self._timer = self._dropped, 0, None
        log.warning("log lines dropped", count=count)


class _Output:
    """The current standard output. Lines that cannot be written are lost: logging never fails a request."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()

    def info(self, line: str) -> None:
        """Write a line of structlog, of any level."""
        try:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        except (OSError, ValueError):
            return

    debug = warning = error = critical = info
