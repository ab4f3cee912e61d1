"""The Lua scripts of the store: each file in `lua/` is one atomic step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Generic, TypeVar

from imstream.errors import StoreRefused
from imstream.redis.client import RedisClient, Script
from imstream.redis.connection import Argument

_MADE_OF = {"begin": ("admit", "open"), "end": ("append", "finish")}
"""Scripts that call others, as functions of their names."""

_TEXTS = {
    file.name.removesuffix(".lua"): file.read_text("utf-8")
    for file in (resources.files("imstream.store") / "lua").iterdir()
}


def _text(name: str) -> str:
    parts = (f"local function {part}(KEYS, ARGV)\n{_TEXTS[part]}\nend\n" for part in _MADE_OF.get(name, ()))
    return "".join(parts) + _TEXTS[name]


LUA = {name: Script(_text(name)) for name in _TEXTS}

S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Step(Generic[T_co]):
    """One run of a script. It may be a part of a script that is made of several. `read`: reads its answer."""

    script: str
    keys: tuple[str, ...]
    arguments: Sequence[Argument]
    read: Callable[[Any], T_co]

    async def run(self, redis: RedisClient, *, urgent: bool = True) -> T_co:
        """Run it by itself. See `RedisClient.execute`."""
        return self.read(await LUA[self.script].run(redis, self.keys, self.arguments, urgent=urgent))


async def run_both(
    script: str, redis: RedisClient, one: Step[S], other: Step[T], *before: Argument
) -> tuple[S, T | None]:
    """Run a script that is made of two steps. None: it has not come to the second one.

    Where their keys may be on different servers, only the first step is run. `before`: arguments before those of the
    steps. See `RedisClient.execute`.
    """
    if not redis.is_split:
        arguments = (*before, len(one.arguments), *one.arguments, *other.arguments)
        try:
            answers = await LUA[script].run(redis, (*one.keys, *other.keys), arguments)
        except StoreRefused as error:
            if "same slot" not in str(error):
                raise
            redis.is_split = True  # one server of a cluster, or a proxy in front of it: nothing was executed
        else:
            return one.read(answers[0]), other.read(answers[1]) if len(answers) > 1 else None
    return await one.run(redis), None
