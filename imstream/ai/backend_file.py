"""The file of several backends: TOML with a table `[[backend]]` for each, whose keys are the options of a backend."""

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from imstream.ai.backend_options import BackendOptions, environment
from imstream.errors import SettingsError
from imstream.settings import Settings
from imstream.settings_group import read_secret, show_value

_FIELDS = {field.alias or name: field for name, field in BackendOptions.model_fields.items()}
_REQUIRED = ("name", "url", "model")
_KEY_OPTIONS = ("key_env", "key_file")
_KEYS = [*(key for key in _FIELDS if key != "key"), *_KEY_OPTIONS]
_MIN_PROMPT = 64  # tokens
_VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")


def ignored_settings(settings: Settings) -> list[str]:
    """The settings of the single backend that are set although there is a file."""
    return sorted(map(Settings.variable, {f"ai_{key}" for key in _FIELDS} & settings.model_fields_set))


def read_backends(path: Path, settings: Settings) -> list[BackendOptions]:
    """Read the file. Raises `SettingsError`: a line for each mistake, with table, key and allowed values."""
    tables = _read_tables(path)
    backends, mistakes = dict[str, BackendOptions](), list[str]()
    for number, table in enumerate(tables, 1):
        options, found = _parse(table, path, settings)
        if options is not None and backends.setdefault(options.name, options) is not options:
            found.append("name: an earlier backend has the same")
        mistakes += [f"{path}: backend {number} ({table.get('name', 'without a name')}): {one}" for one in found]
    largest = max((options.prompt_limit(settings) for options in backends.values()), default=0)
    if not mistakes and largest < settings.context_tokens - settings.answer_tokens:
        shown = f"{Settings.variable('context_tokens')}={settings.context_tokens} is not allowed"
        mistakes = [f"{shown}: no backend in {path} takes such prompts; at most {largest + settings.answer_tokens}"]
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return list(backends.values())


def _read_tables(path: Path) -> list[dict[str, Any]]:
    try:
        document = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{Settings.variable('ai_backends')}={path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8
        raise SettingsError(f"{path} is not TOML: {error}") from None
    tables = document.pop("backend", None)
    if document or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        found = f"{next(iter(document))} is unknown" if document else "it has none"
        raise SettingsError(f"{path} must have a table [[backend]] for each backend, and nothing else: {found}")
    return tables


def _parse(table: dict[str, Any], path: Path, settings: Settings) -> tuple[BackendOptions | None, list[str]]:
    """The options of one backend, if its table is valid, and its mistakes."""
    mistakes = [f"{key} is unknown; allowed are {', '.join(_KEYS)}" for key in table if key not in _KEYS]
    mistakes += [f"{key} is missing" for key in _REQUIRED if key not in table]
    values = {key: value for key, value in table.items() if key in _KEYS}
    of_key = [name for name in _KEY_OPTIONS if name in values]
    if len(of_key) > 1:
        mistakes.append(f"{' and '.join(of_key)} are both given: remove one of them")
    if (file := values.pop("key_file", None)) is not None:
        try:
            values["key"] = read_secret("key_file", str(file))
        except SettingsError as error:
            mistakes.append(str(error))
    if (variable := values.pop("key_env", None)) is not None:
        values["key"] = environment().get(str(variable), "").strip()
        if not values["key"]:
            shown = repr(variable) if _VARIABLE.fullmatch(str(variable)) else "(hidden)"  # it may be the key itself
            mistakes.append(f"key_env={shown} is not allowed: must name an environment variable that is set")
    try:
        options = BackendOptions.model_validate(values).named_in(path, *of_key[:1])
    except ValidationError as error:
        for one in error.errors():
            key, allowed = str(one["loc"][0]), one["msg"].removeprefix("Value error, ")
            mistakes.append(f"{key}={show_value(_FIELDS[key], one['input'])} is not allowed: {allowed}")
        return None, mistakes
    if options.prompt_limit(settings) < _MIN_PROMPT:
        mistakes.append(f"context_tokens: they leave too few for a prompt; at least {_MIN_PROMPT} beside answer_tokens")
    return options, mistakes
