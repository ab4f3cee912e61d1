"""`imstream backends`: the states of the AI backends, or a check of their configuration."""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import click

from imstream.cli.admin import redis_command
from imstream.cli.output import json_option, show
from imstream.clock import now_ms
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.backend_states import BackendStates


@click.command()
@redis_command("ai_backends")
@json_option
@click.option("--check", is_flag=True, help="Check the configured backends from here instead, without a prompt.")
async def backends(redis: RedisClient, settings: Settings, *, as_json: bool, check: bool) -> None:
    """Show the AI backends as each node sees them, or check them.

    Shows their state, calls in flight and last error.

    With --check, it reads the configuration of this machine as a node would, requests the list of models of each
    backend, and ends with 1 if a backend is away, refuses the key or does not have the model.
    """
    if not check:
        nodes = await BackendStates(redis, settings).read()
        show(nodes, _lines(nodes), as_json=as_json)
        return
    problems = await _check(settings)
    show(problems, (f"{name}  {problem or 'answers'}" for name, problem in problems.items()), as_json=as_json)
    sys.exit(any(problems.values()))


async def _check(settings: Settings) -> dict[str, str | None]:
    from imstream.ai.router import Backends  # noqa: PLC0415 - slow; not needed for help

    async with Backends(settings) as all_backends:
        found = await asyncio.gather(*(one.check() for one in all_backends))
        return {one.name: None if error is None else str(error) for one, error in zip(all_backends, found, strict=True)}


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
