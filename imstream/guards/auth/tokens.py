"""Tokens (JSON Web Tokens, RFC 7519): the rules that they must meet, and the secret or PEM file that verifies them."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from jwt.types import Options
from pydantic import SecretStr

from imstream.errors import SettingsError
from imstream.settings import Settings
from imstream.user_ids import UserId, UserIds

MAX_TOKEN = 8192  # characters, ten times the length of real tokens: the cost of verification grows with it
MIN_SECRET_BYTES = 32  # the size of the digest (RFC 7518, section 3.2)
MIN_RSA_BITS = 2048  # RFC 7518, section 3.3

Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]

_REQUIRED: dict[Algorithm, str] = {
    "RS256": f"an RSA key of at least {MIN_RSA_BITS} bits",
    "ES256": "an elliptic curve key on P-256",
    "EdDSA": "an Ed25519 or Ed448 key",
}

# The times are checked below, more strictly. `sub` may be a number: some issuers write it so, and user ids are numbers.
_OPTIONS: Options = {
    "verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_sub": False, "verify_jti": False,
    "enforce_minimum_key_length": True,
}  # fmt: skip

Reason = Literal[
    "missing", "malformed", "algorithm", "signature", "unknown_key", "audience", "issuer", "claims",
    "expired", "not_yet_valid", "lifetime", "other_user",
]  # fmt: skip

_REASONS: dict[type[jwt.PyJWTError], Reason] = {
    jwt.InvalidSignatureError: "signature",
    jwt.InvalidAlgorithmError: "algorithm",
    jwt.InvalidAudienceError: "audience",
    jwt.InvalidIssuerError: "issuer",
    jwt.MissingRequiredClaimError: "claims",
}


class InvalidToken(Exception):  # noqa: N818 - a verdict, not an error of ours
    """A token is not valid. `reason` is for the log only."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Claims:
    """The verified content of a token. `expires_at`: in seconds since 1970."""

    user_id: UserId
    expires_at: float


class TokenRules:
    """Verifies tokens by the settings of a node: one algorithm, and the required claims."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
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
        algorithms = [self._settings.auth_algorithm]
        audience, issuer = self._settings.auth_audience, self._settings.auth_issuer
        for key in keys:
            try:
                claims = jwt.decode(token, key, algorithms, _OPTIONS, audience=audience, issuer=issuer)
            except jwt.PyJWTError as error:
                reason = _REASONS.get(type(error), "malformed")
                if reason != "signature" or key is keys[-1]:
                    raise InvalidToken(reason) from None
            else:
                return self._check_claims(claims)
        raise InvalidToken("unknown_key")

    def _check_claims(self, claims: dict[str, Any]) -> Claims:
        now, leeway = self._clock(), self._settings.auth_leeway.total_seconds()
        if _time(claims, "nbf", default=now) > now + leeway:
            raise InvalidToken("not_yet_valid")
        # Includes the leeway: a session must not end while its token would still be accepted at a login.
        expires_at = _time(claims, "exp") + leeway
        if expires_at <= now:
            raise InvalidToken("expired")
        # A token with a longer lifetime is rejected, not shortened: it could be used again until its own end.
        lifetime = expires_at - min(now, _time(claims, "iat", default=now))
        if lifetime > self._settings.auth_max_lifetime.total_seconds() + 2 * leeway:
            raise InvalidToken("lifetime")
        return Claims(_user_id(claims.get(self._settings.auth_claim), self._settings.user_ids), expires_at)


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
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer larger than any float
            if isfinite(seconds := float(value)):  # Python's JSON has NaN, which would never expire
                return seconds
    raise InvalidToken("claims")


def _user_id(value: object, user_ids: UserIds) -> UserId:
    """A user id: a text, a whole number, or its digits in canonical form. Raises `InvalidToken`."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        user_id = user_ids.parse(str(value))
        if user_id is not None and str(user_id) == str(value):
            return user_id
    raise InvalidToken("claims")


