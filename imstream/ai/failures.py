"""What became of a failed AI call: which error says so, whether trying again can help, and what an operator is told.

Pure: statuses, headers, bodies and exceptions in, errors out. The rules, first match wins:

    says that the context is too long                  permanent   context_too_long
    says that the account's quota is spent             permanent   insufficient_quota
    status 408, 409, 425, 429, 5xx                     transient   http_NNN, with Retry-After
    any other status                                   permanent   http_NNN
    error object in an answer, numeric code            as that status, backend_error
    error object in an answer, known word              by the word, backend_error
    error object in an answer, anything else           transient   backend_error
    no connection                                      transient   connect_failed
    connection lost before the answer began            transient   connection_lost
    connection lost within the answer                  transient   broken_stream
    not HTTP, an encoded body, more than is allowed    transient   bad_stream
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from imstream.ai.bounded_http import ResponseTooLarge
from imstream.ai.error_report import ErrorReport, shorten
from imstream.errors import BackendError, PermanentBackendError, TransientBackendError

LONGEST_RETRY_AFTER = timedelta(hours=1)
"""A backend that wants to be left alone for longer is treated as if it had asked for this."""

TRANSIENT_STATUSES = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.CONFLICT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)
"""Below 500, only these say that the request itself is all right."""

CONTEXT_WORDS = frozenset({"context_length_exceeded", "exceed_context_size_error", "context_window_exceeded"})
CONTEXT_PHRASES = (
    "maximum context length",  # OpenAI, vLLM
    "maximum model length",  # vLLM
    "context size",  # llama.cpp
    "context window",  # Anthropic, Gemini
    "prompt is too long",  # Anthropic
    "max_new_tokens` must be <=",  # TGI
)
"""Where a server has no code for it, its sentence is the only sign. Asked only of statuses that blame the request."""

BLAMES_REQUEST = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
)

QUOTA_WORDS = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
"""OpenAI sends these with 429, which is otherwise worth trying again."""

PERMANENT_WORDS = frozenset(
    {
        "invalid_request_error",
        "invalid_request",
        "badrequesterror",
        "bad_request",
        "authentication_error",
        "invalid_api_key",
        "permission_error",
        "permission_denied",
        "not_found_error",
        "notfounderror",
        "model_not_found",
        "request_too_large",
        "content_filter",
        "content_policy_violation",
    }
)
TRANSIENT_WORDS = frozenset(
    {
        "rate_limit_exceeded",
        "rate_limit_error",
        "server_error",
        "internal_server_error",
        "internalservererror",
        "api_error",
        "overloaded",
        "overloaded_error",
        "engine_overloaded",
        "service_unavailable",
        "timeout",
        "timeout_error",
    }
)
"""Known, so that a telling code wins over a vague type beside it."""


def from_response(
    status: int, headers: Mapping[str, str], body: bytes, *, now: datetime, secrets: tuple[str, ...] = ()
) -> BackendError:
    """The error for a status that is not a success.

    Args:
        status: The status of the response.
        headers: Its headers, found whatever their case.
        body: The beginning of its body.
        now: The wall clock, with a time zone, to read a date in `Retry-After` by.
        secrets: What no text may show, even when the backend repeats it.
    """
    report = ErrorReport.from_body(body)
    detail = report.summary(secrets)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        detail = "a redirect, which is not followed"
    if (reason := _telling_reason(report, status)) is not None:
        return PermanentBackendError(reason, detail)
    if _is_transient(status):
        return TransientBackendError(f"http_{status}", detail, retry_after=retry_after(headers, now=now))
    return PermanentBackendError(f"http_{status}", detail)


def from_report(report: ErrorReport, *, secrets: tuple[str, ...] = ()) -> BackendError:
    """The error for an error object that came inside an answer, where no status tells how bad it is."""
    detail = report.summary(secrets)
    if (reason := _telling_reason(report, report.status)) is not None:
        return PermanentBackendError(reason, detail)
    if _sounds_transient(report) if report.status is None else _is_transient(report.status):
        return TransientBackendError("backend_error", detail)
    return PermanentBackendError("backend_error", detail)


def from_exception(error: aiohttp.ClientError | OSError, *, secrets: tuple[str, ...] = ()) -> TransientBackendError:
    """The error for what the HTTP client raised. Its text is taken only where it cannot hold a header."""
    match error:
        case aiohttp.ClientConnectorError():
            return TransientBackendError("connect_failed", shorten(str(error), secrets))
        case ResponseTooLarge():
            return TransientBackendError("bad_stream", str(error))
        case aiohttp.ClientPayloadError():
            return TransientBackendError("broken_stream", "the connection was lost within the answer")
        case aiohttp.ClientResponseError():
            return TransientBackendError("bad_stream", "the response is not valid HTTP")
        case _:
            return TransientBackendError("connection_lost", f"before the answer began ({type(error).__name__})")


def retry_after(headers: Mapping[str, str], *, now: datetime) -> timedelta | None:
    """How long the backend asks to be left alone: RFC 9110, 10.2.3, seconds or a date; or `retry-after-ms` of OpenAI.

    A time in the past is zero, one too far ahead is `LONGEST_RETRY_AFTER`, and what cannot be read is None.
    """
    wait = _number(headers.get("retry-after-ms"), unit=0.001)
    if wait is None and (text := headers.get("retry-after")) is not None:
        wait = _number(text, unit=1.0)
        if wait is None:
            wait = _seconds_until(text, now)
    if wait is None:
        return None
    return timedelta(seconds=min(max(wait, 0.0), LONGEST_RETRY_AFTER.total_seconds()))


def _telling_reason(report: ErrorReport, status: int | None) -> str | None:
    """A reason that says more than a status does, when the backend gives one. Each of them is permanent."""
    if not CONTEXT_WORDS.isdisjoint(report.words):
        return "context_too_long"
    if status is None or status in BLAMES_REQUEST:
        message = report.message.lower()
        if any(phrase in message for phrase in CONTEXT_PHRASES):
            return "context_too_long"
    return None if QUOTA_WORDS.isdisjoint(report.words) else "insufficient_quota"


def _is_transient(status: int) -> bool:
    return status in TRANSIENT_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _sounds_transient(report: ErrorReport) -> bool:
    for word in report.words:
        if word in PERMANENT_WORDS:
            return False
        if word in TRANSIENT_WORDS:
            return True
    return True


def _number(text: str | None, *, unit: float) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(value) else value * unit


def _seconds_until(text: str, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:  # "-0000": the time is UTC, the place unknown
            moment = moment.replace(tzinfo=UTC)
        return (moment - now).total_seconds()
    except (ValueError, OverflowError):
        return None
