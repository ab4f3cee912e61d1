"""`imstream nodes` and `imstream backends`: what the nodes publish in Redis, and a check of the backends from here."""

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import click

from imstream.cli.admin import redis_command
from imstream.cli.options import TimeSpan
from imstream.cli.output import age, echo, json_option, show, table
from imstream.clock import now_ms
from imstream.errors import StoreUnavailable
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.nodes import BackendStates, NodeOverview, inspect_nodes

NOT_SETTLED = 3  # exit code of --wait-settled when its time is over
_POLL_INTERVAL = 0.1  # seconds between two looks at the nodes


@click.command()
@redis_command()
@json_option
@click.option("--wait-settled", "wait", is_flag=True, help="Wait until the next node may be stopped.")
@click.option("--timeout", "limit", type=TimeSpan(), default="5m", show_default=True, help="Limit of --wait-settled.")
@click.option(
    "--except", "excepted", multiple=True, metavar="NODE", help="With --wait-settled: it stays away; can be repeated."
)
async def nodes(  # noqa: PLR0913 - one for each option
    redis: RedisClient, settings: Settings, *, as_json: bool, wait: bool, limit: timedelta, excepted: Sequence[str]
) -> None:
    """Show all nodes, or wait until the next one may be stopped.

    Shows lease, release, sessions, unfinished requests, and adopted streams.

    With --wait-settled, it returns when each of them runs and is ready, and no stream is adopted: then the next one may
    be stopped in a rolling restart. It ends with 3 if that takes longer than --timeout, and prints the reasons.
    """

    def lack(one: NodeOverview) -> Iterable[str]:
        return () if one.node in excepted else one.unsettled()

    found, missing = await wait_for_nodes(redis, settings, limit if wait else timedelta(), lack)
    report: dict[str, Any] = {"nodes": found, "warnings": list(_warnings(found))}
    show(report | ({"unsettled": missing} if wait else {}), _lines(found, settings), as_json=as_json)
    if wait and missing:
        echo(*(f"not settled: {reason}" for reason in missing), err=True)
        if away := [f" --except {one.node}" for one in found if one.state == "dead" and one.node not in excepted]:
            echo(f"if they stay away:{''.join(away)}", err=True)
        sys.exit(NOT_SETTLED)


async def wait_for_nodes(
    redis: RedisClient,
    settings: Settings,
    limit: timedelta,
    lack: Callable[[NodeOverview], Iterable[str]],
    *,
    only: Sequence[str] = (),
) -> tuple[list[NodeOverview], list[str]]:
    """All nodes, or only some, and the conditions that they still lack after at most `limit`.

    Meanwhile Redis may be away.
    """
    loop, keys = asyncio.get_running_loop(), Keys(settings.key_prefix)
    deadline = loop.time() + limit.total_seconds()
    while True:
        try:
            found = [one for one in await inspect_nodes(redis, keys) if not only or one.node in only]
        except StoreUnavailable:
            if loop.time() >= deadline:
                raise
        else:
            missing = [f"node {one.node}: {why}" for one in found for why in lack(one)]
            if not missing or loop.time() >= deadline:
                return found, missing
        await asyncio.sleep(_POLL_INTERVAL)


def _lines(found: Sequence[NodeOverview], settings: Settings) -> Iterator[str]:
    if not found:
        yield f"no node has run with {settings.redis_url}"
        return
    heading = ("node", "state", "lease", "version", "sessions", "running", "unfinished", "oldest", "adopter", "address")
    yield from table([heading, *map(_row, found)])
    for warning in _warnings(found):
        yield f"warning: {warning}"


def _row(one: NodeOverview) -> tuple[object, ...]:
    work = (one.version, one.sessions, one.running, one.unfinished, age(one.oldest), one.adopter)
    return (one.node, one.condition, age(one.lease), *work, one.address)


def _warnings(found: Sequence[NodeOverview]) -> Iterator[str]:
    versions: dict[str, list[str]] = {}
    if found and all(one.state == "dead" for one in found):
        yield "no node has a lease: none runs, or Redis refuses their writes (imstream doctor)"
    for one in found:
        if one.state != "dead":
            versions.setdefault(one.version or "unknown", []).append(one.node)
        if one.state == "dead" and one.unfinished and one.adopter is None:
            yield f"node {one.node} is dead, and no node has adopted its {one.unfinished} requests yet"
        if one.state == "running" and one.not_ready:
            yield f"node {one.node} is not ready: {one.not_ready}"
        if one.paused:
            yield f"node {one.node} is paused: {one.paused}"
        for helper, count in (one.helpers or {}).items():
            yield f"node {helper} works on {count} requests of node {one.node}"
    if len(versions) > 1:
        mixed = "; ".join(f"{version} on {', '.join(names)}" for version, names in versions.items())
        yield f"the nodes are of different releases ({mixed}): finish the upgrade"
    living = [one for one in found if one.state != "dead"]
    newest = max((one.reads or 1 for one in living), default=1)
    if older := [one.node for one in living if (one.reads or 1) < newest]:
        yield f"node {', '.join(older)} does not support requests of schema {newest}, which wait for the others"


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
        show(nodes, _backend_lines(nodes), as_json=as_json)
        return
    problems = await _check(settings)
    show(problems, (f"{name}  {problem or 'answers'}" for name, problem in problems.items()), as_json=as_json)
    sys.exit(any(problems.values()))


async def _check(settings: Settings) -> dict[str, str | None]:
    from imstream.ai.router import Backends  # noqa: PLC0415 - slow; not needed for help

    async with Backends(settings) as all_backends:
        found = await asyncio.gather(*(one.check() for one in all_backends))
        return {one.name: None if error is None else str(error) for one, error in zip(all_backends, found, strict=True)}


def _backend_lines(nodes: dict[str, dict[str, Any]]) -> Iterator[str]:
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
