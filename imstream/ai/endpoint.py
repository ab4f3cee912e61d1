"""Where a server that speaks OpenAI's protocol is called: address, key, connections, and how its refusals are read."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import ClassVar, Self

import aiohttp
from pydantic import SecretStr
from yarl import URL

from imstream import __version__
from imstream.ai import failures
from imstream.ai.bounded_http import bounded_session, is_encoded
from imstream.errors import BackendError, SettingsError
from imstream.settings import ENV_PREFIX
from imstream.urls import SecretUrl

KEEP_ALIVE = timedelta(seconds=4)
"""How long an unused connection is kept. Servers close theirs after 5 s (uvicorn, Node) or later; whoever closes second
may send a request into a connection that has just gone."""

ERROR_BODY_LIMIT = 8192
"""Most bytes read of what comes with an error status."""

ERROR_BODY_WAIT = timedelta(seconds=2)
"""How long these bytes are waited for. The status is known by then; the body only explains it."""


@dataclass(frozen=True, slots=True, repr=False)  # each of its fields may hold a secret
class Endpoint:
    """One thing that a server is called for.

    Attributes:
        url: Where to send it.
        authorization: The header that authorizes it; empty: the address does, or nothing.
        secrets: What no text may show, even when the server repeats it.
    """

    url: URL
    authorization: str
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, name: str, base: SecretUrl | None, key: SecretStr | None, *, path: str) -> Self:
        """The endpoint of a base URL.

        Args:
            name: How the two settings begin, such as `AI`.
            base: The base URL, ending in `/v1`.
            key: The key that calls show.
            path: What is called, such as `chat/completions`.

        Raises:
            SettingsError: The base is no URL with a host, or the key cannot stand in a header.
        """
        plain = _plain_key(name, key)
        try:
            url = URL(base.get_secret_value() if base is not None else "")
        except ValueError:
            url = URL()
        if not url.host:
            raise SettingsError(
                f"{ENV_PREFIX}{name}_URL={str(base or '')!r} is not allowed: must be a URL with a host, ending in /v1"
            )
        if plain:  # two ways to authorize would contradict each other
            url = url.with_user(None)
        # Also as the server sees them: some repeat the header that they refuse.
        password = url.password or ""
        basic = b64encode(f"{url.user or ''}:{password}".encode()).decode() if password else ""
        return cls(
            url.with_path(f"{url.raw_path.rstrip('/')}/{path}", encoded=True, keep_query=True),
            f"Bearer {plain}" if plain else "",
            tuple(secret for secret in (plain, password, basic) if secret),
        )

    def session(self, *, accept: str, limit: int) -> aiohttp.ClientSession:
        """Connections to it. Their number has no limit: who waited for one would be told that it cannot be reached.

        Args:
            accept: Content types that are asked for.
            limit: Maximum bytes of the body of a response.
        """
        headers = {
            "Accept": accept,
            "Accept-Encoding": "identity",  # compressed, a token would wait for others to fill a block
            "User-Agent": f"imstream/{__version__}",
        }
        if self.authorization:
            headers["Authorization"] = self.authorization
        # All time limits are the caller's. aiohttp's own would set a timer at each read.
        return bounded_session(headers=headers, limit=limit, keep_alive=KEEP_ALIVE)

    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> BackendError:
        """The error for a response that is no success, and the beginning of its body."""
        return failures.from_response(
            response.status, response.headers, body, now=datetime.now(UTC), secrets=self.secrets
        )


class EndpointClient:
    """Whoever calls one endpoint, as an async context manager: inside it there are connections, which close with it."""

    _accept: ClassVar[str]
    """What answers are asked for, as content types."""

    def __init__(self, endpoint: Endpoint, *, limit: int) -> None:
        """`limit`: maximum bytes of the body of a response."""
        self._endpoint = endpoint
        self._body_limit = limit
        self._open_session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._open_session = self._endpoint.session(accept=self._accept, limit=self._body_limit)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._open_session is None:
            raise RuntimeError(f"{type(self).__name__} is used outside its context")
        return self._open_session


async def read_error(response: aiohttp.ClientResponse) -> bytes:
    """The beginning of the body of a response that is no success, as far as it comes in time and can be read."""
    body = b""
    if is_encoded(response):
        return body
    until = asyncio.get_running_loop().time() + ERROR_BODY_WAIT.total_seconds()
    while len(body) < ERROR_BODY_LIMIT and (data := await read_until(response.content, until)):
        body += data
    return body[:ERROR_BODY_LIMIT]


async def read_until(content: aiohttp.StreamReader, deadline: float) -> bytes:
    """Read whatever comes before the deadline, on the loop's clock; nothing when the stream ends or breaks first."""
    try:
        async with asyncio.timeout_at(deadline):
            return await content.readany()
    except (TimeoutError, aiohttp.ClientError, OSError):
        return b""


def _plain_key(name: str, key: SecretStr | None) -> str:
    plain = key.get_secret_value().strip() if key is not None else ""
    if not (plain.isascii() and plain.isprintable()):
        raise SettingsError(f"{ENV_PREFIX}{name}_KEY=(hidden) is not allowed: must be printable ASCII")
    return plain
