"""The public keys that an issuer of tokens publishes (JSON Web Key Set, RFC 7517): fetched, kept, and fetched anew."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiohttp
import jwt
import structlog
from pydantic_core import from_json

from imstream.guards.tokens import KeysAway, NotBelieved
from imstream.guards.tokens.keys import algorithm_of
from imstream.guards.tokens.rules import key_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from imstream.guards.tokens import Algorithm
    from imstream.redis_url import SecretUrl

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


class PublishedKeys:
    """The keys at one address. While it is away the old ones are kept; before the first answer there are none."""

    def __init__(
        self, url: SecretUrl, algorithm: Algorithm, *, refresh: timedelta = REFRESH, apart: timedelta = APART
    ) -> None:
        self._url = url
        self._algorithm = algorithm
        self._refresh = refresh.total_seconds()
        self._apart = apart.total_seconds()
        self._found: Found = []
        self._failing = False
        self._looked_at = float("-inf")
        """When the last look began, in seconds of the event loop."""
        self._looking = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """See `KeySource`."""
        limit = aiohttp.ClientTimeout(total=FETCH_LIMIT.total_seconds())
        async with aiohttp.ClientSession(timeout=limit) as self._session, asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep_fresh(), name="keys of tokens")
            yield
            keeping.cancel()

    async def keys_for(self, token: str) -> Sequence[Any]:
        """See `KeySource`. A key that is not known is looked for, but seldom."""
        name = key_id(token)
        if not self._found:
            raise KeysAway(self._next_look())
        return self._named(name) or await self._look_for(name)

    def _named(self, name: str | None) -> list[Any]:
        """The keys with this name, or else those without one; all of them for a token that names none."""
        if name is None:
            return [key for _, key in self._found]
        named = [key for its_name, key in self._found if its_name == name]
        return named or [key for its_name, key in self._found if its_name is None]

    def _next_look(self) -> timedelta:
        now = asyncio.get_running_loop().time()
        return timedelta(seconds=max(self._apart / 10, self._looked_at + self._apart - now))

    async def _look_for(self, name: str | None) -> list[Any]:
        """See whether there is such a key by now.

        Raises:
            NotBelieved: There is none.
            KeysAway: That is not known, because the last look is not long enough ago, or because this one fails.
        """
        async with self._looking:
            if keys := self._named(name):
                return keys  # somebody else has looked, meanwhile
            if asyncio.get_running_loop().time() < self._looked_at + self._apart:
                raise KeysAway(self._next_look())
            await self._look()
            if self._failing:
                raise KeysAway(self._next_look())
        if not (keys := self._named(name)):
            raise NotBelieved("unknown_key")
        return keys

    async def _keep_fresh(self) -> None:
        while True:
            async with self._looking:
                await self._look()
            await asyncio.sleep(self._apart if self._failing else self._refresh)

    async def _look(self) -> None:
        self._looked_at = asyncio.get_running_loop().time()
        try:
            found = usable(await self._fetch(), self._algorithm)
            if not found:
                raise ValueError(f"there is no key for {self._algorithm}")  # noqa: TRY301 - one place to fail
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if not self._failing:
                why = str(error) or type(error).__name__
                log.warning("keys of tokens away", url=str(self._url), error=why, kept=len(self._found))
            self._failing = True
            return
        if self._failing or not self._found:
            log.info("keys of tokens reached", url=str(self._url), keys=len(found))
        self._found, self._failing = found, False

    async def _fetch(self) -> object:
        assert self._session is not None  # noqa: S101 - it is, at work
        # Not followed elsewhere: who says which keys are good says who anybody is.
        async with self._session.get(self._url.get_secret_value(), allow_redirects=False) as answer:
            if answer.status != 200:  # noqa: PLR2004 - OK
                raise ValueError(f"the answer is HTTP {answer.status}")
            content = bytearray()
            async for part in answer.content.iter_chunked(MAX_SIZE):
                content += part
                if len(content) > MAX_SIZE:
                    raise ValueError(f"the answer has more than {MAX_SIZE} bytes")
        document: object = from_json(bytes(content))
        return document


def usable(document: object, algorithm: Algorithm) -> Found:
    """The keys of a key set that are for signatures of this algorithm; others are left out.

    Raises:
        ValueError: It is no key set.
    """
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ValueError("the answer is no JSON Web Key Set")  # noqa: TRY004 - their document, not our type
    found = ((one.get("kid"), _key(one, algorithm)) for one in keys if isinstance(one, dict))
    return [(name if isinstance(name, str) else None, key) for name, key in found if key is not None][:MAX_KEYS]


def _key(published: dict[str, Any], algorithm: Algorithm) -> object | None:
    """A key, if it is for signatures of this algorithm."""
    if published.get("use", "sig") != "sig" or published.get("alg", algorithm) != algorithm:
        return None
    if "verify" not in (published.get("key_ops") or ["verify"]):
        return None
    try:
        key: object = jwt.PyJWK(published, algorithm).key
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the others may be good
        log.warning("a key of tokens cannot be used", error=type(error).__name__)
        return None
    # A secret or a private key is none that this algorithm takes: nobody should have published it.
    return key if algorithm_of(key) == algorithm else None
