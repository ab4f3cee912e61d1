"""Commands of operators to nodes: `imstream pause`, `imstream resume` and `imstream drain`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import click

from imstream.cli.admin import AsyncCommand, by_option, reason_option, redis_command
from imstream.cli.nodes import wait_for_nodes
from imstream.cli.options import TimeSpan
from imstream.cli.output import echo, json_option, show
from imstream.errors import StoreRefused
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.inbox import DrainRequested, send_notice
from imstream.store.leases import is_node_id
from imstream.store.nodes import NodeOverview, inspect_nodes
from imstream.store.pauses import ALL, Pauses

NOT_CONFIRMED = 3  # exit code when a node has not done it in time
_CONFIRM = timedelta(seconds=10)  # how long a node has to confirm; it looks once a second


def _of_nodes(command: AsyncCommand) -> Callable[..., None]:
    """Make a command with the options that select nodes."""
    for option in (
        click.option("--node", "names", multiple=True, metavar="NODE", help="This node; can be repeated."),
        click.option("--all", "every", is_flag=True, help="All nodes, also those that start later."),
        json_option,
    ):
        command = option(command)
    return redis_command()(command)


def _targets(names: Sequence[str], *, every: bool) -> list[str]:
    if every == bool(names):
        raise click.UsageError("either --all, or at least one --node")
    if wrong := [name for name in names if not is_node_id(name)]:
        raise click.UsageError(f"{wrong[0]!r} is not a node id")
    return [ALL] if every else [*names]


def _report(found: tuple[list[NodeOverview], list[str]], lines: Iterable[str], *, as_json: bool) -> None:
    nodes, missing = found
    show({"nodes": nodes, "missing": missing}, lines, as_json=as_json)
    if missing:
        echo(*(f"not confirmed: {lack}" for lack in missing), err=True)
        sys.exit(NOT_CONFIRMED)


def _lines(found: tuple[list[NodeOverview], list[str]], targets: Sequence[str], verb: str) -> Iterator[str]:
    nodes, missing = found
    if missing and not nodes:
        yield "the pause of all nodes continues"
        return
    if ALL in targets and not missing:
        yield f"all nodes are {verb}"
    for name in sorted({*targets} - {ALL, *(one.node for one in nodes)}):
        yield f"node {name} is {verb}, but has not run yet"
    for one in nodes:
        state = "is dead" if one.state == "dead" else f"is paused: {one.paused}" if one.paused else f"is {one.state}"
        working = "" if one.running is None else f"; it works on {one.running} requests"
        yield f"node {one.node} {state}{working}, {one.unfinished} are unfinished"


@click.command()
@_of_nodes
@reason_option
@by_option
@click.option("--refuse", is_flag=True, help="Refuse new messages with BUSY, instead of accepting them to wait.")
@click.option("--wait", is_flag=True, help="Also wait until the nodes work on no request: the AI has no call then.")
@click.option("--timeout", "limit", type=TimeSpan(), default="5m", show_default=True, help="Limit of --wait.")
async def pause(  # noqa: PLR0913 - one for each option
    redis: RedisClient,
    settings: Settings,
    *,
    names: tuple[str, ...],
    every: bool,
    as_json: bool,
    reason: str,
    by: str,
    refuse: bool,
    wait: bool,
    limit: timedelta,
) -> None:
    """Let requests wait, for maintenance of the AI.

    No call begins until "imstream resume". Running answers continue. Accepted messages wait, also over restarts of
    nodes; sockets stay open and nodes ready. The requests of a paused node are not answered by others, even if it dies.
    Ends with 3 if a node has not confirmed it within 10 s, or with --wait still works on requests after --timeout.
    """
    targets, pauses = _targets(names, every=every), Pauses(redis, settings)
    for node in targets:
        await pauses.pause(node, reason=reason, by=by, refuses=refuse)

    def lack(one: NodeOverview) -> Iterator[str]:
        if one.state == "dead":
            return
        if one.paused is None:
            yield "it is not paused" + ("" if one.version else ": its release does not support pauses")
        elif wait and one.running:
            yield f"it works on {one.running} requests"

    found = await wait_for_nodes(redis, settings, limit if wait else _CONFIRM, lack, only=names)
    _report(found, _lines(found, targets, "paused"), as_json=as_json)


@click.command()
@_of_nodes
async def resume(redis: RedisClient, settings: Settings, *, names: tuple[str, ...], every: bool, as_json: bool) -> None:
    """End a pause, or with --all every pause.

    Ends with 3 if a node has not confirmed it within 10 s, and if a pause of all nodes continues.
    """
    targets, pauses = _targets(names, every=every), Pauses(redis, settings)
    for node in targets:
        await pauses.resume(node)

    def lack(one: NodeOverview) -> Iterator[str]:
        if one.state != "dead" and one.paused is not None:
            yield f"it is still paused: {one.paused}"

    if (left := (await pauses.read()).get(ALL)) is not None:
        found: tuple[list[NodeOverview], list[str]] = [], [f"all nodes are paused: {left.about}"]
    else:
        found = await wait_for_nodes(redis, settings, _CONFIRM, lack, only=names)
    _report(found, _lines(found, targets, "resumed"), as_json=as_json)


@click.command()
@redis_command()
@click.option("--node", "name", required=True, metavar="NODE", help="The node.")
@click.option("--wait", is_flag=True, help="Wait until its process has ended.")
@click.option("--timeout", "limit", type=TimeSpan(), default="2m", show_default=True, help="Limit of --wait.")
@json_option
async def drain(  # noqa: PLR0913 - one for each option
    redis: RedisClient, settings: Settings, *, name: str, wait: bool, limit: timedelta, as_json: bool
) -> None:
    """Drain a node through Redis, as SIGTERM does.

    It takes no new requests, lets running answers end within its IMSTREAM_DRAIN_GRACE, hands over the rest, closes its
    sockets with 1012 and exits with 0. Ends with 3 if it has not begun within 10 s, or with --wait has not ended after
    --timeout.
    """
    keys = Keys(settings.key_prefix)
    instance = next((one.instance for one in await inspect_nodes(redis, keys) if one.node == name), None)
    if instance is None:
        raise StoreRefused(f"node {name} does not run: see imstream nodes")
    await send_notice(redis, keys, name, DrainRequested(instance))

    def lack(now: NodeOverview) -> Iterator[str]:
        if now.instance == instance and now.state == "running":
            yield "it has not begun to drain"
        elif now.instance == instance and wait:
            yield f"it is stopping, and works on {now.running} requests"

    nodes, missing = await wait_for_nodes(redis, settings, limit if wait else _CONFIRM, lack, only=[name])

    def lines() -> Iterator[str]:
        for one in nodes:
            ended = "has ended" if one.instance is None else "has ended, and another process runs it"
            adopter = f"; node {one.adopter} has adopted them" if one.adopter else ""
            state = f"is {one.state}" if one.instance == instance else ended
            yield f"node {name} {state}; {one.unfinished} requests of its stream are unfinished{adopter}"

    _report((nodes, missing), lines(), as_json=as_json)
