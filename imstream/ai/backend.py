"""The interface of an AI backend, and the client of servers that are compatible with OpenAI.

One call of `answer` is one HTTP request. It is not retried here: only the worker retries. The exception is a server
that may refuse to report token counts: it is asked again without them, at once.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from typing import Literal, Protocol, cast

import structlog
from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, from_json, to_json
from yarl import URL

from imstream.ai import failures
from imstream.ai.answer_reader import BYTES_PER_CHARACTER, JSON_LIMIT, AnswerReader
from imstream.ai.backend_options import BackendOptions, resolve_headers, resolve_parameters
from imstream.ai.dialect import UsageRequest, Written, adapt, continued, merged, parameters
from imstream.ai.endpoint import EndpointClient, read_until
from imstream.ai.error_report import shorten
from imstream.ai.failures import failure
from imstream.ai.http_response import BodyBroken, ConnectionLost, HttpError, Response
from imstream.ai.intake import Intake, Turn
from imstream.ai.rollup import RollUp
from imstream.ai.time_limits import AnswerLimits, TimeLimits
from imstream.errors import BackendError
from imstream.settings import Settings
from imstream.tracing import CURRENT, HEADER
from imstream.urls import redact_url

PATH = "chat/completions"
AFTER_FINISH = timedelta(seconds=2)  # time limit for usage, `[DONE]` and the end of the body, after all text
AFTER_TEXT = timedelta(seconds=10)  # the same if text came with the finish reason: there may be more of both
AFTER_DONE = timedelta(milliseconds=100)  # for the end of the body; without it the connection cannot be reused
CHECK_TIMEOUT = timedelta(seconds=10)  # of `check`

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """A message of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a complete answer."""

    finish_reason: str  # `stop`, `length` or another word of the backend; `stop` if it sent only `[DONE]`
    usage: dict[str, int] | None  # token counts, as sent, with `reasoning_tokens` and `cached_tokens` of their details


class Backend(Protocol):
    """Answers prompts. `name`: for logs and records."""

    name: str

    async def answer(
        self,
        messages: Sequence[PromptMessage],
        *,
        on_text: Callable[[str], None],
        on_reasoning: Callable[[str], None] | None = None,
        written: Written | None = None,
    ) -> Completion:
        """Send a prompt; return when the answer, of which `written` is the beginning, is complete.

        `on_text` receives the text in order, never empty: one part for each network read that contains text, or several
        for a large read. `on_reasoning` receives the reasoning before it, and `""` at its end. A text longer than
        `max_answer` is truncated, with the finish reason `length`. Cancelling closes the connection to the backend at
        once. Raises `BackendError`, whose kind decides whether a retry may succeed.
        """
        ...


class OpenAIBackend(EndpointClient):
    """Calls `POST {ai_url}/chat/completions`. End every `answer` before leaving the context."""

    _accept = "text/event-stream, application/json"

    def __init__(self, settings: Settings, options: BackendOptions | None = None, rollup: RollUp | None = None) -> None:
        """Default of `options`: those of the settings. `rollup`: that of the node. Raises `SettingsError`."""
        self._options = options = options or BackendOptions.of(settings)
        self.name = options.name
        limit = settings.max_answer * BYTES_PER_CHARACTER + 2 * JSON_LIMIT
        super().__init__(options.url, options.key, path=PATH, limit=limit, variable=options.variable)
        headers, of_headers = resolve_headers(options.headers, option=options.variable("headers"))
        body, of_body = resolve_parameters(options.body, option=options.variable("body"))
        self._extend_endpoint(headers, [*of_headers, *of_body], options.proxy_for(self._endpoint.url))
        self._parameters = parameters(options, body, answer_tokens=options.answer_limit(settings))
        self._with_usage = merged(UsageRequest.PARAMETERS, self._parameters)
        self._max_answer = settings.max_answer
        self._usage = UsageRequest(options)
        self._limits = AnswerLimits(options)
        self._turn = Turn()
        self._rollup = rollup or RollUp(settings.rollup)
        self._address = shorten(redact_url(str(self._endpoint.url)), self._endpoint.secrets)

    @property
    def request(self) -> object:
        """The common part of all requests, with the values of the environment; for comparisons."""
        return self._endpoint, self._parameters

    async def check(self) -> BackendError | None:
        """Return the error of future calls, found with the list of models or an empty request; None: none found."""
        url = self._endpoint.url
        models = url.with_path(f"{url.raw_path.removesuffix(PATH)}models", encoded=True, keep_query=True)
        try:
            async with asyncio.timeout(CHECK_TIMEOUT.total_seconds()):
                try:
                    error = await self._check_models(models)
                except ConnectionLost as lost:  # a gateway may drop it
                    error = failures.from_exception(lost, secrets=self._endpoint.secrets)
                if error is not None and error.reason != "model_not_found":
                    error = await self._check_address()  # there may be no list, or not with this key
        except (HttpError, TimeoutError) as raised:
            error = failures.from_exception(raised, secrets=self._endpoint.secrets)
        if error is not None:
            self._locate(error)
        return error

    async def _check_models(self, url: URL) -> BackendError | None:
        async with await self._http.request("GET", url) as response:
            if response.status != HTTPStatus.OK:
                return self._error(response, await self._read_error(response))
            try:
                models = [
                    (model["id"], model.get("owned_by")) for model in from_json(await response.read_all())["data"]
                ]
            except (ValueError, KeyError, TypeError, AttributeError):
                return failure("misconfigured", "misconfigured", "the response is no list of models")
        model = re.escape(self._options.model)
        # Gemini lists `models/name`, Ollama `name:latest`; llama.cpp accepts every name.
        same = re.compile(rf"(?:.*/)?{model}(?::.*)?")
        if not models or any(same.fullmatch(str(name)) or owner == "llamacpp" for name, owner in models):
            return None
        listed = shorten(", ".join(str(name) for name, _ in models), self._endpoint.secrets)
        return failure(
            "misconfigured", "model_not_found", f"{self._options.model} is not in its list of models: {listed}"
        )

    async def _check_address(self) -> BackendError | None:
        """Send an empty request: an error about it shows that requests are read there."""
        async with await self._http.request("POST", self._endpoint.url, b"{}") as response:
            error = self._error(response, await self._read_error(response))
            status = HTTPStatus.NOT_FOUND if response.content_type == "text/html" else response.status
        return error if status in failures.ADDRESS_STATUSES or error.kind == "away" else None

    def _locate(self, error: BackendError) -> None:
        """Add the URL of the call to an error, and the setting that may be wrong."""
        hint = failures.hint(error, self._endpoint.url.path, variable=self._options.variable)
        error.detail = f"{error.detail} ({'; '.join(filter(None, (self._address, hint)))})"

    async def answer(
        self,
        messages: Sequence[PromptMessage],
        *,
        on_text: Callable[[str], None],
        on_reasoning: Callable[[str], None] | None = None,
        written: Written | None = None,
    ) -> Completion:
        """See `Backend.answer`."""
        url = self._endpoint.url
        with CURRENT.get().call(self.name, self._options.model, url.host or "", url.port) as span:
            headers = {} if HEADER in self._endpoint.headers else {HEADER: span.traceparent}
            try:
                completion = await self._answer(messages, _Call(on_text, on_reasoning, written, headers))
            except BackendError as error:
                if error.reason == "first_token_timeout":
                    self._limits.on_silence()
                self._locate(error)
                raise
            span.answered(completion.finish_reason, completion.usage)
            return completion

    async def _answer(self, messages: Sequence[PromptMessage], call: "_Call") -> Completion:
        prompt = {"messages": cast("JsonValue", adapt(messages, self._options))}
        if not self._usage.next():
            completion = await self._call(prompt | self._parameters, call)
            self._usage.record_success_without()
            return completion
        try:
            completion = await self._call(prompt | self._with_usage, call)
        except BackendError as error:
            if not self._usage.may_be_refused(error, received=call.received):
                raise
            reason, shown = error.reason, str(error)  # not the error, whose traceback has this frame
        else:
            self._usage.record_success()
            return completion
        completion = await self._call(prompt | self._parameters, call)
        self._usage.record_refusal(reason)
        log.warning("backend refuses stream_options", error=shown, still_requested=self._usage.wanted)
        return completion

    async def _call(self, body: Mapping[str, JsonValue], call: "_Call") -> Completion:
        """Make one HTTP request."""
        try:
            data = to_json(body if call.written is None else continued(body, self._options, call.written))
        except PydanticSerializationError:
            raise BackendError("bad_prompt", "the prompt is not valid Unicode", kind="impossible") from None
        async with self._limits.start() as limits, await self._send(data, limits, call.headers) as response:
            if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                is_document = response.content_type == "application/json"
                self._limits.on_head(limits, is_document=is_document)
                try:
                    completion = await self._receive(response, limits, call)
                except BackendError as error:
                    error.usage = None if call.reader is None else call.reader.usage
                    raise
                finally:
                    call.received = response.received
                self._limits.on_answer(is_document=is_document)
                return completion
            limits.stop()
            raise self._error(response, await self._read_error(response))

    async def _send(self, data: bytes, limits: TimeLimits, headers: Mapping[str, str]) -> Response:
        """Send the request; return when the head of the response is received."""
        limits.expect("connect_timeout", within=self._options.connect_timeout)
        try:
            return await self._http.request(
                "POST", self._endpoint.url, data, headers, on_send=lambda: self._limits.on_send(limits)
            )
        except HttpError as error:
            raise failures.from_exception(error, secrets=self._endpoint.secrets) from None

    async def _receive(self, response: Response, limits: TimeLimits, call: "_Call") -> Completion:
        if response.is_encoded:
            coding = shorten(response.headers["content-encoding"])
            raise failure("misconfigured", "encoded", f"content encoding {coding}, although none is accepted")
        reader = AnswerReader(
            limit=self._max_answer,
            secrets=self._endpoint.secrets,
            reasoning=self._options.reasoning,
            on_reasoning=call.on_reasoning,
            beginning="" if call.written is None else call.written.text,
        )
        intake = Intake(reader, limits, call.on_text, self._options.idle_timeout, self._turn, self._rollup)
        call.reader = reader
        limits.catch_up = intake.wake
        self._rollup.join(intake)
        try:
            while not reader.complete:
                await response.stream(intake.feed, intake.rest)
                await intake.feed_deferred()
        except BodyBroken as broken:
            try:
                intake.feed(b"")  # it may have lost nothing but its end
                await intake.feed_deferred()
            except BackendError as told:
                if told.reason not in {"bad_stream", "broken_stream"}:
                    raise
                raise failures.from_exception(broken, secrets=self._endpoint.secrets) from None
        finally:
            self._rollup.leave(intake)
        limits.stop()
        if not reader.truncated:
            await self._receive_rest(response, reader, intake)
        if reader.problem:
            log.warning("answer is whole in spite of a problem", problem=reader.problem, skipped=reader.skipped)
        return Completion(reader.finish_reason or "stop", reader.usage)

    async def _receive_rest(self, response: Response, reader: AnswerReader, intake: Intake) -> None:
        """Read the events that may follow a finish reason: usage, `[DONE]`, and more text from some servers.

        A timeout or a lost connection is no error: the answer is whole. It is one if the finish reason meant nothing.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.total_timeout.total_seconds()
        deadline = loop.time() + (AFTER_TEXT if reader.may_resume else AFTER_FINISH).total_seconds()
        while not reader.done:
            if reader.resumed and reader.progressed:
                deadline = min(end, loop.time() + self._options.idle_timeout.total_seconds())
            if not (data := await read_until(response, deadline)):
                break
            intake.feed(data)
            await intake.feed_deferred()
        if reader.resumed and not reader.done and response.failure is not None:
            raise failures.from_exception(BodyBroken())
        if not reader.done and response.at_end:
            intake.feed(b"")
            await intake.feed_deferred()
        if reader.done and not response.at_end:
            await read_until(response, loop.time() + AFTER_DONE.total_seconds())


@dataclass(slots=True)
class _Call:
    """One call. `received`: bytes of the body of its last successful response, once it has ended."""

    on_text: Callable[[str], None]
    on_reasoning: Callable[[str], None] | None = None
    written: Written | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    reader: AnswerReader | None = None
    received: int | None = None
