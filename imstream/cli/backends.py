"""`imstream backends`: the states of the AI backends, or a check of their configuration."""

import asyncio
from collections.abc import Iterator
from typing import Any

from imstream.ai.router import Backends
from imstream.cli.admin import with_redis
from imstream.cli.output import show
from imstream.clock import now_ms
from imstream.errors import BackendError
from imstream.settings import Settings
from imstream.store.backend_states import BackendStates


def show_backends(settings: Settings, *, as_json: bool) -> None:
    """Print the states of all nodes' backends."""
    nodes = with_redis(settings, lambda redis: BackendStates(redis, settings).read())
    show(nodes, _lines(nodes), as_json=as_json)


def check_backends(settings: Settings, *, as_json: bool) -> int:
    """Check each backend of the settings; print the errors, and return the exit code."""

    async def check() -> dict[str, BackendError | None]:
        async with Backends(settings) as backends:
            found = await asyncio.gather(*(one.check() for one in backends))
            return {one.name: error for one, error in zip(backends, found, strict=True)}

    problems = {name: None if error is None else str(error) for name, error in asyncio.run(check()).items()}
    show(problems, (f"{name}  {problem or 'answers'}" for name, problem in problems.items()), as_json=as_json)
    return int(any(problems.values()))


def _lines(nodes: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not nodes:
        yield "no node runs"
    for node, backends in nodes.items():
        yield f"node {node}" + ("" if backends else "  does not run, or publishes nothing")
        width = max(map(len, backends), default=0)
        for name, state in backends.items():
            counts = f"{state.get('inFlight')} of {state.get('slots', '?')} in flight  {state.get('calls')} calls"
            yield f"  {name:<{width}}  {state.get('state'):<10}  {counts}  {state.get('model')} at {state.get('url')}"
            if state.get("lastError") and isinstance(state.get("failedAt"), int):
                seconds = (now_ms() - state["failedAt"]) // 1000
                yield f"  {'':<{width}}  last error {seconds} s ago: {state['lastError']}"
