"""Nodes under these tests have all of their speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", autouse=True)
def unmeasured() -> Iterator[None]:
    """Processes are started without coverage, which takes half of their speed. Other tests cover what they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # coverage's `patch = subprocess`
        yield
