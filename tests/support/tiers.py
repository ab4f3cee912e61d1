"""Examples of properties: all of them at random in the second tier, always the same third in the first.

A property that fails rarely is found by the second tier, and does not block an unrelated change.
"""

from hypothesis import HealthCheck, settings

# No deadline: on a busy machine, the duration of an example means nothing.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
_SHARE = 3

settings.register_profile("first", _COMMON, max_examples=100 // _SHARE, derandomize=True)
settings.register_profile("all", _COMMON, max_examples=100)


def load(*, second: bool) -> None:
    """Choose the tier; must be called before test modules are imported."""
    settings.load_profile("all" if second else "first")


def examples(count: int, *, first: int | None = None) -> int:
    """The number of examples for a property with `count` in the second tier, and `first` or a third in the first."""
    is_second = settings.get_current_profile_name() == "all"
    return count if is_second else first or count // _SHARE
