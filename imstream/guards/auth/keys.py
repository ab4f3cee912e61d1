"""The keys of tokens: a shared secret, or a key in a PEM file. Signs tokens, too, for development."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from pydantic import SecretStr

from imstream.errors import SettingsError
from imstream.settings import Settings

Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]

MIN_SECRET_BYTES = 32
"""The size of the digest (RFC 7518, section 3.2)."""

MIN_RSA_BITS = 2048
"""RFC 7518, section 3.3."""

_REQUIRED: dict[Algorithm, str] = {
    "RS256": f"an RSA key of at least {MIN_RSA_BITS} bits",
    "ES256": "an elliptic curve key on P-256",
    "EdDSA": "an Ed25519 or Ed448 key",
}


class KeysUnavailable(Exception):  # noqa: N818 - reads as the state that it names
    """The key of a token cannot be fetched now."""

    def __init__(self, retry_after: timedelta) -> None:
        super().__init__("no key")
        self.retry_after = retry_after


class KeySource(Protocol):
    """Provides the keys that tokens are verified with."""

    def running(self) -> AbstractAsyncContextManager[object]:
        """Fetch the keys and keep them fresh while the node runs. Entering does not wait for the first fetch."""
        ...

    async def reload(self) -> bool:
        """Fetch the keys now; False for static keys."""
        ...

    async def keys_for(self, token: str) -> Sequence[Any]:
        """The keys that may have signed a token, at least one. Raises `InvalidToken`, `KeysUnavailable`."""
        ...


class StaticKey:
    """One key that signs all tokens."""

    def __init__(self, key: Any) -> None:  # noqa: ANN401 - each algorithm has its own type of key
        self._keys = (key,)

    def running(self) -> AbstractAsyncContextManager[object]:
        """See `KeySource.running`."""
        return nullcontext()

    async def reload(self) -> bool:
        """See `KeySource.reload`."""
        return False

    async def keys_for(self, _token: str) -> Sequence[Any]:
        """See `KeySource.keys_for`."""
        return self._keys


def algorithm_of(key: object) -> Algorithm | None:
    """The algorithm of a public key; None when it is not supported, or the key is too weak."""
    if isinstance(key, RSAPublicKey):
        return "RS256" if key.key_size >= MIN_RSA_BITS else None
    if isinstance(key, EllipticCurvePublicKey):
        return "ES256" if isinstance(key.curve, SECP256R1) else None
    return "EdDSA" if isinstance(key, Ed25519PublicKey | Ed448PublicKey) else None


def secret_key(secret: SecretStr, variable: str) -> bytes:
    """The key of HS256, without surrounding white space. Raises `SettingsError`, which does not show the secret."""
    key = secret.get_secret_value().strip().encode(errors="surrogateescape")  # the bytes of the environment
    if len(key) < MIN_SECRET_BYTES:
        raise SettingsError(
            f"{variable}=(hidden) is not allowed: at least {MIN_SECRET_BYTES} bytes, and it has {len(key)}"
        )
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(key)
    except jwt.InvalidKeyError:  # a public key is known to others, who could sign with it
        raise SettingsError(f"{variable}=(hidden) is not allowed: it is an asymmetric key, not a secret") from None
    return key


def public_key(path: Path, algorithm: Algorithm, variable: str) -> object:
    """Load the key of a PEM file. Raises `SettingsError`."""
    content = _read(path, variable)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        found = "a private key" if b"PRIVATE KEY" in content else "no public key in PEM format"
        raise SettingsError(
            f"{variable}={path} is not allowed: it contains {found}; {algorithm} needs {_REQUIRED[algorithm]}"
        ) from None
    if algorithm_of(key) != algorithm:
        raise SettingsError(f"{variable}={path} is not allowed: {algorithm} needs {_REQUIRED[algorithm]}")
    return key


def sign(settings: Settings, user_id: int, *, ttl: timedelta, key_file: Path | None) -> str:
    """Sign a token that nodes with these settings accept. For development: in production, the user database signs.

    Args:
        settings: Claim, issuer and audience of the nodes; and their secret, unless there is a key file.
        user_id: The user who may log in with it.
        ttl: How long it is valid.
        key_file: PEM file with a private key, which determines the algorithm.

    Raises:
        SettingsError: There is no key, or its algorithm is not that of the settings.
    """
    if ttl > settings.auth_max_lifetime:
        maximum = f"{settings.variable('auth_max_lifetime')}={settings.auth_max_lifetime.total_seconds():g}s"
        raise SettingsError(f"--ttl={ttl.total_seconds():g}s is not allowed: nodes accept at most {maximum}")
    now = int(time.time())
    claims: dict[str, Any] = {settings.auth_claim: str(user_id), "iat": now, "exp": now + int(ttl.total_seconds())}
    if settings.auth_issuer is not None:
        claims["iss"] = settings.auth_issuer
    if settings.auth_audience is not None:
        claims["aud"] = settings.auth_audience
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
