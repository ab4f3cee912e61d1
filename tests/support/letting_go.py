"""What failed must let go of who asked, at once: an error whose trace holds itself keeps all that its frames hold."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest


class Asker:
    """Somebody with something to lose."""

    def take(self, text: str) -> None:
        """Whatever comes."""


async def lets_go(ask: Callable[[Asker], Awaitable[object]]) -> bool:
    """Whether nothing holds the one who asked when that has failed, before any garbage is collected."""

    async def ask_in_vain() -> weakref.ref[Asker]:
        asker = Asker()
        try:
            await ask(asker)
        except Exception:  # noqa: BLE001 - whatever it is
            return weakref.ref(asker)
        pytest.fail("it did not fail")

    gc.collect()
    gc.disable()
    try:
        asker = await ask_in_vain()
        await asyncio.sleep(0)  # the event loop holds what has just woken us
        return asker() is None
    finally:
        gc.enable()
