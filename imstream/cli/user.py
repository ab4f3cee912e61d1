"""`imstream user`: who is banned or locked, what was asked today, and changes of both. `accounts` carries it out."""
# ruff: noqa: PLC0415 - what a command needs is imported inside it, so that help stays quick

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import click

from imstream.cli.options import TimeSpan, UserId, given, settings_options
from imstream.settings import Settings

Command = TypeVar("Command", bound="Callable[..., Any]")

_WHERE = ["redis_url", "key_prefix", "redis_timeout"]
_DAY = [*_WHERE, "daily_quota", "quota_timezone"]


def _user_command(*settings: str) -> Callable[[Command], Command]:
    """A user id, and options for these settings."""

    def decorate(command: Command) -> Command:
        command = click.argument("user_id", type=UserId(), metavar="USER")(command)
        return settings_options(Settings, only=settings, aliases={"redis_url": "--redis"})(command)

    return decorate


_reason = click.option("--reason", default="", help="Why, for operators; the user is not told.")
_by = click.option(
    "--by", default=lambda: os.environ.get("USER", "imstream user"), help="Who says so; else USER of the environment."
)


@click.group()
def user() -> None:
    """Show, lock and ban users, and see their quota.

    What is changed holds at once, on all nodes: open sessions are told and closed (4503).
    """


@user.command()
@_user_command(*_DAY)
def show(user_id: int, **options: str | None) -> None:
    """Show account, quota, violations and route of a user."""
    from imstream.cli import accounts

    accounts.show(Settings.load(**given(options)), user_id)


@user.command()
@click.option(
    *("--for", "span"),
    type=TimeSpan(),
    metavar="TIME",
    help="For how long, such as 90s, 1h, 7d; else IMSTREAM_LOCK_TIME.",
)
@_reason
@_by
@_user_command(*_WHERE, "quota_timezone")
def lock(user_id: int, span: timedelta | None, reason: str, by: str, **options: str | None) -> None:
    """Lock a user out for a time."""
    from imstream.cli import accounts

    settings = Settings.load(**given(options))
    accounts.lock(settings, user_id, span or settings.lock_time, reason=reason, by=by)


@user.command()
@_user_command(*_WHERE)
def unlock(user_id: int, **options: str | None) -> None:
    """End a lock."""
    from imstream.cli import accounts

    accounts.unlock(Settings.load(**given(options)), user_id)


@user.command()
@_reason
@_by
@_user_command(*_WHERE)
def ban(user_id: int, reason: str, by: str, **options: str | None) -> None:
    """Ban a user."""
    from imstream.cli import accounts

    accounts.ban(Settings.load(**given(options)), user_id, reason=reason, by=by)


@user.command()
@_user_command(*_WHERE)
def unban(user_id: int, **options: str | None) -> None:
    """End a ban."""
    from imstream.cli import accounts

    accounts.unban(Settings.load(**given(options)), user_id)


@user.command()
@click.option("--give-back", metavar="MESSAGE", help="Count this message of today no more.")
@click.option("--reset", is_flag=True, help="Count none of today's messages any more.")
@_user_command(*_DAY)
def quota(user_id: int, give_back: str | None, *, reset: bool, **options: str | None) -> None:
    """Show what a user has asked today, or give it back."""
    from imstream.cli import accounts

    accounts.quota(Settings.load(**given(options)), user_id, give_back=give_back, reset=reset)
