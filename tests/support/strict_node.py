"""A real node with an additional guard: `python -m tests.support.strict_node` refuses RUDE texts as violations."""

from typing import Self

from imstream.codes import Code
from imstream.guards import chain
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Reject
from imstream.model import ChatRequest
from imstream.node_process import run
from imstream.settings import Settings
from imstream.texts import Sentence

RUDE = "[[rude]]"
"""Refused before admission."""

RUDE_AT_SECOND_SIGHT = "[[rude at second sight]]"
"""Refused by the worker."""

NO = Reject("rude", Code.FORBIDDEN, Sentence("请文明用语", "Be polite, please"), violation=True)


class Politeness(Guard):
    """Refuses these texts."""

    @classmethod
    def create(cls, deps: GuardDeps) -> Self:
        """Create the guard on every node."""
        del deps
        return cls()

    async def check_chat(self, request: ChatRequest) -> Allow | Reject:
        """See `RUDE`."""
        return NO if RUDE in request.contents else ALLOW

    async def check_ai_call(self, request: ChatRequest) -> Allow | Reject:
        """See `RUDE_AT_SECOND_SIGHT`."""
        return NO if RUDE_AT_SECOND_SIGHT in request.contents else ALLOW


def main() -> None:
    """Run a node."""
    chain.GUARDS = (*chain.GUARDS, Politeness)
    run(Settings.load())


if __name__ == "__main__":
    main()
