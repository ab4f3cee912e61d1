"""One settings object: every option of every command, read from `IMSTREAM_*`, `.env` or the command line."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from imstream.errors import SettingsError
from imstream.urls import SecretUrl, valid_redis_url, without_password

ENV_PREFIX = "IMSTREAM_"

MIN_PAGE_TOKEN = 16

ENV_FILE = ".env"
"""The file in the working directory that settings are read from."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>ms|s|m|h|d)?")


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


def _valid_http_url(url: SecretUrl) -> SecretUrl:
    if not url.get_secret_value().startswith(("http://", "https://")):
        raise ValueError("an address that begins with http:// or https://")
    return url


def _unset_when_empty(value: object) -> object:
    """An empty value counts as unset; spaces and line ends around a value are no part of it."""
    return value.strip() or None if isinstance(value, str) else value


def _valid_page_token(token: SecretStr) -> SecretStr:
    stripped = token.get_secret_value().strip()
    if len(stripped) < MIN_PAGE_TOKEN:
        raise ValueError(f"at least {MIN_PAGE_TOKEN} characters")
    return SecretStr(stripped)


def valid_zone(name: str) -> str:
    """The name of a time zone that there is."""
    try:
        return ZoneInfo(name).key
    except (KeyError, ValueError, OSError):  # not there; no name but a path; a folder
        raise ValueError("a time zone such as UTC, Asia/Shanghai or Europe/Berlin") from None


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Positive = Annotated[Duration, Field(gt=timedelta(0))]


def is_secret(field: FieldInfo) -> bool:
    """Whether nothing of a setting may be shown. An address may be, without its user and password."""
    return SecretStr.__name__ in str(field.annotation)


def _show(value: object) -> str:
    return f"{value.total_seconds():g}s" if isinstance(value, timedelta) else repr(value)


