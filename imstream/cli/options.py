"""Command line options generated from settings, so that name, text and default of a setting are defined once.

`--queue-limit` is `IMSTREAM_QUEUE_LIMIT`: the settings parse the value and report errors. Secrets have no option,
because every user of a machine can read command lines.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo

from imstream.errors import SettingsError
from imstream.settings_group import ENV_PREFIX, SettingsGroup, is_secret, parse_duration
from imstream.user_ids import UserId, UserIds


class ChatSettings(SettingsGroup):
    """The settings of `imstream chat` itself."""

    url: str | None = Field(
        None,
        description="Address that `imstream chat` connects to, such as `wss://chat.example.com/ws`. Default: the node "
        "of IMSTREAM_HOST and IMSTREAM_PORT.",
    )
    token: SecretStr | None = Field(None, description="Signed token of the user of `imstream chat`.")


TOKEN = ChatSettings.variable("token")  # the variable of `imstream chat` that holds a token
REDIS_SETTINGS = ("redis_url", "key_prefix", "redis_timeout")  # the settings of commands that read Redis

_ALIASES = {f"{ENV_PREFIX}REDIS_URL": "--redis", f"{ENV_PREFIX}AI_URL": "--ai"}
"""Shorter names of options, by their variables."""

Command = TypeVar("Command", bound="Callable[..., Any]")


def parse_user_id(text: str, user_ids: UserIds) -> UserId:
    """Parse an argument. Raises `click.UsageError`."""
    if (user_id := user_ids.parse(text)) is None:
        raise click.UsageError(f"{text!r} is not a user id: {user_ids.allowed}")
    return user_id


class TimeSpan(click.ParamType[timedelta]):
    """A time span in the syntax of the settings, more than 0 and at most `maximum`."""

    name = "time"
    maximum = timedelta(days=3650)

    def convert(self, value: str | timedelta, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ARG002 - click's
        """See `click.ParamType.convert`. Raises `SettingsError`, as for a setting."""
        name = param.opts[0] if param else ""
        try:
            span = parse_duration(value)
        except ValueError as error:
            raise SettingsError(f"{name}={value!r} is not allowed: {error}") from None
        if not isinstance(span, timedelta) or not timedelta(0) < span <= self.maximum:
            raise SettingsError(f"{name}={value!r} is not allowed: more than 0, at most {self.maximum.days}d")
        return span


def settings_options(
    group: type[SettingsGroup], *, only: Sequence[str] | None = None, full_names: bool = False
) -> Callable[[Command], Command]:
    """Add one option for each setting of a group, or for the fields in `only`; see also `given`.

    With `full_names`, names begin with the group's prefix (`--demo-pace`), for a command with several groups.
    """

    def decorate(command: Command) -> Command:
        for name in reversed(only or list(group.model_fields)):
            field = group.model_fields[name]
            if is_secret(field):
                continue
            variable = group.variable(name)
            parameter = variable.removeprefix(ENV_PREFIX).lower() if full_names else name
            names = [f"--{parameter.replace('_', '-')}", parameter, *filter(None, [_ALIASES.get(variable)])]
            default = "" if field.default is None else f"; default {format_default(field.default)}"
            text = f"{field.description} [{variable}{default}]"
            alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if field.annotation is bool else {}
            command = click.option(*names, metavar=_metavar(field), help=text, **alone)(command)
        return command

    return decorate


def given(options: Mapping[str, str | None]) -> dict[str, str]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def choices(field: FieldInfo) -> Sequence[object]:
    """The values of a setting that has few; empty for others."""
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    return list(type(field.default)) if isinstance(field.default, StrEnum) else ()


def _metavar(field: FieldInfo) -> str:
    if few := choices(field):
        return "|".join(map(str, few))
    names: dict[object, str] = {timedelta: "TIME", bool: "true|false", int: "NUMBER", float: "NUMBER"}
    return names.get(field.annotation, "TEXT")


def format_default(default: object) -> str:
    """Format a default value as it is typed."""
    if isinstance(default, bool):
        return str(default).lower()
    if not isinstance(default, timedelta):
        return f"{default:g}" if isinstance(default, float) else str(default)
    seconds = default.total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"
