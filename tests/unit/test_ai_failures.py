"""Failures of AI calls: transient or permanent, the reason, the detail for the operator, and Retry-After."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from imstream.ai.error_report import DETAIL_LENGTH, ErrorReport, shorten
from imstream.ai.failures import MAX_RETRY_AFTER, from_report, from_response, retry_after
from imstream.errors import BackendError, PermanentBackendError, TransientBackendError

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


def refused(
    status: int, body: bytes | dict[str, Any] = b"", secrets: tuple[str, ...] = (), **headers: str
) -> BackendError:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    fields = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return from_response(status, fields, data, now=NOW, secrets=secrets)


def reported(**error: object) -> BackendError:
    return from_report(ErrorReport.from_value({"error": error}))


# Transient or permanent


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 501, 502, 503, 504, 520, 529, 599])
def test_these_statuses_may_pass(status: int) -> None:
    error = refused(status)
    assert isinstance(error, TransientBackendError)
    assert error.reason == f"http_{status}"


@pytest.mark.parametrize("status", [301, 302, 304, 307, 308, 400, 401, 402, 403, 404, 405, 413, 415, 418, 422, 451])
def test_these_statuses_will_not(status: int) -> None:
    error = refused(status)
    assert isinstance(error, PermanentBackendError)
    assert error.reason == f"http_{status}"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"code": "context_length_exceeded", "message": "too long", "type": "invalid_request_error"}}),
        (400, {"object": "error", "message": "This model's maximum context length is 4096 tokens.", "code": 400}),
        (400, {"error": {"message": "The prompt is longer than the maximum model length of 8.", "code": 400}}),
        (400, {"error": {"code": 400, "message": "too big", "type": "exceed_context_size_error"}}),
        (400, {"error": {"code": 400, "message": "the request exceeds the available context size"}}),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long"}}),
        (413, {"error": "Input is larger than the context window"}),
        (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: ...", "error_type": "validation"}),
        (500, {"error": {"code": "context_length_exceeded"}}),
    ],
)
def test_a_context_that_is_too_long_has_a_reason_of_its_own(status: int, body: dict[str, Any]) -> None:
    error = refused(status, body)
    assert isinstance(error, PermanentBackendError)
    assert error.reason == "context_too_long"


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_sentence_counts_only_where_the_status_blames_the_request(status: int) -> None:
    assert (
        refused(status, {"error": {"message": "upstream broke while it read the context window"}}).reason
        == f"http_{status}"
    )


def test_a_spent_quota_is_permanent_though_429_is_not() -> None:
    error = refused(
        429, {"error": {"code": "insufficient_quota", "type": "insufficient_quota", "message": "Pay first."}}
    )
    assert isinstance(error, PermanentBackendError)
    assert (error.reason, error.detail) == ("insufficient_quota", "insufficient_quota: Pay first.")
    limited = refused(429, {"error": {"code": "rate_limit_exceeded", "type": "tokens", "message": "Slow down."}})
    assert isinstance(limited, TransientBackendError)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        ({"type": "server_error"}, True),
        ({"type": "overloaded_error"}, True),
        ({"code": "rate_limit_exceeded", "type": "invalid_request_error"}, True),
        ({"code": "something_new"}, True),
        ({"message": "something broke"}, True),
        ({"message": ""}, True),
        ({"code": None, "type": None}, True),
        ({"code": 502}, True),
        ({"code": "503"}, True),
        ({"code": 429, "type": "invalid_request_error"}, True),
        ({"code": 1234}, True),
        ({"code": True}, True),
        ({"type": "invalid_request_error"}, False),
        ({"code": "model_not_found", "type": "server_error"}, False),
        ({"code": "something_new", "type": "Invalid_Request_Error"}, False),
        ({"type": "BadRequestError", "code": 400}, False),
        ({"code": 401}, False),
        ({"code": "404"}, False),
        ({"code": "content_filter"}, False),
    ],
)
def test_an_error_inside_an_answer_is_judged_by_its_words(error: dict[str, Any], transient: bool) -> None:  # noqa: FBT001 - a column
    judged = reported(**error)
    assert isinstance(judged, TransientBackendError) is transient
    assert judged.reason == "backend_error"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ({"code": "context_length_exceeded"}, "context_too_long"),
        ({"message": "This model's maximum context length is 8 tokens"}, "context_too_long"),
        ({"code": 400, "message": "This model's maximum context length is 8 tokens"}, "context_too_long"),
        ({"code": "insufficient_quota"}, "insufficient_quota"),
    ],
)
def test_an_error_inside_an_answer_may_tell_more(error: dict[str, Any], reason: str) -> None:
    judged = reported(**error)
    assert isinstance(judged, PermanentBackendError)
    assert judged.reason == reason


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
    assert isinstance(error, TransientBackendError)
    assert error.retry_after == timedelta(seconds=seconds)


@pytest.mark.parametrize("value", ["", "soon", "nan", "Mon, 99 Nov 2026", "Mon, 23 Nov 99999999999 12:00:00 GMT"])
def test_a_retry_after_that_cannot_be_read_is_none(value: str) -> None:
    error = refused(429, Retry_After=value)
    assert isinstance(error, TransientBackendError)
    assert error.retry_after is None


def test_milliseconds_are_more_precise_than_seconds() -> None:
    error = refused(429, Retry_After="2", Retry_After_Ms="1250")
    assert isinstance(error, TransientBackendError)
    assert error.retry_after == timedelta(milliseconds=1250)
    error = refused(429, Retry_After="2", Retry_After_Ms="?")
    assert isinstance(error, TransientBackendError)
    assert error.retry_after == timedelta(seconds=2)


@given(st.text())
def test_any_retry_after_is_within_bounds(value: str) -> None:
    wait = retry_after({"retry-after": value}, now=NOW)
    assert wait is None or timedelta(0) <= wait <= MAX_RETRY_AFTER


# The detail for the operator


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
        (b'[{"error": {"code": 400, "message": "API key not valid", "status": "BAD"}}]', "API key not valid"),
        (b'{"error": {"message": "cut in the mid', "cut in the mid"),
        (b'{"prompt": "a secret prompt"}', ""),
        (b'{"error": 7}', ""),
        (b"{nonsense", "the body looks like JSON but is not"),
        (b"[]", ""),
        (b"", ""),
        (b"upstream connect error\n\tor disconnect", "upstream connect error or disconnect"),
        (b"\xff\xfe\x1b[31mred\x00", "\ufffd\ufffd [31mred"),
        (b"<html><head><title>502 Bad&nbsp;Gateway</title></head><body><h1>nginx</h1>", "502 Bad Gateway"),
        (b"<!DOCTYPE html>\n<TITLE lang=en>\n Error <b>503</b>\n</TITLE>", "Error 503"),
        (
            b"<head><style>b{}</style><title> </title></head><!-- c --><h1>Oops</h1><script>x</script><p>Sorry",
            "Oops Sorry",
        ),
        (b"<html><script>never closed", ""),
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
