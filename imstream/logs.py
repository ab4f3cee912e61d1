"""Logs: one structured line per event, JSON for machines, readable in a terminal; never the text of a message.

Our own lines come from structlog directly, those of libraries (uvicorn, aiohttp, asyncio) from `logging`; both go to
standard output in the same form. Tracebacks are printed without local variables, because these hold people's messages.
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, cast

import structlog
from structlog.stdlib import ProcessorFormatter

if TYPE_CHECKING:
    from imstream.settings import Settings

_QUERY = re.compile(r"\?[^\s\"'>]+")

_CHATTY = ("uvicorn.error", "uvicorn.access", "aiohttp.access", "asyncio")
"""Loggers with a line or more for each connection, some with the query string in it; below warning only on debug."""


_OVERHEARING = ("uvicorn.error", "websockets")
"""Loggers that write down on debug what goes over a socket: headers with tokens, and what is said. They never may."""


def configure(settings: Settings) -> None:
    """Set up logging for this process, by `log_level` and `log_format`. May be called again; the last call counts."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    renderer = _renderer(settings.log_format)
    output = cast("TextIO", _Output())
    both: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*both, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(output),
        # Loggers are made when modules are imported; a cached one would keep what was configured before.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
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
    if log_format == "json" or (log_format == "auto" and not terminal):
        return [
            structlog.processors.format_exc_info,
            _in_reading_order,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    # The default prints tracebacks with local variables when `rich` is installed.
    console = structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
    return [console]


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

    A line that cannot be written (disk full, reader gone) is lost: it must not take down the request that logs it.
    """

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stdout.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()
