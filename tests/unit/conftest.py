"""Fixtures for unit tests."""

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Restore the process-wide logging configuration after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "websockets")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:  # as in a new process, whatever a test before this one has configured
        logging.getLogger(name).propagate, logging.getLogger(name).disabled = True, False
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
