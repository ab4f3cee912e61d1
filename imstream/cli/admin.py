"""Commands of operators that read or change Redis: `imstream streams` and `imstream user`."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from functools import wraps
from typing import Any
from zoneinfo import ZoneInfo

import click

from imstream.cli.options import REDIS_SETTINGS, TimeSpan, given, parse_user_id, settings_options
from imstream.cli.output import echo
from imstream.clock import Calendar, now_ms
from imstream.errors import StoreDenied, StoreError, StoreRefused, StoreUnavailable
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.accounts import Accounts, Banned, Locked, Restricted
from imstream.store.inbox import AccountChanged, send_notice
from imstream.store.inspection import StreamOverview, UserOverview, inspect_stream, inspect_user, is_node
from imstream.user_ids import UserId

MAX_SHOWN = 20  # maximum number of counted messages that are listed

DEAD_LETTER = "user {user}  message {message_id}  {reason} after {attempts} attempts: {error}"
"""A dead letter in lists, by its fields."""

AsyncCommand = Callable[..., Awaitable[None]]


def redis_command(*names: str) -> Callable[[AsyncCommand], Callable[..., None]]:
    """Add options for the settings of Redis and for these. The command gets a connection, the settings, and the rest.

    It may raise `StoreError`; errors about the connection name the server.
    """
    names = (*names, *REDIS_SETTINGS)

    def decorate(command: AsyncCommand) -> Callable[..., None]:
        @wraps(command)
        def run(**options: Any) -> None:  # noqa: ANN401 - any option
            settings = Settings.load(**given({name: options.pop(name) for name in names}))
            try:
                asyncio.run(connected(settings, options))
            except StoreDenied as error:
                raise StoreDenied(f"the Redis at {settings.redis_url} denies access: {error}") from None
            except StoreUnavailable as error:
                raise StoreUnavailable(f"no Redis at {settings.redis_url}: {error}") from None

        async def connected(settings: Settings, options: dict[str, Any]) -> None:
            async with RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout) as redis:
                await command(redis, settings, **options)

        return settings_options(Settings, only=names)(run)

    return decorate


@click.command()
@redis_command("node")
@click.option("--newest", type=click.IntRange(0, 1000), default=5, show_default=True, help="Dead letters shown.")
async def streams(redis: RedisClient, settings: Settings, *, newest: int) -> None:
    """Show a node's stream, and why its requests wait.

    Shows the number of unfinished requests, the reasons why they wait, those in work with their workers, and
    the newest dead letters.
    """
    keys = Keys(settings.key_prefix)
    if not await is_node(redis, keys, settings.node):
        raise StoreRefused(f"there is no node {settings.node} in {settings.redis_url}: see imstream nodes")
    overview = await inspect_stream(redis, keys, settings.node, newest=newest)
    echo(f"node {settings.node} at {settings.redis_url}", *_stream_lines(overview))


def _stream_lines(overview: StreamOverview) -> Iterator[str]:
    working = sum(overview.in_progress.values())
    yield f"  unfinished requests  {overview.unfinished}: {overview.waiting} waiting, {working} in work"
    if (following := overview.next) is not None:
        yield (
            f"    the next one has waited {following.since.total_seconds():.1f} s  "
            f"user {following.user}  message {following.message_id}"
        )
    reasons = [*_why_requests_wait(overview)] if overview.unfinished else []
    if overview.waiting and not reasons:
        reasons = ["no reason in Redis: the node has free slots, see its log"]
    yield from (f"    {reason}" for reason in reasons)
    for consumer, count in overview.in_progress.items():
        dead = " and does not run: another node takes over" if consumer in overview.dead_nodes else ""
        yield f"    node {consumer} works on {count}{dead}"
    for work in overview.oldest:
        ids = f"{work.entry_id}  user {work.user}  message {work.message_id}"
        why = work.waiting and f"  waits for backend {work.waiting.backend}: {work.waiting.reason}"
        yield f"      {ids}  for {work.since.total_seconds():.1f} s  delivery {work.deliveries}{why or ''}"
    if working > len(overview.oldest):
        yield f"      and {working - len(overview.oldest)} more"
    yield f"  dead letters         {overview.dead}" + (", the newest:" if overview.newest_dead else "")
    for letter in overview.newest_dead:
        yield f"    {letter.dead_at:%Y-%m-%d %H:%M:%S} UTC  {DEAD_LETTER.format(**letter.about)}"


def _why_requests_wait(overview: StreamOverview) -> Iterator[str]:
    if overview.pause is not None:
        yield f"an operator has paused the node: {overview.pause}"
    if overview.holder is None:
        adopter = f"node {overview.adopter}" if overview.adopter else "no node"
        yield f"the node does not run (it has no lease); {adopter} has adopted its stream"
    elif overview.holder.stopping:
        yield "the node drains: it takes no requests"
    for name, backend in overview.backends.items():
        if backend.get("state") == "away":
            until = backend.get("until")
            seconds = f" for {max(0, until - now_ms()) / 1000:.0f} s" if isinstance(until, int) else ""
            yield f"backend {name} is away ({backend.get('reason') or '?'}), and is not called{seconds}"
        elif backend.get("state") == "recovering":
            yield f"backend {name} was away, and calls are paced"
    if 0 < overview.slots <= sum(overview.in_progress.values()):
        yield f"all {overview.slots} slots are in use"


def _user_command(*names: str) -> Callable[[AsyncCommand], Callable[..., None]]:
    """As `redis_command`, with the argument USER: the command gets its id, too."""

    def decorate(command: AsyncCommand) -> Callable[..., None]:
        @redis_command("user_ids", *names)
        @click.argument("user", metavar="USER")
        @wraps(command)
        async def run(redis: RedisClient, settings: Settings, *, user: str, **options: Any) -> None:  # noqa: ANN401 - any option
            await command(redis, settings, parse_user_id(user, settings.user_ids), **options)

        return run

    return decorate


reason_option = click.option("--reason", default="", help="Reason, for operators only.")
by_option = click.option("--by", default=lambda: os.environ.get("USER", "imstream"), help="Operator; default $USER.")


@click.group()
def user() -> None:
    """Show, lock and ban users, and see their quota.

    Changes take effect at once, on all nodes: open sessions are notified and closed (4503).
    """


@user.command()
@_user_command("daily_quota", "quota_timezone")
async def show(redis: RedisClient, settings: Settings, user_id: UserId) -> None:
    """Show account, quota, violations and route of a user."""
    calendar = Calendar(ZoneInfo(settings.quota_timezone))
    day = calendar.day(now_ms())
    overview = await inspect_user(redis, Keys(settings.key_prefix), user_id, day)
    status = await Accounts(redis, settings).look(user_id)
    lines = _user_lines(overview, status, settings, calendar)
    echo(f"user {user_id} at {settings.redis_url}", *lines)


def _user_lines(
    overview: UserOverview, status: Locked | Banned | None, settings: Settings, calendar: Calendar
) -> Iterator[str]:
    account = overview.account
    yield f"  account     {'free' if status is None else type(status).__name__.lower()}"
    if isinstance(status, Locked):
        # A value written by hand, such as 1.9e12, is shown as Redis interprets it.
        written, ms = account.get("locked_until", ""), timedelta(milliseconds=1)
        until = float(written) if written.isdecimal() else now_ms() + status.remaining // ms
        yield f"    until     {calendar.format(until)}"
    if status is not None:
        for name in ("reason", "by"):
            yield f"    {name:<9} {account.get(name) or '?'}"
        if (since := account.get("at", "")).isdecimal():
            yield f"    since     {calendar.format(float(since))}"
    yield f"  quota       {_quota(overview, settings)}"
    expiry = f", expire in {timedelta(seconds=overview.violations_expire_in.seconds)}" if overview.violations else ""
    yield f"  violations  {overview.violations}{expiry}"
    yield f"  sockets     {'on node ' + ', '.join(overview.nodes) if overview.nodes else 'none'}"


def _quota(overview: UserOverview, settings: Settings) -> str:
    used, limit = len(overview.counted), settings.daily_quota
    day = f"{overview.day} ({settings.quota_timezone})"
    if not limit:
        return f"{used} used on {day}, no limit here"
    return f"{used} of {limit} used on {day}, {max(0, limit - used)} left"


@user.command()
@click.option("--for", "span", type=TimeSpan(), help="Duration, such as 90s or 7d; default IMSTREAM_LOCK_TIME.")
@reason_option
@by_option
@_user_command("quota_timezone")
async def lock(  # noqa: PLR0913 - one for each option
    redis: RedisClient, settings: Settings, user_id: UserId, *, span: timedelta | None, reason: str, by: str
) -> None:
    """Lock a user out for a time."""
    locked = await Accounts(redis, settings).lock(user_id, span or settings.lock_time, reason=reason, by=by)
    until = Calendar(ZoneInfo(settings.quota_timezone)).format(locked.until)
    echo(f"user {user_id} is locked until {until}")
    await _close_sessions(redis, settings, user_id, locked)


@user.command()
@_user_command()
async def unlock(redis: RedisClient, settings: Settings, user_id: UserId) -> None:
    """End a lock."""
    was_locked = await Accounts(redis, settings).unlock(user_id)
    echo(f"user {user_id} is unlocked" if was_locked else f"user {user_id} was not locked")


@user.command()
@reason_option
@by_option
@_user_command()
async def ban(redis: RedisClient, settings: Settings, user_id: UserId, reason: str, by: str) -> None:
    """Ban a user."""
    banned = await Accounts(redis, settings).ban(user_id, reason=reason, by=by)
    echo(f"user {user_id} is banned")
    await _close_sessions(redis, settings, user_id, banned)


@user.command()
@_user_command()
async def unban(redis: RedisClient, settings: Settings, user_id: UserId) -> None:
    """End a ban."""
    was_banned = await Accounts(redis, settings).unban(user_id)
    echo(f"user {user_id} is unbanned" if was_banned else f"user {user_id} was not banned")


@user.command()
@click.option("--give-back", metavar="MESSAGE", help="Remove this message from today's count.")
@click.option("--reset", is_flag=True, help="Reset today's count.")
@_user_command("daily_quota", "quota_timezone")
async def quota(redis: RedisClient, settings: Settings, user_id: UserId, give_back: str | None, *, reset: bool) -> None:
    """Show the messages that count towards today's quota, or remove some."""
    calendar, accounts = Calendar(ZoneInfo(settings.quota_timezone)), Accounts(redis, settings)
    day = calendar.day(now_ms())
    if give_back is not None:
        was_counted = await accounts.refund(user_id, give_back, day)
        echo(f"message {give_back} is {'given back' if was_counted else 'not counted today'}")
    if reset:
        echo(f"messages given back: {await accounts.reset_quota(user_id, day)}")
    overview = await inspect_user(redis, Keys(settings.key_prefix), user_id, day)
    echo(f"user {user_id}: {_quota(overview, settings)}")
    for message_id, at in overview.counted[:MAX_SHOWN]:
        echo(f"  {calendar.format(at)}  {message_id}")
    if len(overview.counted) > MAX_SHOWN:
        echo(f"  and {len(overview.counted) - MAX_SHOWN} more")


async def _close_sessions(redis: RedisClient, settings: Settings, user_id: UserId, restricted: Restricted) -> None:
    for node in sorted(restricted.nodes):
        try:
            await send_notice(redis, Keys(settings.key_prefix), node, AccountChanged(user_id))
            echo(f"node {node} was notified to close the user's sessions")
        except StoreError as error:
            echo(f"node {node} was not notified and closes the sessions within minutes: {error}", err=True)
