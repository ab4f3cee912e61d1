"""The schema version of what nodes write into Redis for each other: requests, reply events, leases.

Nodes of two successive releases share one Redis during a rolling upgrade. So a new field does not raise the version:
a release that does not know it ignores it, and one that needs it has a default. The version is raised only for entries
that an older release must not touch; it leaves them to a node that knows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELD = "v"
"""The field that holds the version. The scripts that write reply events name it, too."""

VERSION = 1
"""What this release writes, and the newest that it knows. Entries without the field are of version 1."""

_DIGITS = 9
"""Digits of a version at most: what is longer was written by hand."""


def version_of(fields: Mapping[str, str]) -> int:
    """The version of an entry; 1 also for what is no number."""
    version = fields.get(FIELD, "")
    return int(version) if version.isdecimal() and len(version) <= _DIGITS else 1
