"""A real node that kills itself at one point of a request's way: `python -m tests.support.crashing_node --at POINT`.

The node is built and run as ever, from `IMSTREAM_*`; one method is wrapped before. It dies by SIGKILL, so nothing is
cleaned up, flushed or said. The points, in the order in which a request comes by:

    counted     it is counted for the quota of the day, and not admitted
    admitted    it is in the stream; its client knows nothing
    delivered   it was given to the worker, which has not begun
    opened      the attempt is in the reply stream
    called      the backend is about to be asked; only for a text that holds POISON
    first-text  the first text has come from the backend
    flushed     the first text is recorded
    last-text   the answer is whole; its end is not recorded
    ended       the end is recorded; no client was told, and the request is not acknowledged
    told        clients may have been told; the request is not acknowledged
    finished    the request is acknowledged
    giving-back the failure is recorded; it is still counted for the quota of the day
    burying     the failure is recorded; the dead letter is not written
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import click

from imstream.ai.backend import OpenAIBackend
from imstream.node import run
from imstream.reply_buffer import ReplyBuffer
from imstream.settings import Settings
from imstream.store.accounts import Accounts
from imstream.store.replies import ReplyStore
from imstream.store.requests import Admitted, RequestStream
from imstream.worker.reply_writer import ReplyWriter

POISON = "[[poison]]"
"""A text that kills the worker which asks the backend about it."""


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: type, name: str, *, when: Callable[..., object] = lambda *_: True) -> None:
    """Die when the method is called."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the method takes
        if when(*args):
            _die()
        return original(*args, **named)

    setattr(owner, name, wrapped)


def _after(owner: type, name: str, *, when: Callable[[Any], object] = lambda _: True) -> None:
    """Die when the coroutine method returns something like that."""
    original = getattr(owner, name)

    @functools.wraps(original)
    async def wrapped(*args: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the method takes
        result = await original(*args, **named)
        if when(result):
            _die()
        return result

    setattr(owner, name, wrapped)


POINTS: dict[str, Callable[[], None]] = {
    "counted": lambda: _after(Accounts, "count"),
    "admitted": lambda: _after(RequestStream, "admit", when=lambda verdict: isinstance(verdict, Admitted)),
    "delivered": lambda: _after(RequestStream, "read", when=bool),
    "opened": lambda: _after(ReplyStore, "open"),
    "called": lambda: _before(OpenAIBackend, "answer", when=lambda _, messages: POISON in messages[-1].content),
    "first-text": lambda: _before(ReplyBuffer, "append"),
    "flushed": lambda: _after(ReplyWriter, "flush"),
    "last-text": lambda: _before(ReplyWriter, "end"),
    "ended": lambda: _after(ReplyWriter, "end"),
    "told": lambda: _before(RequestStream, "finish"),
    "finished": lambda: _after(RequestStream, "finish"),
    "giving-back": lambda: _before(Accounts, "give_back"),
    "burying": lambda: _before(RequestStream, "bury"),
}


@click.command()
@click.option("--at", type=click.Choice(list(POINTS)), required=True)
def main(at: str) -> None:
    """Run a node until it comes to the point."""
    POINTS[at]()
    run(Settings.load())


if __name__ == "__main__":
    main()
