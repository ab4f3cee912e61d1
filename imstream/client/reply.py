"""The answer to one message, as the one who asked sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from imstream.client.cancel import Receipt
from imstream.client.errors import Cancelled, Expired, Failed, Unanswered
from imstream.client.message import Accepted, Message, Outcome, Piece, Restarted, Result

ReplyEvent = Accepted | Restarted | Piece | Result

_ERRORS: dict[Outcome, type[Unanswered]] = {
    Outcome.FAILED: Failed,
    Outcome.CANCELLED: Cancelled,
    Outcome.EXPIRED: Expired,
}


class Reply:
    """The answer to one message while it comes in. `Client.send` gives it.

    Nobody has to read it: it costs its own text, and who reads slowly gets fewer, larger pieces. It can be read by
    several at once, and again from the beginning.
    """

    def __init__(self, message: Message, cancel: Callable[[str], Awaitable[Receipt]]) -> None:
        self._message = message
        self._cancel = cancel

    @property
    def message_id(self) -> str:
        """Id of the message it answers."""
        return self._message.message_id

    @property
    def position(self) -> int | None:
        """Place in the queue as last told; 1 is next."""
        return self._message.position

    @property
    def attempt(self) -> int:
        """The attempt that `so_far` belongs to; 0 before the first."""
        return self._message.attempt

    @property
    def offset(self) -> int:
        """Where the reply stands; what a resuming client tells the server."""
        return self._message.offset

    @property
    def so_far(self) -> str:
        """The answer so far, of the latest attempt."""
        return self._message.text

    @property
    def repeated(self) -> int:
        """Deltas that brought nothing new and were dropped. A correct server causes none."""
        return self._message.repeated

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._message.ended

    async def accepted(self) -> int | None:
        """Wait until the server has promised an answer, and give the place in the queue.

        Raises:
            Refused: It was not accepted; a subclass says why.
            ClientError: The session ended for good, or the server broke the contract.
        """
        while not self._message.accepted:
            await self._change()
        return self._message.position

    async def result(self) -> Result:
        """Wait for the end, whatever it is, and give it.

        Raises:
            Refused: It was not accepted; a subclass says why.
            ClientError: The session ended for good, or the server broke the contract.
        """
        while self._message.result is None:
            await self._change()
        return self._message.result

    async def text(self) -> str:
        """Wait for the whole answer.

        Raises:
            Unanswered: It failed, was cancelled or has expired; `text` of the error is what there is.
            Refused: It was not accepted; a subclass says why.
            ClientError: The session ended for good, or the server broke the contract.
        """
        return _whole(await self.result())

    async def events(self) -> AsyncIterator[ReplyEvent]:
        """Everything that happens to the message, as it happens, from the beginning; last the `Result`.

        Raises:
            Refused: It was not accepted; a subclass says why.
            ClientError: The session ended for good, or the server broke the contract.
        """
        reader = _Reader(self._message)
        while True:
            event = reader.advance()
            if event is None:
                await self._change()
                continue
            yield event
            if isinstance(event, Result):
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The text as it comes. A piece with `restarted` voids all before it.

        Raises:
            Unanswered: It failed, was cancelled or has expired; `text` of the error is what there is.
            Refused: It was not accepted; a subclass says why.
            ClientError: The session ended for good, or the server broke the contract.
        """
        void = False
        async for event in self.events():
            if isinstance(event, Restarted):
                void = True
            elif isinstance(event, Piece):
                yield Piece(event.text, event.attempt, restarted=void)
                void = False
            elif isinstance(event, Result):
                _whole(event)

    async def cancel(self) -> Receipt:
        """Stop the answer; see `Client.cancel`."""
        return await self._cancel(self.message_id)

    async def _change(self) -> None:
        """Wait for the next change; raises the error that ended the message instead, if one did."""
        if self._message.error is not None:
            raise self._message.error
        await self._message.changed.wait()


def _whole(result: Result) -> str:
    if result.outcome is Outcome.DONE:
        return result.text
    raise _ERRORS[result.outcome](result.why or result.outcome.value, result.text)


@dataclass(slots=True)
class _Reader:
    """How far one reader got. It looks at the state and not at a log of frames, so that no queue can fill up."""

    message: Message
    told_position: bool = False
    restarts: int = 0
    pieces: int = 0

    def advance(self) -> ReplyEvent | None:
        """The next thing this reader has not seen, or None when there is nothing new."""
        message = self.message
        if message.accepted and not self.told_position:
            self.told_position = True
            return Accepted(message.position)
        if self.restarts != message.restarts:
            self.restarts = message.restarts
            self.pieces = 0
            return Restarted(message.attempt)
        if self.pieces < len(message.pieces):
            text = "".join(message.pieces[self.pieces :])
            self.pieces = len(message.pieces)
            return Piece(text, message.attempt)
        return message.result
