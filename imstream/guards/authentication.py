"""Who a user is: shown by a signed token, when `IMSTREAM_AUTH` is `jwt`."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import ClassVar, Self

from imstream.errors import SettingsError
from imstream.guards.auth import Claims, InvalidToken, KeySource, KeysUnavailable, Reason
from imstream.guards.auth.rules import TokenRules
from imstream.guards.guard import Allow, Guard, GuardDeps, LoginAttempt, Reject
from imstream.settings import Settings
from imstream.texts import Sentence, Text
from imstream.wire import CloseCode, Code

_INVALID = Sentence("登录令牌无效", "This token is not valid")
_SENTENCES: dict[Reason, Sentence] = {
    "missing": Sentence("请用令牌 (token) 登录", "Please log in with a token"),
    "expired": Text.LOGIN_EXPIRED,
    "not_yet_valid": Sentence("登录令牌尚未生效", "This token is not valid yet"),
}
"""What its bearer is told of it. Of all else no more than that it is not valid: they might be guessing."""


class TokenAuthentication(Guard):
    """Believes nobody without a token that says the same, and only until the token ends."""

    order: ClassVar[int] = 10

    def __init__(self, rules: TokenRules, keys: KeySource) -> None:
        self._rules = rules
        self._keys = keys
        self._at_work: AbstractAsyncContextManager[object] | None = None

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """See `Guard`."""
        settings = supplies.settings
        if settings.auth == "none":
            return None
        from imstream.guards.auth.rules import TokenRules  # noqa: PLC0415 - only nodes with tokens pay for it

        return cls(TokenRules(settings), key_source(settings))

    async def __aenter__(self) -> Self:
        """Get the keys."""
        self._at_work = self._keys.at_work()
        await self._at_work.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Look for keys no more."""
        if self._at_work is not None:
            await self._at_work.__aexit__(kind, error, traceback)

    async def reload(self) -> str | None:
        """See `Guard.reload`."""
        return "keys of tokens" if await self._keys.reload() else None

    async def login(self, login: LoginAttempt) -> Allow | Reject:
        """Believe the token, if it is this user's."""
        try:
            shown = await self._read(login.token)
            if shown.user_id != login.user_id:
                raise InvalidToken("other_user")  # noqa: TRY301 - refused like all others
        except InvalidToken as why:
            sentence = _SENTENCES.get(why.reason, _INVALID)
            return Reject(f"token_{why.reason}", Code.UNAUTHORIZED, sentence, close=CloseCode.NOT_AUTHENTICATED)
        except KeysUnavailable as away:
            return Reject("keys_away", Code.UNAVAILABLE, Text.UNAVAILABLE, retry_after=away.retry_after)
        return Allow(until=shown.until)

    async def _read(self, token: str | None) -> Claims:
        token = self._rules.check_shape(token)
        return self._rules.read(token, await self._keys.keys_for(token))


def key_source(settings: Settings) -> KeySource:
    """Where the keys of the settings come from.

    Raises:
        SettingsError: There is none, there are two, or it is of the wrong kind.
    """
    from imstream.guards.auth.jwks import PublishedKeys, check_url  # noqa: PLC0415 - see `make`
    from imstream.guards.auth.keys import FixedKey, public_key, secret_key  # noqa: PLC0415 - same

    algorithm, variable = settings.auth_algorithm, Settings.variable
    takes = ("auth_secret",) if algorithm == "HS256" else ("auth_public_key", "auth_jwks_url")
    allowed = f"{variable('auth_algorithm')}={algorithm} takes {' or '.join(map(variable, takes))}"
    given = keys_given(settings)
    if not given:
        raise SettingsError(f"{variable('auth')}=jwt is not allowed without a key: {allowed}")
    if not set(given) <= set(takes):
        wrong = ", ".join(variable(name) for name in given if name not in takes)
        raise SettingsError(f"{wrong} is not allowed: {allowed}")
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(map(variable, given))} are not allowed together: {allowed}")
    if settings.auth_secret is not None:
        return FixedKey(secret_key(settings.auth_secret, variable("auth_secret")))
    if settings.auth_public_key is not None:
        return FixedKey(public_key(settings.auth_public_key, algorithm, variable("auth_public_key")))
    assert settings.auth_jwks_url is not None  # noqa: S101 - one of the three is given
    check_url(settings.auth_jwks_url, allow_http=settings.auth_jwks_allow_http)
    return PublishedKeys(settings.auth_jwks_url, algorithm, max_age=settings.auth_keys_max_age)


def keys_given(settings: Settings) -> list[str]:
    """The settings that name a key."""
    names = ("auth_secret", "auth_public_key", "auth_jwks_url")
    return [name for name in names if getattr(settings, name) is not None]