class SettingsGroup(BaseSettings):
    """Settings that are read together. Every group shares `.env`; each has its own prefix of names."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_file=ENV_FILE,
        env_file_encoding="utf-8-sig",  # Windows editors begin UTF-8 with a mark that would be part of the first name
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable of a field."""
        return f"{cls.model_config.get('env_prefix', '')}{field}".upper()

    @classmethod
    def load(cls, **given: Any) -> Self:  # noqa: ANN401 - any setting may be given
        """Read the settings; what is given wins over the environment, that over `.env`, that over the default.

        Raises:
            SettingsError: A value is wrong; the text has one line for each: setting, value, what is allowed. Or `.env`
                cannot be read.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError("\n".join(cls._explain(line) for line in error.errors())) from None
        except UnicodeDecodeError:
            raise SettingsError(f"{ENV_FILE} in the working directory cannot be read: it is not UTF-8") from None
        except OSError as error:
            raise SettingsError(f"{error.filename or ENV_FILE} cannot be read: {error.strerror}") from None

    @classmethod
    def _explain(cls, error: Any) -> str:  # noqa: ANN401 - pydantic's error details
        name = str(error["loc"][0]) if error["loc"] else "?"
        field = cls.model_fields.get(name)
        # What may hold a password and is no text is shown by nobody who knows where it is.
        address = field is not None and (not field.repr or SecretUrl.__name__ in str(field.annotation))
        secret = field is not None and (is_secret(field) or (address and not isinstance(error["input"], str)))
        shown = "(hidden)" if secret else without_password(_show(error["input"]))
        allowed = error["msg"].removeprefix("Value error, ")
        return f"{cls.variable(name)}={shown} is not allowed: {allowed}"


def _beats_often_enough(heartbeat: timedelta, info: ValidationInfo) -> timedelta:
    """One heartbeat may be lost; the second that is missing closes the socket."""
    idle: timedelta | None = info.data.get("idle_timeout")  # None: it is wrong itself, and said to be
    if idle is not None and idle <= 2 * heartbeat:
        raise ValueError(f"less than half of {ENV_PREFIX}IDLE_TIMEOUT, which is {_show(idle)}")
    return heartbeat


class Settings(SettingsGroup):
    """What can be set. The environment variable is `IMSTREAM_` and the name in capitals."""

    node: str = Field("0", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Id of this node, unique among all nodes.")
    host: str = Field("127.0.0.1", description="Address the node listens on; :: is every address, IPv4 too.")
    port: int = Field(8080, ge=0, le=65535, description="Port the node listens on; 0 takes a free one.")

    redis_url: Annotated[SecretUrl, AfterValidator(valid_redis_url)] = Field(
        SecretUrl("redis://127.0.0.1:6390/0?password_file=.imstream/redis/password"),
        description="Redis or Valkey, 6.2 or newer: one server, Sentinel or Cluster.",
    )
    redis_timeout: Positive = Field(timedelta(seconds=2), description="Time limit of one Redis round trip.")
    redis_connections: int = Field(4, ge=1, le=64, description="Connections that carry the node's Redis commands.")
    key_prefix: str = Field("im", pattern=r"^[A-Za-z0-9._-]{1,32}$", description="What every Redis key starts with.")

    ai_url: Annotated[SecretUrl, AfterValidator(_valid_http_url)] = Field(
        SecretUrl("http://127.0.0.1:8090/v1"), description="OpenAI-compatible base URL, ending in /v1."
    )
    ai_model: str = Field("demo", min_length=1, description="Model that is asked for.")
    ai_key: SecretStr | None = Field(None, description="Key sent to the AI backend as a bearer token.")
    ai_connect_timeout: Positive = Field(timedelta(seconds=5), description="Time limit to connect to the backend.")
    ai_first_token_timeout: Positive = Field(timedelta(seconds=60), description="Time limit to the first token.")
    ai_idle_timeout: Positive = Field(timedelta(seconds=30), description="Longest silence between tokens.")
    ai_total_timeout: Positive = Field(timedelta(minutes=15), description="Time limit of one whole answer.")

    max_answer: int = Field(262_144, ge=1, description="Maximum characters of an answer; it ends there (`length`).")
    ai_breaker_failures: int = Field(10, ge=1, description="Failed AI calls in a row after which intake pauses.")
    ai_breaker_pause: Positive = Field(timedelta(seconds=2), description="First such pause; it doubles.")

    queue_limit: int = Field(100, ge=1, description="Most unfinished requests of this node; more are told BUSY.")
    user_limit: int = Field(4, ge=1, description="Most unfinished requests of one user on this node.")
    concurrency: int = Field(64, ge=1, description="Most requests this node works on at once.")
    max_attempts: int = Field(4, ge=1, description="AI calls tried for one request before it is given up.")
    max_deliveries: int = Field(3, ge=1, description="Times a request may die with its worker before it is given up.")
    retry_wait: Positive = Field(timedelta(milliseconds=500), description="First wait before a retry; it doubles.")
    retry_wait_max: Positive = Field(timedelta(seconds=30), description="Longest wait before a retry.")
    retry_window: Positive = Field(timedelta(minutes=3), description="No new attempt this long after the first one.")

    reply_ttl: Positive = Field(timedelta(minutes=15), description="How long a reply is kept after its last append.")
    queued_ttl: Positive = Field(timedelta(days=1), description="How long the reply of a waiting request is kept.")
    flush_interval: Positive = Field(
        timedelta(milliseconds=100),
        description="Time between two reply stream appends; three times that if no other node has sockets of the user.",
    )
    read_block: Positive = Field(timedelta(seconds=1), description="How long one read of the requests stream blocks.")
    sweep_interval: Positive = Field(
        timedelta(seconds=5), description="Time between two looks for pending requests that slipped through."
    )

    lease: Positive = Field(
        timedelta(seconds=10), description="How long a node counts as alive after its last sign of life."
    )
    retire_after: Positive = Field(
        timedelta(hours=1), description="How long a dead node without requests stays in the directory."
    )
    auth: Literal["none", "jwt"] = Field(
        "none", description="How users show who they are; none: a node listens on loopback only."
    )
    auth_algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = Field(
        "HS256", description="The one algorithm that tokens may be signed with."
    )
    auth_secret: SecretStr | None = Field(None, description="Secret of HS256, at least 32 bytes.")
    auth_public_key: Annotated[Path | None, BeforeValidator(_unset_when_empty)] = Field(
        None, description="PEM file with the public key of the other algorithms."
    )
    auth_jwks_url: Annotated[
        Annotated[SecretUrl, AfterValidator(_valid_http_url)] | None, BeforeValidator(_unset_when_empty)
    ] = Field(None, description="URL of a JSON Web Key Set with the public keys; https, or http on loopback.")
    auth_jwks_allow_http: bool = Field(
        default=False, description="Fetch the key set over unencrypted http from other machines too."
    )
    auth_keys_max_age: Annotated[Duration, Field(ge=timedelta(seconds=1))] = Field(
        timedelta(hours=1), description="How long a key set is used after it was last fetched."
    )
    auth_claim: str = Field("sub", min_length=1, description="Claim of the token that is the user id.")
    auth_issuer: Annotated[str | None, BeforeValidator(_unset_when_empty)] = Field(
        None, description="What the token's iss must be; empty: anything."
    )
    auth_audience: Annotated[str | None, BeforeValidator(_unset_when_empty)] = Field(
        None, description="What the token's aud must be, or contain; empty: the token must have none."
    )
    auth_max_lifetime: Positive = Field(
        timedelta(days=1), description="Maximum time from a token's iat, or from now, to its exp."
    )
    auth_leeway: Duration = Field(timedelta(seconds=5), description="How far clocks may differ at exp and nbf.")
    auth_warning: Positive = Field(
        timedelta(seconds=30), description="How long before a token ends its client is asked for a new one."
    )
    allow_insecure: bool = Field(
        default=False, description="Listen beyond loopback although anybody may claim to be anybody."
    )
    origins: str = Field(
        "same", description="Pages that may open sockets, with commas: same (host), null (from disk), *, or origins."
    )

    page_token: Annotated[
        Annotated[SecretStr, AfterValidator(_valid_page_token)] | None, BeforeValidator(_unset_when_empty)
    ] = Field(
        None, description="Token that pages of the origin null must show where auth is none; at least 16 characters."
    )

    sessions: Literal["many", "one"] = Field(
        "many", description="Sockets a user may have; one: the newest wins, the older is closed (4502)."
    )

    max_frame: int = Field(
        65536, ge=1024, description="Largest WebSocket message in bytes, before INIT 16384 at most; more closes 1009."
    )
    init_timeout: Positive = Field(timedelta(seconds=10), description="Time a new socket has to send INIT.")
    idle_timeout: Positive = Field(timedelta(seconds=75), description="Silence after which a socket is closed (4001).")
    stall_timeout: Positive = Field(
        timedelta(seconds=10), description="How long a socket may refuse to read before it is closed (4002)."
    )
    handshake_timeout: Positive = Field(
        timedelta(seconds=10), description="Time a connection has to ask for something."
    )
    heartbeat: Annotated[Positive, AfterValidator(_beats_often_enough)] = Field(
        timedelta(seconds=25), description="How often clients are asked to be heard of."
    )
    max_depth: int = Field(8, ge=4, description="Deepest nesting of a frame's JSON.")
    max_history: int = Field(200, ge=0, description="Most turns in the history of one message.")
    frame_rate: int = Field(
        50, ge=0, description="Frames a socket may send each second, each up to 4 KiB or 1 ms of CPU; 0: any number."
    )
    frame_burst: int = Field(200, ge=1, description="Frames a socket may send at once.")
    chats_per_minute: int = Field(
        60, ge=0, description="Messages a user may ask each minute on a node, on average; 0: any number."
    )
    user_sockets: int = Field(16, ge=1, description="Sockets a user may have on a node; more are closed (4504).")
    node_sockets: int = Field(10_000, ge=1, description="Sockets a node may have; more are closed (1013).")

    daily_quota: int = Field(0, ge=0, description="Messages a user may ask each day; 0: any number.")
    quota_timezone: Annotated[str, AfterValidator(valid_zone)] = Field(
        "UTC", description="Time zone in which such a day begins, such as Asia/Shanghai."
    )
    violation_window: Positive = Field(
        timedelta(minutes=10), description="Time without a refused content after which those before are forgotten."
    )
    lock_after: int = Field(3, ge=0, description="Refused contents after which a user is locked; 0: never.")
    lock_time: Positive = Field(timedelta(hours=1), description="How long such a user is locked.")
    ban_after: int = Field(10, ge=0, description="Refused contents after which a user is banned; 0: never.")

    words: Path | None = Field(None, description="File of words that are not wanted, one a line.")
    words_action: Literal["refuse", "mask"] = Field("refuse", description="What becomes of a text with such a word.")
    moderation_url: Annotated[SecretUrl, AfterValidator(_valid_http_url)] | None = Field(
        None, description="OpenAI-compatible base URL that moderates messages, ending in /v1."
    )
    moderation_key: SecretStr | None = Field(None, description="Key sent there as a bearer token.")
    moderation_model: str = Field("omni-moderation-latest", min_length=1, description="Model that is asked for there.")
    moderation_timeout: Positive = Field(timedelta(seconds=3), description="Time limit of one moderation.")
    moderation_fail: Literal["open", "closed"] = Field(
        "closed", description="Without moderation, messages are asked (open), or wait and fail (closed)."
    )
    moderation_history: Literal["none", "assistant", "all"] = Field(
        "assistant",
        description="Turns of the history that are moderated too: those claimed to be the model's, all, none.",
    )
    moderation_batch: int = Field(32, ge=1, description="Most messages moderated in one call.")

    system_prompt: str | None = Field(None, description="What the model is told first; {user}, {date}, {language}.")
    system_prompt_file: Path | None = Field(None, description="File with the system prompt, instead.")
    prompt_template: str = Field(
        "{contents}", description="What a message is put into; the system prompt's, {contents}."
    )
    allow_system_role: bool = Field(default=False, description="Take turns with the role system from clients.")
    context_tokens: int = Field(8192, ge=256, description="Tokens of the model's context.")
    answer_tokens: int = Field(1024, ge=1, description="Tokens of it that are kept free for the answer.")
    tokenizer: Path | None = Field(None, description="The model's tokenizer.json; without it tokens are estimated.")
    history: Literal["drop", "summarise"] = Field(
        "drop", description="What becomes of the oldest turns when the context is full."
    )
    drain_grace: Positive = Field(timedelta(seconds=30), description="Time running answers get to end on SIGTERM.")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="How logs look; auto: console in a terminal, JSON elsewhere."
    )
