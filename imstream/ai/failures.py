"""Classifies failed AI calls: whose fault it is, the reason, and the detail for the operator.

Pure functions from statuses, headers, bodies and exceptions to errors. The first matching row of `RULES` applies, then
the status:

    408, 409, 424, 425, 429, 499, 5xx; 401, 402, 403    away            http_NNN
    3xx, 404, 405, 406, 407, 410, 415, 421, 426, 431    misconfigured   http_NNN
    501, 505                                            misconfigured   http_NNN
    any other status                                    impossible      http_NNN

Errors inside an answer are judged by their words, or else by the status that they name; without either, and with 500,
the answer is broken. Their reason is `backend_error`, unless a rule has a more specific one.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from imstream.ai.bounded_http import ResponseTooLarge
from imstream.ai.error_report import SENTENCE_LIMIT, ErrorReport, shorten
from imstream.errors import BackendError, FailureKind, PermanentBackendError, TransientBackendError

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
    """A row of the table: codes and types, or sentences in the message, that tell more than the status does.

    `words` are compared without case and punctuation: `InvalidApiKey` is `invalid_api_key`. Sentences count only with
    `statuses` (None: an error inside an answer), because other errors may quote anything.
    """

    reason: str
    kind: FailureKind
    words: frozenset[str]
    sentences: re.Pattern[str] | None = None
    statuses: frozenset[int | None] = frozenset()
    is_generic: bool = False  # a status of the same kind has the better reason, such as `http_401`


def _words(text: str) -> frozenset[str]:
    return frozenset(map(_plain, text.split()))


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())


def _any(*sentences: str) -> re.Pattern[str]:
    return re.compile("|".join(sentences), re.IGNORECASE)


_REQUEST = frozenset({400, 413, 422, None})

RULES = (
    Rule(
        "context_too_long",
        "impossible",
        _words(
            "context_length_exceeded exceed_context_size_error context_window_exceeded ContextWindowExceededError "
            "string_above_max_length request_too_large tokens_limit_reached prompt_too_long 1261"
        ),
        _any(
            r"maximum (?:context|model|input|prompt) length",  # OpenAI, vLLM
            r"context (?:size|window|length)",  # llama.cpp, Anthropic, Gemini
            r"ContextWindowExceeded",  # LiteLLM
            r"(?:prompt|input|message|request)s? (?:is|are|was) too (?:long|large)",  # Anthropic, Mistral
            r"longer than the (?:model|maximum)",
            r"max_new_tokens` must be <=",  # TGI
            r"input length should be",  # DashScope
            r"(?:exceeds?|exceeded) the (?:maximum|max) (?:number of )?(?:input )?tokens",  # Gemini
            r"too many (?:input )?tokens(?!,? please wait)",  # else Bedrock's limit per minute
            r"must have less than \d{1,9} tokens|tokens must be at least 1, got -",  # TGI, vLLM
            r"上下文.{0,8}(?:过长|超)|(?:输入|长度|tokens?).{0,8}(?:过长|超过|超出)",
            r"reduce (?:the length|the size|your message)",  # OpenAI, Groq
        ),
        _REQUEST,
    ),
    Rule(  # a limit of tokens per minute that this request alone exceeds: OpenAI, Groq; see `_exceeds_limit`
        "context_too_long", "impossible", frozenset(), _any(r"request too large"), frozenset({429, *_REQUEST})
    ),
    Rule(
        "content_filter",
        "impossible",
        _words(
            "content_filter content_policy_violation data_inspection_failed ResponsibleAIPolicyViolation "
            "content_filter_error moderation_blocked content_moderation sensitive_content prohibited_content safety "
            "invalid_prompt input_moderation output_moderation 1301 SensitiveContentDetected "
            "InputTextSensitiveContentDetected OutputTextSensitiveContentDetected"
        ),
        _any(
            r"content management policy",  # Azure
            r"inappropriate content",  # DashScope
            r"content exists risk",  # DeepSeek
            r"considered high risk",  # Moonshot
            r"content[ _](?:filter|policy|moderation)",
            r"safety (?:system|filter|settings|reasons)",
            r"(?:was|were|been|is|input) flagged",  # OpenRouter, OpenAI
            r"(?:unsafe|sensitive|prohibited) (?:or sensitive )?content",
            r"sensitive words?",
            r"敏感|不安全|违规|违反",
        ),
        frozenset({*_REQUEST, 403, 451}),
    ),
    Rule(
        "insufficient_quota",
        "away",
        _words(
            "insufficient_quota billing_hard_limit_reached billing_not_active billing_error insufficient_balance "
            "insufficient_credits insufficient_user_quota exceeded_current_quota_error arrearage payment_required 1008 "
            "1113 AccountOverdueError"
        ),
        _any(
            r"credit balance",  # Anthropic
            r"insufficient (?:\w+ ){0,2}(?:balance|credits?|quota|funds)",  # DeepSeek, OpenRouter
            r"balance is (?:insufficient|too low)|credit limit|(?:not enough|more|out of) credits",
            r"exceeded your current quota",
            r"billing|overdue|arrears|in good standing",
            r"余额不足|欠费|额度不足",
        ),
        frozenset({*_REQUEST, 401, 402, 403, 429}),
    ),
    Rule(
        "unauthorized",
        "away",
        _words(
            "invalid_api_key InvalidApiKey API_KEY_INVALID invalid_authentication_error authentication_error "
            "AuthenticationError unauthorized unauthenticated invalid_token incorrect_api_key_error permission_error "
            "permission_denied PermissionDeniedError access_denied forbidden account_deactivated"
        ),
        _any(
            r"api[ _-]?key (?:not valid|expired|is invalid|is missing)",
            r"(?:invalid|incorrect|missing|no) api[ _-]?key",
            r"无效的(?:令牌|密钥|api)",
        ),
        _REQUEST,
        is_generic=True,
    ),
    Rule(
        "model_not_found",
        "misconfigured",
        _words(
            "model_not_found ModelNotFound DeploymentNotFound invalid_model model_not_supported model_not_available "
            "model_decommissioned model_not_exist unsupported_model unknown_model InvalidEndpointOrModel "
            "ModelNotOpen 1211"
        ),
        _any(
            r"model\b.{0,80}(?:not exist|not found|is not (?:available|supported)|decommissioned|deprecated)",
            r"(?:no such|unknown|invalid|unsupported) model",
            r"not a valid model",
            r"模型不存在",
        ),
        frozenset({*_REQUEST, 403, 404}),
    ),
    Rule(
        "misconfigured",
        "misconfigured",
        _words("not_found_error NotFoundError not_found unsupported_parameter unsupported_value unknown_parameter"),
        _any(
            r"must be verified",  # OpenAI: organisations, to stream
            r"(?:system|developer) (?:role|messages?|prompts?|instructions?)\b",  # Gemma
            r"roles? must alternate",
            r"unsupported|not supported|does(?: not|n't) support|unrecognized|not permitted",
            r"unknown (?:parameter|argument|field|name)|unexpected keyword|extra (?:inputs|fields)|additional propert",
            r"param(?:eter)?s? (?:incorrect|error|invalid|missing)|invalid param(?:eter)?s?\b",
            r"max_(?:completion_)?tokens.{0,80}(?:too large|at most|less than)",
            r"missing required",
        ),
        _REQUEST,
        is_generic=True,
    ),
    Rule(
        "overloaded",
        "away",
        _words(
            "rate_limit_exceeded rate_limit_error rate_limit_reached rate_limit RateLimitError resource_exhausted "
            "overloaded overloaded_error engine_overloaded engine_overloaded_error service_unavailable unavailable "
            "ServiceUnavailableError model_overloaded throttling too_many_requests limit_requests limit_burst_rate "
            "server_busy ServerOverloaded capacity_exceeded loading ThrottlingException 1302 1305"
        ),
        _any(
            r"overloaded|at capacity|rate limit|too many requests|try again (?:later|in)|temporarily",
            r"server (?:is )?busy|请求过于频繁|繁忙|限流",
            r"(?:model|server) is (?:still |currently )?loading|loading model|no healthy|unavailable",
        ),
        frozenset({500, None}),
        is_generic=True,
    ),
)
"""Which errors tell more than their status, the most specific ones first."""

WORD_RULES = (
    Rule("backend_error", "broken", _words("server_error internal_server_error api_error timeout timeout_error")),
    Rule("backend_error", "impossible", _words("invalid_request_error invalid_request BadRequestError bad_request")),
)
"""For errors inside an answer that name no status."""


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
        kind, reason = "misconfigured", "misconfigured"  # a page is not of the API: nobody has read the request
    wait = retry_after(headers, now=now)
    return failure(kind, reason, detail, retry_after=report.retry_after if wait is None else wait)


def from_report(report: ErrorReport, *, secrets: tuple[str, ...] = ()) -> BackendError:
    """The error for an error object inside a successful response."""
    kind, reason = _judge(report, report.status, in_answer=True)
    detail = report.summary(secrets) or "an error without a text"
    return failure(kind, reason, detail, retry_after=report.retry_after)


def from_exception(error: aiohttp.ClientError | OSError, *, secrets: tuple[str, ...] = ()) -> BackendError:
    """The error for an exception of the HTTP client, whose text is shown only where it cannot contain a header."""
    row: tuple[FailureKind, str, str]
    match error:
        case aiohttp.ClientConnectorError():
            is_tls = isinstance(error, aiohttp.ClientSSLError)
            row = "misconfigured" if is_tls else "away", "connect_failed", shorten(str(error), secrets)
        case ResponseTooLarge():
            row = "impossible", "too_large", str(error)
        case aiohttp.ClientPayloadError():
            row = "broken", "broken_stream", "the connection was lost within the answer"
        case aiohttp.ClientHttpProxyError():
            row = _kind_of(error.status), "proxy_failed", f"the proxy answers with status {error.status}"
        case aiohttp.ClientResponseError():
            row = "broken", "bad_stream", "the response is not valid HTTP"
        case _:
            row = "away", "connection_lost", f"before the answer began ({type(error).__name__})"
    return failure(*row)


def failure(
    kind: FailureKind, reason: str, detail: str, *, retry_after: timedelta | None = None
) -> TransientBackendError | PermanentBackendError:
    """The error of a kind. Only of one that is away a wait counts; it is at most `MAX_RETRY_AFTER`."""
    wait = None
    if retry_after is not None and kind in {"away", "broken"}:
        wait = min(max(retry_after, timedelta(0)), MAX_RETRY_AFTER)
    error = TransientBackendError if kind in {"away", "broken"} else PermanentBackendError
    return error(reason, detail, kind=kind, retry_after=wait)


def is_unusual(path: str) -> bool:
    """Whether the path of a URL, with `/chat/completions` appended, is one that may lack something or have too much."""
    base = path.removesuffix("/chat/completions")
    return base.rstrip("/").endswith("/completions") or not _VERSION.search(base)


def may_be_about_request(error: BackendError) -> bool:
    """Whether a request of another form might succeed. Not if the address, the model or the key is wrong."""
    return error.kind == "impossible" or (error.kind == "misconfigured" and error.reason in _PARAMETER_REASONS)


def hint(error: BackendError, path: str, *, variable: Callable[[str], str]) -> str:
    """What an operator may have to change; empty if unknown. `path`: of the URL that was asked."""
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
    """Whose fault an error is, and its reason."""
    by_status = "broken" if status is None or (in_answer and status == _BROKEN_STATUS) else _kind_of(status)
    status_reason = _ANSWER_REASONS.get(status, "backend_error") if in_answer else f"http_{status}"
    words = {_plain(part) for word in report.words for part in (word, word.partition(".")[0])}
    message = report.message[:SENTENCE_LIMIT]
    if status in {429, 413, None} and _exceeds_limit(message):
        return "impossible", "context_too_long"
    for rule in RULES if status is not None else (*RULES, *WORD_RULES):
        if rule.reason == "insufficient_quota" and report.retry_after is not None:
            continue  # a limit per minute: Gemini words it alike
        quoted = rule.sentences is not None and status in rule.statuses and rule.sentences.search(message)
        if quoted or not rule.words.isdisjoint(words):
            if rule.is_generic and rule.kind == by_status and not in_answer:
                break  # the status says as much
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