@dataclass(frozen=True, slots=True)
class StaticKey:
    """A key source with one key; see `JwksKeySource`."""

    key: Any

    def running(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def reload(self) -> bool:
        return False

    async def keys_for(self, _token: str) -> Sequence[Any]:
        return (self.key,)


def secret_key(secret: SecretStr, variable: str) -> bytes:
    """The key of HS256, without surrounding white space. Raises `SettingsError`, which does not show the secret."""
    key = secret.get_secret_value().strip().encode(errors="surrogateescape")  # the bytes of the environment
    if (size := len(key)) < MIN_SECRET_BYTES:
        raise SettingsError(f"{variable}=(hidden) is not allowed: at least {MIN_SECRET_BYTES} bytes, and it has {size}")
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(key)
    except jwt.InvalidKeyError:  # a public key is not secret: others could sign with it
        raise SettingsError(f"{variable}=(hidden) is not allowed: it is an asymmetric key, not a secret") from None
    return key


def public_key(path: Path, algorithm: Algorithm, variable: str) -> object:
    """Load the key of a PEM file. Raises `SettingsError`."""
    content, needs = _read(path, variable), f"{algorithm} needs {_REQUIRED[algorithm]}"
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        found = "a private key" if b"PRIVATE KEY" in content else "no public key in PEM format"
        raise SettingsError(f"{variable}={path} is not allowed: it contains {found}; {needs}") from None
    if algorithm_of(key) != algorithm:
        raise SettingsError(f"{variable}={path} is not allowed: {needs}")
    return key


def algorithm_of(key: object) -> Algorithm | None:
    """The algorithm of a public key; None when it is not supported, or the key is too weak."""
    if isinstance(key, RSAPublicKey):
        return "RS256" if key.key_size >= MIN_RSA_BITS else None
    if isinstance(key, EllipticCurvePublicKey):
        return "ES256" if isinstance(key.curve, SECP256R1) else None
    return "EdDSA" if isinstance(key, Ed25519PublicKey | Ed448PublicKey) else None


def sign(settings: Settings, user_id: UserId, *, ttl: timedelta, key_file: Path | None) -> str:
    """Sign a token that nodes with these settings accept, for development. Raises `SettingsError`.

    The secret of the settings signs, or the private key of a PEM file, which determines the algorithm.
    """
    if ttl > settings.auth_max_lifetime:
        maximum = f"{settings.variable('auth_max_lifetime')}={settings.auth_max_lifetime.total_seconds():g}s"
        raise SettingsError(f"--ttl={ttl.total_seconds():g}s is not allowed: nodes accept at most {maximum}")
    now = int(time.time())
    claims: dict[str, Any] = {settings.auth_claim: str(user_id), "iat": now, "exp": now + int(ttl.total_seconds())}
    optional = {"iss": settings.auth_issuer, "aud": settings.auth_audience}
    claims |= {name: value for name, value in optional.items() if value is not None}
    key, algorithm = _signing_key(settings, key_file)
    return jwt.encode(claims, key, algorithm)


def _signing_key(settings: Settings, path: Path | None) -> tuple[Any, Algorithm]:
    variable, expected = settings.variable("auth_algorithm"), settings.auth_algorithm
    if path is None:
        if expected != "HS256":
            raise SettingsError(f"{variable}={expected} needs --key FILE, with the private key")
        if settings.auth_secret is None:
            raise SettingsError(f"set {settings.variable('auth_secret')} as the node has it, or give --key FILE")
        return secret_key(settings.auth_secret, settings.variable("auth_secret")), "HS256"
    try:
        key = load_pem_private_key(_read(path, "--key"), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingsError(f"--key={path} is not allowed: no private key in PEM format without a password") from None
    algorithm = algorithm_of(key.public_key())
    if algorithm is None:
        raise SettingsError(f"--key={path} is not allowed: {', '.join(_REQUIRED.values())} is needed")
    if "auth_algorithm" in settings.model_fields_set and algorithm != expected:
        raise SettingsError(f"--key={path} is not allowed: it is for {algorithm}, and {variable}={expected}")
    return key, algorithm


def _read(path: Path, variable: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{variable}={path} is not allowed: cannot be read: {error.strerror}") from None
