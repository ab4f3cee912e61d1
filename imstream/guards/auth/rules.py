"""What a token must be, to be believed. No I/O; the time is a parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import jwt
from jwt.types import Options

from imstream.guards.auth import Claims, InvalidToken, Reason
from imstream.settings import Settings
from imstream.wire import parse_user_id

MAX_TOKEN = 8192
"""Characters of the longest token that is looked at. Real ones have a tenth; reading costs as much as there is."""

# Times are checked here and more strictly. `sub` may be a number: some issuers have it so, and users are numbers here.
_OPTIONS: Options = {
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_sub": False,
    "verify_jti": False,
    "enforce_minimum_key_length": True,
}

_REASONS: dict[type[jwt.PyJWTError], Reason] = {
    jwt.InvalidSignatureError: "signature",
    jwt.InvalidAlgorithmError: "algorithm",
    jwt.InvalidAudienceError: "audience",
    jwt.InvalidIssuerError: "issuer",
    jwt.MissingRequiredClaimError: "claims",
}


class TokenRules:
    """The rules of one node: one algorithm, and what the claims must say."""

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
        """A token that is there, and no longer than it may be. Raises `InvalidToken`."""
        if not token:
            raise InvalidToken("missing")
        if len(token) > MAX_TOKEN or not token.isascii():
            raise InvalidToken("malformed")
        return token

    def read(self, token: str, keys: Sequence[Any]) -> Claims:
        """What a token shows, signed with one of these keys. Raises `InvalidToken`."""
        for key in keys:
            try:
                return self._believe(self._claims(token, key))
            except InvalidToken as why:
                if why.reason != "signature" or key is keys[-1]:
                    raise
        raise InvalidToken("unknown_key")

    def _claims(self, token: str, key: Any) -> dict[str, Any]:  # noqa: ANN401 - each algorithm has its own type of key
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

    def _believe(self, claims: dict[str, Any]) -> Claims:
        now = self._clock()
        if _time(claims, "nbf", default=now) > now + self._leeway:
            raise InvalidToken("not_yet_valid")
        # To the end of the leeway: a session must not end while its token would still be taken at the door.
        until = _time(claims, "exp") + self._leeway
        if until <= now:
            raise InvalidToken("expired")
        # A token that was issued for longer is refused as a whole, or it could be shown again until its end.
        if until - min(now, _time(claims, "iat", default=now)) > self._max_lifetime + 2 * self._leeway:
            raise InvalidToken("lifetime")
        return Claims(_user_id(claims.get(self._claim)), until)


def key_id(token: str) -> str | None:
    """The key that a token claims to be signed with; it may claim none. Raises `InvalidToken`."""
    try:
        named: str | None = jwt.get_unverified_header(token).get("kid")
    except jwt.PyJWTError:
        raise InvalidToken("malformed") from None
    return named


def _time(claims: dict[str, Any], name: str, *, default: float | None = None) -> float:
    """A NumericDate (RFC 7519, section 2): seconds since 1970. Raises `InvalidToken`."""
    value = claims.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken("claims")
    try:
        seconds = float(value)
    except OverflowError:
        raise InvalidToken("claims") from None
    if not isfinite(seconds):  # Python's JSON has NaN, which is never over
        raise InvalidToken("claims")
    return seconds


def _user_id(value: object) -> int:
    """A user id: a whole number, or its digits as they are always written. Raises `InvalidToken`."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    user_id = parse_user_id(text)
    if user_id is None or str(user_id) != text:
        raise InvalidToken("claims")
    return user_id
