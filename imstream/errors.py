"""Every error imstream raises, as one tree.

ImstreamError
├── SettingsError            a setting has a wrong value; the text names it
├── NodeTaken                another process runs the node with this id
├── StoreError               something about Redis
│   ├── StoreUnavailable     not reached in time; whether the command was carried out is unknown
│   │   └── StoreDenied      the login or a permission is denied, until an operator has seen to it
│   ├── StoreFull            Redis is out of memory and refused to write; nothing was written
│   └── StoreRefused         Redis refused the command for another reason
└── BackendError             something about the AI backend; carries a `reason` for the dead stream
    ├── TransientBackendError   may succeed when tried again, perhaps not before `retry_after`
    └── PermanentBackendError   will never succeed: the request itself is refused
"""

from __future__ import annotations

from datetime import timedelta


class ImstreamError(Exception):
    """Anything that is wrong and that imstream knows how to say."""


class SettingsError(ImstreamError):
    """A setting has a wrong value. The text names the setting, the value and what is allowed."""


class NodeTaken(ImstreamError):  # noqa: N818 - reads as the state that it names
    """Another process runs the node with this id. The text says which."""

    def __init__(self, node: str, address: str, pid: int, host: str) -> None:
        super().__init__(
            f"node {node} is run by another process ({address}, process {pid} on {host}): "
            "stop that one, or set IMSTREAM_NODE to another id"
        )


class StoreError(ImstreamError):
    """Redis did not do what it was asked."""


class StoreUnavailable(StoreError):  # noqa: N818 - reads as the state that it names
    """Redis was not reached, or did not answer in time. The command may or may not have been carried out."""


class StoreDenied(StoreUnavailable):
    """Redis does not let us in, or denies the user a command or a key. As good as not being there until an operator has
    seen to it, and then as if it was back. The text is Redis' own and says where to look."""  # noqa: D205, D209 - one thought


class StoreFull(StoreError):  # noqa: N818 - reads as the state that it names
    """Redis is at `maxmemory` and refused the write. Nothing was written; reading and deleting still work."""


class StoreRefused(StoreError):  # noqa: N818 - reads as the state that it names
    """Redis refused the command: a missing group, a key of another type. The text is Redis' own."""


class BackendError(ImstreamError):
    """The AI backend gave no whole answer.

    Attributes:
        reason: A stable word for logs, tests and the dead stream, such as `http_503` or `first_token_timeout`.
        detail: One line for an operator: what the backend said, shortened.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class TransientBackendError(BackendError):
    """The same call may succeed later: no connection, a time limit, 429, 5xx, a broken stream.

    Attributes:
        retry_after: How long the backend asked to be left alone, when it said so.
    """

    def __init__(self, reason: str, detail: str = "", *, retry_after: timedelta | None = None) -> None:
        super().__init__(reason, detail)
        self.retry_after = retry_after


class PermanentBackendError(BackendError):
    """The same call can never succeed: the backend refuses the request itself (most 4xx, context too long)."""
