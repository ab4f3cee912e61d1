"""`imstream node` whose consumer loop hangs at its next read after SIGUSR1."""

import asyncio
import signal
from typing import Any

import uvloop

from imstream import logs, node_process
from imstream.settings import Settings
from imstream.store.requests import RequestStream

_read = RequestStream.read


async def _serve(settings: Settings) -> None:
    wedged = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, wedged.set)

    async def read(*args: Any, **named: Any) -> Any:  # noqa: ANN401 - any arguments
        if wedged.is_set():
            await asyncio.Future()
        return await _read(*args, **named)

    RequestStream.read = read  # type: ignore[method-assign]
    await node_process.serve(settings)


if __name__ == "__main__":
    given = Settings.load()
    logs.configure(given)
    uvloop.run(_serve(given))
