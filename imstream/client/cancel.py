"""A request to cancel that waits for its receipt. No I/O."""

from __future__ import annotations

import asyncio
from enum import StrEnum

from imstream.client.errors import ClientError, refusal
from imstream.wire import Code, Event, ServerFrame


class Receipt(StrEnum):
    """What became of a request to cancel."""

    CANCELLED = "cancelled"
    """The answer was stopped; the text so far stays."""
    TOO_LATE = "too_late"
    """It had ended."""
    UNKNOWN = "unknown"
    """The server knows no such message of this user, or no longer."""


_BY_CODE = {Code.TOO_LATE: Receipt.TOO_LATE, Code.UNKNOWN: Receipt.UNKNOWN, Code.EXPIRED: Receipt.UNKNOWN}


class Cancel:
    """One message that shall be cancelled, however many callers wait for it.

    Attributes:
        message_id: The message.
        receipt: The server's answer.
        error: Why there will be none.
        sent_on: The connection that last carried the request.
    """

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self.receipt: Receipt | None = None
        self.error: ClientError | None = None
        self.sent_on: object = None
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Nothing more will be known."""
        return self._ended.is_set()

    def apply(self, frame: ServerFrame) -> None:
        """Take in what the server said about the message; most of it is no receipt and changes nothing."""
        if frame.event is Event.CANCELLED:
            self._end(Receipt.CANCELLED)
        elif frame.code in _BY_CODE:
            self._end(_BY_CODE[frame.code])
        elif frame.code is not Code.SUCCESS and frame.event is None:
            self.fail(refusal(frame))

    def fail(self, error: ClientError) -> None:
        """End it without a receipt."""
        self.error = error
        self._ended.set()

    async def outcome(self) -> Receipt:
        """Wait for the receipt.

        Raises:
            ClientError: There will be none; the error says why.
        """
        await self._ended.wait()
        if self.error is not None:
            raise self.error
        return self.receipt or Receipt.UNKNOWN

    def _end(self, receipt: Receipt) -> None:
        self.receipt = receipt
        self._ended.set()
