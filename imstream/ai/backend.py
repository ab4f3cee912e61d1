"""The AI backend as the worker sees it, and the client of any OpenAI-compatible server.

One call of `answer` is one HTTP request. Nothing is tried again here: the worker has the only retry loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from time import perf_counter
from typing import Literal, Protocol

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from pydantic_core import PydanticSerializationError, to_json

from imstream.ai import failures
from imstream.ai.answer_reader import BYTES_A_CHARACTER, JSON_LIMIT, AnswerReader
from imstream.ai.bounded_http import ENCODED, is_encoded
from imstream.ai.endpoint import Endpoint, EndpointClient, read_error, read_until
from imstream.ai.stream_body import BodyBroken, stream_body
from imstream.ai.time_limits import TimeLimits
from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.settings import Settings

AFTER_FINISH = timedelta(seconds=2)
"""How long usage, `[DONE]` and the end of the body are waited for when the text is complete."""

AFTER_DONE = timedelta(milliseconds=100)
"""How long the end of the body is waited for after `[DONE]`, so that the connection can be used again."""

PIECE = 16 * 1024
"""Maximum bytes of an answer that are parsed, and characters that are handed on, in one turn of the event loop."""

LONG = 0.005
"""Seconds of one turn of the event loop that others notice."""


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Completion:
    """How a whole answer ended.

    Attributes:
        finish_reason: `stop`, `length` or what else the backend said; `stop` when it said only `[DONE]`.
        usage: Tokens used, when the backend told: `prompt_tokens`, `completion_tokens`, `total_tokens` and others of
            its own, with `reasoning_tokens` and `cached_tokens` taken out of their details.
    """

    finish_reason: str
    usage: dict[str, int] | None


class Backend(Protocol):
    """Whoever can answer a prompt."""

    async def answer(self, messages: Sequence[PromptMessage], *, on_text: Callable[[str], None]) -> Completion:
        """Have a prompt answered; return when the answer is whole.

        `on_text` gets the text in order, one piece per network read that held any (or several, when it held much), and
        never an empty one. A text that is longer than `max_answer` ends there, with the finish reason `length`.
        Cancelling closes the connection to the backend at once.

        Raises:
            TransientBackendError: There is no whole answer, but trying again may give one.
            PermanentBackendError: The backend refuses this request, and will again.
        """
        ...


class OpenAIBackend(EndpointClient):
    """A server that speaks `POST {ai_url}/chat/completions`. Use it as an async context manager.

    End every `answer` before leaving the context: the connections close with it.
    """

    _accept = "text/event-stream, application/json"

    def __init__(self, settings: Settings) -> None:
        limit = settings.max_answer * BYTES_A_CHARACTER + 2 * JSON_LIMIT
        super().__init__(Endpoint.of("AI", settings.ai_url, settings.ai_key, path="chat/completions"), limit=limit)
        self._settings = settings
        self._asks_for_usage = True
        self._turns = _Turns()

    async def answer(self, messages: Sequence[PromptMessage], *, on_text: Callable[[str], None]) -> Completion:
        """See `Backend.answer`."""
        with_usage = self._asks_for_usage
        body = self._encode(messages, with_usage=with_usage)
        total = self._settings.ai_total_timeout
        async with TimeLimits(total=total) as limits, await self._send(body, limits) as response:
            if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                return await self._receive(response, limits, on_text)
            limits.stop()
            raise await self._refusal(response, with_usage=with_usage)

    def _encode(self, messages: Sequence[PromptMessage], *, with_usage: bool) -> bytes:
        body: dict[str, object] = {
            "model": self._settings.ai_model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
        }
        if with_usage:
            body["stream_options"] = {"include_usage": True}
        try:
            return to_json(body)
        except PydanticSerializationError:
            raise PermanentBackendError("bad_prompt", "the prompt is not valid Unicode") from None

    async def _send(self, body: bytes, limits: TimeLimits) -> aiohttp.ClientResponse:
        """Send the request; return when the head of the response is there."""
        first_token = self._settings.ai_first_token_timeout
        limits.expect("connect_timeout", within=self._settings.ai_connect_timeout)
        request = _Request(body, on_send=lambda: limits.expect("first_token_timeout", within=first_token))
        try:
            return await self._session.post(self._endpoint.url, data=request, allow_redirects=False)
        except (aiohttp.ClientError, OSError) as error:
            # Not "from error": aiohttp's exceptions carry the request with its headers, and so the key.
            raise failures.from_exception(error, secrets=self._endpoint.secrets) from None

    async def _receive(
        self, response: aiohttp.ClientResponse, limits: TimeLimits, on_text: Callable[[str], None]
    ) -> Completion:
        if is_encoded(response):
            raise TransientBackendError("bad_stream", ENCODED)
        reader = AnswerReader(limit=self._settings.max_answer, secrets=self._endpoint.secrets)
        intake = _Intake(reader, limits, on_text, idle=self._settings.ai_idle_timeout, turns=self._turns)
        try:
            while not reader.whole:
                await stream_body(response, intake.take)
                await intake.catch_up()
        except BodyBroken as broken:
            raise failures.from_exception(broken.cause, secrets=self._endpoint.secrets) from None
        limits.stop()
        if not reader.cut:
            await self._receive_rest(response.content, reader, intake)
        return Completion(reader.finish_reason or "stop", reader.usage)

    async def _receive_rest(self, content: aiohttp.StreamReader, reader: AnswerReader, intake: _Intake) -> None:
        """Read what may follow a finish reason. The answer is whole: that nothing follows, or an end, is no error."""
        loop = asyncio.get_running_loop()
        until = loop.time() + AFTER_FINISH.total_seconds()
        while not reader.done and loop.time() < until and (data := await read_until(content, until)):
            intake.take(data)
            await intake.catch_up()
        if reader.done and not content.at_eof():
            await read_until(content, loop.time() + AFTER_DONE.total_seconds())

    async def _refusal(self, response: aiohttp.ClientResponse, *, with_usage: bool) -> BackendError:
        """The error for a response that is no success."""
        body = await read_error(response)
        if with_usage and response.status in failures.BLAMES_REQUEST and b"stream_options" in body:
            # A server that does not know the option. Without it there is no usage, but there is an answer.
            self._asks_for_usage = False
            return TransientBackendError(
                "stream_options_refused", "from now on usage is not asked for", retry_after=timedelta(0)
            )
        return self._endpoint.refusal(response, body)


class _Turns(asyncio.Lock):
    """Held by the answer that takes what costs much."""

    def __init__(self) -> None:
        super().__init__()
        self._spent = 0.0

    async def rest(self, spent: float) -> None:
        """Leave the event loop to others for as long as they were held up, when that has become long (seconds)."""
        self._spent += spent
        if self._spent > LONG:
            spent, self._spent = self._spent, 0.0
            await asyncio.sleep(spent)


class _Intake:
    """Takes the pieces of one answer as they come.

    What costs more than usual, a large piece or the end of a large event, is put aside, and taken by `catch_up` in
    small pieces. All answers that share `turns` take one at a time, and leave the event loop to others now and then.
    """

    def __init__(
        self,
        reader: AnswerReader,
        limits: TimeLimits,
        on_text: Callable[[str], None],
        *,
        idle: timedelta,
        turns: _Turns,
    ) -> None:
        self._reader = reader
        self._limits = limits
        self._on_text = on_text
        self._idle = idle
        self._turns = turns
        self._begun = False
        self._aside: bytes | None = None
        self._text = ""

    def take(self, data: bytes, *, now: bool = False) -> bool:
        """Take a piece, or `b""` at the end of the body; whether there may be more of them before `catch_up`.

        With `now` nothing is put aside. Raises as `AnswerReader` does.
        """
        reader = self._reader
        if (len(data) > PIECE or (reader.heavy and (b"\n" in data or not data))) and not now:
            self._aside = data
            return False
        text = reader.feed(data) if data else reader.end()
        if text:
            if len(text) <= PIECE:
                self._on_text(text)
            else:
                self._text = text
        if reader.moved:
            if self._begun:
                self._limits.renew()
            else:
                self._begun = True
                self._limits.expect("idle_timeout", within=self._idle)
        return not (reader.whole or self._text)

    async def catch_up(self) -> None:
        """Take what was put aside. Raises as `AnswerReader` does."""
        data, self._aside = self._aside, None
        if data is None:
            return await self._hand_on_text()
        for begin in range(0, len(data) or 1, PIECE):
            if self._reader.done:
                break
            async with self._turns:
                began = perf_counter()  # not the loop's clock: uvloop's stands still within a turn
                self.take(data[begin : begin + PIECE], now=True)
                await self._turns.rest(perf_counter() - began)
                await self._hand_on_text()
        return None

    async def _hand_on_text(self) -> None:
        text, self._text = self._text, ""
        for begin in range(0, len(text), PIECE):
            if begin:
                await asyncio.sleep(0)
            self._on_text(text[begin : begin + PIECE])


class _Request(aiohttp.BytesPayload):
    """The body of a request. Tells when it is sent, which is when there is a connection, new or used before."""

    def __init__(self, body: bytes, *, on_send: Callable[[], None]) -> None:
        super().__init__(body, content_type="application/json")
        self._on_send = on_send

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Called by aiohttp after the headers."""
        self._on_send()
        await super().write_with_length(writer, content_length)
