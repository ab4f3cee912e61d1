"""The unfinished requests of one client: messages whose reply has not ended, cancellations without a receipt.

No I/O: the connection passes in the server's frames and fetches the frames that are still to be sent.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from imstream.client.errors import BadMessage, ClientError, refusal
from imstream.client.reply import Receipt, Reply
from imstream.codes import Code, Event
from imstream.wire import MAX_RESUMED, ClientCancel, ReceivedFrame

MAX_FAILED = 64
"""Maximum number of failed messages that are remembered: an operator may have one answered after all."""

MAX_OPEN = MAX_RESUMED
"""Maximum number of unfinished messages of one client: as many as one INIT can resume. Beyond it, `add` waits."""

_REFUSES_MESSAGES = (Code.BAD_REQUEST, Code.FORBIDDEN, Code.BUSY)
"""Codes that refuse a message even without its id. The others concern the login, precede a close, or ask the client to
wait (RATE_LIMITED) while the server handles sent frames."""


_RECEIPTS: dict[str, Receipt] = {
    Code.TOO_LATE: Receipt.TOO_LATE,
    Code.UNKNOWN: Receipt.UNKNOWN,
    Code.EXPIRED: Receipt.UNKNOWN,
}


@dataclass(slots=True, eq=False)
class CancelRequest:
    """A request to cancel one message, shared by all callers that cancel it. `sent_on`: the last connection used."""

    frame: ClientCancel
    receipt: asyncio.Future[Receipt]
    sent_on: object = None

    @property
    def ended(self) -> bool:
        """Whether there is a receipt or an error."""
        return self.receipt.done()

    def apply(self, frame: ReceivedFrame) -> None:
        """Apply a frame about the message; frames that are neither a receipt nor a refusal change nothing."""
        receipt = Receipt.CANCELLED if frame.event is Event.CANCELLED else _RECEIPTS.get(frame.code)
        if receipt is not None:
            self.receipt.set_result(receipt)
        elif frame.code is not Code.SUCCESS and frame.event is None:
            self.fail(refusal(frame))

    def fail(self, error: ClientError) -> None:
        """End it without a receipt."""
        self.receipt.set_exception(error)
        self.receipt.exception()  # there may be no caller left that waits for it


class PendingRequests:
    """All unfinished requests; a request is removed as soon as it ends.

    `on_reopened` is called with a failed reply that continues. `error`: why new requests are refused; None while the
    session lasts.
    """

    def __init__(self, on_reopened: Callable[[Reply], None] | None = None) -> None:
        self._on_reopened = on_reopened
        self._failed: dict[str, Reply] = {}
        self._reopened = set[str]()  # these unfinished replies have no slot
        self.error: ClientError | None = None
        self._replies: dict[str, Reply] = {}
        self._cancels: dict[str, CancelRequest] = {}
        self._free_slots = asyncio.Semaphore(MAX_OPEN)

    @property
    def accepted(self) -> list[Reply]:
        """Replies to accepted messages: a new connection resumes them. Those that were reopened may be too many."""
        return [reply for reply in self._replies.values() if reply.is_accepted][:MAX_RESUMED]

    @property
    def unanswered(self) -> list[Reply]:
        """Replies to other messages: a new connection sends these again."""
        return [reply for reply in self._replies.values() if not reply.is_accepted]

    @property
    def cancels(self) -> list[CancelRequest]:
        """Cancellations without a receipt: a new connection sends them again."""
        return list(self._cancels.values())

    def reply(self, message_id: str) -> Reply | None:
        """The reply to a message, unless it has ended for good."""
        return self._replies.get(message_id) or self._failed.get(message_id)

    @property
    def is_full(self) -> bool:
        """Whether `add` would wait."""
        return self._free_slots.locked()

    async def add(self, reply: Reply) -> None:
        """Wait for a free slot and add a reply; raises `error`, or ValueError if its message id is in use."""
        await self._free_slots.acquire()
        if self.error is not None or reply.message_id in self._replies:
            self._free_slots.release()
            raise self.error or ValueError(f"message {reply.message_id} is still being answered")
        self._replies[reply.message_id] = reply
        self._failed.pop(reply.message_id, None)

    def add_cancel(self, frame: ClientCancel) -> CancelRequest:
        """Add a cancellation, or return the pending one of the same message; raises `error`."""
        if self.error is not None:
            raise self.error
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        return self._cancels.setdefault(frame.message_id, CancelRequest(frame, receipt))

    def apply_chat(self, frame: ReceivedFrame) -> None:
        """Apply a CHAT frame: an answer, or the receipt of a cancellation."""
        message_id = frame.message_id or ""
        failed = self._failed.get(message_id)
        if failed is not None and failed.is_reopened_by(frame):
            self._replies[message_id] = self._failed.pop(message_id)
            self._reopened.add(message_id)
            failed.apply(frame)
            if self._on_reopened is not None:
                self._on_reopened(failed)
        elif message_id in self._replies:
            self._replies[message_id].apply(frame)
        if message_id in self._cancels:
            self._cancels[message_id].apply(frame)
        self._remove_if_ended(message_id)

    def apply_system(self, frame: ReceivedFrame) -> bool:
        """Apply a SYSTEM frame: a refusal or a receipt. False if it concerns no pending request."""
        reply = self._replies.get(frame.message_id or "")
        if frame.message_id is None and frame.code in _REFUSES_MESSAGES and len(unanswered := self.unanswered) == 1:
            reply = unanswered[0]
        cancel = self._cancels.get(frame.message_id or "")
        if frame.code is Code.UNAVAILABLE and reply and (reply.resuming or not (reply.is_accepted or reply.is_moved)):
            reply.is_moved = not reply.resuming
            return False  # try elsewhere: the node may be draining; this does not concern the cancellation
        if frame.code not in (Code.SUCCESS, Code.TOO_LATE, Code.UNKNOWN) and reply and not reply.is_accepted:
            reply.fail(refusal(frame))
            self._remove_if_ended(reply.message_id)
        elif cancel is not None:
            cancel.apply(frame)
            self._remove_if_ended(cancel.frame.message_id)
        else:
            return False
        return True

    def fail_largest(self, connection: object) -> None:
        """Fail the largest message sent on a connection that was closed because of its size."""
        candidates = [reply for reply in self.unanswered if reply.sent_on is connection]
        if candidates:  # sent again, it would end the next connection as well
            largest = max(candidates, key=lambda reply: len(reply.frame.model_dump_json()))
            largest.fail(BadMessage(Code.BAD_REQUEST, "the message, with its history, is too big for the server"))
            self._remove_if_ended(largest.message_id)

    def fail_all(self, error: ClientError) -> None:
        """Fail all pending requests and refuse new ones. Only the first call has an effect."""
        if self.error is not None:
            return
        self.error = error
        for reply in list(self._replies.values()):
            reply.fail(error)
            self._remove_if_ended(reply.message_id)
        for cancel in self.cancels:
            cancel.fail(error)
        self._cancels.clear()

    def _remove_if_ended(self, message_id: str) -> None:
        if message_id in self._replies and (reply := self._replies[message_id]).ended:
            del self._replies[message_id]
            if message_id not in self._reopened:
                self._free_slots.release()
            self._reopened.discard(message_id)
            if reply.has_failed:
                self._failed[message_id] = reply
            if len(self._failed) > MAX_FAILED:
                del self._failed[next(iter(self._failed))]
        if message_id in self._cancels and self._cancels[message_id].ended:
            del self._cancels[message_id]
