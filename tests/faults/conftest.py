"""Nodes under these tests have all of their speed."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast(unmeasured: None) -> None:
    """For all of them."""
