"""Client of a moderation API that is compatible with OpenAI: one call of `moderate` is one `POST {url}/moderations`.

https://platform.openai.com/docs/api-reference/moderations
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json

from imstream.ai import failures
from imstream.ai.endpoint import EndpointClient
from imstream.ai.error_report import ErrorReport, shorten
from imstream.ai.http_response import HttpError
from imstream.errors import BackendError
from imstream.settings import Settings

ANSWER_LIMIT = 1 << 18  # bytes of an answer; one result of OpenAI has about 1 KB
WRONG_NUMBER = "wrong_number"  # reason of an error: the number of results is not that of the texts
_MAX_CATEGORIES = 16  # of one text that are logged; OpenAI has 13


@dataclass(frozen=True, slots=True)
class ModerationResult:
    """The verdict on one text. `categories`: names of the flagged categories, on one shortened line."""

    flagged: bool
    categories: str = ""


class ModerationClient(EndpointClient):
    """Use as an async context manager; end every `moderate` before leaving it."""

    _accept = "application/json"

    def __init__(self, settings: Settings) -> None:
        base, key = settings.moderation_url, settings.moderation_key
        super().__init__(
            base,
            key,
            path="moderations",
            limit=2 * ANSWER_LIMIT,
            variable=lambda option: Settings.variable(f"moderation_{option}"),
        )
        self._model = settings.moderation_model
        self._timeout = settings.moderation_timeout.total_seconds()

    async def moderate(self, texts: Sequence[str]) -> list[ModerationResult]:
        """Moderate texts. A single text is sent as a string, which every server accepts. Raises `BackendError`."""
        try:
            data = to_json({"model": self._model, "input": texts[0] if len(texts) == 1 else texts})
        except PydanticSerializationError:
            raise BackendError("bad_prompt", "the text is not valid Unicode", kind="impossible") from None
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._post(data)
        except TimeoutError:
            raise BackendError("timeout", f"after {self._timeout:g} s") from None
        return self._parse(body, len(texts))

    async def _post(self, data: bytes) -> bytes:
        try:
            async with await self._http.request("POST", self._endpoint.url, data) as response:
                if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                    raise self._error(response, await self._read_error(response))
                if response.is_encoded:
                    raise BackendError("bad_answer", "a body with a content encoding, which is not supported")
                body = await response.read_all(ANSWER_LIMIT)
                if len(body) > ANSWER_LIMIT:
                    raise BackendError("bad_answer", f"more than {ANSWER_LIMIT} bytes")
                return body
        except HttpError as error:
            raise failures.from_exception(error, secrets=self._endpoint.secrets) from None

    def _parse(self, body: bytes, number: int) -> list[ModerationResult]:
        try:
            value = from_json(body, cache_strings=False)
        except ValueError:
            raise BackendError("bad_answer", "no JSON") from None
        if not isinstance(value, dict):
            raise BackendError("bad_answer", "JSON of another shape than a moderation's")
        if value.get("error"):
            raise failures.from_report(ErrorReport.from_value(value), secrets=self._endpoint.secrets)
        results = value.get("results")
        if not isinstance(results, list):
            raise BackendError("bad_answer", "JSON without results")
        if len(results) != number:
            raise BackendError(WRONG_NUMBER, f"{len(results)} results for {number} texts")
        return [self._parse_result(result) for result in results]

    def _parse_result(self, result: Any) -> ModerationResult:  # noqa: ANN401 - JSON
        flagged = result.get("flagged") if isinstance(result, dict) else None
        if not isinstance(flagged, bool):
            raise BackendError("bad_answer", "a result without the field flagged")
        if not flagged:
            return ModerationResult(flagged=False)
        categories = result.get("categories")
        names = (name for name, value in categories.items() if value is True) if isinstance(categories, dict) else ()
        line = ", ".join(islice(names, _MAX_CATEGORIES))
        return ModerationResult(flagged=True, categories=shorten(line, self._endpoint.secrets))
