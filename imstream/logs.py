"""Logs: one structured line per event, JSON for machines, readable in a terminal; never the text of a message.

Our own lines come from structlog directly, those of libraries (uvicorn, aiohttp, asyncio) from `logging`; both go to
standard output in the same form. Tracebacks are printed without local variables, because these hold people's messages.

No line obeys what somebody else has written: in every value, characters that are not printable are escaped, and what is
longer than its field may be is cut. Lines that anybody can cause, without a login, share one token bucket (`LIMITED`).
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from contextlib import suppress
from typing import TextIO, cast

import structlog
from structlog.stdlib import ProcessorFormatter

from imstream.settings import Settings
from imstream.token_bucket import NEVER_USED, TokenBucket

MAX_VALUE_LENGTH = 64
"""Maximum length of a value in a log line, unless `_LENGTHS` allows its field more."""

_LENGTHS = {"event": 1000, "error": 1000, "address": 300, "url": 300, "file": 300, "detail": 300, "peer": 160}
"""Fields that hold a sentence, an address or a path of ours, or one that was cut where it came in."""

_LIST = 10
"""Maximum number of values of a list that are shown."""

_TRACE_LINES, _TRACE_LINE = 200, 500
"""Maximum number of lines of a traceback, and maximum length of each: it repeats values too."""

LIMITED = {"limited": True}
"""Fields of a logger for lines that anybody can cause: `structlog.get_logger(**LIMITED)`. Each has the `peer`."""

_LIMIT = TokenBucket(rate=1, size=20)
"""How many of these lines are written: 20 at once, then one a second."""

_COUNT_AFTER = 1.0
"""Seconds after the first line that was left out, until the number of those left out is logged."""

_QUERY = re.compile(r"\?[^\s\"'>]+")

_CHATTY = ("uvicorn.error", "uvicorn.access", "aiohttp.access", "asyncio")
"""Loggers with a line or more for each connection, some with the query string in it; below warning only on debug."""

_ABOUT_CLIENTS = ("uvicorn", "websockets")
"""Libraries whose lines clients cause: they share the token bucket."""

_OVERHEARING = ("uvicorn.error", "websockets")
"""Loggers that write down on debug what goes over a socket: headers with tokens, and what is said. They never may."""


log = structlog.get_logger()


def sanitize(text: str) -> str:
    """Show what somebody else has written, for a log line: at most 64 characters, those not printable escaped."""
    return _cut(text, MAX_VALUE_LENGTH)


def configure(settings: Settings) -> None:
    """Set up logging for this process, by `log_level` and `log_format`. May be called again; the last call counts."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    renderer = _renderer(settings.log_format)
    output = cast("TextIO", _Output())
    limiter = _Limiter()
    both: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[limiter, *both, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(output),
        # Loggers are made when modules are imported; a cached one would keep what was configured before.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.addFilter(limiter.passes)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*both, structlog.stdlib.add_logger_name, _without_query],
            processors=[ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, ProcessorFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
    for name in _OVERHEARING:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.INFO))


def _renderer(log_format: str) -> list[structlog.typing.Processor]:
    terminal = sys.stdout.isatty()
    harmless: list[structlog.typing.Processor] = [structlog.processors.format_exc_info, _harmless]
    if log_format == "json" or (log_format == "auto" and not terminal):
        return [*harmless, _in_reading_order, structlog.processors.JSONRenderer(ensure_ascii=False)]
    # The default prints tracebacks with local variables when `rich` is installed.
    console = structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
    return [*harmless, _indented, console]


def _harmless(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Escape and cut every value. Without this, one with a line end or U+009B in it could forge lines."""
    for name, value in event.items():
        if name == "exception":
            event[name] = _trace(str(value))
        elif isinstance(value, list):
            event[name] = [_plain(one, MAX_VALUE_LENGTH) for one in value[:_LIST]]
        else:
            event[name] = _plain(value, _LENGTHS.get(name, MAX_VALUE_LENGTH))
    return event


def _plain(value: object, length: int) -> object:
    if value is None or isinstance(value, int | float):
        return value
    return _cut(value if isinstance(value, str) else repr(value), length)


def _cut(text: str, length: int) -> str:
    shown = _escaped(text[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def _escaped(text: str) -> str:
    """Line ends, control characters (also C1), bidirectional controls, lone surrogates and the like as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _trace(text: str) -> str:
    lines = text.split("\n")
    if len(lines) > _TRACE_LINES:
        lines = [*lines[: _TRACE_LINES // 4], "…", *lines[-_TRACE_LINES * 3 // 4 :]]
    return "\n".join(_cut(line, _TRACE_LINE) for line in lines)


def _indented(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Indent a traceback: no line of an exception's text may look like a line of the log."""
    if "exception" in event:
        event["exception"] = "\n".join(f"  {line}" for line in str(event["exception"]).split("\n"))
    return event


class _Limiter:
    """Leaves out lines that anybody can cause, when there are too many, and logs how many were left out."""

    def __init__(self) -> None:
        self._full_at = NEVER_USED
        self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    def __call__(
        self, _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        """Our own lines."""
        if event.pop("limited", False) and not self._take():
            raise structlog.DropEvent
        return event

    def passes(self, record: logging.LogRecord) -> bool:
        """Lines of libraries."""
        return record.name.partition(".")[0] not in _ABOUT_CLIENTS or self._take()

    def _take(self) -> bool:
        now = time.monotonic()
        full_at = _LIMIT.take(self._full_at, now)
        if not _LIMIT.wait(full_at, now):
            self._full_at = full_at
            return True
        self._left_out += 1
        if self._timer is None:
            with suppress(RuntimeError):  # without an event loop there are no clients
                self._timer = asyncio.get_running_loop().call_later(_COUNT_AFTER, self._tell)
        return False

    def _tell(self) -> None:
        count, self._left_out, self._timer = self._left_out, 0, None
        log.warning("log lines left out", count=count)


def _without_query(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Take query strings out of what libraries log: they hold user ids, and may hold tokens."""
    event["event"] = _QUERY.sub("?…", str(event["event"]))
    return event


def _in_reading_order(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """When, how bad and what come first."""
    return {"timestamp": event["timestamp"], "level": event["level"], "event": event["event"], **event}


class _Output:
    """Standard output, whatever it is at the moment.

    A line that cannot be written (disk full, reader gone, another encoding) is lost: it must not take down the request
    that logs it.
    """

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
