"""The rules by which a token is verified. No I/O; the clock is a parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import jwt
from jwt.types import Options

from imstream.settings import Settings
from imstream.wire import parse_user_id

MAX_TOKEN = 8192
"""Maximum length of a token in characters, ten times that of real ones: the cost of verification grows with it."""

# The times are checked below, more strictly. `sub` may be a number: some issuers write it so, and user ids are numbers.
_OPTIONS: Options = {
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_sub": False,
    "verify_jti": False,
    "enforce_minimum_key_length": True,
}

Reason = Literal[
    "missing",
    "malformed",
    "algorithm",
    "signature",
    "unknown_key",
    "audience",
    "issuer",
    "claims",
    "expired",
    "not_yet_valid",
    "lifetime",
    "other_user",
]

_REASONS: dict[type[jwt.PyJWTError], Reason] = {
    jwt.InvalidSignatureError: "signature",
    jwt.InvalidAlgorithmError: "algorithm",
    jwt.InvalidAudienceError: "audience",
    jwt.InvalidIssuerError: "issuer",
    jwt.MissingRequiredClaimError: "claims",
}


@dataclass(frozen=True, slots=True)
class Claims:
    """The verified content of a token. `expires_at`: in seconds since 1970."""

    user_id: int
    expires_at: float


class InvalidToken(Exception):  # noqa: N818 - a verdict, not an error of ours
    """A token is not valid. `reason` is for the log only."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class TokenRules:
    """Verifies tokens by the settings of a node: one algorithm, and the required claims."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._algorithm = settings.auth_algorithm
        self._claim = settings.auth_claim
        self._issuer = settings.auth_issuer
        self._audience = settings.auth_audience
        self._leeway = settings.auth_leeway.total_seconds()
        self._max_lifetime = settings.auth_max_lifetime.total_seconds()
        self._clock = clock

    @staticmethod
    def check_shape(token: str | None) -> str:
        """Return the token if there is one that is short enough to be verified. Raises `InvalidToken`."""
        if not token:
            raise InvalidToken("missing")
        if len(token) > MAX_TOKEN or not token.isascii():
            raise InvalidToken("malformed")
        return token

    def verify(self, token: str, keys: Sequence[Any]) -> Claims:
        """Verify a token that is signed with one of these keys. Raises `InvalidToken`."""
        for key in keys:
            try:
                return self._check_claims(self._decode(token, key))
            except InvalidToken as error:
                if error.reason != "signature" or key is keys[-1]:
                    raise
        raise InvalidToken("unknown_key")

    def _decode(self, token: str, key: Any) -> dict[str, Any]:  # noqa: ANN401 - each algorithm has its own type of key
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[self._algorithm],
                audience=self._audience,
                issuer=self._issuer,
                options=_OPTIONS,
            )
        except jwt.PyJWTError as error:
            raise InvalidToken(_REASONS.get(type(error), "malformed")) from None

    def _check_claims(self, claims: dict[str, Any]) -> Claims:
        now = self._clock()
        if _time(claims, "nbf", default=now) > now + self._leeway:
            raise InvalidToken("not_yet_valid")
        # Includes the leeway: a session must not end while its token would still be accepted at a login.
        expires_at = _time(claims, "exp") + self._leeway
        if expires_at <= now:
            raise InvalidToken("expired")
        # A token with a longer lifetime is rejected, not shortened: it could be used again until its own end.
        if expires_at - min(now, _time(claims, "iat", default=now)) > self._max_lifetime + 2 * self._leeway:
            raise InvalidToken("lifetime")
        return Claims(_user_id(claims.get(self._claim)), expires_at)


def key_id(token: str) -> str | None:
    """The id of the key that a token claims to be signed with (`kid`), if any. Raises `InvalidToken`."""
    try:
        kid: str | None = jwt.get_unverified_header(token).get("kid")
    except jwt.PyJWTError:
        raise InvalidToken("malformed") from None
    return kid


def _time(claims: dict[str, Any], name: str, *, default: float | None = None) -> float:
    """A NumericDate (RFC 7519, section 2): seconds since 1970. Raises `InvalidToken`."""
    value = claims.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken("claims")
    try:
        seconds = float(value)
    except OverflowError:
        raise InvalidToken("claims") from None
    if not isfinite(seconds):  # Python's JSON has NaN, which would never expire
        raise InvalidToken("claims")
    return seconds


def _user_id(value: object) -> int:
    """A user id: a whole number, or its digits in canonical form. Raises `InvalidToken`."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    user_id = parse_user_id(text)
    if user_id is None or str(user_id) != text:
        raise InvalidToken("claims")
    return user_id
