"""The client: one user's session, whatever happens to the connection.

    async with Client("ws://127.0.0.1:8080/ws", 10001) as client:
        reply = await client.send("hello")
        async for piece in reply:
            print(piece.text, end="")

When the connection ends it makes another one by itself: accepted messages are resumed where they stood, messages
without an answer are sent again with the same id.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from ssl import SSLContext
from types import TracebackType
from typing import Self

from imstream.client.cancel import Cancel, Receipt
from imstream.client.connection import ConnectionChange, ReconnectingConnection, cancel_frame
from imstream.client.credentials import Credentials, Token
from imstream.client.errors import NotConnected
from imstream.client.message import Message
from imstream.client.pending import PendingRequests
from imstream.client.reconnect import Servers, Timing, address
from imstream.client.reply import Reply
from imstream.texts import DEFAULT_LANG, Lang
from imstream.wire import MAX_USER_ID, MIN_USER_ID, ClientChat, Turn, parse_user_id


class Client:
    """A session of one user, on one server of `urls` at a time.

    Args:
        urls: Address of the server, or of several that serve the same users, in order of preference.
        user_id: Who is speaking.
        token: The user's signed token, when the server wants one; or a function that gives one, and at the next call
            another one, fresh: it is called for each connection, and when the server says that the login ends soon.
        lang: Language of the server's sentences.
        timing: Time limits and intervals.
        tls: For `wss`, whom to trust; the system's certificate authorities unless given.
        on_change: Called with every change of the connection; must neither block nor raise.

    Raises:
        ValueError: An address is no WebSocket address, there is none, or the user id is out of range.
    """

    def __init__(  # noqa: PLR0913 - two are needed, the others are options
        self,
        urls: str | Sequence[str],
        user_id: int,
        *,
        token: Token | None = None,
        lang: Lang = DEFAULT_LANG,
        timing: Timing | None = None,
        tls: SSLContext | None = None,
        on_change: Callable[[ConnectionChange], None] | None = None,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else urls
        if not urls:
            raise ValueError("a client needs the address of a server")
        if parse_user_id(str(user_id)) is None:
            raise ValueError(f"user id {user_id} is not allowed: a whole number from {MIN_USER_ID} to {MAX_USER_ID}")
        for url in urls:
            address(url, user_id)
        self._user_id = user_id
        self._timing = timing or Timing()
        self._ledger = PendingRequests()
        self._link = ReconnectingConnection(
            Servers(urls, tls), Credentials(user_id, token, lang), self._timing, self._ledger, on_change
        )
        self._runner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Log in.

        Raises:
            NotConnected: No server let the client in within `timing.open`.
            SessionEnded: A server refused the user.
        """
        self._runner = asyncio.create_task(self._link.run(), name="imstream client")
        try:
            async with asyncio.timeout(self._timing.open.total_seconds()):
                await self._link.settled.wait()
            self._check()
        except TimeoutError:
            await self._stop()
            raise NotConnected(self._link.last_word or "no server answered in time") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection. Whoever still waits for an answer gets `ClientClosed`."""
        await self._stop()

    async def send(self, contents: str, *, history: Sequence[Turn] = (), message_id: str | None = None) -> Reply:
        """Ask the AI. What the server says about it is in the reply; waits only while too much is unfinished.

        Args:
            contents: The text.
            history: Earlier messages of the conversation, oldest first.
            message_id: Id of the message; made up when not given. Sending one again that was answered brings its
                recorded answer.

        Raises:
            ValueError: The text is empty, the id malformed, or a message with this id is unfinished.
            ClientError: The client is closed, or the session has ended for good.
        """
        message_id = message_id or uuid.uuid4().hex
        chat = ClientChat(
            msg_type="CHAT", user_id=self._user_id, message_id=message_id, contents=contents, history=list(history)
        )
        message = Message(chat, message_id)
        await self._ledger.add(message)
        await self._link.send_message(message)
        return Reply(message, self.cancel)

    async def cancel(self, message_id: str) -> Receipt:
        """Stop the answer to one message of this user, and wait for the receipt.

        Raises:
            ValueError: The id is malformed.
            ClientError: There is no receipt: the service is unavailable, the client closed, or the session ended.
        """
        cancel_frame(self._user_id, message_id)
        cancel = self._ledger.add_cancel(Cancel(message_id))
        message = self._ledger.message(message_id)
        if message is not None and not message.accepted:
            await self._link.send_message(message)  # a server cannot cancel what it was not told yet
        await self._link.send_cancel(cancel)
        return await cancel.outcome()

    def _check(self) -> None:
        if self._ledger.error is not None:
            raise self._ledger.error

    async def _stop(self) -> None:
        """Stop the task that owns the connection; an error of ours in it is raised here."""
        if self._runner is None:
            return
        self._runner.cancel()
        await asyncio.wait([self._runner])
        if not self._runner.cancelled() and (error := self._runner.exception()) is not None:
            raise error
