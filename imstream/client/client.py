"""The client: the session of one user, kept across connections.

    async with Client("ws://127.0.0.1:8080/ws", 10001) as client:
        reply = await client.send("hello")
        async for piece in reply:
            print(piece.text, end="")

The client reconnects by itself: accepted messages are resumed where they stood, messages without an answer are sent
again with the same id.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from ssl import SSLContext
from types import TracebackType
from typing import Self

from imstream.client.connection import ConnectionChange, ReconnectingConnection
from imstream.client.errors import ClientError, NotConnected
from imstream.client.pending import PendingRequests
from imstream.client.reconnect import Credentials, Servers, Timing, Token, connect_url
from imstream.client.reply import Receipt, Reply
from imstream.user_ids import UserId, kind_of
from imstream.wire import ClientCancel, ClientChat, ReceivedFrame, Turn


class Client:
    """A session of one user, on one server of `urls` at a time.

    Args:
        urls: Address of the server, or of several that serve the same users, in order of preference.
        user_id: The user's id, an integer or a text, as the server has it (`IMSTREAM_USER_IDS`).
        token: The user's signed token, if the server requires one; or a function that returns a new one at each call,
            called for each connection and when the server announces that the login expires.
        wants: Optional events: `status`, `thinking`, and with `on_asked` also `asked`.
        lang: Language of the server's sentences, as in `Accept-Language`; None: the server's own choice.
        timing: Time limits and intervals.
        tls: For `wss`, replaces the system's trust store.
        on_change: Called with every change of the connection; must neither block nor raise.
        on_asked: The same, with the answer to each message of the user's other sockets; its `frame` has the question.
        on_reopened: The same, with a reply that has failed and is answered after all: an operator has retried the
            message. Read it again. The newest 64 failed messages are remembered.

    Raises:
        ValueError: `urls` is empty or contains something else than WebSocket URLs, or the user id is not allowed.
    """

    def __init__(  # noqa: PLR0913 - two are required, the others are options
        self,
        urls: str | Sequence[str],
        user_id: UserId,
        *,
        token: Token | None = None,
        wants: Sequence[str] = (),
        lang: str | None = None,
        timing: Timing | None = None,
        tls: SSLContext | None = None,
        on_change: Callable[[ConnectionChange], None] | None = None,
        on_asked: Callable[[Reply], None] | None = None,
        on_reopened: Callable[[Reply], None] | None = None,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else urls
        if not urls:
            raise ValueError("a client needs the address of a server")
        if (kind := kind_of(user_id)).parse(str(user_id)) is None:
            raise ValueError(f"user id {user_id!r} is not allowed: {kind.allowed}")
        for url in urls:
            connect_url(url, user_id)
        self._user_id = user_id
        self._timing = timing or Timing()
        self._pending = PendingRequests(on_reopened)
        self._connection = ReconnectingConnection(
            servers=Servers(urls, tls),
            credentials=Credentials(user_id, token, lang, wants),
            timing=self._timing,
            pending=self._pending,
            on_change=on_change,
            on_asked=self._follow,
        )
        self._on_asked = on_asked
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Log in.

        Raises:
            NotConnected: No server accepted the login within `timing.open`.
            SessionEnded: A server refused the user.
        """
        self._task = asyncio.create_task(self._connection.run(), name="imstream client")
        try:
            async with asyncio.timeout(self._timing.open.total_seconds()):
                await self._connection.settled.wait()
            if self._pending.error is not None:
                raise self._pending.error  # noqa: TRY301 - handled like any other error
        except TimeoutError:
            await self._stop()
            raise NotConnected(self._connection.last_error or "no server answered in time") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection. Pending calls raise `ClientClosed`."""
        await self._stop()

    async def send(
        self,
        contents: str,
        *,
        history: Sequence[Turn] = (),
        message_id: str | None = None,
        traceparent: str | None = None,
    ) -> Reply:
        """Send a message to the AI. Waits only while `MAX_OPEN` messages are unfinished.

        Args:
            contents: The text.
            history: Earlier messages of the conversation, oldest first.
            message_id: Id of the message; generated by default. Sending an answered message again returns its recorded
                answer.
            traceparent: The trace that it belongs to (W3C Trace Context); an invalid one is ignored.

        Raises:
            ValueError: The text is empty, the id is malformed, or a message with this id is unfinished.
            ClientError: The client is closed, or the session has ended.
        """
        message_id = message_id or uuid.uuid4().hex
        chat = ClientChat(
            msg_type="CHAT",
            user_id=self._user_id,
            message_id=message_id,
            contents=contents,
            history=list(history),
            traceparent=traceparent,
        )
        reply = Reply(chat, message_id, self.cancel)
        await self._pending.add(reply)
        await self._connection.send(reply)
        return reply

    async def ended(self) -> ClientError | None:
        """Wait for the end of the session; the error that all calls raise from then on."""
        if self._task is not None:
            await asyncio.wait([self._task])
        return self._pending.error

    async def _follow(self, asked: ReceivedFrame) -> None:
        """Follow a message of another socket, unless it has no reader or too many are unfinished."""
        message_id = asked.message_id or ""
        if self._on_asked is None or self._pending.is_full or self._pending.reply(message_id) is not None:
            return
        chat = ClientChat.model_construct(
            msg_type="CHAT", user_id=self._user_id, message_id=message_id, contents=asked.contents or ""
        )
        reply = Reply(chat, message_id, self.cancel)
        reply.is_accepted = True
        await self._pending.add(reply)
        self._on_asked(reply)

    async def cancel(self, message_id: str) -> Receipt:
        """Stop the answer to one message of this user, and wait for the receipt.

        Raises:
            ValueError: The id is malformed.
            ClientError: The service is unavailable, the client is closed, or the session has ended.
        """
        frame = ClientCancel(msg_type="CANCEL", user_id=self._user_id, message_id=message_id)
        cancel = self._pending.add_cancel(frame)
        reply = self._pending.reply(message_id)
        if reply is not None and not reply.is_accepted:
            await self._connection.send(reply)  # a server cannot cancel a message that it has not received
        await self._connection.send(cancel)
        return await asyncio.shield(cancel.receipt)

    async def _stop(self) -> None:
        """Stop the connection's task; raises the exception that ended it, if any."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error
