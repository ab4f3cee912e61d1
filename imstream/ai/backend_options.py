"""The options of one AI backend: its address, the form of its requests, and its time limits.

Those of a single backend are the settings `IMSTREAM_AI_…`, one to one. A value `env:NAME` of a header or a parameter
stands for the environment variable of that name, `file:PATH` for the content of that file.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.request import getproxies_environment, proxy_bypass

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, Secret, SecretStr
from yarl import URL

from imstream import option_types
from imstream.errors import SettingsError
from imstream.settings import Settings
from imstream.settings_group import ENV_FILE, ENV_PREFIX, HttpUrl, Positive, read_secret
from imstream.urls import MIN_SECRET

_REFERENCE = re.compile(r"env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|file:(?P<file>.+)")
_CREDENTIAL = re.compile(r"auth|cookie|key|password|secret|signature|token", re.IGNORECASE)

T = TypeVar("T", bound=JsonValue)


def _default(option: str) -> Any:  # noqa: ANN401 - the default of any setting
    return Settings.model_fields[f"ai_{option}"].default


class BackendOptions(BaseModel):
    """The options of one backend. The settings describe them and have the same defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    priority: Annotated[int, Field(ge=0)] = 0
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    concurrency: Annotated[int, Field(ge=1)] | None = None
    context_tokens: Annotated[int, Field(ge=256)] | None = None
    answer_tokens: Annotated[int, Field(ge=1)] | None = None
    url: HttpUrl = _default("url")
    model: Annotated[str, Field(min_length=1)] = _default("model")
    key: SecretStr | None = _default("key")
    headers: option_types.Headers | None = _default("headers")
    body: option_types.Parameters | None = _default("body")
    proxy: option_types.ProxyOption | None = _default("proxy")
    usage: option_types.UsageOption = _default("usage")
    max_tokens: option_types.MaxTokensOption = _default("max_tokens")
    roles: option_types.RolesOption = _default("roles")
    system: option_types.SystemOption = _default("system")
    reasoning: option_types.ReasoningOption = _default("reasoning")
    continues: option_types.ContinueOption = Field(_default("continue"), alias="continue")
    connect_timeout: Positive = _default("connect_timeout")
    first_token_timeout: Positive = _default("first_token_timeout")
    load_timeout: Positive | None = _default("load_timeout")
    queue_timeout: Positive = _default("queue_timeout")
    idle_timeout: Positive = _default("idle_timeout")
    total_timeout: Positive = _default("total_timeout")
    _file: Path | None = PrivateAttr(None)
    _key_option: str = PrivateAttr("key_env")

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The options of the single backend."""
        names = [field.alias or name for name, field in cls.model_fields.items()]
        return cls(**{name: getattr(settings, f"ai_{name}") for name in names if hasattr(settings, f"ai_{name}")})

    def named_in(self, file: Path, key_option: str = "key_env") -> Self:
        """These options, with a file, and the option in it that names the key, for errors."""
        self._file, self._key_option = file, key_option
        return self

    def variable(self, option: str) -> str:
        """The setting of an option, or its place in the file, for errors."""
        if self._file is None:
            return f"{ENV_PREFIX}AI_{option}".upper()
        return f"{self._file}, backend {self.name}, {self._key_option if option == 'key' else option}"

    def answer_limit(self, settings: Settings) -> int:
        """Tokens of the longest answer."""
        return self.answer_tokens or settings.answer_tokens

    def prompt_limit(self, settings: Settings) -> int:
        """Tokens of the longest prompt that it takes."""
        return (self.context_tokens or settings.context_tokens) - self.answer_limit(settings)

    def proxy_for(self, url: URL) -> URL | None:
        """The proxy of requests to this URL. With `env`, that of the environment (`HTTPS_PROXY`, `NO_PROXY`, …)."""
        if self.proxy is None:
            return None
        address = self.proxy.get_secret_value()
        if address == "env":
            proxies = getproxies_environment()
            address = proxies.get(url.scheme) or proxies.get("all") or ""
            if not address or proxy_bypass(f"{url.host}:{url.port}"):
                return None
        try:
            proxy = URL(address if "//" in address else f"http://{address}")
        except ValueError:
            proxy = URL()
        if proxy.scheme not in {"http", "https"} or not proxy.host:
            which = "the proxy that the environment names" if str(self.proxy) == "env" else "it"
            shown = f"{self.variable('proxy')}={str(self.proxy)!r}"
            raise SettingsError(f"{shown} is not allowed: {which} must be an HTTP proxy with a host")
        return proxy


def resolve_headers(headers: Secret[dict[str, str]] | None, *, option: str) -> tuple[dict[str, str], list[str]]:
    """Return the headers with the values of variables and files, and which of their values are secret.

    Raises `SettingsError`, naming the option, for a variable that is not set, a file without a value, or a value that
    fits in no header.
    """
    resolved, secrets = dict[str, str](), list[str]()
    for name, value in (headers.get_secret_value() if headers is not None else {}).items():
        resolved[name] = _resolve(value, option, secrets).strip()
        if not option_types.fits_in_header(resolved[name]):
            raise _rejected(option, f"the header {name} must be printable ASCII")
        if _CREDENTIAL.search(name):
            # Of `Bearer x`, also x alone.
            found = (resolved[name], resolved[name].rpartition(" ")[2])
            secrets += (text for text in found if len(text) >= MIN_SECRET)
    return resolved, secrets


def resolve_parameters(
    body: Secret[dict[str, JsonValue]] | None, *, option: str
) -> tuple[dict[str, JsonValue], list[str]]:
    """Return the parameters with the values of variables and files, and these values, which are secret.

    Raises `SettingsError`, naming the option, for a variable that is not set, or a file without a value.
    """
    secrets = list[str]()
    return _resolve(body.get_secret_value() if body is not None else {}, option, secrets), secrets


def _resolve(value: T, option: str, secrets: list[str]) -> T:
    resolved: JsonValue = value
    if isinstance(value, str) and (reference := _REFERENCE.fullmatch(value)):
        file = reference["file"]
        resolved = read_secret(option, file) if file else environment().get(reference["name"], "").strip()
        if not resolved:
            raise _rejected(option, f"the environment variable {reference['name']}, which it names, is not set")
        secrets.append(resolved)
    elif isinstance(value, dict):
        resolved = {name: _resolve(member, option, secrets) for name, member in value.items()}
    elif isinstance(value, list):
        resolved = [_resolve(member, option, secrets) for member in value]
    return resolved  # type: ignore[return-value]


def environment() -> Mapping[str, str]:
    """The environment, and below it the file of the settings."""
    try:
        file = dotenv_values(ENV_FILE, interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        file = {}
    return {**{name: value for name, value in file.items() if value is not None}, **os.environ}


def _rejected(option: str, why: str) -> SettingsError:
    return SettingsError(f"{option}=(hidden) is not allowed: {why}")
