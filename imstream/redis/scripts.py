"""Lua scripts: read from their files once, sent by digest, and in full only to a server that does not know them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from redis.exceptions import NoScriptError

from imstream.redis.client import Argument, RedisClient


@dataclass(frozen=True)
class Script:
    """One atomic step, as a file in `lua/` whose head lists its keys, arguments and result."""

    name: str
    text: str = field(init=False, repr=False)
    digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        text = resources.files("imstream.store").joinpath("lua", f"{self.name}.lua").read_text("utf-8")
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "digest", hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    async def run(
        self, commands: RedisClient, keys: Sequence[str], arguments: Sequence[Argument], *, urgent: bool = True
    ) -> Any:  # noqa: ANN401 - what Redis answers
        """Run the script. Takes `urgent` and raises as `RedisClient.execute` does."""
        try:
            return await commands.execute("EVALSHA", self.digest, len(keys), *keys, *arguments, urgent=urgent)
        except NoScriptError:  # a new or restarted server: nothing was carried out, so the text may follow
            return await commands.execute("EVAL", self.text, len(keys), *keys, *arguments)
