"""`imstream streams`: what is in a node's stream, for a person."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from imstream.errors import StoreDenied, StoreUnavailable
from imstream.keys import Keys
from imstream.store import inspect
from imstream.store.connection import Commands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imstream.settings import Settings


def run(settings: Settings, *, newest: int) -> None:
    """Print an overview of the node's stream.

    Raises:
        StoreUnavailable: Redis was not reached.
    """
    address = settings.redis_url
    try:
        overview = asyncio.run(_look(settings, newest))
    except StoreDenied as error:
        raise StoreDenied(f"the Redis at {address} denies access: {error}") from None
    except StoreUnavailable as error:
        raise StoreUnavailable(f"no Redis at {address}: {error}") from None
    click.echo(f"node {settings.node} at {address}")
    for line in _lines(overview):
        click.echo(line)


async def _look(settings: Settings, newest: int) -> inspect.Overview:
    async with Commands(settings.redis_url, lanes=1, timeout=settings.redis_timeout) as commands:
        return await inspect.look(commands, Keys(settings.key_prefix), settings.node, newest=newest)


def _lines(overview: inspect.Overview) -> Iterator[str]:
    working = sum(overview.in_work.values())
    yield f"  unfinished requests  {overview.unfinished}: {overview.waiting} waiting, {working} in work"
    for consumer, count in overview.in_work.items():
        yield f"    node {consumer} works on {count}"
    for work in overview.oldest:
        yield f"      {work.entry_id}  for {work.since.total_seconds():.1f} s  delivery {work.deliveries}"
    if working > len(overview.oldest):
        yield f"      and {working - len(overview.oldest)} more"
    yield f"  dead letters         {overview.dead}" + (", the newest:" if overview.newest_dead else "")
    for letter in overview.newest_dead:
        yield (
            f"    {letter.died:%Y-%m-%d %H:%M:%S} UTC  user {letter.user}  message {letter.message_id}  "
            f"{letter.reason} after {letter.attempts} attempts: {letter.error}"
        )
