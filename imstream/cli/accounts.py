"""What `imstream user` does, and what it says of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from zoneinfo import ZoneInfo

import click

from imstream.cli.redis_command import ask
from imstream.clock import Calendar, now
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.accounts import AccountOpen, Accounts, Banned, Locked, Restricted
from imstream.store.inbox import AccountChanged, leave
from imstream.store.inspection import UserOverview, look_at_user

MAX_SHOWN = 20
"""Most messages of a day that are listed; they are counted all the same."""


def show(settings: Settings, user_id: int) -> None:
    """Print all that is known of a user."""
    ask(settings, lambda commands: _show(commands, settings, user_id))


def lock(settings: Settings, user_id: int, span: timedelta, *, reason: str, by: str) -> None:
    """Lock a user, and have the sessions closed."""

    async def work(commands: RedisClient) -> None:
        restricted = await Accounts(commands, settings).lock(user_id, span, reason=reason, by=by)
        until = Calendar(ZoneInfo(settings.quota_timezone)).show(restricted.until)
        click.echo(f"user {user_id} is locked until {until}")
        await _tell(commands, settings, user_id, restricted)

    ask(settings, work)


def ban(settings: Settings, user_id: int, *, reason: str, by: str) -> None:
    """Ban a user, and have the sessions closed."""

    async def work(commands: RedisClient) -> None:
        restricted = await Accounts(commands, settings).ban(user_id, reason=reason, by=by)
        click.echo(f"user {user_id} is banned")
        await _tell(commands, settings, user_id, restricted)

    ask(settings, work)


def unlock(settings: Settings, user_id: int) -> None:
    """End a lock."""

    async def work(commands: RedisClient) -> None:
        was = await Accounts(commands, settings).unlock(user_id)
        click.echo(f"user {user_id} is locked no more" if was else f"user {user_id} was not locked")

    ask(settings, work)


def unban(settings: Settings, user_id: int) -> None:
    """End a ban."""

    async def work(commands: RedisClient) -> None:
        was = await Accounts(commands, settings).unban(user_id)
        click.echo(f"user {user_id} is banned no more" if was else f"user {user_id} was not banned")

    ask(settings, work)


def quota(settings: Settings, user_id: int, *, give_back: str | None, reset: bool) -> None:
    """Give back what was counted today, if asked to; print what is counted."""
    calendar = Calendar(ZoneInfo(settings.quota_timezone))
    day = calendar.day(now())

    async def work(commands: RedisClient) -> None:
        accounts = Accounts(commands, settings)
        if give_back is not None:
            was = await accounts.give_back(user_id, give_back, day)
            click.echo(f"message {give_back} is {'counted no more' if was else 'not counted today'}")
        if reset:
            click.echo(f"given back: {await accounts.give_all_back(user_id, day)}")
        overview = await look_at_user(commands, Keys(settings.key_prefix), user_id, day)
        click.echo(f"user {user_id}: {_used(overview, settings)}")
        for message_id, at in overview.asked[:MAX_SHOWN]:
            click.echo(f"  {calendar.show(at)}  {message_id}")
        if len(overview.asked) > MAX_SHOWN:
            click.echo(f"  and {len(overview.asked) - MAX_SHOWN} more")

    ask(settings, work)


async def _show(commands: RedisClient, settings: Settings, user_id: int) -> None:
    calendar = Calendar(ZoneInfo(settings.quota_timezone))
    day = calendar.day(now())
    overview = await look_at_user(commands, Keys(settings.key_prefix), user_id, day)
    standing = await Accounts(commands, settings).look(user_id, day)
    click.echo(f"user {user_id} at {settings.redis_url}")
    for line in _lines(overview, standing, settings, calendar):
        click.echo(line)


def _lines(
    overview: UserOverview, standing: AccountOpen | Locked | Banned, settings: Settings, calendar: Calendar
) -> Iterator[str]:
    account = overview.account
    yield f"  account     {type(standing).__name__.lower()}"
    if isinstance(standing, Locked):
        # Somebody may have written it by hand, such as 1.9e12: what holds is what Redis makes of it.
        written, ms = account.get("locked_until", ""), timedelta(milliseconds=1)
        until = float(written) if written.isdecimal() else now() + standing.left // ms
        yield f"    until     {calendar.show(until)}"
    if not isinstance(standing, AccountOpen):
        for name in ("reason", "by"):
            yield f"    {name:<9} {account.get(name) or '?'}"
        if (since := account.get("at", "")).isdecimal():
            yield f"    since     {calendar.show(float(since))}"
    yield f"  quota       {_used(overview, settings)}"
    left = f", forgotten in {timedelta(seconds=overview.violations_for.seconds)}" if overview.violations else ""
    yield f"  violations  {overview.violations}{left}"
    yield f"  sockets     {'on node ' + ', '.join(overview.nodes) if overview.nodes else 'none'}"


def _used(overview: UserOverview, settings: Settings) -> str:
    used, most = len(overview.asked), settings.daily_quota
    day = f"{overview.day} ({settings.quota_timezone})"
    return (
        f"{used} of {most} used on {day}, {max(0, most - used)} left"
        if most
        else f"{used} used on {day}, no limit here"
    )


async def _tell(commands: RedisClient, settings: Settings, user_id: int, restricted: Restricted) -> None:
    """Have each node close the user's sessions."""
    for node in sorted(restricted.nodes):
        try:
            await leave(commands, Keys(settings.key_prefix), node, AccountChanged(user_id))
        except StoreError as error:
            click.echo(f"node {node} could not be told, and closes sessions within minutes: {error}", err=True)
        else:
            click.echo(f"node {node} was told to close the user's sessions")
