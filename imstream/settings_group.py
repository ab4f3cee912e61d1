"""Groups of settings: read from the environment, `.env` and files of secrets, with errors that hide the secrets."""

import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self

import structlog
from pydantic import AfterValidator, BeforeValidator, Field, Secret, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from imstream.errors import SettingsError
from imstream.urls import SecretUrl, redact_url

ENV_PREFIX = "IMSTREAM_"
FILE_SUFFIX = "_FILE"
ENV_FILE = ".env"  # file in the working directory that settings are read from
_OF_CONTAINERS = "/run/secrets/"  # where containers find their secrets, readable for every user; there are no others

_SECRET = re.compile(rf"\b({Secret.__name__}|{SecretStr.__name__})\b")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>ms|s|m|h|d)?")

log = structlog.get_logger()


def parse_duration(value: object) -> object:
    """Read `250ms`, `30s`, `15m`, `1h`, `1d` or a plain number of seconds as a time span."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError("a time span such as 250ms, 30s, 15m, 1h or 1d")
        value = float(match["number"]) * _UNITS[match["unit"] or "s"]
    if not isinstance(value, int | float):
        return value
    try:
        return timedelta(seconds=value)
    except OverflowError:
        raise ValueError("a shorter time span") from None


def _validate_http_url(url: SecretUrl) -> SecretUrl:
    if not url.get_secret_value().startswith(("http://", "https://")):
        raise ValueError("an address that begins with http:// or https://")
    return url


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Positive = Annotated[Duration, Field(gt=timedelta(0))]
HttpUrl = Annotated[SecretUrl, AfterValidator(_validate_http_url)]


def is_secret(field: FieldInfo) -> bool:
    """Whether no part of the value may be shown. URLs may be, without user and password."""
    return _SECRET.search(str(field.annotation)) is not None


def read_secret(variable: str, file: str) -> str:
    """Read a secret, as `_read_secret`; log a warning if other users can read it."""
    value = _read_secret(variable, file)
    if warning := open_secret_warning(variable, file):
        log.warning(warning)
    return value


def open_secret_warning(variable: str, file: str) -> str | None:
    """The warning about the file of a secret, if it exists and other users can read it."""
    with suppress(OSError, ValueError):
        if file and not file.startswith(_OF_CONTAINERS) and Path(file).stat().st_mode & stat.S_IROTH:
            return f"{variable}: {file} can be read by other users of this machine"
    return None


def _read_secret(variable: str, file: str) -> str:
    """Read a secret. Raises `SettingsError` that does not show `file`: it may be the secret itself, by mistake."""
    try:
        value = Path(file).read_text("utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{variable}: its file cannot be read: {getattr(error, 'strerror', 'not UTF-8')}") from None
    if not value:
        raise SettingsError(f"{variable}: its file is empty")
    return value


def format_value(value: object) -> str:
    """A value of any type; a time span in seconds."""
    return f"{value.total_seconds():g}s" if isinstance(value, timedelta) else repr(value)


def show_value(field: FieldInfo | None, value: object) -> str:
    """A value as errors show it."""
    # A URL of another type than text may hold a password in an unknown place: hide it.
    is_url = field is not None and (not field.repr or SecretUrl.__name__ in str(field.annotation))
    hidden = field is not None and (is_secret(field) or (is_url and not isinstance(value, str)))
    return "(hidden)" if hidden else redact_url(format_value(value))


class SettingsGroup(BaseSettings):
    """Settings that are read together. All groups share `.env`; each has its own prefix of variable names."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_file=ENV_FILE,
        env_file_encoding="utf-8-sig",  # Windows editors write a byte order mark
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,  # as descriptions that do not fit in the line
    )

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Remove blanks and line ends around values; an empty value of an optional setting is unset."""
        optional = {name for name, field in cls.model_fields.items() if field.default is None}
        tidy = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
        return {name: value for name, value in tidy.items() if not (name in optional and value == "")}

    @classmethod
    def variable(cls, field: str) -> str:
        """Return the environment variable of a field."""
        return f"{cls.model_config.get('env_prefix', '')}{field}".upper()

    @classmethod
    def file_variables(cls) -> dict[str, str]:
        """The variables that name files, each with the one whose value the file holds: secrets and URLs."""
        secret = [name for name, field in cls.model_fields.items() if Secret.__name__ in str(field.annotation)]
        return {f"{variable}{FILE_SUFFIX}": variable for variable in map(cls.variable, secret)}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - same
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the files that `IMSTREAM_…_FILE` names. Raises `SettingsError`."""
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource):  # both are
                source.env_vars = {**source.env_vars, **dict(cls._read_files(source.env_vars))}
        return init_settings, env_settings, dotenv_settings

    @classmethod
    def _read_files(cls, variables: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
        for of_file, variable in cls.file_variables().items():
            if file := (variables.get(of_file.lower()) or "").strip():
                if variables.get(variable.lower()):
                    raise SettingsError(f"{variable} and {of_file} are both set: remove one of them")
                yield variable.lower(), _read_secret(of_file, file)

    @classmethod
    def load(cls, **given: Any) -> Self:  # noqa: ANN401 - any setting may be given
        """Read the settings. Precedence: `given`, the environment, `.env`, the default.

        Raises:
            SettingsError: Values are invalid (one line each: setting, value, allowed values), or `.env` is unreadable.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError("\n".join(cls._describe(line) for line in error.errors())) from None
        except UnicodeDecodeError:
            raise SettingsError(f"{ENV_FILE} in the working directory cannot be read: it is not UTF-8") from None
        except OSError as error:
            raise SettingsError(f"{error.filename or ENV_FILE} cannot be read: {error.strerror}") from None

    @classmethod
    def _describe(cls, error: Any) -> str:  # noqa: ANN401 - pydantic's error details
        name = str(error["loc"][0]) if error["loc"] else "?"
        shown = show_value(cls.model_fields.get(name), error["input"])
        allowed = error["msg"].removeprefix("Value error, ")
        return f"{cls.variable(name)}={shown} is not allowed: {allowed}"
