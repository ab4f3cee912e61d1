"""Classifies failed AI calls: whose fault it is, the reason, and the detail for the operator.

Pure functions from statuses, headers, bodies and exceptions to errors. The first rule of failure_rules.toml
that matches applies, then the status:

    408, 409, 424, 425, 429, 499, 5xx; 401, 402, 403    away            http_NNN
    3xx, 404, 405, 406, 407, 410, 415, 421, 426, 431    misconfigured   http_NNN
    501, 505                                            misconfigured   http_NNN
    any other status                                    impossible      http_NNN

Errors inside an answer are judged by their words, or else by the status that they name; without either, and with 500,
the answer is broken. Their reason is `backend_error`, unless a rule has a more specific one.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from imstream.ai.error_report import SENTENCE_LIMIT, ErrorReport, shorten
from imstream.ai.http_client import ConnectFailed, ProxyRefused
from imstream.ai.http_response import BadResponse, BodyBroken, HttpError, ResponseTooLarge
from imstream.errors import BackendError, FailureKind

MAX_RETRY_AFTER = timedelta(hours=1)  # a longer one is shortened to this

AWAY_STATUSES = frozenset({401, 402, 403, 408, 409, 424, 425, 429, 499})
MISCONFIGURED_STATUSES = frozenset({404, 405, 406, 407, 410, 415, 421, 426, 431, 501, 505})
ADDRESS_STATUSES = frozenset({301, 302, 303, 307, 308, 404, 405, 410})
_BROKEN_STATUS = 500  # inside an answer
_ANSWER_REASONS: dict[int | None, str] = {401: "unauthorized", 402: "insufficient_quota", 403: "unauthorized"}

NEEDS_OPERATOR = frozenset({"insufficient_quota", "unauthorized", "http_401", "http_402", "http_403"})
"""Reasons of the kind `away` that do not pass by themselves: the key or the credit of the account."""

_KEY_REASONS = frozenset({"unauthorized", "http_401", "http_403"})
_LIMIT = re.compile(
    r"limit:? (?P<limit>\d{1,12})\b[,. ]{1,3}(?:used:? \d{1,12}[,. ]{1,3})?requested:? (?P<requested>\d{1,12})\b",
    re.IGNORECASE,
)
_VERSION = re.compile(r"/v\d|/deployments/")  # the latter of Azure

REQUEST_REASONS = frozenset({"context_too_long", "content_filter", "refusal", "http_400", "http_413", "http_422"})
"""Reasons of the kind `impossible` that the user can mend by changing the message."""

_PARAMETER_REASONS = frozenset({"misconfigured", "http_400", "http_422"})


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of failure_rules.toml, where its fields are explained."""

    reason: str
    kind: FailureKind
    words: frozenset[str]
    sentences: re.Pattern[str] | None
    statuses: frozenset[int]
    is_generic: bool = False
    only_without_status: bool = False


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())


def _rule(row: dict[str, Any]) -> Rule:
    words = frozenset(map(_plain, row.pop("words", "").split()))
    sentences = row.pop("sentences", None)
    pattern = re.compile("|".join(sentences), re.IGNORECASE) if sentences else None
    return Rule(words=words, sentences=pattern, statuses=frozenset(row.pop("statuses", ())), **row)


RULES = tuple(map(_rule, tomllib.loads(Path(__file__).with_name("failure_rules.toml").read_text("utf-8"))["rule"]))


def from_response(
    status: int, headers: Mapping[str, str], body: bytes, *, now: datetime, secrets: tuple[str, ...] = ()
) -> BackendError:
    """The error for a response with an error status, from the beginning of its body. It does not show `secrets`."""
    report = ErrorReport.from_body(body)
    detail = report.summary(secrets) or "the response does not say why"
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        detail = "a redirect, which is not followed"
    kind, reason = _judge(report, status, in_answer=False)
    if reason == "http_400" and body.lstrip().startswith(b"<"):
        kind, reason = "misconfigured", "misconfigured"  # a page is not of the API: the request was not read
    wait = retry_after(headers, now=now)
    return failure(kind, reason, detail, retry_after=report.retry_after if wait is None else wait)


def from_report(report: ErrorReport, *, secrets: tuple[str, ...] = ()) -> BackendError:
    """The error for an error object inside a successful response."""
    kind, reason = _judge(report, report.status, in_answer=True)
    detail = report.summary(secrets) or "an error without a text"
    return failure(kind, reason, detail, retry_after=report.retry_after)


