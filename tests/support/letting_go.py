"""Checks that a failure releases its caller at once: an error in a reference cycle keeps every object of its frames."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest


class Asker:
    """A caller with a weak reference."""

    def take(self, text: str) -> None:
        """Ignore the value."""


async def lets_go(ask: Callable[[Asker], Awaitable[object]]) -> bool:
    """Whether a failed call releases its caller without garbage collection."""

    async def ask_in_vain() -> weakref.ref[Asker]:
        asker = Asker()
        try:
            await ask(asker)
        except Exception:  # noqa: BLE001 - any failure
            return weakref.ref(asker)
        pytest.fail("it did not fail")

    gc.collect()
    gc.disable()
    try:
        asker = await ask_in_vain()
        await asyncio.sleep(0)  # the event loop holds the callback that has just run
        return asker() is None
    finally:
        gc.enable()
