"""The public keys that a token issuer publishes as a JSON Web Key Set (JWKS, RFC 7517), fetched and kept fresh.

A key set is a foreign document: no content of it may stop the task that refreshes it. A response that is not a key set
changes nothing until the known keys reach their maximum age; in a key set, each key that cannot be used is skipped.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Any

import jwt
import structlog
from pydantic_core import from_json
from yarl import URL

from imstream import __version__
from imstream.ai.http_client import HttpClient
from imstream.ai.http_response import HttpError
from imstream.errors import SettingsError
from imstream.guards.auth.tokens import Algorithm, InvalidToken, algorithm_of, key_id
from imstream.settings import Settings
from imstream.urls import SecretUrl, is_loopback

REFRESH_INTERVAL = timedelta(minutes=5)  # also the longest time that a withdrawn key is still accepted
MIN_INTERVAL = timedelta(seconds=5)  # between fetches, whatever keys unverified tokens name; also after a failed fetch
FETCH_TIMEOUT = timedelta(seconds=5)
MAX_SIZE = 262_144  # bytes of a response
MAX_KEYS = 64  # a token that names no key is tried with all of them

log = structlog.get_logger()


class KeysUnavailable(Exception):  # noqa: N818 - reads as the state that it names
    """The key of a token cannot be fetched now."""

    def __init__(self, retry_after: timedelta) -> None:
        super().__init__("no key")
        self.retry_after = retry_after


class InvalidKeySet(ValueError):  # noqa: N818 - a verdict on a foreign document
    """A response is not a key set. The message does not quote it."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """A parsed key set: the usable keys with their ids, and the number of `broken` ones."""

    keys: list[tuple[str | None, Any]]
    broken: int


@dataclass(eq=False, repr=False)
class JwksKeySource:
    """The keys at one URL. There are none before the first successful fetch, and `max_age` after the last one."""

    url: SecretUrl
    algorithm: Algorithm
    max_age: timedelta
    refresh_interval: timedelta = REFRESH_INTERVAL
    min_interval: timedelta = MIN_INTERVAL

    def __post_init__(self) -> None:
        self._key_set: KeySet | None = None
        self._failing = False
        self._last_success = self._next_fetch = 0.0  # when keys were fetched, and may be fetched again; monotonic
        self._lock = asyncio.Lock()
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": f"imstream/{__version__}"}
        self._url = URL(self.url.get_secret_value())
        self._client = HttpClient(self._url, headers, proxy=None, limit=2 * MAX_SIZE)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the keys fresh while the node runs. Entering does not wait for the first fetch."""
        try:
            async with asyncio.TaskGroup() as group:
                refreshing = group.create_task(self._refresh_periodically(), name="jwks")
                yield
                refreshing.cancel()
        finally:
            await self._client.close()

    async def _refresh_periodically(self) -> None:
        while True:
            await self.reload()
            self._drop_expired()
            interval = self.min_interval if self._failing else min(self.refresh_interval, self.max_age / 2)
            await asyncio.sleep(interval.total_seconds())

    async def reload(self) -> bool:
        async with self._lock:
            await self._refresh()
        return True

    async def _refresh(self) -> None:
        """Fetch the key set. On any failure, keep the known one."""
        started = time.monotonic()
        self._next_fetch = started + self.min_interval.total_seconds()
        try:
            # In a thread: parsing 256 KB of broken keys takes 0.2 s.
            fetched = await asyncio.to_thread(parse_key_set, await self._fetch(), self.algorithm)
        except Exception as error:  # noqa: BLE001 - a foreign document must not end the task
            if not self._failing:
                # The messages of other errors may quote the response, or the URL with its password.
                is_safe = isinstance(error, InvalidKeySet | HttpError)
                reason = str(error) if is_safe else type(error).__name__
                kept = 0 if self._key_set is None else len(self._key_set.keys)
                log.warning("token keys not fetched", url=str(self.url), error=reason, kept=kept)
            self._failing = True
            return
        before = self._key_set
        if self._failing or before is None:
            log.info("token keys fetched", url=str(self.url), keys=len(fetched.keys))
        if fetched.broken and (before is None or before.broken != fetched.broken):
            log.warning("unusable token keys skipped", url=str(self.url), broken=fetched.broken)
        if not fetched.keys and (before is None or before.keys):
            log.error("no usable token key, no login is possible", url=str(self.url), algorithm=self.algorithm)
        self._key_set, self._last_success, self._failing = fetched, started, False

    async def _fetch(self) -> bytes:
        time_limit = asyncio.timeout(FETCH_TIMEOUT.total_seconds())
        async with time_limit, await self._client.request("GET", self._url) as response:
            # A redirect, too: the server that provides the keys can impersonate any user.
            if response.status != HTTPStatus.OK:
                raise InvalidKeySet(f"the response is HTTP {response.status}")
            if response.is_encoded:
                raise InvalidKeySet("the response is compressed, which was not requested")
            content = await response.read_all(MAX_SIZE)
        if len(content) > MAX_SIZE:
            raise InvalidKeySet(f"the response has more than {MAX_SIZE} bytes")
        return content

    def _drop_expired(self) -> None:
        """Drop keys that have not been confirmed for `max_age`: the issuer may have withdrawn them."""
        age = time.monotonic() - self._last_success
        if self._key_set is not None and age > self.max_age.total_seconds():
            self._key_set = None
            log.error("token keys expired, no login is possible", url=str(self.url), seconds=round(age))

    async def keys_for(self, token: str) -> Sequence[Any]:
        """The keys that may have signed a token; an unknown id is fetched. Raises `InvalidToken`, `KeysUnavailable`."""
        kid = key_id(token)
        self._drop_expired()
        if self._key_set is None:
            raise KeysUnavailable(self._retry_after())
        if keys := self._matching(kid):
            return keys
        async with self._lock:
            if keys := self._matching(kid):  # fetched while this call waited for the lock
                return keys
            if time.monotonic() < self._next_fetch:  # the key may have been added since the last fetch
                raise KeysUnavailable(self._retry_after())
            await self._refresh()
            if self._failing:
                raise KeysUnavailable(self._retry_after())
        if keys := self._matching(kid):
            return keys
        raise InvalidToken("unknown_key")

    def _matching(self, kid: str | None) -> list[Any]:
        """The keys with this id, or else those without an id; all keys for a token that names none."""
        known = self._key_set.keys if self._key_set is not None else []
        if kid is None:
            return [key for _, key in known]
        return [key for its_id, key in known if its_id == kid] or [key for its_id, key in known if its_id is None]

    def _retry_after(self) -> timedelta:
        return max(self.min_interval / 10, timedelta(seconds=self._next_fetch - time.monotonic()))


