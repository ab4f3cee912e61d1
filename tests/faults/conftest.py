"""Nodes under these tests run at full speed, and are restarted for the next test of their module."""

from collections.abc import AsyncIterator

import pytest

from tests.support.many_nodes import ManyNodes


@pytest.fixture(scope="module", autouse=True)
def fast(unmeasured: None) -> None:
    """Run without coverage."""


@pytest.fixture
async def nodes(standing: ManyNodes) -> AsyncIterator[ManyNodes]:
    """The `standing` nodes of the module, all alive; after the test nothing is unfinished."""
    await standing.mended()
    yield standing
    await standing.settled()
    await standing.left_alone()
    standing.check_logs()
