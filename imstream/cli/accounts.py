"""What `imstream user` does, and what it says of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from zoneinfo import ZoneInfo

import click

from imstream.cli.redis_command import ask
from imstream.clock import Calendar, now_ms
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.accounts import AccountOpen, Accounts, Banned, Locked, Restricted
from imstream.store.inbox import AccountChanged, notify
from imstream.store.inspection import UserOverview, inspect_user

MAX_SHOWN = 20
"""Most messages of a day that are listed; they are counted all the same."""


def show(settings: Settings, user_id: int) -> None:
    """Print all that is known of a user."""
    ask(settings, lambda redis: _show(redis, settings, user_id))


def lock(settings: Settings, user_id: int, span: timedelta, *, reason: str, by: str) -> None:
    """Lock a user, and have the sessions closed."""

    async def work(redis: RedisClient) -> None:
        restricted = await Accounts(redis, settings).lock(user_id, span, reason=reason, by=by)
        until = Calendar(ZoneInfo(settings.quota_timezone)).format(restricted.until)
        click.echo(f"user {user_id} is locked until {until}")
        await _tell(redis, settings, user_id, restricted)

    ask(settings, work)


def ban(settings: Settings, user_id: int, *, reason: str, by: str) -> None:
    """Ban a user, and have the sessions closed."""

    async def work(redis: RedisClient) -> None:
        restricted = await Accounts(redis, settings).ban(user_id, reason=reason, by=by)
        click.echo(f"user {user_id} is banned")
        await _tell(redis, settings, user_id, restricted)

    ask(settings, work)


def unlock(settings: Settings, user_id: int) -> None:
    """End a lock."""

    async def work(redis: RedisClient) -> None:
        was = await Accounts(redis, settings).unlock(user_id)
        click.echo(f"user {user_id} is locked no more" if was else f"user {user_id} was not locked")

    ask(settings, work)


def unban(settings: Settings, user_id: int) -> None:
    """End a ban."""

    async def work(redis: RedisClient) -> None:
        was = await Accounts(redis, settings).unban(user_id)
        click.echo(f"user {user_id} is banned no more" if was else f"user {user_id} was not banned")

    ask(settings, work)


def quota(settings: Settings, user_id: int, *, give_back: str | None, reset: bool) -> None:
    """Give back what was counted today, if asked to; print what is counted."""
    calendar = Calendar(ZoneInfo(settings.quota_timezone))
    day = calendar.day(now_ms())

    async def work(redis: RedisClient) -> None:
        accounts = Accounts(redis, settings)
        if give_back is not None:
            was = await accounts.refund(user_id, give_back, day)
            click.echo(f"message {give_back} is {'counted no more' if was else 'not counted today'}")
        if reset:
            click.echo(f"given back: {await accounts.reset_quota(user_id, day)}")
        overview = await inspect_user(redis, Keys(settings.key_prefix), user_id, day)
        click.echo(f"user {user_id}: {_used(overview, settings)}")
        for message_id, at in overview.counted[:MAX_SHOWN]:
            click.echo(f"  {calendar.format(at)}  {message_id}")
        if len(overview.counted) > MAX_SHOWN:
            click.echo(f"  and {len(overview.counted) - MAX_SHOWN} more")

    ask(settings, work)


async def _show(redis: RedisClient, settings: Settings, user_id: int) -> None:
    calendar = Calendar(ZoneInfo(settings.quota_timezone))
    day = calendar.day(now_ms())
    overview = await inspect_user(redis, Keys(settings.key_prefix), user_id, day)
    standing = await Accounts(redis, settings).check(user_id, day)
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
        until = float(written) if written.isdecimal() else now_ms() + standing.remaining // ms
        yield f"    until     {calendar.format(until)}"
    if not isinstance(standing, AccountOpen):
        for name in ("reason", "by"):
            yield f"    {name:<9} {account.get(name) or '?'}"
        if (since := account.get("at", "")).isdecimal():
            yield f"    since     {calendar.format(float(since))}"
    yield f"  quota       {_used(overview, settings)}"
    left = f", forgotten in {timedelta(seconds=overview.violations_expire_in.seconds)}" if overview.violations else ""
    yield f"  violations  {overview.violations}{left}"
    yield f"  sockets     {'on node ' + ', '.join(overview.nodes) if overview.nodes else 'none'}"


def _used(overview: UserOverview, settings: Settings) -> str:
    used, most = len(overview.counted), settings.daily_quota
    day = f"{overview.day} ({settings.quota_timezone})"
    return (
        f"{used} of {most} used on {day}, {max(0, most - used)} left"
        if most
        else f"{used} used on {day}, no limit here"
    )


async def _tell(redis: RedisClient, settings: Settings, user_id: int, restricted: Restricted) -> None:
    """Have each node close the user's sessions."""
    for node in sorted(restricted.nodes):
        try:
            await notify(redis, Keys(settings.key_prefix), node, AccountChanged(user_id))
        except StoreError as error:
            click.echo(f"node {node} could not be told, and closes sessions within minutes: {error}", err=True)
        else:
            click.echo(f"node {node} was told to close the user's sessions")
