"""The settings of a node, read from `IMSTREAM_*` environment variables, `.env` or command-line options."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo

from imstream import option_types
from imstream.errors import SettingsError
from imstream.settings_group import ENV_PREFIX, Duration, HttpUrl, Positive, SettingsGroup, format_value
from imstream.texts import DEFAULT_LANG, Lang
from imstream.urls import SecretUrl, is_loopback, validate_redis_url
from imstream.user_ids import UserIds

MIN_PAGE_TOKEN = 16

_LISTENER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<plus>\+?)(?P<port>[0-9]{1,5})")
_MAX_PORT = 65535


def validate_timezone(name: str) -> str:
    """Return the name of an existing time zone, or raise `ValueError`."""
    try:
        return ZoneInfo(name).key
    except (KeyError, ValueError, OSError):  # unknown; a path instead of a name; a directory
        raise ValueError("a time zone such as UTC, Asia/Shanghai or Europe/Berlin") from None


def _validate_metrics(value: str) -> str:
    found = _LISTENER.fullmatch(value)
    if value != "off" and (found is None or int(found["port"]) > _MAX_PORT):
        raise ValueError(
            "off, or a host and a port, such as 127.0.0.1:9100; as the port, +1000 is the node's plus 1000"
        )
    return value


def _validate_page_token(token: SecretStr) -> SecretStr:
    if len(token.get_secret_value()) < MIN_PAGE_TOKEN:
        raise ValueError(f"at least {MIN_PAGE_TOKEN} characters")
    return token


def _validate_heartbeat(heartbeat: timedelta, info: ValidationInfo) -> timedelta:
    """One heartbeat may be lost before the socket is closed."""
    idle: timedelta | None = info.data.get("idle_timeout")  # None: it is invalid itself, and reported
    if idle is not None and idle <= 2 * heartbeat:
        raise ValueError(f"less than half of {ENV_PREFIX}IDLE_TIMEOUT, which is {format_value(idle)}")
    return heartbeat


class Settings(SettingsGroup):
    """The settings of a node. The environment variable is `IMSTREAM_` and the name in capitals."""

    node: str = Field("0", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Id of this node, unique among all nodes.")
    host: str = Field("127.0.0.1", description="Address the node listens on; :: listens on every address, IPv4 too.")
    port: int = Field(8080, ge=0, le=65535, description="Port the node listens on; 0 chooses a free one.")

    redis_url: Annotated[SecretUrl, AfterValidator(validate_redis_url)] = SecretUrl(
        "redis://127.0.0.1:6390/0?password_file=.imstream/redis/password"
    )
    """Redis or Valkey, 6.2 or newer: one server, Sentinel or Cluster."""
    redis_timeout: Positive = Field(timedelta(seconds=2), description="Time limit of one Redis round trip.")
    redis_connections: int = Field(4, ge=1, le=64, description="Connections that carry the node's Redis commands.")
    key_prefix: str = Field("im", pattern=r"^[A-Za-z0-9._-]{1,32}$", description="Prefix of every Redis key.")

    ai_backends: Path | None = None
    """TOML file of several backends, instead of the settings of one; read again on SIGHUP."""
    ai_url: HttpUrl = Field(SecretUrl("http://127.0.0.1:8090/v1"), description="OpenAI-compatible base URL, with /v1.")
    ai_model: str = Field("demo", min_length=1, description="Model name sent to the AI backend.")
    ai_key: SecretStr | None = Field(None, description="API key of the AI backend, sent as a bearer token.")
    ai_headers: option_types.Headers | None = None
    """Additional headers of AI calls: a JSON object; `env:NAME` and `file:PATH` are replaced."""
    ai_body: option_types.Parameters | None = None
    """Additional parameters of AI calls, such as temperature: a JSON object, as above."""
    ai_proxy: option_types.ProxyOption | None = None
    """URL of an HTTP proxy for AI calls; env: that of HTTPS_PROXY, NO_PROXY and so on."""
    ai_usage: option_types.UsageOption = "auto"
    """Whether token counts are requested (stream_options); auto: unless the backend refuses it."""
    ai_max_tokens: option_types.MaxTokensOption = "none"
    """Name under which IMSTREAM_ANSWER_TOKENS is sent as the maximum of an answer; none: not sent."""
    ai_roles: option_types.RolesOption = "merge"
    """Turns are sent so that roles alternate, after one system message (merge), or as_is."""
    ai_system: option_types.SystemOption = "role"
    """Where the system prompt is sent: as a message of its own role, or before the user's text."""
    ai_reasoning: option_types.ReasoningOption = Field(
        "tags",
        description="Where reasoning is expected: in a field of its own (field), also in tags such as `<think>` at the "
        "beginning of the text (tags; open_tags: without the opening tag), or nowhere (none).",
    )
    ai_continue: option_types.ContinueOption = Field(
        "none",
        description="How an answer is continued: with its beginning as the last message (assistant), "
        "with the parameters of vLLM and SGLang (vllm), with `prefix` in that message (prefix), or not (none).",
    )
    ai_connect_timeout: Positive = Field(timedelta(seconds=5), description="Time limit for connecting to the backend.")
    ai_first_token_timeout: Positive = timedelta(seconds=60)
    """Maximum silence before the first token."""
    ai_load_timeout: Positive | None = Field(
        None,
        description="The same for a backend that has not answered for 4 minutes and may have to load its model; "
        "default: 5 times as long.",
    )
    ai_queue_timeout: Positive = timedelta(minutes=10)
    """Time limit for the first token while there are signs of life (comments)."""
    ai_idle_timeout: Positive = Field(timedelta(seconds=30), description="Maximum silence between tokens.")
    ai_total_timeout: Positive = Field(timedelta(minutes=15), description="Time limit of one whole answer.")
    rollup: Annotated[Duration, Field(ge=timedelta(0), le=timedelta(seconds=1))] = timedelta(milliseconds=40)
    """Maximum time for which a busy node leaves text of an answer unread; 0: off."""
    thinking: Literal["hide", "status", "show"] = Field(
        "status",
        description="Reasoning in frames to clients that request it: none (hide), only the state thinking (status), "
        "or also the reasoning (show).",
    )
    max_answer: int = Field(262_144, ge=1, description="Maximum characters of an answer; it is cut there (`length`).")
    ai_breaker_failures: int = Field(10, ge=1, description="Consecutive AI failures that open the circuit breaker.")
    ai_breaker_pause: Positive = Field(timedelta(seconds=2), description="First pause of the open breaker; it doubles.")

    queue_limit: int = Field(100, ge=1, description="Maximum unfinished requests of this node; more get BUSY.")
    user_limit: int = Field(4, ge=1, description="Maximum unfinished requests of one user on this node.")
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Maximum requests that this node answers at the same time; default: the sum of the backends' "
        "`concurrency`, and 64 for those without one.",
    )
    max_attempts: int = Field(4, ge=1)
    """Maximum attempts at one answer; waiting for a backend does not count."""
    max_deliveries: int = Field(3, ge=1, description="Worker deaths after which a request becomes a dead letter.")
    dead_age: Positive = Field(timedelta(days=7), description="How long dead letters are kept.")
    dead_bytes: int = Field(33_554_432, ge=0)
    """Bytes of Redis for a node's dead letters; more, or a full Redis, drops the oldest."""
    retry_wait: Positive = Field(timedelta(milliseconds=500), description="First wait before a retry; it doubles.")
    retry_wait_max: Positive = Field(timedelta(seconds=30), description="Maximum wait before a retry.")
    retry_window: Positive = timedelta(minutes=10)
    """How long a message waits for a backend that is away."""

    reply_ttl: Positive = Field(timedelta(minutes=15), description="How long a reply is kept after its last append.")
    queued_ttl: Positive = Field(timedelta(days=1), description="How long the reply of a waiting request is kept.")
    flush_interval: Positive = timedelta(milliseconds=100)
    """Time between two appends to a reply stream; tripled while no other node has sockets of the user."""
    read_block: Positive = Field(timedelta(seconds=1), description="How long one XREADGROUP blocks.")
    sweep_interval: Positive = Field(timedelta(seconds=5), description="Time between two sweeps for orphaned requests.")
    lease: Positive = Field(timedelta(seconds=10), description="How long a node counts as alive after a renewal.")
    retire_after: Positive = Field(timedelta(hours=1), description="How long a dead, idle node stays listed.")

    user_ids: UserIds = UserIds.NUMBER
    """Kind of user ids, the same on all nodes: numbers above 10000, or text of an identity provider."""
    auth: Literal["none", "jwt"] = Field("none", description="How users are authenticated; none: loopback only.")
    auth_algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = "HS256"
    """The only signature algorithm that is accepted."""
    auth_secret: SecretStr | None = Field(None, description="Secret of HS256, at least 32 bytes.")
    auth_public_key: Path | None = Field(None, description="PEM file with the public key of the other algorithms.")
    auth_jwks_url: HttpUrl | None = Field(None, description="URL of a key set (JWKS); https, or http on loopback.")
    auth_jwks_allow_http: bool = Field(default=False, description="Fetch the key set by http from other machines too.")
    auth_keys_max_age: Annotated[Duration, Field(ge=timedelta(seconds=1))] = timedelta(hours=1)
    """How long a key set is used after its last successful fetch."""
    auth_claim: str = Field("sub", min_length=1, description="Token claim that holds the user id.")
    auth_issuer: str | None = Field(None, description="Required iss of tokens; empty accepts any.")
    auth_audience: str | None = Field(None, description="Required aud of tokens; empty: they have none.")
    auth_max_lifetime: Positive = timedelta(days=1)
    """Maximum time from iat, or now, to exp of a token."""
    auth_leeway: Duration = Field(timedelta(seconds=5), description="Clock skew that exp and nbf tolerate.")
    auth_warning: Positive = Field(timedelta(seconds=30), description="How long before exp the client is warned.")
    allow_insecure: bool = Field(default=False, description="Listen beyond loopback without authentication.")
    origins: str = "same"
    """Origins that may open sockets, with commas: same (host), null (file), *, or origins."""
    page_token: Annotated[SecretStr, AfterValidator(_validate_page_token)] | None = None
    """Token that pages of the origin null must send with auth none; at least 16 characters."""

    language: Lang = Field(DEFAULT_LANG, description="Language of texts for clients that request none: zh or en.")
    sessions: Literal["many", "one"] = "many"
    """Sockets per user; one: a new login closes the older (4502)."""
    max_frame: int = Field(65536, ge=1024)
    """Maximum WebSocket message in bytes, 16384 before INIT; more closes with 1009."""
    init_timeout: Positive = Field(timedelta(seconds=10), description="Time limit for INIT on a new socket.")
    idle_timeout: Positive = Field(timedelta(seconds=75), description="Silence after which a socket is closed (4001).")
    stall_timeout: Positive = Field(timedelta(seconds=10), description="Time without reading before a close with 4002.")
    handshake_timeout: Positive = Field(timedelta(seconds=10), description="Time limit of a handshake or HTTP request.")
    heartbeat: Annotated[Positive, AfterValidator(_validate_heartbeat)] = timedelta(seconds=25)
    """Heartbeat interval announced to clients."""
    max_depth: int = Field(8, ge=4, description="Maximum nesting of a frame's JSON.")
    max_history: int = Field(200, ge=0, description="Maximum turns in the history of one message.")
    frame_rate: int = Field(50, ge=0)
    """Frames per second of a socket (4 KiB or 1 ms of CPU each); 0: unlimited."""
    frame_burst: int = Field(200, ge=1, description="Frames that a socket may send at once.")
    chats_per_minute: int = Field(60, ge=0, description="Messages per minute of a user on one node; 0 is unlimited.")
    user_sockets: int = Field(16, ge=1, description="Maximum sockets of a user on one node; more are closed (4504).")
    node_sockets: int = Field(10_000, ge=1, description="Maximum sockets of a node; more are closed (1013).")

    daily_quota: int = Field(0, ge=0, description="Messages of a user per day, on all nodes; 0 is unlimited.")
    quota_timezone: Annotated[str, AfterValidator(validate_timezone)] = "UTC"
    """Time zone of the quota's day."""
    violation_window: Positive = Field(timedelta(minutes=10), description="Time without violations that clears them.")
    lock_after: int = Field(3, ge=0, description="Violations after which an account is locked; 0: never.")
    lock_time: Positive = Field(timedelta(hours=1), description="How long such an account is locked.")
    ban_after: int = Field(10, ge=0, description="Violations after which an account is banned; 0: never.")

    words: Path | None = Field(None, description="File of unwanted words, one per line.")
    words_action: Literal["refuse", "mask"] = Field("refuse", description="Action on a text with such a word.")
    moderation_url: HttpUrl | None = Field(None, description="OpenAI-compatible base URL of a moderation service.")
    moderation_key: SecretStr | None = Field(None, description="Its API key, sent as a bearer token.")
    moderation_model: str = Field("omni-moderation-latest", min_length=1, description="Model name sent to it.")
    moderation_timeout: Positive = Field(timedelta(seconds=3), description="Time limit of one moderation call.")
    moderation_fail: Literal["open", "closed"] = "closed"
    """While moderation is unavailable, messages pass (open), or wait and fail (closed)."""
    moderation_history: Literal["none", "assistant", "all"] = "assistant"
    """History turns that are moderated too: those with the role assistant, all, none."""
    moderation_batch: int = Field(32, ge=1, description="Maximum messages in one moderation call.")

    system_prompt: str | None = Field(None, description="System prompt; may use {user}, {date}, {language}.")
    system_prompt_file: Path | None = Field(None, description="File with the system prompt.")
    prompt_template: str = "{contents}"
    """Template for the user message; may also use {user}, {date}, {language}."""
    allow_system_role: bool = Field(default=False, description="Accept history turns with the role system.")
    context_tokens: int = Field(8192, ge=256, description="Context length of the model in tokens.")
    answer_tokens: int = Field(1024, ge=1, description="Tokens of the context that are reserved for the answer.")
    tokenizer: Path | None = Field(None, description="The model's tokenizer.json; without it tokens are estimated.")
    history: Literal["drop", "summarise"] = Field("drop", description="Handling of turns beyond the context.")

    metrics: Annotated[str, AfterValidator(_validate_metrics)] | None = Field(
        None,
        description="Address of `/metrics`, such as `127.0.0.1:9100`, or `127.0.0.1:+1000` for the node's port plus "
        "1000; off: nowhere. Default: the node's own port, for this machine only, if the node listens on loopback.",
    )
    drain_grace: Positive = Field(timedelta(seconds=30), description="How long running answers may finish on SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Minimum level of log lines.")
    log_format: Literal["auto", "json", "console"] = "auto"
    """Format of log lines; auto is console in a terminal, JSON elsewhere."""

    @property
    def shows_metrics_here(self) -> bool:
        """Whether the node serves metrics on its own address, to clients of this machine."""
        return self.metrics is None and is_loopback(self.host)

    def metrics_address(self, node_port: int) -> tuple[str, int] | None:
        """Host and port of the listener of metrics; None if they have none. `node_port`: where the node listens."""
        found = _LISTENER.fullmatch(self.metrics or "")
        if found is None:
            return None
        port = int(found["port"]) + (node_port if found["plus"] else 0)
        if port > _MAX_PORT:
            raise SettingsError(f"{self.variable('metrics')}={self.metrics} is not allowed: port {port} does not exist")
        return found["host"].strip("[]"), port
