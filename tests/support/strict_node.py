"""A real node with one guard more: `python -m tests.support.strict_node` refuses RUDE texts, and blames their users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from imstream.guards import chain
from imstream.guards.guard import PASS, Guard, Pass, Refuse
from imstream.node import run
from imstream.settings import Settings
from imstream.texts import OwnSentence
from imstream.wire import Code

if TYPE_CHECKING:
    from imstream.guards.guard import Supplies
    from imstream.store.chat_request import ChatRequest

RUDE = "[[rude]]"
"""Refused before it is admitted."""

RUDE_AT_SECOND_SIGHT = "[[rude at second sight]]"
"""Refused by the worker."""

NO = Refuse("rude", Code.FORBIDDEN, OwnSentence("请文明用语", "Be polite, please"), violation=True)


class Politeness(Guard):
    """Refuses them."""

    @classmethod
    def make(cls, supplies: Supplies) -> Self:
        """On every node."""
        del supplies
        return cls()

    async def chat(self, request: ChatRequest) -> Pass | Refuse:
        """See `RUDE`."""
        return NO if RUDE in request.contents else PASS

    async def request(self, request: ChatRequest) -> Pass | Refuse:
        """See `RUDE_AT_SECOND_SIGHT`."""
        return NO if RUDE_AT_SECOND_SIGHT in request.contents else PASS


def main() -> None:
    """Run a node."""
    known = chain.all_guards()
    chain.all_guards = lambda: [*known, Politeness]
    run(Settings.load())


if __name__ == "__main__":
    main()
