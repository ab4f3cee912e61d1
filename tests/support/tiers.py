"""How thorough properties are tested: the second tier takes all examples at random, the first the same third each time.

A property that fails only now and then is found by the second tier, and does not stop a change that has not caused it.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a machine that does other things too.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
_SHARE = 3

settings.register_profile("first", _COMMON, max_examples=100 // _SHARE, derandomize=True)
settings.register_profile("all", _COMMON, max_examples=100)


def load(*, second: bool) -> None:
    """Choose the tier. Called before any test module is imported."""
    settings.load_profile("all" if second else "first")


def examples(count: int) -> int:
    """How many examples a property gets that has `count` in the second tier."""
    return count if settings.get_current_profile_name() == "all" else count // _SHARE
