"""Users that keep asking while nodes come and go."""

import asyncio

from imstream.client import Client
from imstream.client.errors import Unavailable
from imstream.demo.answer import canned_answer
from tests.support.many_nodes import ManyNodes


def question(length: int, about: object = "", *, pace: str = "10ms", stall: int = 0) -> str:
    """A question whose answer has that many deltas, one every `pace`.

    `stall`: calls whose answers stop in the middle and do not end, so that a slow test can interrupt them as well.
    """
    stalls = f" stall={stall}" if stall else ""
    return f"tell me more {about} [[demo first=0 length={length} pace={pace}{stalls}]]"


def whole(asked: str) -> str:
    """The complete answer to such a question."""
    return "".join(canned_answer(asked))


class Talk:
    """A user that asks one question after the other until stopped."""

    def __init__(self, nodes: ManyNodes, user: int) -> None:
        self.user = user
        self.repeated = 0
        self.texts: dict[str, tuple[str, str]] = {}
        """Questions and answers by message id."""
        names = list(nodes.nodes)
        self._urls = nodes.urls(names[user % len(names)])

    async def go_on(self, over: asyncio.Event) -> None:
        """Ask until `over` is set, then wait for the last answer."""
        async with Client(self._urls, self.user) as client:
            while not over.is_set():
                message_id = f"m{len(self.texts)}"
                asked = question(20 + 5 * (self.user % 7), f"{self.user} {message_id}")
                reply = await client.send(asked, message_id=message_id)
                try:
                    text = await reply.text()
                except Unavailable:  # not accepted: the node was about to close the socket
                    await asyncio.sleep(0.05)
                    continue
                self.texts[message_id] = (asked, text)
                self.repeated += reply.repeated
