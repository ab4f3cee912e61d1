"""Everything of one client that waits for the server: messages without an end, cancellations without a receipt.

No I/O: the connection hands in what the server says, and asks what is still to be sent.
"""

from __future__ import annotations

import asyncio

from imstream.client.cancel import Cancel
from imstream.client.errors import BadMessage, ClientError, refusal
from imstream.client.message import Message
from imstream.wire import MAX_RESUMED, Code, ServerFrame

MAX_OPEN = MAX_RESUMED
"""Most unfinished messages of one client: as many as one INIT can resume. `add` waits while there are so many."""

_REFUSES_MESSAGES = (Code.BAD_REQUEST, Code.FORBIDDEN, Code.BUSY)
"""Codes that are about a message even when no id is told. Others are about the login, come before a close, or ask to
wait (RATE_LIMITED) while the server takes what was sent."""


class PendingRequests:
    """What waits for the server. Whatever ends is forgotten at once.

    Attributes:
        error: Why nothing can be added any more; None while it can.
    """

    def __init__(self) -> None:
        self.error: ClientError | None = None
        self._messages: dict[str, Message] = {}
        self._cancels: dict[str, Cancel] = {}
        self._free = asyncio.Semaphore(MAX_OPEN)

    @property
    def accepted(self) -> list[Message]:
        """What the server has promised to answer: a new connection resumes it."""
        return [message for message in self._messages.values() if message.accepted]

    @property
    def unanswered(self) -> list[Message]:
        """What the server has said nothing about: a new connection sends it again."""
        return [message for message in self._messages.values() if not message.accepted]

    @property
    def cancels(self) -> list[Cancel]:
        """What shall be cancelled: a new connection sends it again."""
        return list(self._cancels.values())

    def message(self, message_id: str) -> Message | None:
        """The unfinished message with this id."""
        return self._messages.get(message_id)

    async def add(self, message: Message) -> None:
        """Wait until there is room, and take the message in.

        Raises:
            ValueError: A message with this id is unfinished.
            ClientError: It is over; see `error`.
        """
        await self._free.acquire()
        if self.error is not None or message.message_id in self._messages:
            self._free.release()
            raise self.error or ValueError(f"message {message.message_id} is still being answered")
        self._messages[message.message_id] = message

    def add_cancel(self, cancel: Cancel) -> Cancel:
        """Take it in, or give the one that waits for the same message.

        Raises:
            ClientError: It is over; see `error`.
        """
        if self.error is not None:
            raise self.error
        return self._cancels.setdefault(cancel.message_id, cancel)

    def chat(self, frame: ServerFrame) -> None:
        """Take in a CHAT frame: the answer to a message, or the receipt of a cancellation."""
        message_id = frame.message_id or ""
        if message_id in self._cancels:
            self._cancels[message_id].apply(frame)
        if message_id in self._messages:
            self._messages[message_id].apply(frame)
        self._settle(message_id)

    def system(self, frame: ServerFrame) -> bool:
        """Take in a SYSTEM frame: a refusal, or a receipt. False when it is about nothing that waits."""
        message = self._messages.get(frame.message_id or "") or self._meant_without_id(frame)
        cancel = self._cancels.get(frame.message_id or "")
        if frame.code is Code.UNAVAILABLE and message and message.resuming:
            return False  # it could not be resumed; whether it can be cancelled is not known yet
        if frame.code not in (Code.SUCCESS, Code.TOO_LATE, Code.UNKNOWN) and message and not message.accepted:
            message.fail(refusal(frame))
            self._settle(message.message_id)
        elif cancel is not None:
            cancel.apply(frame)
            self._settle(cancel.message_id)
        else:
            return False
        return True

    def drop_largest(self, connection: object) -> None:
        """Give up the message that was too big for this connection. Sent again, it would end the next one as well."""
        suspects = [message for message in self.unanswered if message.sent_on is connection]
        if suspects:
            largest = max(suspects, key=lambda message: len(message.chat.model_dump_json()))
            largest.fail(BadMessage(Code.BAD_REQUEST, "the message, with its history, is too big for the server"))
            self._settle(largest.message_id)

    def end(self, error: ClientError) -> None:
        """End everything that waits, once, and let nothing new in."""
        if self.error is not None:
            return
        self.error = error
        for message in list(self._messages.values()):
            message.fail(error)
            self._settle(message.message_id)
        for cancel in self.cancels:
            cancel.fail(error)
            self._settle(cancel.message_id)

    def _meant_without_id(self, frame: ServerFrame) -> Message | None:
        """The message that a refusal without an id must be about, when only one is possible."""
        if frame.message_id is not None or frame.code not in _REFUSES_MESSAGES:
            return None
        unanswered = self.unanswered
        return unanswered[0] if len(unanswered) == 1 else None

    def _settle(self, message_id: str) -> None:
        """Forget what has ended."""
        if message_id in self._messages and self._messages[message_id].ended:
            del self._messages[message_id]
            self._free.release()
        if message_id in self._cancels and self._cancels[message_id].ended:
            del self._cancels[message_id]
