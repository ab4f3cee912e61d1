"""Every error that imstream raises, as one tree.

ImstreamError
├── SettingsError            a setting has an invalid value; the text names it
├── NodeTaken                another process runs the node with this id
├── StoreError               Redis
│   ├── StoreUnavailable     not reached in time; the command may or may not have been executed
│   │   └── StoreDenied      login or permission denied, until an operator changes it
│   ├── StoreFull            out of memory; nothing was written
│   └── StoreRefused         the command failed for another reason
└── BackendError             the AI backend; `reason` goes into the dead stream, `kind` decides about a retry
"""

from datetime import timedelta
from typing import Literal

FailureKind = Literal["away", "broken", "impossible", "misconfigured"]
"""Whose fault the failure of an AI call is.

- `away`: the backend cannot be reached, is full, or rejects our key or our credit. Other calls may share the reason.
- `broken`: the answer broke, such as a cut stream or an answer without text.
- `impossible`: this request cannot succeed, such as a context that is too long. It does not concern other requests.
- `misconfigured`: the URL, the model or an option is wrong. No request can succeed until an operator changes it.
"""


class ImstreamError(Exception):
    """An error whose text is meant for an operator or user, without a traceback."""


class SettingsError(ImstreamError):
    """A setting is invalid. The text names the setting, the value and the allowed values."""


class NodeTaken(ImstreamError):  # noqa: N818 - a state, as are the errors below
    """Another process runs the node with this id. The text names the process."""

    def __init__(self, node: str, address: str, pid: int, host: str) -> None:
        super().__init__(
            f"node {node} is run by another process ({address}, process {pid} on {host}): "
            "stop that one, or set IMSTREAM_NODE to another id"
        )


class StoreError(ImstreamError):
    """A Redis command failed."""


class StoreUnavailable(StoreError):  # noqa: N818 - same
    """Redis was not reached, or did not answer in time. The command may or may not have been executed."""


class StoreDenied(StoreUnavailable):
    """Redis denies the login, a command or a key, which counts as unavailable. The text is Redis' own."""


class StoreFull(StoreError):  # noqa: N818 - same
    """Redis is at `maxmemory`. Nothing was written; reads and deletes still work."""


class StoreRefused(StoreError):  # noqa: N818 - same
    """The command is invalid here, such as a missing group or a key of another type. The text is Redis' own."""


class BackendError(ImstreamError):
    """The AI backend gave no complete answer.

    Attributes:
        kind: Its cause, which determines the handling; see `FailureKind`.
        reason: A stable identifier, such as `http_503`.
        detail: One line for operators, such as the backend's text.
        retry_after: The pause that the backend requests, if it does.
        usage: The token counts of a call that broke, if the backend reported them.
    """

    usage: dict[str, int] | None = None

    def __init__(
        self, reason: str, detail: str = "", *, kind: FailureKind = "broken", retry_after: timedelta | None = None
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.kind = kind
        self.retry_after = retry_after

    def __str__(self) -> str:
        """The reason and the detail, which callers may extend."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
