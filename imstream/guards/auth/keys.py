"""The keys of tokens: a secret or a key from a file, and whether a key is of the kind that an algorithm takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from pydantic import SecretStr

from imstream.errors import SettingsError
from imstream.guards.auth import Algorithm

MIN_SECRET = 32
"""Bytes: as long as the digest (RFC 7518, section 3.2)."""

MIN_RSA = 2048
"""Bits (RFC 7518, section 3.3)."""

NEEDED: dict[Algorithm, str] = {
    "RS256": f"an RSA key of at least {MIN_RSA} bits",
    "ES256": "an elliptic curve key on P-256",
    "EdDSA": "an Ed25519 or Ed448 key",
}


class FixedKey:
    """The one key that signs all tokens."""

    def __init__(self, key: Any) -> None:  # noqa: ANN401 - each algorithm has its own type of key
        self._keys = (key,)

    def at_work(self) -> AbstractAsyncContextManager[object]:
        """See `KeySource`."""
        return nullcontext()

    async def reload(self) -> bool:
        """See `KeySource`."""
        return False

    async def keys_for(self, _token: str) -> Sequence[Any]:
        """See `KeySource`."""
        return self._keys


def algorithm_of(key: object) -> Algorithm | None:
    """The algorithm that a public key is for; None when it is for none of ours, or too weak."""
    if isinstance(key, RSAPublicKey):
        return "RS256" if key.key_size >= MIN_RSA else None
    if isinstance(key, EllipticCurvePublicKey):
        return "ES256" if isinstance(key.curve, SECP256R1) else None
    return "EdDSA" if isinstance(key, Ed25519PublicKey | Ed448PublicKey) else None


def secret_key(secret: SecretStr, variable: str) -> bytes:
    """The key of HS256, without spaces and line ends around it. Raises `SettingsError`; it does not show the secret."""
    key = secret.get_secret_value().strip().encode(errors="surrogateescape")  # the bytes of the environment
    if len(key) < MIN_SECRET:
        raise SettingsError(f"{variable}=(hidden) is not allowed: at least {MIN_SECRET} bytes, and it has {len(key)}")
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(key)
    except jwt.InvalidKeyError:
        # Whoever knows the public key could sign with it.
        raise SettingsError(f"{variable}=(hidden) is not allowed: it is a key of another kind, no secret") from None
    return key


def public_key(path: Path, algorithm: Algorithm, variable: str) -> object:
    """The key in a PEM file. Raises `SettingsError`."""
    content = read_file(path, variable)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        what = "a private key is in it" if b"PRIVATE KEY" in content else "no public key in PEM is in it"
        raise SettingsError(f"{variable}={path} is not allowed: {what}, and {NEEDED[algorithm]} is needed") from None
    if algorithm_of(key) != algorithm:
        raise SettingsError(f"{variable}={path} is not allowed: {algorithm} needs {NEEDED[algorithm]}")
    return key


def private_key(path: Path, variable: str) -> tuple[Any, Algorithm]:
    """The key in a PEM file that signs, and what it signs with. Raises `SettingsError`."""
    try:
        key = load_pem_private_key(read_file(path, variable), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingsError(f"{variable}={path} is not allowed: no private key in PEM without a password") from None
    algorithm = algorithm_of(key.public_key())
    if algorithm is None:
        raise SettingsError(f"{variable}={path} is not allowed: {', '.join(NEEDED.values())} is needed")
    return key, algorithm


def read_file(path: Path, variable: str) -> bytes:
    """The content of a file. Raises `SettingsError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{variable}={path} is not allowed: cannot be read: {error.strerror}") from None
