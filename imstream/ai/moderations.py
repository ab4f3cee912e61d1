"""Client of a moderation API that is compatible with OpenAI, and the batches of texts that its calls carry.

https://platform.openai.com/docs/api-reference/moderations
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from typing import Any, Generic, TypeVar, cast

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

MAX_CALLS = 8  # at the same time
MIN_INTERVAL = 0.020  # seconds between the starts of two calls, unless a batch is full: bounds the delay

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModerationResult:
    """The verdict on one text. `categories`: names of the flagged categories, on one shortened line."""

    flagged: bool
    categories: str = ""


class ModerationClient(EndpointClient):
    """One `moderate` is one `POST {url}/moderations`. An async context manager; end every call before leaving it."""

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


class Batcher(Generic[T]):
    """Groups texts that arrive at about the same time into one `call` of at most `size`, which costs little more.

    the last call began `MIN_INTERVAL` ago or earlier   texts of one turn of the event loop are sent together, at once
    the last call began later                           texts are collected until then, or until the batch is full
    `MAX_CALLS` calls are running                       texts are collected until one of them ends
    """

    def __init__(self, call: Callable[[Sequence[str]], Awaitable[Sequence[T]]], *, size: int) -> None:
        self._call = call
        self._size = size
        self._queue: deque[tuple[str, asyncio.Future[T]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._next_start = 0.0  # of a call that is not full (loop time)

    async def submit(self, text: str) -> T:
        """The result for a text. Cancelling does not affect other texts of the same call."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._queue.append((text, result))
        if len(self._queue) >= self._size:
            self._start_calls()
        elif self._timer is None:
            self._timer = loop.call_at(self._next_start, self._start_calls)  # if in the past: in the next turn
        try:
            return await result
        finally:
            del result  # breaks a reference cycle: its exception has a traceback with this frame

    def resolve_queued(self, result: T) -> None:
        """Give this result to all texts whose call has not started."""
        while self._queue:
            _, future = self._queue.popleft()
            if not future.done():
                future.set_result(result)

    async def aclose(self) -> None:
        """Cancel all calls. No caller may be waiting for a result."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._calls:
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)

    def _start_calls(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._queue and len(self._calls) < MAX_CALLS:
            batch = list[tuple[str, asyncio.Future[T]]]()
            while self._queue and len(batch) < self._size:
                text, future = self._queue.popleft()
                if not future.done():  # cancelled
                    batch.append((text, future))
            if batch:
                self._calls.add(loop.create_task(self._run(batch)))
                self._next_start = loop.time() + MIN_INTERVAL

    async def _run(self, batch: list[tuple[str, asyncio.Future[T]]]) -> None:
        try:
            results = await self._call([text for text, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:  # noqa: BLE001 - passed on to all texts
            _fail(batch, error)  # a function, whose frame is in no traceback and so in no reference cycle
        finally:
            while batch:  # emptied to break reference cycles: exceptions have tracebacks with this frame
                batch.pop()[1].cancel()  # has no result yet if the call is cancelled
            self._calls.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            if self._timer is None:  # texts may be waiting because too many calls were running
                self._start_calls()


def _fail(batch: Sequence[tuple[str, asyncio.Future[T]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            failure = RuntimeError("the call has failed")  # one each: a traceback is part of the exception
            failure.__cause__ = error
            future.set_exception(failure)
