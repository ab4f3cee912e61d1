"""Classifies failed AI calls: transient or permanent, the reason, and the detail for the operator.

Pure functions from statuses, headers, bodies and exceptions to errors. The first matching rule applies:

    reports that the context is too long               permanent   context_too_long
    reports that the account's quota is exhausted      permanent   insufficient_quota
    status 408, 409, 425, 429, 5xx                     transient   http_NNN, with Retry-After
    any other status                                   permanent   http_NNN
    error object in an answer, numeric code            as that status, backend_error
    error object in an answer, known word              by the word, backend_error
    error object in an answer, anything else           transient   backend_error
    no connection                                      transient   connect_failed
    connection lost before the answer began            transient   connection_lost
    connection lost within the answer                  transient   broken_stream
    not HTTP, encoded, or too large                    transient   bad_stream
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from imstream.ai.bounded_http import ResponseTooLarge
from imstream.ai.error_report import ErrorReport, shorten
from imstream.errors import BackendError, PermanentBackendError, TransientBackendError

MAX_RETRY_AFTER = timedelta(hours=1)  # a longer one is shortened to this

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})  # the only ones below 500 that the request did not cause
BLAMES_REQUEST = frozenset({400, 413, 422})

CONTEXT_WORDS = frozenset({"context_length_exceeded", "exceed_context_size_error", "context_window_exceeded"})
CONTEXT_PHRASES = (
    "maximum context length",  # OpenAI, vLLM
    "maximum model length",  # vLLM
    "context size",  # llama.cpp
    "context window",  # Anthropic, Gemini
    "prompt is too long",  # Anthropic
    "max_new_tokens` must be <=",  # TGI
)
"""For servers without a code for it, and statuses that the request caused."""

QUOTA_WORDS = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
"""OpenAI sends these with 429, which is otherwise transient."""

PERMANENT_WORDS = frozenset(
    {
        *("invalid_request_error", "invalid_request", "badrequesterror", "bad_request", "request_too_large"),
        *("authentication_error", "invalid_api_key", "permission_error", "permission_denied"),
        *("not_found_error", "notfounderror", "model_not_found", "content_filter", "content_policy_violation"),
    }
)
TRANSIENT_WORDS = frozenset(
    {
        *("server_error", "internal_server_error", "internalservererror", "api_error", "timeout", "timeout_error"),
        *("rate_limit_exceeded", "rate_limit_error", "overloaded", "overloaded_error", "engine_overloaded"),
        "service_unavailable",
    }
)
"""Listed so that a specific code takes precedence over a generic type."""


def from_response(
    status: int, headers: Mapping[str, str], body: bytes, *, now: datetime, secrets: tuple[str, ...] = ()
) -> BackendError:
    """The error for a response with an error status, from the beginning of its body. It does not show `secrets`."""
    report = ErrorReport.from_body(body)
    detail = report.summary(secrets)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        detail = "a redirect, which is not followed"
    if (reason := _specific_reason(report, status)) is not None:
        return PermanentBackendError(reason, detail)
    if _is_transient(status):
        return TransientBackendError(f"http_{status}", detail, retry_after=retry_after(headers, now=now))
    return PermanentBackendError(f"http_{status}", detail)


def from_report(report: ErrorReport, *, secrets: tuple[str, ...] = ()) -> BackendError:
    """The error for an error object inside a successful response."""
    detail = report.summary(secrets)
    if (reason := _specific_reason(report, report.status)) is not None:
        return PermanentBackendError(reason, detail)
    if report.status is not None:
        transient = _is_transient(report.status)
    else:
        known = [word for word in report.words if word in PERMANENT_WORDS or word in TRANSIENT_WORDS]
        transient = not known or known[0] in TRANSIENT_WORDS
    return (TransientBackendError if transient else PermanentBackendError)("backend_error", detail)


def from_exception(error: aiohttp.ClientError | OSError, *, secrets: tuple[str, ...] = ()) -> TransientBackendError:
    """The error for an exception of the HTTP client, whose text is shown only where it cannot contain a header."""
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
    """Read `Retry-After` (RFC 9110, 10.2.3: seconds or a date), or `retry-after-ms` of OpenAI; None if invalid."""
    text = headers.get("retry-after", "")
    wait = _number(headers.get("retry-after-ms", ""), unit=0.001)
    wait = _number(text, unit=1.0) if wait is None else wait
    wait = _seconds_until(text, now) if wait is None else wait
    return None if wait is None else timedelta(seconds=min(max(wait, 0.0), MAX_RETRY_AFTER.total_seconds()))


def _specific_reason(report: ErrorReport, status: int | None) -> str | None:
    """A reason that is more specific than the status. All of these are permanent."""
    if not CONTEXT_WORDS.isdisjoint(report.words):
        return "context_too_long"
    if status is None or status in BLAMES_REQUEST:
        message = report.message.lower()
        if any(phrase in message for phrase in CONTEXT_PHRASES):
            return "context_too_long"
    return None if QUOTA_WORDS.isdisjoint(report.words) else "insufficient_quota"


def _is_transient(status: int) -> bool:
    return status in TRANSIENT_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _number(text: str, *, unit: float) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value * unit


def _seconds_until(text: str, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:  # "-0000": UTC, from an unknown time zone
            moment = moment.replace(tzinfo=UTC)
        return (moment - now).total_seconds()
    except (ValueError, OverflowError):
        return None
