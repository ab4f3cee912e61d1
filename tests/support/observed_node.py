"""`imstream node` that prints its number of asyncio tasks by coroutine on SIGUSR1."""

import asyncio
import json
import signal
from collections import Counter

import uvloop

from imstream import logs, node_process
from imstream.settings import Settings


def _tell() -> None:
    tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    print(json.dumps({"event": "tasks", "count": tasks.total(), "tasks": tasks}), flush=True)  # noqa: T201


async def _serve(settings: Settings) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _tell)
    await node_process.serve(settings)


if __name__ == "__main__":
    given = Settings.load()
    logs.configure(given)
    uvloop.run(_serve(given))
