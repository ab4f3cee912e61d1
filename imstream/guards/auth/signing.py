"""Signs tokens, for development: in production, whoever knows the users does."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt

from imstream.errors import SettingsError
from imstream.guards.auth import Algorithm
from imstream.guards.auth.keys import private_key, secret_key
from imstream.settings import Settings


def sign(settings: Settings, user_id: int, ttl: timedelta, key_file: Path | None) -> str:
    """A token that nodes with these settings believe.

    Args:
        settings: Whose claim, issuer, audience, and secret unless there is a key file.
        user_id: Whom it is for.
        ttl: How long it holds.
        key_file: PEM file with a private key; the key says which algorithm it is for.

    Raises:
        SettingsError: There is no key, or it is not for the algorithm that the settings name.
    """
    if ttl > settings.auth_max_lifetime:
        most = f"{settings.variable('auth_max_lifetime')}={settings.auth_max_lifetime.total_seconds():g}s"
        raise SettingsError(f"--ttl={ttl.total_seconds():g}s is not allowed: nodes take at most {most}")
    now = int(time.time())
    claims: dict[str, Any] = {settings.auth_claim: str(user_id), "iat": now, "exp": now + int(ttl.total_seconds())}
    if settings.auth_issuer is not None:
        claims["iss"] = settings.auth_issuer
    if settings.auth_audience is not None:
        claims["aud"] = settings.auth_audience
    key, algorithm = _key(settings, key_file)
    return jwt.encode(claims, key, algorithm)


def _key(settings: Settings, key_file: Path | None) -> tuple[Any, Algorithm]:
    variable, wanted = settings.variable("auth_algorithm"), settings.auth_algorithm
    if key_file is not None:
        key, algorithm = private_key(key_file, "--key")
        if "auth_algorithm" in settings.model_fields_set and algorithm != wanted:
            raise SettingsError(f"--key={key_file} is not allowed: it is for {algorithm}, and {variable}={wanted}")
        return key, algorithm
    if wanted != "HS256":
        raise SettingsError(f"{variable}={wanted} needs --key FILE, with the private key")
    if settings.auth_secret is None:
        raise SettingsError(f"set {settings.variable('auth_secret')} as the node has it, or give --key FILE")
    return secret_key(settings.auth_secret, settings.variable("auth_secret")), "HS256"
