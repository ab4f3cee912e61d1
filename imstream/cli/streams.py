"""`imstream streams`: what is in a node's stream, for a person."""

from __future__ import annotations

from collections.abc import Iterator

import click

from imstream.cli.redis_command import ask
from imstream.keys import Keys
from imstream.settings import Settings
from imstream.store import inspection


def run(settings: Settings, *, newest: int) -> None:
    """Print an overview of the node's stream.

    Raises:
        StoreUnavailable: Redis was not reached.
    """
    overview = ask(
        settings,
        lambda redis: inspection.inspect_stream(redis, Keys(settings.key_prefix), settings.node, newest=newest),
    )
    click.echo(f"node {settings.node} at {settings.redis_url}")
    for line in _lines(overview):
        click.echo(line)


def _lines(overview: inspection.StreamOverview) -> Iterator[str]:
    working = sum(overview.in_progress.values())
    yield f"  unfinished requests  {overview.unfinished}: {overview.waiting} waiting, {working} in work"
    for consumer, count in overview.in_progress.items():
        yield f"    node {consumer} works on {count}"
    for work in overview.oldest:
        yield f"      {work.entry_id}  for {work.since.total_seconds():.1f} s  delivery {work.deliveries}"
    if working > len(overview.oldest):
        yield f"      and {working - len(overview.oldest)} more"
    yield f"  dead letters         {overview.dead}" + (", the newest:" if overview.newest_dead else "")
    for letter in overview.newest_dead:
        yield (
            f"    {letter.dead_at:%Y-%m-%d %H:%M:%S} UTC  user {letter.user}  message {letter.message_id}  "
            f"{letter.reason} after {letter.attempts} attempts: {letter.error}"
        )
