"""Notes about the settings at start-up: the file they were read from, its permissions, and unknown names."""

import os
import stat
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

import structlog
from dotenv import dotenv_values

from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.options import ChatSettings
from imstream.cli.up import UpSettings
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.private_files import others_can_write
from imstream.settings import Settings
from imstream.settings_group import ENV_FILE, ENV_PREFIX, is_secret, open_secret_warning
from imstream.urls import redact_url

_GROUPS = (Settings, UpSettings, EmbeddedSettings, DemoSettings, LocalAISettings, ChatSettings)
_FIELDS = {group.variable(name): field for group in _GROUPS for name, field in group.model_fields.items()}
_SECRET_FILES = {name for group in _GROUPS for name in group.file_variables()}
_KNOWN = {name.removeprefix(ENV_PREFIX) for name in (*_FIELDS, *_SECRET_FILES)}

_MAX_NAME = 64
_MAX_UNKNOWN = 10  # maximum number of unknown names that are listed; more are only counted

log = structlog.get_logger()


def check() -> tuple[Path | None, list[str]]:
    """The file that settings are read from, if any, and warnings about it and about unknown names."""
    unknown = [(name, "") for name in _unknown(os.environ)]
    found: Path | None = None
    warnings = [*_secret_file_warnings(os.environ)]
    try:
        if (file := Path(ENV_FILE).absolute()).is_file():
            values = dotenv_values(file, interpolate=False, encoding="utf-8-sig")
            warnings += [*_file_warnings(file, values), *_secret_file_warnings(values)]
            unknown += [(name, f" in {ENV_FILE}") for name in _unknown(values)]
            found = file
    except (OSError, UnicodeDecodeError):
        pass  # reported when the settings are loaded
    warnings += [_hint(*one) for one in unknown[:_MAX_UNKNOWN]]
    if (more := len(unknown) - _MAX_UNKNOWN) > 0:
        warnings.append(f"{more} more variables that begin with {ENV_PREFIX} are not settings")
    return found, warnings


def log_notes() -> None:
    """Log the file and the warnings, for a node."""
    file, warnings = check()
    if file:
        log.info("settings read", file=str(file))
    for warning in warnings:
        log.warning(warning)


def _file_warnings(file: Path, values: Mapping[str, str | None]) -> Iterator[str]:
    if problem := others_can_write(file):
        yield f"{file} {problem}, who can change every setting"
    has_secrets = any(_is_secret(name.upper(), value or "") for name, value in values.items())
    if has_secrets and file.stat().st_mode & stat.S_IROTH:
        yield f"{file} holds secrets and can be read by other users: chmod 600 {file}"


def _secret_file_warnings(values: Mapping[str, str | None]) -> Iterator[str]:
    for name, file in values.items():
        if name.upper() in _SECRET_FILES and (warning := open_secret_warning(name.upper(), (file or "").strip())):
            yield warning


def _is_secret(name: str, value: str) -> bool:
    field = _FIELDS.get(name)
    return field is not None and value != "" and (is_secret(field) or redact_url(value) != value)


def _unknown(names: Mapping[str, str | None]) -> Iterator[str]:
    for name in names:
        setting = name.upper()  # settings are not case-sensitive
        if setting.startswith(ENV_PREFIX) and setting.removeprefix(ENV_PREFIX) not in _KNOWN:
            yield name


def _hint(name: str, where: str) -> str:
    shown = name[:_MAX_NAME]  # the cost of a comparison grows with the square of the length
    nearest = get_close_matches(shown.upper().removeprefix(ENV_PREFIX), _KNOWN, n=1)
    hint = f"; did you mean {ENV_PREFIX}{nearest[0]}?" if nearest else ""
    return f"{ascii(shown)[1:-1]}{where} is not a setting{hint}"
