"""An event loop whose clock jumps to the next timer instead of waiting. Only for code without I/O."""

import asyncio
import functools
import selectors
from collections.abc import Awaitable, Callable
from typing import ParamSpec

Args = ParamSpec("Args")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its clock starts at 0 and advances only when the loop would wait."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Seconds since the start."""
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("everybody waits for something that will never happen")
            self._loop.now += max(timeout, 0.0)
        return ready


def in_virtual_time(test: Callable[Args, Awaitable[None]]) -> Callable[Args, None]:
    """Run an async test on such a loop."""

    @functools.wraps(test)
    def run(*args: Args.args, **fixtures: Args.kwargs) -> None:
        async def main() -> None:
            await test(*args, **fixtures)

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(main())

    return run
