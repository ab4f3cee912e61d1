"""The public keys that an issuer of tokens publishes (JSON Web Key Set, RFC 7517): fetched, kept, and fetched anew.

A key set is a foreign document. Whatever is in it, the task that fetches it goes on: a document that is no key set
changes nothing until the keys are too old, and of a key set each key that cannot be used is left out by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jwt
import structlog
from pydantic_core import from_json

from imstream.errors import SettingsError
from imstream.guards.auth import Algorithm, InvalidToken, KeysUnavailable
from imstream.guards.auth.keys import algorithm_of
from imstream.guards.auth.rules import key_id
from imstream.settings import Settings
from imstream.urls import SecretUrl, is_loopback

REFRESH = timedelta(minutes=5)
"""Between two looks at the keys. One that was withdrawn is believed no longer than this."""

APART = timedelta(seconds=5)
"""Least time between two looks, whatever keys the tokens of strangers name; and until the next one after a failure."""

FETCH_LIMIT = timedelta(seconds=5)
"""Time that the address has to answer."""

MAX_SIZE = 262_144
"""Bytes of the largest answer that is taken."""

MAX_KEYS = 64
"""Most keys that are kept; a token that names none is tried with all of them."""

log = structlog.get_logger()

Found = list[tuple[str | None, Any]]
"""Keys, with their names if they have some."""


class NoKeySet(ValueError):  # noqa: N818 - a verdict on what somebody else publishes
    """What came is no key set. The text is our own."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """What a key set holds: `keys` that can be used, and how many are `broken`, for the log."""

    keys: Found
    broken: int


class PublishedKeys:
    """The keys at one URL. Before the first answer there are none, and none again when the last answer is too old."""

    def __init__(
        self,
        url: SecretUrl,
        algorithm: Algorithm,
        *,
        max_age: timedelta,
        refresh: timedelta = REFRESH,
        apart: timedelta = APART,
    ) -> None:
        self._url = url
        self._algorithm = algorithm
        self._max_age = max_age.total_seconds()
        self._refresh = min(refresh, max_age / 2).total_seconds()
        self._apart = apart.total_seconds()
        self._known: KeySet | None = None
        self._failing = False
        self._looked_at = self._fetched_at = float("-inf")
        """When the last look began, and the last one that found a key set, in seconds of the event loop."""
        self._looking = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """See `KeySource`."""
        session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=FETCH_LIMIT.total_seconds()),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,  # a few bytes could unpack to any number
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        async with session as self._session, asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep_fresh(), name="keys of tokens")
            yield
            keeping.cancel()

    async def reload(self) -> bool:
        """See `KeySource`."""
        async with self._looking:
            await self._look()
        return True

    async def keys_for(self, token: str) -> Sequence[Any]:
        """See `KeySource`. A key that is not known is looked for, but seldom."""
        name = key_id(token)
        self._drop_when_too_old()
        if self._known is None:
            raise KeysUnavailable(self._next_look())
        return self._named(name) or await self._look_for(name)

    def _named(self, name: str | None) -> list[Any]:
        """The keys with this name, or else those without one; all of them for a token that names none."""
        found = self._known.keys if self._known is not None else []
        if name is None:
            return [key for _, key in found]
        named = [key for its_name, key in found if its_name == name]
        return named or [key for its_name, key in found if its_name is None]

    def _drop_when_too_old(self) -> None:
        """Forget keys whose issuer has not confirmed them for too long: they may be withdrawn by now."""
        age = asyncio.get_running_loop().time() - self._fetched_at
        if self._known is not None and age > self._max_age:
            self._known = None
            log.error("keys of tokens too old, nobody is logged in", url=str(self._url), seconds=round(age))

    def _next_look(self) -> timedelta:
        now = asyncio.get_running_loop().time()
        return timedelta(seconds=max(self._apart / 10, self._looked_at + self._apart - now))

    async def _look_for(self, name: str | None) -> list[Any]:
        """See whether there is such a key by now.

        Raises:
            InvalidToken: There is none.
            KeysUnavailable: That is not known, because the last look is not long enough ago, or because this one fails.
        """
        async with self._looking:
            if keys := self._named(name):
                return keys  # somebody else has looked, meanwhile
            if asyncio.get_running_loop().time() < self._looked_at + self._apart:
                raise KeysUnavailable(self._next_look())
            await self._look()
            if self._failing:
                raise KeysUnavailable(self._next_look())
        if not (keys := self._named(name)):
            raise InvalidToken("unknown_key")
        return keys

    async def _keep_fresh(self) -> None:
        while True:
            async with self._looking:
                await self._look()
            self._drop_when_too_old()
            await asyncio.sleep(self._apart if self._failing else self._refresh)

    async def _look(self) -> None:
        self._looked_at = asyncio.get_running_loop().time()
        try:
            # In a thread: 256 KB of broken keys take a fifth of a second.
            found = await asyncio.to_thread(read_key_set, await self._fetch(), self._algorithm)
        except Exception as error:  # noqa: BLE001 - whatever a stranger publishes, the keys that are known stay
            if not self._failing:
                # Other texts may hold what came, or the URL with its password.
                ours = isinstance(error, NoKeySet | aiohttp.ClientConnectorError)
                why = str(error) if ours else type(error).__name__
                kept = len(self._known.keys) if self._known is not None else 0
                log.warning("keys of tokens away", url=str(self._url), error=why, kept=kept)
            self._failing = True
            return
        before, self._known = self._known, found
        if self._failing or before is None:
            log.info("keys of tokens reached", url=str(self._url), keys=len(found.keys))
        if found.broken and (before is None or before.broken != found.broken):
            log.warning("keys of tokens cannot be used", url=str(self._url), broken=found.broken)
        if not found.keys and (before is None or before.keys):
            log.error("there is no key for tokens, nobody is logged in", url=str(self._url), algorithm=self._algorithm)
        self._fetched_at, self._failing = self._looked_at, False

    async def _fetch(self) -> bytes:
        assert self._session is not None  # noqa: S101 - it is, at work
        # Not followed elsewhere: who says which keys are good says who anybody is.
        async with self._session.get(self._url.get_secret_value(), allow_redirects=False) as answer:
            if answer.status != 200:  # noqa: PLR2004 - OK
                raise NoKeySet(f"the answer is HTTP {answer.status}")
            if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise NoKeySet("the answer is compressed, which was not asked for")
            content = bytearray()
            async for part in answer.content.iter_chunked(MAX_SIZE):
                content += part
                if len(content) > MAX_SIZE:
                    raise NoKeySet(f"the answer has more than {MAX_SIZE} bytes")
        return bytes(content)


def check_url(url: SecretUrl, *, allow_http: bool) -> None:
    """See that nobody on the way can exchange the keys. Raises `SettingsError`."""
    variable, allowing = Settings.variable("auth_jwks_url"), Settings.variable("auth_jwks_allow_http")
    try:
        parts = urlsplit(url.get_secret_value())
        host = parts.hostname or ""
    except ValueError:
        host = ""
    if not host:
        raise SettingsError(f"{variable}={url} is not allowed: must be a URL with a host")
    if parts.scheme != "https" and not (allow_http or is_loopback(host)):
        raise SettingsError(
            f"{variable}={url} is not allowed: whoever can change what comes over http could be anybody; "
            f"set an https URL, or {allowing}=true in a network where everybody is trusted"
        )


def read_key_set(content: bytes, algorithm: Algorithm) -> KeySet:
    """Read the keys of a key set that are for signatures of this algorithm. There may be none.

    Raises:
        NoKeySet: It is no key set.
    """
    try:
        document = from_json(content)
    except ValueError:
        raise NoKeySet("the answer is no JSON") from None
    published = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(published, list):
        raise NoKeySet("the answer is no JSON Web Key Set")
    found, broken = Found(), 0
    for one in published:
        try:
            key, name = _key(one, algorithm), one.get("kid")
        except Exception:  # noqa: BLE001 - whatever is wrong with it, the others may be good
            broken += 1
            continue
        if key is not None:
            found.append((name if isinstance(name, str) else None, key))
    return KeySet(found[:MAX_KEYS], broken)


def _key(published: dict[str, Any], algorithm: Algorithm) -> object | None:
    """A key, if it is for signatures of this algorithm. Raises whatever is wrong with it."""
    if published.get("use", "sig") != "sig" or published.get("alg", algorithm) != algorithm:
        return None
    if "verify" not in (published.get("key_ops") or ["verify"]):
        return None
    key: object = jwt.PyJWK(published, algorithm).key
    # A secret or a private key is none that this algorithm takes: nobody should have published it.
    return key if algorithm_of(key) == algorithm else None
