"""The clients: they send random messages and record the replies. The client library reconnects and resumes."""

import asyncio
import random
from collections.abc import Coroutine
from datetime import timedelta

from imstream.client import Busy, Client, ClientError, NotConnected, Refused, Reply, Timing
from imstream.demo.answer import canned_answer
from imstream.user_ids import MIN_USER_ID
from ops.chaos_test.history import SentMessage

TIMING = Timing(
    open=timedelta(seconds=5),
    login=timedelta(seconds=4),
    heartbeat=timedelta(seconds=2),
    backoff=timedelta(milliseconds=200),
    backoff_max=timedelta(seconds=2),
    close=timedelta(milliseconds=500),
)

MAX_OPEN = 2
"""Maximum number of unfinished messages of one client."""

SHARED = 3
"""Of this number of clients, two are the same user on two sockets."""

CANCELLED = 0.05
"""Share of the messages that are cancelled by their client."""

_MAX_PAUSE = 1.0


class RandomClient:
    """One client: it sends messages until `stop`, then waits for all replies.

    Args:
        number: Its number, from 0.
        seed: Seed of its messages.
        url: Address of the server.
        pause: Mean time between two of its messages, in seconds.
        asked: The list to which its messages are added.
    """

    def __init__(self, number: int, seed: int, url: str, pause: float, asked: list[SentMessage]) -> None:
        self.user_id = MIN_USER_ID + number - number // SHARED
        self._name = f"c{number}"
        self._random = random.Random(f"{seed} {self._name}")  # noqa: S311 - no secrets
        self._url = url
        self._pause = pause
        self._asked = asked
        self._count = 0
        self._open = asyncio.Semaphore(MAX_OPEN)

    async def run(self, stop: asyncio.Event) -> None:
        """Send messages until `stop`, and wait for the replies. Cancel it to stop waiting."""
        while True:
            try:
                async with Client(self._url, self.user_id, lang="en", timing=TIMING) as client:
                    async with asyncio.TaskGroup() as group:
                        await self._ask_until(stop, client, group)
                    return
            except NotConnected:
                if stop.is_set():
                    return

    async def _ask_until(self, stop: asyncio.Event, client: Client, group: asyncio.TaskGroup) -> None:
        while not await _wait_for(stop, self._random.expovariate(1 / self._pause)):
            await self._open.acquire()
            group.create_task(self._free_after(self._exchange(client, self._next_message())))

    async def _free_after(self, asking: Coroutine[None, None, None]) -> None:
        try:
            await asking
        finally:
            self._open.release()

    def _next_message(self) -> SentMessage:
        rng = self._random
        self._count += 1
        length, pace = rng.randint(5, 120), rng.choice((0, 10, 20, 40))
        words = rng.choice(("What becomes of it", "它会怎样", "And if you die now"))
        message_id = f"{self._name}-{self._count}"
        question = f"{words}, {message_id}? [[demo length={length} pace={pace}ms]]"
        message = SentMessage(self.user_id, message_id, question, "".join(canned_answer(question)))
        message.cancelling = rng.random() < CANCELLED
        self._asked.append(message)
        return message

    async def _exchange(self, client: Client, message: SentMessage) -> None:
        loop = asyncio.get_running_loop()
        cancel_after = self._random.uniform(0, 2)
        while True:
            try:
                reply = await client.send(message.question, message_id=message.message_id)
                await reply.accepted()
                message.accepted_at = message.accepted_at or loop.time()
                if message.cancelling:
                    await _cancel(reply, cancel_after)
                result = await reply.result()
            except Refused as refused:
                if isinstance(refused, Busy):
                    message.refused += 1
                else:
                    message.unknown += 1
                wait = refused.retry_after or timedelta(seconds=_MAX_PAUSE)
                await asyncio.sleep(min(wait.total_seconds(), _MAX_PAUSE))
            except ClientError as error:
                message.error, message.why = True, f"{type(error).__name__}: {error}"
                return
            else:
                message.ended_at = loop.time()
                message.outcome, message.text, message.why = result.outcome.value, result.text, result.why
                return


async def _cancel(reply: Reply, after: float) -> None:
    await asyncio.sleep(after)
    try:
        await reply.cancel()
    except Refused:
        return  # not possible now; the answer continues


async def _wait_for(event: asyncio.Event, within: float) -> bool:
    """Wait for an event; False after `within` seconds."""
    try:
        async with asyncio.timeout(within):
            await event.wait()
    except TimeoutError:
        return False
    return True
