"""Authentication by signed tokens; without it (`IMSTREAM_AUTH=none`), only clients on this machine are accepted."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Self
from urllib.parse import urlsplit

import structlog

from imstream.codes import CloseCode, Code
from imstream.errors import SettingsError
from imstream.guards.auth.jwks import JwksKeySource, KeysUnavailable, check_url
from imstream.guards.auth.tokens import InvalidToken, Reason, StaticKey, TokenRules, public_key, secret_key
from imstream.guards.guard import Allow, Guard, GuardDeps, LoginAttempt, Reject
from imstream.settings import Settings
from imstream.texts import Sentence, Text
from imstream.urls import is_loopback

_INVALID = Sentence("登录令牌无效", "This token is not valid")
# The reasons that a client receives about a token. For all others only that it is not valid: it may be guessing.
_SENTENCES: dict[Reason, Sentence] = {
    "missing": Sentence("请用令牌 (token) 登录", "Please log in with a token"),
    "expired": Text.LOGIN_EXPIRED,
    "not_yet_valid": Sentence("登录令牌尚未生效", "This token is not valid yet"),
}

_NOT_LOCAL = Reject(
    "from_elsewhere",
    Code.FORBIDDEN,
    Sentence(
        "本节点不验证用户身份,只接受来自本机的连接 (IMSTREAM_AUTH, IMSTREAM_ALLOW_INSECURE)",
        "Without authentication, this node accepts local clients only (IMSTREAM_AUTH, IMSTREAM_ALLOW_INSECURE)",
    ),
)

log = structlog.get_logger()


class TokenAuthentication(Guard):
    """Rejects logins without a valid token of the same user. The login expires with the token."""

    def __init__(self, rules: TokenRules, keys: StaticKey | JwksKeySource) -> None:
        self._rules = rules
        self._keys = keys

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        settings = deps.settings
        return None if settings.auth == "none" else cls(TokenRules(settings), create_key_source(settings))

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._keys.running()

    async def reload(self) -> str | None:
        return "token keys" if await self._keys.reload() else None

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:
        try:
            token = self._rules.check_shape(login.token)
            claims = self._rules.verify(token, await self._keys.keys_for(token))
        except InvalidToken as error:
            return _reject(error.reason)
        except KeysUnavailable as error:
            return Reject("keys_away", Code.UNAVAILABLE, Text.UNAVAILABLE, retry_after=error.retry_after)
        return Allow(expires_at=claims.expires_at) if claims.user_id == login.user_id else _reject("other_user")


def _reject(reason: Reason) -> Reject:
    sentence = _SENTENCES.get(reason, _INVALID)
    return Reject(f"token_{reason}", Code.UNAUTHORIZED, sentence, close=CloseCode.NOT_AUTHENTICATED)


def create_key_source(settings: Settings) -> StaticKey | JwksKeySource:
    """Create the one key source that the settings name, for their algorithm. Raises `SettingsError`."""
    algorithm, variable = settings.auth_algorithm, Settings.variable
    accepted = ("auth_secret",) if algorithm == "HS256" else ("auth_public_key", "auth_jwks_url")
    allowed = f"{variable('auth_algorithm')}={algorithm} takes {' or '.join(map(variable, accepted))}"
    given = _given_keys(settings)
    if not given:
        raise SettingsError(f"{variable('auth')}=jwt is not allowed without a key: {allowed}")
    if wrong := [variable(name) for name in given if name not in accepted]:
        raise SettingsError(f"{', '.join(wrong)} is not allowed: {allowed}")
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(map(variable, given))} are not allowed together: {allowed}")
    if settings.auth_secret is not None:
        return StaticKey(secret_key(settings.auth_secret, variable("auth_secret")))
    if settings.auth_public_key is not None:
        return StaticKey(public_key(settings.auth_public_key, algorithm, variable("auth_public_key")))
    assert settings.auth_jwks_url is not None  # noqa: S101 - one of the three is given
    check_url(settings.auth_jwks_url, allow_http=settings.auth_jwks_allow_http)
    return JwksKeySource(settings.auth_jwks_url, algorithm, max_age=settings.auth_keys_max_age)


class Exposure(Guard):
    """Without authentication, rejects clients from other machines, also those that a balancer forwards."""

    def __init__(self, *, insecure: bool) -> None:
        self._insecure = insecure

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        check_exposure(deps.settings)
        return cls(insecure=deps.settings.allow_insecure) if deps.settings.auth == "none" else None

    def running(self) -> AbstractAsyncContextManager[None]:
        """Log at start-up that users are not authenticated."""
        if self._insecure:
            log.error("INSECURE: users are not authenticated, any client can be any user (IMSTREAM_ALLOW_INSECURE)")
        else:
            log.warning("users are not authenticated (IMSTREAM_AUTH=none): local clients can impersonate any user")
        return nullcontext()

    def check_handshake(self, headers: Mapping[str, str]) -> Reject | None:
        """Reject clients that were forwarded from other machines, and foreign host names: those of DNS rebinding."""
        return None if self._insecure or is_local(headers) else _NOT_LOCAL


def check_exposure(settings: Settings) -> None:
    """Check that a node without authentication has no keys and only local clients. Raises `SettingsError`."""
    if settings.auth != "none":
        return
    auth, host, insecure = map(Settings.variable, ("auth", "host", "allow_insecure"))
    if given := _given_keys(settings):
        raise SettingsError(
            f"{auth}=none is not allowed with {', '.join(map(Settings.variable, given))}: set {auth}=jwt, or no key"
        )
    if not (settings.allow_insecure or is_loopback(settings.host)):
        raise SettingsError(
            f"{host}={settings.host} is not allowed with {auth}=none, because any client could impersonate any user: "
            f"set {auth}=jwt and a key, {host}=127.0.0.1, or {insecure}=true in a trusted network"
        )


def is_local(headers: Mapping[str, str]) -> bool:
    """Whether a handshake names this machine as its host and was not forwarded from another one."""
    forwarded_for = ",".join(headers.get(name, "127.0.0.1") for name in ("x-forwarded-for", "x-real-ip")).split(",")
    try:
        host = urlsplit(f"//{headers.get('host', 'localhost')}").hostname or ""
    except ValueError:
        return False
    is_forwarded = "forwarded" in headers or not all(is_loopback(address.strip()) for address in forwarded_for)
    return is_loopback(host) and not is_forwarded


def _given_keys(settings: Settings) -> list[str]:
    names = ("auth_secret", "auth_public_key", "auth_jwks_url")
    return [name for name in names if getattr(settings, name) is not None]