def parse_key_set(content: bytes, algorithm: Algorithm) -> KeySet:
    """Parse a key set. Keeps the keys for signatures of this algorithm, possibly none. Raises `InvalidKeySet`."""
    try:
        document = from_json(content)
    except ValueError:
        raise InvalidKeySet("the response is not JSON") from None
    published = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(published, list):
        raise InvalidKeySet("the response is not a JSON Web Key Set")
    keys, broken = list[tuple[str | None, Any]](), 0
    for jwk in published:
        try:
            key, kid = _parse_key(jwk, algorithm), jwk.get("kid")
        except Exception:  # noqa: BLE001 - whatever is wrong with this key, the others may be valid
            broken += 1
            continue
        if key is not None:
            keys.append((kid if isinstance(kid, str) else None, key))
    return KeySet(keys[:MAX_KEYS], broken)


def _parse_key(jwk: dict[str, Any], algorithm: Algorithm) -> object | None:
    """The key, if it verifies signatures of this algorithm. May raise any exception."""
    if jwk.get("use", "sig") != "sig" or jwk.get("alg", algorithm) != algorithm:
        return None
    if "verify" not in (jwk.get("key_ops") or ["verify"]):
        return None
    key: object = jwt.PyJWK(jwk, algorithm).key
    # Excludes secrets and private keys, too: they should not have been published.
    return key if algorithm_of(key) == algorithm else None


def check_url(url: SecretUrl, *, allow_http: bool) -> None:
    """Check that the keys cannot be replaced in transit. Raises `SettingsError`."""
    variable = Settings.variable("auth_jwks_url")
    try:
        parts = URL(url.get_secret_value())
    except ValueError:
        parts = URL()
    if not parts.host:
        raise SettingsError(f"{variable}={url} is not allowed: must be a valid URL with a host")
    if parts.scheme != "https" and not (allow_http or is_loopback(parts.host)):
        raise SettingsError(
            f"{variable}={url} is not allowed: anyone who can change the response in transit can impersonate any user; "
            f"set an https URL, or {Settings.variable('auth_jwks_allow_http')}=true in a trusted network"
        )
