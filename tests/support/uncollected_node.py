"""`imstream node` without the garbage collector: `python -m tests.support.uncollected_node`.

Reference cycles are never freed. On SIGUSR1 it prints the increase in the number of objects of each type that the
collector tracks, since the last time.
"""

import asyncio
import gc
import json
import signal
from collections import Counter

import uvloop

from imstream import logs, node_process
from imstream.settings import Settings

_told = Counter[str]()


def _tell() -> None:
    found = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    more = found - _told
    _told.clear()
    _told.update(found)
    # The first time these are all objects, which are not of interest.
    print(json.dumps({"event": "objects", "objects": more if more != found else {}}), flush=True)  # noqa: T201


async def _serve(settings: Settings) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _tell)
    await node_process.serve(settings)


if __name__ == "__main__":
    gc.disable()
    given = Settings.load()
    logs.configure(given)
    uvloop.run(_serve(given))
