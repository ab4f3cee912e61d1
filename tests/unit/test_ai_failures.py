"""Failures of AI calls: whose fault, the reason, the detail for the operator, and Retry-After."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from imstream.ai.error_report import DETAIL_LENGTH, ErrorReport, shorten
from imstream.ai.failures import MAX_RETRY_AFTER, NEEDS_OPERATOR, RULES, from_report, from_response, retry_after
from imstream.errors import BackendError, FailureKind

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


def refused(
    status: int, body: bytes | dict[str, Any] = b"", secrets: tuple[str, ...] = (), **headers: str
) -> BackendError:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    fields = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return from_response(status, fields, data, now=NOW, secrets=secrets)


def reported(**error: object) -> BackendError:
    return from_report(ErrorReport.from_value({"error": error}))


def test_rules_have_known_kinds_and_each_word_belongs_to_one() -> None:
    assert {rule.kind for rule in RULES} <= set(get_args(FailureKind))
    words = [word for rule in RULES for word in rule.words]
    assert sorted(words) == sorted(set(words))


# Whose fault it is

AWAY, BROKEN, IMPOSSIBLE, MISCONFIGURED = "away", "broken", "impossible", "misconfigured"


@pytest.mark.parametrize("status", [401, 402, 403, 408, 409, 424, 425, 429, 500, 502, 503, 504, 520, 529, 599])
def test_with_these_statuses_the_backend_is_away(status: int) -> None:
    error = refused(status)
    assert error.kind in {"away", "broken"}
    assert (error.kind, error.reason) == (AWAY, f"http_{status}")


@pytest.mark.parametrize("status", [101, 301, 302, 304, 307, 308, 404, 405, 406, 407, 410, 415, 426, 501, 505])
def test_with_these_statuses_the_url_or_an_option_is_wrong(status: int) -> None:
    error = refused(status)
    assert error.kind in {"impossible", "misconfigured"}
    assert (error.kind, error.reason) == (MISCONFIGURED, f"http_{status}")


@pytest.mark.parametrize("status", [400, 411, 413, 414, 418, 422, 451])
def test_with_these_statuses_this_request_is_refused(status: int) -> None:
    error = refused(status)
    assert error.kind in {"impossible", "misconfigured"}
    assert (error.kind, error.reason) == (IMPOSSIBLE, f"http_{status}")


LIMITED = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 30601."


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"code": "context_length_exceeded", "message": "too long", "type": "invalid_request_error"}}),
        (400, {"object": "error", "message": "This model's maximum context length is 4096 tokens.", "code": 400}),
        (400, {"error": {"message": "The prompt is longer than the maximum model length of 8.", "code": 400}}),
        (400, {"error": {"code": 400, "message": "too big", "type": "exceed_context_size_error"}}),
        (400, {"error": {"code": 400, "message": "the request exceeds the available context size"}}),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long"}}),
        (400, {"error": {"message": "Range of input length should be [1, 30720]", "type": "invalid_request_error"}}),
        (400, {"error": {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}}),
        (400, {"error": {"message": "litellm.ContextWindowExceededError: too much", "code": "400"}}),
        (413, {"error": "Input is larger than the context window"}),
        (413, {"error": {"message": "Please reduce your message size and try again.", "code": "rate_limit_exceeded"}}),
        (413, {"error": {"type": "request_too_large", "message": "Request exceeds the maximum size"}}),
        (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: ...", "error_type": "validation"}),
        (429, {"error": {"code": "rate_limit_exceeded", "type": "tokens", "message": LIMITED}}),
        (429, {"error": {"message": "Rate limit reached: Limit 6000, Used 0, Requested 7000. Retry in 2s."}}),
        (400, {"error": {"message": "max_tokens must be at least 1, got -904."}}),
        (400, {"error": {"message": "输入内容过长,请缩短后重试", "code": "1261"}}),
        (500, {"error": {"code": "context_length_exceeded"}}),
    ],
)
def test_a_context_that_is_too_long_has_a_reason_of_its_own(status: int, body: dict[str, Any]) -> None:
    error = refused(status, body)
    assert (error.kind, error.reason) == (IMPOSSIBLE, "context_too_long")


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_sentence_counts_only_where_the_status_blames_the_request(status: int) -> None:
    assert (
        refused(status, {"error": {"message": "upstream broke while it read the context window"}}).reason
        == f"http_{status}"
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"code": "content_filter", "message": "The response was filtered"}}),
        (400, {"error": {"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        (400, {"error": {"message": "Filtered due to Azure OpenAI's content management policy."}}),
        (400, {"error": {"code": "data_inspection_failed", "type": "data_inspection_failed", "message": "no"}}),
        (400, {"code": "DataInspectionFailed", "message": "Input data may contain inappropriate content."}),
        (400, {"error": {"code": "InputTextSensitiveContentDetected", "message": "no"}}),
        (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}),
        (400, {"error": {"message": "The request was rejected because it was considered high risk"}}),
        (400, {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}}),
        (403, {"error": {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["x"]}}}),
        (400, {"error": {"message": "Your request was rejected as a result of our safety system."}}),
    ],
)
def test_a_content_filter_refuses_this_request_and_no_other(status: int, body: dict[str, Any]) -> None:
    error = refused(status, body)
    assert (error.kind, error.reason) == (IMPOSSIBLE, "content_filter")


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (429, {"error": {"code": "insufficient_quota", "type": "insufficient_quota"}}, "insufficient_quota"),
        (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}, "insufficient_quota"),
        (400, {"error": {"message": "Your credit balance is too low to access the API."}}, "insufficient_quota"),
        (402, {"error": {"message": "This request requires more credits, or fewer max_tokens"}}, "insufficient_quota"),
        (
            400,
            {"code": "Arrearage", "message": "Access denied, your account is not in good standing."},
            "insufficient_quota",
        ),
        (403, {"error": {"message": "账户余额不足"}}, "insufficient_quota"),
        (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}, "insufficient_quota"),
        (403, {"error": {"code": "AccountOverdueError", "message": "no"}}, "insufficient_quota"),
        (402, {}, "http_402"),
        (401, {"error": {"code": "invalid_api_key", "type": "invalid_request_error"}}, "http_401"),
        (403, {"error": {"type": "permission_error", "message": "Your key may not use this."}}, "http_403"),
        (400, {"error": {"message": "API key not valid.", "status": "INVALID_ARGUMENT"}}, "unauthorized"),
        (400, {"error": {"details": [{"reason": "API_KEY_INVALID"}]}}, "unauthorized"),
    ],
)
def test_a_wrong_key_and_a_spent_credit_are_no_fault_of_the_request(
    status: int, body: dict[str, Any], reason: str
) -> None:
    error = refused(status, body)
    assert (error.kind, error.reason) == (AWAY, reason)
    assert reason in NEEDS_OPERATOR


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, {"detail": "Not Found"}, "http_404"),
        (404, {"error": {"code": "InvalidEndpointOrModel.NotFound", "message": "no"}}, "model_not_found"),
        (
            404,
            {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError"},
            "model_not_found",
        ),
        (
            404,
            {"error": {"message": 'model "x" not found, try pulling it first', "type": "api_error"}},
            "model_not_found",
        ),
        (
            404,
            {"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}},
            "model_not_found",
        ),
        (404, {"error": {"code": "404", "message": "Resource not found"}}, "http_404"),
        (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}, "model_not_found"),
        (400, {"error": {"message": "x/y is not a valid model ID", "code": 400}}, "model_not_found"),
        (403, {"error": {"code": "model_not_found", "message": "Project has no access to model"}}, "model_not_found"),
        (400, {"error": {"message": "Your organization must be verified to stream this model."}}, "misconfigured"),
        (400, {"error": {"message": "System role not supported"}}, "misconfigured"),
        (400, {"error": {"message": "Developer instruction is not enabled for models/gemma"}}, "misconfigured"),
        (
            400,
            {"error": {"message": "Conversation roles must alternate user/assistant/user/assistant/..."}},
            "misconfigured",
        ),
        (
            400,
            {"error": {"code": "unsupported_parameter", "message": "Use 'max_completion_tokens' instead."}},
            "misconfigured",
        ),
        (400, {"error": {"message": "Unrecognized request argument supplied: foo"}}, "misconfigured"),
        (422, {"detail": [{"loc": ["body", "foo"], "msg": "Extra inputs are not permitted"}]}, "misconfigured"),
        (
            400,
            {"error": {"message": "max_tokens is too large: 9999. This model supports at most 4096."}},
            "misconfigured",
        ),
    ],
)
def test_errors_of_all_requests_are_misconfigurations(status: int, body: dict[str, Any], reason: str) -> None:
    error = refused(status, body)
    assert (error.kind, error.reason) == (MISCONFIGURED, reason)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (429, {"error": {"code": "rate_limit_exceeded", "type": "tokens", "message": "Slow down."}}, "http_429"),
        (400, {"error": {"code": "Throttling.RateQuota", "message": "Slow."}}, "overloaded"),
        (400, {"code": "ThrottlingException", "message": "Too many tokens, please wait."}, "overloaded"),
        (429, {"error": {"message": "Limit 30000, Used 29000, Requested 2000. Try again in 2s."}}, "http_429"),
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, "http_503"),
        (500, {"error": {"message": "The engine is currently overloaded, please try again later"}}, "http_500"),
    ],
)
def test_a_backend_that_is_full_is_away(status: int, body: dict[str, Any], reason: str) -> None:
    error = refused(status, body)
    assert (error.kind, error.reason) == (AWAY, reason)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        ({"type": "server_error"}, BROKEN, "backend_error"),
        ({"type": "overloaded_error"}, AWAY, "overloaded"),
        ({"code": "rate_limit_exceeded", "type": "invalid_request_error"}, AWAY, "overloaded"),
        ({"code": "something_new"}, BROKEN, "backend_error"),
        ({"message": "something broke"}, BROKEN, "backend_error"),
        ({"message": ""}, BROKEN, "backend_error"),
        ({"code": None, "type": None}, BROKEN, "backend_error"),
        ({"code": 500}, BROKEN, "backend_error"),
        ({"code": 502}, AWAY, "backend_error"),
        ({"code": "503"}, AWAY, "backend_error"),
        ({"code": 429, "type": "invalid_request_error"}, AWAY, "backend_error"),
        ({"code": 1234}, BROKEN, "backend_error"),
        ({"code": True}, BROKEN, "backend_error"),
        ({"type": "invalid_request_error"}, IMPOSSIBLE, "backend_error"),
        ({"code": "model_not_found", "type": "server_error"}, MISCONFIGURED, "model_not_found"),
        ({"code": "something_new", "type": "Invalid_Request_Error"}, IMPOSSIBLE, "backend_error"),
        ({"type": "BadRequestError", "code": 400}, IMPOSSIBLE, "backend_error"),
        ({"code": 401}, AWAY, "unauthorized"),
        ({"code": "InvalidApiKey", "message": "Invalid API-key provided."}, AWAY, "unauthorized"),
        ({"code": "404"}, MISCONFIGURED, "backend_error"),
        ({"code": "content_filter"}, IMPOSSIBLE, "content_filter"),
        ({"code": "context_length_exceeded"}, IMPOSSIBLE, "context_too_long"),
        ({"message": "This model's maximum context length is 8 tokens"}, IMPOSSIBLE, "context_too_long"),
        ({"code": 400, "message": "This model's maximum context length is 8 tokens"}, IMPOSSIBLE, "context_too_long"),
        ({"code": "insufficient_quota"}, AWAY, "insufficient_quota"),
        (
            {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": '{"error":{"code":"content_filter"}}'},
            },
            IMPOSSIBLE,
            "content_filter",
        ),
    ],
)
def test_an_error_inside_an_answer_is_judged_by_its_words(error: dict[str, Any], kind: str, reason: str) -> None:
    judged = reported(**error)
    assert (judged.kind, judged.reason) == (kind, reason)
    assert judged.detail


@pytest.mark.parametrize(
    ("value", "is_error"),
    [
        ({"code": "InvalidApiKey", "message": "Invalid API-key provided.", "request_id": "1"}, True),
        ({"error_code": 17, "error_msg": "Open api daily request limit reached"}, True),
        ({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}, "choices": None}, True),
        ({"success": False, "errors": [{"code": 7000, "message": "No route"}]}, True),
        ({"code": 1211, "msg": "模型不存在", "success": False}, True),
        ({"status": "error", "message": "down"}, True),
        ({"object": "error", "message": "down"}, True),
        ({"code": 0, "message": "success"}, False),
        ({"code": "200", "msg": "ok"}, False),
        ({"base_resp": {"status_code": 0, "status_msg": "success"}}, False),
        ({"type": "ping"}, False),
        ({"status": "queued", "message": "place 3"}, False),
        ({"id": "1", "error": None}, False),
        ({}, False),
    ],
)
def test_an_object_may_report_an_error_without_saying_error(value: dict[str, Any], is_error: bool) -> None:  # noqa: FBT001 - a column
    assert ErrorReport.is_error(value) is is_error


# Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        (" 7 ", 7),
        ("1.5", 1.5),
        ("-3", 0),
        ("86400", 3600),
        ("1e400", 3600),
        ("Mon, 23 Nov 2026 12:00:20 GMT", 20),
        ("Mon, 23 Nov 2026 13:00:20 +0100", 20),
        ("Mon, 23 Nov 2026 12:00:20 -0000", 20),
        ("Monday, 23-Nov-26 12:00:20 GMT", 20),
        ("Mon Nov 23 12:00:20 2026", 20),
        ("Sun, 22 Nov 2026 12:00:00 GMT", 0),
        ("Mon, 23 Nov 2099 12:00:00 GMT", 3600),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    error = refused(503, Retry_After=value)
    assert error.kind in {"away", "broken"}
    assert error.retry_after == timedelta(seconds=seconds)


@pytest.mark.parametrize("value", ["", "soon", "nan", "Mon, 99 Nov 2026", "Mon, 23 Nov 99999999999 12:00:00 GMT"])
def test_a_retry_after_that_cannot_be_read_is_none(value: str) -> None:
    error = refused(429, Retry_After=value)
    assert error.kind in {"away", "broken"}
    assert error.retry_after is None


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Please retry in 6.07s.", 6.07),
        ("Rate limit reached: Limit 30000, Used 29000, Requested 2000. Please try again in 1m2.5s.", 62.5),
        ("Please try again in 20ms.", 0.02),
        ("Please retry after 20 seconds. Contact us at 5 min walking distance.", 20),
        ("Try again in 2 minutes", 120),
        ("wait for 1 hour", 3600),
        ("请在 20 秒后重试", 20),
        ("请求过快,请重试:3秒", 3),
        ("retry after some time", None),
        ("You have 500 ms of CPU", None),
        ("retry with status 503", None),
    ],
)
def test_the_wait_may_be_in_the_sentence(message: str, seconds: float | None) -> None:
    error = refused(429, {"error": {"message": message}})
    assert error.retry_after == (None if seconds is None else timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ({"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "6s"}]}, 6),
        ({"details": [{"retryDelay": {"seconds": 6}}]}, 6),
        ({"retry_after": 7}, 7),
        ({"retry_after": "7.5"}, 7.5),
        ({"metadata": {"retry_after_ms": 250}}, 0.25),
        ({"retry_after": -1}, 0),
        ({"retry_after": 10**9}, 3600),
        ({"retry_after": "1e999"}, None),
        ({"retry_after": "soon"}, None),
        ({"retry_after": True}, None),
    ],
)
def test_the_wait_may_be_a_field_of_the_error(error: dict[str, Any], seconds: float | None) -> None:
    wait = None if seconds is None else timedelta(seconds=seconds)
    assert refused(429, {"error": error}).retry_after == wait
    assert reported(code=503, **error).retry_after == wait


def test_a_quota_with_a_wait_is_a_limit_per_minute() -> None:
    message = "You exceeded your current quota, please check your plan and billing details. Please retry in 6.07s."
    error = refused(429, {"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED"}})
    assert (error.kind, error.reason, error.retry_after) == (AWAY, "http_429", timedelta(seconds=6.07))


def test_the_header_wins_over_the_sentence() -> None:
    assert refused(429, b"try again in 60s", Retry_After="2").retry_after == timedelta(seconds=2)


def test_milliseconds_are_more_precise_than_seconds() -> None:
    error = refused(429, Retry_After="2", Retry_After_Ms="1250")
    assert error.kind in {"away", "broken"}
    assert error.retry_after == timedelta(milliseconds=1250)
    error = refused(429, Retry_After="2", Retry_After_Ms="?")
    assert error.kind in {"away", "broken"}
    assert error.retry_after == timedelta(seconds=2)


@given(st.text())
def test_any_retry_after_is_within_bounds(value: str) -> None:
    wait = retry_after({"retry-after": value}, now=NOW)
    assert wait is None or timedelta(0) <= wait <= MAX_RETRY_AFTER


# The detail for the operator

SILENT = "the response does not say why"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"error": {"message": "No such model", "type": "NotFoundError"}}', "notfounderror: No such model"),
        (b'{"error": {"message": "No", "type": "x", "code": "x"}}', "x: No"),
        (b'{"error": "model not found"}', "model not found"),
        (b'{"message": "Invalid model", "type": "invalid_model"}', "invalid_model: Invalid model"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (
            b'{"detail": [{"loc": ["body", 0], "msg": "Required", "input": "a prompt"}, {"msg": "Bad"}]}',
            "body.0: Required; Bad",
        ),
        (b'{"detail": [{"loc": 7, "msg": "Bad"}, {"msg": {"input": "a prompt"}}, 7]}', "Bad"),
        (b'[{"error": {"code": 400, "message": "API key not valid", "status": "BAD"}}]', "bad: API key not valid"),
        (b'{"error": {"message": "cut in the mid', "cut in the mid"),
        (b'{"prompt": "a secret prompt"}', SILENT),
        (b'{"error": 7}', SILENT),
        (b"{nonsense", "the body looks like JSON but is not"),
        (b"[]", SILENT),
        (b"", SILENT),
        (b"upstream connect error\n\tor disconnect", "upstream connect error or disconnect"),
        (b"\xff\xfe\x1b[31mred\x00", "\ufffd\ufffd [31mred"),
        (b"<html><head><title>502 Bad&nbsp;Gateway</title></head><body><h1>nginx</h1>", "502 Bad Gateway"),
        (b"<!DOCTYPE html>\n<TITLE lang=en>\n Error <b>503</b>\n</TITLE>", "Error 503"),
        (
            b"<head><style>b{}</style><title> </title></head><!-- c --><h1>Oops</h1><script>x</script><p>Sorry",
            "Oops Sorry",
        ),
        (b"<html><script>never closed", SILENT),
        (b"<html><body>cut <im", "cut"),
    ],
)
def test_the_detail_is_one_short_line_of_what_the_backend_says(body: bytes, detail: str) -> None:
    assert refused(500, body).detail == detail


def test_a_redirect_is_told_as_such() -> None:
    assert (
        refused(307, b"<html>go there</html>", Location="http://elsewhere/?token=x").detail
        == "a redirect, which is not followed"
    )


def test_a_long_detail_is_cut() -> None:
    detail = refused(500, b"word " * 1000).detail
    assert len(detail) <= DETAIL_LENGTH
    assert detail.endswith("word…")


def test_a_secret_that_the_backend_repeats_is_hidden_before_the_text_is_cut() -> None:
    body = {"error": {"message": "x" * 180 + " Incorrect key: sk-very-secret-indeed, see docs", "type": "y"}}
    error = refused(401, body, secrets=("sk-very-secret-indeed",))
    assert "sk-" not in str(error)
    assert "secret" not in repr(error)
    assert shorten("a sk-1 b", ("sk-1",)) == "a (hidden) b"


def test_a_detail_can_be_written_anywhere() -> None:
    assert shorten("half \ud83d a character") == "half ? a character"


@given(st.binary() | st.text().map(str.encode) | st.text().map(lambda text: f"<{text}>".encode()))
def test_any_error_body_gives_an_error(body: bytes) -> None:
    detail = refused(500, body).detail
    assert len(detail) <= DETAIL_LENGTH
    assert "\n" not in detail


FIELDS = st.sampled_from(["error", "message", "detail", "loc", "msg", "code", "type"])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner)
)


@given(JSON)
def test_any_json_is_a_report(value: object) -> None:
    assert isinstance(from_report(ErrorReport.from_value(value)), BackendError)
