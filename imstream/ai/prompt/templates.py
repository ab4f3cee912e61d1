"""Texts with variables, as an operator writes them: `{user}` stands for a value, `{{` and `}}` for a brace.

What fills a variable is never looked at: braces in it are braces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from zoneinfo import ZoneInfo

from imstream.errors import SettingsError
from imstream.settings import Settings

CONTENTS = "contents"
"""The variable that is what a person wrote."""

_PART = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])")


class Template:
    """A text with variables."""

    def __init__(self, text: str, variables: Sequence[str], *, setting: str) -> None:
        """Read it.

        Args:
            text: The text.
            variables: The names that it may use.
            setting: The setting that it stands in.

        Raises:
            SettingsError: It uses another name, or a brace stands alone.
        """
        allowed = f"the variables are {', '.join(f'{{{name}}}' for name in variables)}; a brace is written {{{{ or }}}}"
        self._parts: list[tuple[str, str]] = []
        """Text, and the name of the variable after it."""
        before, end = "", 0
        for part in _PART.finditer(text):
            before += text[end : part.start()]
            end = part.end()
            if part["brace"]:
                before += part["brace"][0]
            elif part["name"] in variables:
                self._parts.append((before, part["name"]))
                before = ""
            else:
                line = text.count("\n", 0, part.start()) + 1
                raise SettingsError(f"{setting} is not allowed: {part[0]} in line {line}: {allowed}")
        self._rest = before + text[end:]

    @property
    def names(self) -> frozenset[str]:
        """The variables that it uses."""
        return frozenset(name for _, name in self._parts)

    def fill(self, values: Mapping[str, str]) -> str:
        """The text, with these values."""
        return "".join([part for before, name in self._parts for part in (before, values[name])] + [self._rest])


def system_prompt(settings: Settings, variables: Sequence[str]) -> Template | None:
    """What the model is told first; None: nothing.

    Raises:
        SettingsError: It is set twice, its file cannot be read, or it uses another variable.
    """
    text, file = settings.system_prompt, settings.system_prompt_file
    if file is None:
        return Template(text, variables, setting=Settings.variable("system_prompt")) if text else None
    setting = f"{Settings.variable('system_prompt_file')}={str(file)!r}"
    if text:
        raise SettingsError(f"{setting} is not allowed: {Settings.variable('system_prompt')} is set too, choose one")
    try:
        text = file.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{setting} is not allowed: it cannot be read: {why}") from None
    return Template(text, variables, setting=setting) if text else None


def message_template(settings: Settings, variables: Sequence[str]) -> Template:
    """What a message is put into.

    Raises:
        SettingsError: It uses another variable, or has no place for the message.
    """
    setting = Settings.variable("prompt_template")
    template = Template(settings.prompt_template, (CONTENTS, *variables), setting=setting)
    if CONTENTS not in template.names:
        raise SettingsError(f"{setting} is not allowed: {{{CONTENTS}}} must stand in it")
    return template


def time_zone(settings: Settings) -> ZoneInfo:
    """Where `{date}` is: where the day of the quota begins.

    Raises:
        SettingsError: There is no such time zone.
    """
    try:
        return ZoneInfo(settings.quota_timezone)
    except (KeyError, OSError, ValueError):  # unknown; a folder of the database; no name at all
        setting = f"{Settings.variable('quota_timezone')}={settings.quota_timezone!r}"
        raise SettingsError(f"{setting} is not allowed: must be a time zone such as Asia/Shanghai") from None
