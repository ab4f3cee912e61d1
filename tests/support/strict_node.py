"""A real node with one guard more: `python -m tests.support.strict_node` refuses RUDE texts, and blames their users."""

from __future__ import annotations

from typing import Self

from imstream.guards import chain
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.node import run
from imstream.settings import Settings
from imstream.texts import Sentence
from imstream.wire import Code

RUDE = "[[rude]]"
"""Refused before it is admitted."""

RUDE_AT_SECOND_SIGHT = "[[rude at second sight]]"
"""Refused by the worker."""

NO = Reject("rude", Code.FORBIDDEN, Sentence("请文明用语", "Be polite, please"), violation=True)


class Politeness(Guard):
    """Refuses them."""

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self:
        """On every node."""
        del supplies
        return cls()

    async def chat(self, request: ChatRequest) -> Allow | Reject:
        """See `RUDE`."""
        return NO if RUDE in request.contents else ALLOW

    async def request(self, request: ChatRequest) -> Allow | Reject:
        """See `RUDE_AT_SECOND_SIGHT`."""
        return NO if RUDE_AT_SECOND_SIGHT in request.contents else ALLOW


def main() -> None:
    """Run a node."""
    known = chain.all_guards()
    chain.all_guards = lambda: [*known, Politeness]
    run(Settings.load())


if __name__ == "__main__":
    main()
