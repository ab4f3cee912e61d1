"""Command line options made from settings, so that each setting has one name, one text and one default.

`--queue-limit` is `IMSTREAM_QUEUE_LIMIT`: the value is taken as it is typed and read by the settings, which also say
what is wrong with it. Secrets have no option, because every user of a machine can read command lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from imstream.errors import SettingsError
from imstream.settings import ENV_PREFIX, SettingsGroup, is_secret, parse_duration
from imstream.wire import MAX_USER_ID, MIN_USER_ID, parse_user_id

Command = TypeVar("Command", bound="Callable[..., Any]")


class UserId(click.ParamType[int]):
    """A user's number, as every command reads it."""

    name = "number"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See `click.ParamType.convert`."""
        if (user_id := parse_user_id(str(value))) is None:
            self.fail(f"{value!r} is no user id: a number from {MIN_USER_ID} to {MAX_USER_ID}", param, ctx)
        return user_id


class TimeSpan(click.ParamType[timedelta]):
    """A time span, written as in the settings: more than none, and at most ten years."""

    name = "time"
    most = timedelta(days=3650)

    def convert(self, value: str | timedelta, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ARG002 - click's
        """See `click.ParamType.convert`. Raises `SettingsError`, as for a setting."""
        name = param.opts[0] if param else ""
        try:
            span = parse_duration(value)
        except ValueError as error:
            raise SettingsError(f"{name}={value!r} is not allowed: {error}") from None
        if not isinstance(span, timedelta) or not timedelta(0) < span <= self.most:
            raise SettingsError(f"{name}={value!r} is not allowed: more than 0, at most {self.most.days}d")
        return span


def settings_options(
    group: type[SettingsGroup],
    *,
    only: Sequence[str] | None = None,
    aliases: Mapping[str, str] | None = None,
    full_names: bool = False,
) -> Callable[[Command], Command]:
    """Give a command one option for each setting of a group.

    The command gets what was typed as keyword arguments, None for what was not; `given` leaves those out.

    Args:
        group: The settings.
        only: The fields that get an option, in this order; all of them when it is left out.
        aliases: A shorter name for some fields, such as `{"redis_url": "--redis"}`.
        full_names: Names start with the group's own prefix (`--demo-pace`), for a command with several groups.
    """
    fields = {name: group.model_fields[name] for name in only or group.model_fields}
    options = [
        _option(group, name, field, (aliases or {}).get(name), full_name=full_names)
        for name, field in fields.items()
        if not is_secret(field)
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def given(options: Mapping[str, str | None]) -> dict[str, str]:
    """What was typed, by the name of its setting."""
    return {name: value for name, value in options.items() if value is not None}


def as_environment(group: type[SettingsGroup], values: Mapping[str, object]) -> dict[str, str]:
    """Settings as environment variables, for a child process."""
    return {group.variable(name): str(value) for name, value in values.items()}


def _option(
    group: type[SettingsGroup], name: str, field: FieldInfo, alias: str | None, *, full_name: bool
) -> Callable[[Command], Command]:
    variable = group.variable(name)
    parameter = variable.removeprefix(ENV_PREFIX).lower() if full_name else name
    names = [f"--{parameter.replace('_', '-')}", parameter, *([alias] if alias else [])]
    default = "" if field.default is None else f"; default {format_default(field.default)}"
    return click.option(*names, metavar=_metavar(field.annotation), help=f"{field.description} [{variable}{default}]")


def _metavar(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if annotation is timedelta:
        return "TIME"
    if annotation is bool:
        return "true|false"
    return "NUMBER" if annotation in {int, float} else "TEXT"


def format_default(default: object) -> str:
    """Format a default as it is typed."""
    if isinstance(default, bool):
        return str(default).lower()
    if not isinstance(default, timedelta):
        return f"{default:g}" if isinstance(default, float) else str(default)
    for unit, span in (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("m", timedelta(minutes=1))):
        if default and default % span == timedelta(0):
            return f"{default // span}{unit}"
    seconds = default.total_seconds()
    return f"{seconds:g}s" if seconds >= 1 or not default else f"{seconds * 1000:g}ms"
