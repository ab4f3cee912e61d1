"""The base of clients of a server that is compatible with OpenAI: its URL, key, connections and error responses."""

import asyncio
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Self

from multidict import CIMultiDict
from pydantic import SecretStr
from yarl import URL

from imstream import __version__
from imstream.ai import failures
from imstream.ai.http_client import HttpClient
from imstream.ai.http_response import HttpError, Response
from imstream.errors import BackendError, SettingsError
from imstream.urls import SecretUrl, secrets_in_query

ERROR_BODY_LIMIT = 8192  # bytes read of the body of an error response
ERROR_BODY_WAIT = timedelta(seconds=2)  # time limit for that body, which only explains the status


@dataclass(frozen=True, slots=True, repr=False)  # all fields may contain a secret
class Endpoint:
    """A URL, the headers of each request, the texts that no error may show, and the proxy of requests, if any."""

    url: URL
    headers: Mapping[str, str]
    secrets: tuple[str, ...]
    proxy: URL | None = None


class EndpointClient:
    """Calls one endpoint. An async context manager, which opens and closes the connections."""

    _accept: ClassVar[str]  # content types of the responses

    def __init__(
        self, base: SecretUrl | None, key: SecretStr | None, *, path: str, limit: int, variable: Callable[[str], str]
    ) -> None:
        """Call `path` below the base URL, with at most `limit` bytes of the body of a response.

        The key takes precedence over credentials in the URL. Raises `SettingsError` about the settings `url` and `key`,
        which `variable` names: a base URL without a host, or a key that is not allowed in a header.
        """
        plain = key.get_secret_value().strip() if key is not None else ""
        if not (plain.isascii() and plain.isprintable()):
            raise SettingsError(f"{variable('key')}=(hidden) is not allowed: must be printable ASCII")
        try:
            url = URL(base.get_secret_value() if base is not None else "")
        except ValueError:
            url = URL()
        if not url.host:
            raise SettingsError(
                f"{variable('url')}={str(base or '')!r} is not allowed: must be a URL with a host, ending in /v1"
            )
        headers = CIMultiDict(
            {
                "Accept": self._accept,
                "Accept-Encoding": "identity",  # compression would delay tokens until a block is full
                "User-Agent": f"imstream/{__version__}",
            }
        )
        if plain:
            url = url.with_user(None)
            headers["Authorization"] = f"Bearer {plain}"
        secrets = (plain, *_passwords(url), *secrets_in_query(str(url)))
        url = url.with_path(f"{url.raw_path.rstrip('/')}/{path}", encoded=True, keep_query=True)
        self._endpoint = Endpoint(url, headers, tuple(filter(None, secrets)))
        self._body_limit = limit
        self._client: HttpClient | None = None

    def _extend_endpoint(self, headers: Mapping[str, str], secrets: Iterable[str], proxy: URL | None) -> None:
        """Send more headers, which take precedence, also over the key; hide more texts; use a proxy."""
        endpoint = self._endpoint
        if any(name.lower() == "authorization" for name in headers):
            endpoint = replace(endpoint, url=endpoint.url.with_user(None))
        together = CIMultiDict(endpoint.headers)
        together.update(headers)
        every = [*endpoint.secrets, *secrets, *(_passwords(proxy) if proxy is not None else ())]
        self._endpoint = replace(
            endpoint,
            headers=together,
            # A longer one first: it may contain a shorter one.
            secrets=tuple(sorted(filter(None, set(every)), key=lambda secret: (-len(secret), secret))),
            proxy=proxy,
        )

    async def __aenter__(self) -> Self:
        endpoint, limit = self._endpoint, self._body_limit
        self._client = HttpClient(endpoint.url, endpoint.headers, proxy=endpoint.proxy, limit=limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    @property
    def _http(self) -> HttpClient:
        if self._client is None:
            raise RuntimeError(f"{type(self).__name__} is used outside its context")
        return self._client

    async def _read_error(self, response: Response) -> bytes:
        """The beginning of the body of an error response, as far as it arrives in time and is not encoded."""
        if response.is_encoded:
            return b""
        body = b""
        deadline = asyncio.get_running_loop().time() + ERROR_BODY_WAIT.total_seconds()
        while len(body) < ERROR_BODY_LIMIT and (data := await read_until(response, deadline)):
            body += data
        return body[:ERROR_BODY_LIMIT]

    def _error(self, response: Response, body: bytes) -> BackendError:
        now = datetime.now(UTC)
        return failures.from_response(response.status, response.headers, body, now=now, secrets=self._endpoint.secrets)


def _passwords(url: URL) -> tuple[str, ...]:
    """The password of a URL, plain and encoded: some servers repeat the header that they reject."""
    password = url.password or ""
    return (password, b64encode(f"{url.user or ''}:{password}".encode()).decode()) if password else ()


async def read_until(response: Response, deadline: float) -> bytes:
    """Read what arrives first before the deadline (loop time); empty if the body ends or breaks instead."""
    try:
        async with asyncio.timeout_at(deadline):
            return await response.read()
    except (TimeoutError, HttpError):
        return b""
