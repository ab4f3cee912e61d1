"""Fields of an answer that are kept and told to clients: each has a maximum length and a character set."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

OTHER_FINISH = "other"
"""Stands for a finish reason that is no short word."""

LARGEST_COUNT = 2**53
"""The largest number of tokens that is taken: JavaScript's JSON keeps no larger ones exact."""

_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

_MOST_COUNTS = 16
"""Maximum counts that are kept of a usage. OpenAI tells 3, others up to 8."""

_MOST_FIELDS = 4 * _MOST_COUNTS
"""Maximum fields of a usage that are looked at."""

_USAGE_DETAILS = (
    ("prompt_tokens_details", "cached_tokens"),
    ("completion_tokens_details", "reasoning_tokens"),
)


def short_word(text: str) -> str | None:
    """The text, if it is a short word of ASCII letters, digits and `_.:-`."""
    return text if _WORD.fullmatch(text) else None


def token_counts(usage: dict[str, Any]) -> dict[str, int]:
    """The token counts, and of the details those that say what was not shown or not paid in full."""
    counts = dict[str, int]()
    for name, value in islice(usage.items(), _MOST_FIELDS):
        if _is_count(value) and len(counts) < _MOST_COUNTS and short_word(name):
            counts[name] = value
    for group, name in _USAGE_DETAILS:
        details = usage.get(group)
        if isinstance(details, dict) and _is_count(value := details.get(name)):
            counts[name] = value
    return counts


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT
