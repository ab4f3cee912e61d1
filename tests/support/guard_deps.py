"""`GuardDeps` for guards that use neither Redis nor the inbox."""

from typing import Any, cast

from imstream.ai.prompt.assembler import PromptAssembler
from imstream.guards.guard import GuardDeps
from imstream.settings import Settings


def guard_deps(**given: Any) -> GuardDeps:  # noqa: ANN401 - any setting
    """Build the dependencies from settings."""
    settings, nothing = Settings.load(**given), cast("Any", None)
    return GuardDeps(settings=settings, redis=nothing, inbox=nothing, assembler=PromptAssembler(settings))
