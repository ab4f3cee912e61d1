"""A real node that kills itself at one step of a request: `python -m tests.support.crashing_node --at POINT`.

The node is built and run as usual, from `IMSTREAM_*`, with one method wrapped. It dies by SIGKILL, so nothing is
cleaned up, flushed or sent. The points, in the order of a request's steps:

    counted     counted for the daily quota, not admitted
    begun       in the stream, and the attempt in the reply stream; the client is not informed, and there is no job
    admitted    in the stream; the client is not informed
    delivered   read by the worker, which has not begun
    opened      the attempt is in the reply stream
    called      the backend is about to be called; only for a text with POISON
    first-text  the first text has arrived from the backend
    flushed     the first text is recorded
    last-text   the answer is complete; its end is not recorded
    removed     the end is recorded, and the request removed; no client is informed
    ended       the end is recorded; no client is informed, and the request is not acknowledged
    told        clients may be informed; the request is not acknowledged
    finished    the request is acknowledged
    giving-back the failure is recorded; the message is still counted for the daily quota
    burying     the failure is recorded; the dead letter is not written

For `admitted`, `delivered`, `opened`, `ended`, `told` and `finished`, the node takes these steps one by one, as
in a cluster.
"""

import asyncio
import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import click

from imstream.ai.backend import OpenAIBackend
from imstream.model import ChatRequest
from imstream.node_process import run
from imstream.redis.client import RedisClient
from imstream.reply_buffer import ReplyBuffer
from imstream.settings import Settings
from imstream.store.accounts import Accounts
from imstream.store.replies import ReplyStore
from imstream.store.requests import Admitted, QueueFull, RequestStream
from imstream.worker.admission import Admission
from imstream.worker.reply_writer import ReplyWriter

POISON = "[[poison]]"
"""A text that kills the worker when it calls the backend."""


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: type, name: str, *, when: Callable[..., object] = lambda *_: True) -> None:
    """Kill this process when the method is called."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **named: Any) -> Any:  # noqa: ANN401 - any arguments
        if when(*args):
            _die()
        return original(*args, **named)

    setattr(owner, name, wrapped)


def _after(owner: type, name: str, *, when: Callable[[Any], object] = lambda _: True) -> None:
    """Kill this process when the coroutine method returns such a value."""
    original = getattr(owner, name)

    @functools.wraps(original)
    async def wrapped(*args: Any, **named: Any) -> Any:  # noqa: ANN401 - any arguments
        result = await original(*args, **named)
        if when(result):
            _die()
        return result

    setattr(owner, name, wrapped)


def _beside_a_read() -> None:
    """Let requests wait for the consumer's next read, beside which one may begin at once."""
    original = Admission.admit

    async def admit(self: Admission, request: ChatRequest) -> Admitted | QueueFull:
        while self.slots is None:  # noqa: ASYNC110 - only the test needs to know
            await asyncio.sleep(0.005)
        return await original(self, request)

    setattr(Admission, "admit", admit)  # noqa: B010 - it is set at run time
    _after(RequestStream, "begin")


def _in_steps(die: Callable[..., None], *where: Any, **when: Any) -> None:  # noqa: ANN401 - any arguments
    """Admit, deliver and open each request in steps of their own, as in a cluster, and so for its end."""
    setattr(RedisClient, "is_split", property(lambda _: True, lambda *_: None))  # noqa: B010 - it is set at run time
    die(*where, **when)


POINTS: dict[str, Callable[[], None]] = {
    "counted": lambda: _after(Accounts, "check_and_count"),
    "begun": _beside_a_read,
    "admitted": lambda: _in_steps(_after, RequestStream, "admit", when=lambda verdict: isinstance(verdict, Admitted)),
    "delivered": lambda: _in_steps(_after, RequestStream, "read", when=bool),
    "opened": lambda: _in_steps(_after, ReplyStore, "open"),
    "called": lambda: _before(OpenAIBackend, "answer", when=lambda _, messages: POISON in messages[-1].content),
    "first-text": lambda: _before(ReplyBuffer, "append"),
    "flushed": lambda: _after(ReplyWriter, "flush"),
    "last-text": lambda: _before(ReplyWriter, "end"),
    "removed": lambda: _after(ReplyWriter, "end"),
    "ended": lambda: _in_steps(_after, ReplyWriter, "end"),
    "told": lambda: _in_steps(_before, RequestStream, "finish"),
    "finished": lambda: _in_steps(_after, RequestStream, "finish"),
    "giving-back": lambda: _before(Accounts, "refund"),
    "burying": lambda: _before(RequestStream, "bury"),
}


@click.command()
@click.option("--at", type=click.Choice(list(POINTS)), required=True)
def main(at: str) -> None:
    """Run a node until it reaches the point."""
    POINTS[at]()
    run(Settings.load())


if __name__ == "__main__":
    main()
