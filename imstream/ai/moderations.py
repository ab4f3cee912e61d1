"""The client of any server that speaks OpenAI's `POST {url}/moderations`.

https://platform.openai.com/docs/api-reference/moderations. One call of `moderate` is one HTTP request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from typing import Any

import aiohttp
from pydantic_core import PydanticSerializationError, from_json, to_json

from imstream.ai import failures
from imstream.ai.bounded_http import ENCODED, is_encoded
from imstream.ai.endpoint import Endpoint, EndpointClient, read_error
from imstream.ai.error_report import ErrorReport, shorten
from imstream.errors import PermanentBackendError, TransientBackendError
from imstream.settings import Settings

ANSWER_LIMIT = 1 << 18
"""Maximum bytes of an answer. One result of OpenAI's takes about 1 KB."""

_MOST_CATEGORIES = 16
"""Maximum categories of one text that are told. OpenAI has 13."""

WRONG_NUMBER = "wrong_number"
"""The reason of an error: there were fewer or more results than texts."""

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Moderated:
    """What the server thinks of one text. `categories`: names of what it found, on one line, shortened."""

    flagged: bool
    categories: str = ""


class Moderations(EndpointClient):
    """A server that moderates. Use it as an async context manager; end every `moderate` before leaving it."""

    _accept = "application/json"

    def __init__(self, settings: Settings) -> None:
        base, key = settings.moderation_url, settings.moderation_key
        super().__init__(Endpoint.of("MODERATION", base, key, path="moderations"), limit=2 * ANSWER_LIMIT)
        self._model = settings.moderation_model
        self._limit = settings.moderation_timeout.total_seconds()

    async def moderate(self, texts: Sequence[str]) -> list[Moderated]:
        """What the server thinks of each text. One text is sent as a string, as every server takes it.

        Raises:
            TransientBackendError: It cannot be told now.
            PermanentBackendError: The server refuses the request, and will again.
        """
        request = {"model": self._model, "input": texts[0] if len(texts) == 1 else texts}
        try:
            data = to_json(request)
        except PydanticSerializationError:
            raise PermanentBackendError("bad_prompt", "the text is not valid Unicode") from None
        try:
            async with asyncio.timeout(self._limit):
                body = await self._post(data)
        except TimeoutError:
            raise TransientBackendError("timeout", f"after {self._limit:g} s") from None
        return self._read(body, len(texts))

    async def _post(self, data: bytes) -> bytes:
        try:
            async with self._session.post(
                self._endpoint.url, data=data, headers=_JSON, allow_redirects=False
            ) as response:
                if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                    if is_encoded(response):
                        raise TransientBackendError("bad_answer", ENCODED)
                    return await _whole(response)
                raise self._endpoint.refusal(response, await read_error(response))
        except TimeoutError:  # an OSError as well
            raise
        except (aiohttp.ClientError, OSError) as error:
            # Not "from error": aiohttp's exceptions carry the request with its headers, and so the key.
            raise failures.from_exception(error, secrets=self._endpoint.secrets) from None

    def _read(self, body: bytes, number: int) -> list[Moderated]:
        try:
            value = from_json(body, cache_strings=False)
        except ValueError:
            raise TransientBackendError("bad_answer", "no JSON") from None
        if not isinstance(value, dict):
            raise TransientBackendError("bad_answer", "JSON of another shape than a moderation's")
        if value.get("error"):
            raise failures.from_report(ErrorReport.from_value(value), secrets=self._endpoint.secrets)
        results = value.get("results")
        if not isinstance(results, list):
            raise TransientBackendError("bad_answer", "JSON without results")
        if len(results) != number:
            raise TransientBackendError(WRONG_NUMBER, f"{len(results)} results for {number} texts")
        return [self._read_result(result) for result in results]

    def _read_result(self, result: Any) -> Moderated:  # noqa: ANN401 - JSON
        flagged = result.get("flagged") if isinstance(result, dict) else None
        if flagged is False:
            return _CLEAN
        if flagged is not True:
            raise TransientBackendError("bad_answer", "a result that does not say whether it is flagged")
        categories = result.get("categories")
        found = _found(categories) if isinstance(categories, dict) else ()
        return Moderated(flagged=True, categories=shorten(", ".join(found), self._endpoint.secrets))


_CLEAN = Moderated(flagged=False)


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The whole body of an answer."""
    body = bytearray()
    while data := await response.content.readany():
        body += data
        if len(body) > ANSWER_LIMIT:
            response.close()
            raise TransientBackendError("bad_answer", f"more than {ANSWER_LIMIT} bytes")
    return bytes(body)


def _found(categories: dict[str, Any]) -> Iterator[str]:
    return islice((name for name, value in categories.items() if value is True), _MOST_CATEGORIES)