def from_exception(error: HttpError | TimeoutError, *, secrets: tuple[str, ...] = ()) -> BackendError:
    """The error for an exception of the HTTP client."""
    row: tuple[FailureKind, str, str]
    match error:
        case ConnectFailed():
            row = "misconfigured" if error.is_tls else "away", "connect_failed", shorten(str(error), secrets)
        case ResponseTooLarge():
            row = "impossible", "too_large", str(error)
        case BodyBroken():
            row = "broken", "broken_stream", "the connection was lost within the answer"
        case ProxyRefused():
            row = _kind_of(error.status), "proxy_failed", str(error)
        case BadResponse():
            row = "broken", "bad_stream", "the response is not valid HTTP"
        case _:
            row = "away", "connection_lost", f"before the answer began ({type(error).__name__})"
    return failure(*row)


def failure(kind: FailureKind, reason: str, detail: str, *, retry_after: timedelta | None = None) -> BackendError:
    """The error of a kind. Only of one that is away a wait counts; it is at most `MAX_RETRY_AFTER`."""
    wait = None
    if retry_after is not None and kind in {"away", "broken"}:
        wait = min(max(retry_after, timedelta(0)), MAX_RETRY_AFTER)
    return BackendError(reason, detail, kind=kind, retry_after=wait)


def may_be_about_request(error: BackendError) -> bool:
    """Whether a request of another form might succeed. Not if the address, the model or the key is wrong."""
    return error.kind == "impossible" or (error.kind == "misconfigured" and error.reason in _PARAMETER_REASONS)


def hint(error: BackendError, path: str, *, variable: Callable[[str], str]) -> str:
    """The setting that may be wrong; empty if unknown. `path`: of the URL of the call."""
    base = path.removesuffix("/chat/completions")
    if error.reason in _KEY_REASONS:
        return f"check {variable('key')}"
    if error.kind != "misconfigured" or error.reason in {"misconfigured", "encoded"}:
        return ""
    if error.reason == "model_not_found":
        return f"check {variable('model')}"
    if base.rstrip("/").endswith("/completions"):
        return f"{variable('url')} must end before /chat/completions, which is appended"
    if not _VERSION.search(base):
        return f"{variable('url')} may have to end in /v1"
    return f"check {variable('url')} and {variable('model')}"


def retry_after(headers: Mapping[str, str], *, now: datetime) -> timedelta | None:
    """Read `Retry-After` (RFC 9110, 10.2.3: seconds or a date), or `retry-after-ms` of OpenAI; None if invalid."""
    text = headers.get("retry-after", "")
    wait = _number(headers.get("retry-after-ms", ""), unit=0.001)
    wait = _number(text, unit=1.0) if wait is None else wait
    wait = _seconds_until(text, now) if wait is None else wait
    return None if wait is None else timedelta(seconds=min(max(wait, 0.0), MAX_RETRY_AFTER.total_seconds()))


def _judge(report: ErrorReport, status: int | None, *, in_answer: bool) -> tuple[FailureKind, str]:
    by_status = "broken" if status is None or (in_answer and status == _BROKEN_STATUS) else _kind_of(status)
    status_reason = _ANSWER_REASONS.get(status, "backend_error") if in_answer else f"http_{status}"
    words = {_plain(part) for word in report.words for part in (word, word.partition(".")[0])}
    message = report.message[:SENTENCE_LIMIT]
    if status in {429, 413, None} and _exceeds_limit(message):
        return "impossible", "context_too_long"
    for rule in RULES:
        if rule.only_without_status and status is not None:
            continue
        if rule.reason == "insufficient_quota" and report.retry_after is not None:
            continue  # a limit per minute: Gemini words it alike
        may_quote = status is None or status in rule.statuses
        quoted = may_quote and rule.sentences is not None and rule.sentences.search(message)
        if quoted or not rule.words.isdisjoint(words):
            if rule.is_generic and rule.kind == by_status and not in_answer:
                break  # the status is enough
            return rule.kind, rule.reason
    return by_status, status_reason


def _exceeds_limit(message: str) -> bool:
    """Whether a request alone exceeds a limit per minute: "Limit 30000, Used 0, Requested 30601"."""
    numbers = _LIMIT.search(message)
    return numbers is not None and int(numbers["requested"]) > int(numbers["limit"])


def _kind_of(status: int) -> FailureKind:
    if status in MISCONFIGURED_STATUSES or HTTPStatus.CONTINUE <= status < HTTPStatus.BAD_REQUEST:
        return "misconfigured"
    return "away" if status in AWAY_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR else "impossible"


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
