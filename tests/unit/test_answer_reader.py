"""The answer reader: the dialects of many servers, in any fragmentation."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from imstream.ai.answer_reader import JSON_LIMIT, AnswerReader
from imstream.ai.completion_reader import MAX_TOKEN_COUNT
from imstream.errors import BackendError
from tests.support.scripted_backend import DONE, chunk, event, usage_chunk

LIMIT = 262_144


def read(*parts: bytes) -> tuple[str, AnswerReader]:
    """Read a whole body."""
    reader = AnswerReader(limit=LIMIT)
    text = "".join([reader.feed(part) for part in parts])
    return text + reader.end(), reader


def with_delta(**delta: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def failure(*parts: bytes) -> BackendError:
    with pytest.raises(BackendError) as caught:
        read(*parts)
    return caught.value


STOP = event(chunk(finish_reason="stop"))


# Text


def test_all_events_of_one_read_become_one_piece() -> None:
    reader = AnswerReader(limit=LIMIT)
    assert reader.feed(event(chunk("Hel")) + event(chunk("lo")) + event(chunk(" 你好"))) == "Hello 你好"
    assert not reader.complete
    assert reader.feed(STOP) == ""
    assert (reader.complete, reader.done, reader.finish_reason) == (True, False, "stop")
    assert reader.feed(DONE) == ""
    assert reader.done


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(with_delta(role="assistant", content=""), "", id="a role"),
        pytest.param(with_delta(content=None), "", id="content null"),
        pytest.param(event({"choices": [{"index": 0, "finish_reason": None}]}), "", id="no delta"),
        pytest.param(event({"choices": [{"index": 0, "delta": None}]}), "", id="delta null"),
        pytest.param(event({"choices": []}), "", id="no choices"),
        pytest.param(event({"choices": None}), "", id="choices null"),
        pytest.param(event({"id": "x"}), "", id="choices missing"),
        pytest.param(with_delta(content="a", error=None), "a", id="text"),
        pytest.param(event({"error": None, **chunk("a")}), "a", id="error null"),
        pytest.param(
            with_delta(content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]), "a", id="parts"
        ),
        pytest.param(with_delta(content="a", reasoning_content="hm"), "a", id="text beside reasoning"),
        pytest.param(event(chunk("a", finish_reason="length")), "a", id="text with the finish reason"),
        pytest.param(
            event({"choices": [{"delta": {"content": "a"}, "message": {"content": "all"}}]}),
            "a",
            id="a whole beside the delta",
        ),
        pytest.param(
            event({"choices": [{"delta": {}, "message": {"content": "1"}, "finish_reason": "stop"}]}),
            "",
            id="a whole after the deltas",
        ),
        pytest.param(event({"usage": [1], **chunk("a")}), "a", id="usage of another shape"),
        pytest.param(with_delta(content="\u0001"), "\u0001", id="a control character"),
        pytest.param(b"event: message\nid: 7\n" + event(chunk("a")), "a", id="named events"),
    ],
)
def test_only_the_text_of_a_delta_is_shown(body: bytes, text: str) -> None:
    assert read(event(chunk("1")), body, STOP, DONE)[0] == f"1{text}"


@pytest.mark.parametrize(
    ("body", "moved"),
    [
        (with_delta(content="a"), True),
        (with_delta(reasoning_content="hm"), True),
        (with_delta(reasoning="hm", content=""), True),
        (with_delta(tool_calls=[{"index": 0}], content=None), True),
        (STOP, True),
        (with_delta(role="assistant", content=""), False),
        (with_delta(role="assistant", content=None, reasoning_content=""), False),
        (b": keep-alive\n\n", False),
        (event({"choices": []}), False),
        (b"data: {", False),
    ],
)
def test_text_and_hidden_reasoning_show_the_model_at_work_and_comments_do_not(body: bytes, moved: bool) -> None:  # noqa: FBT001 - a column
    reader = AnswerReader(limit=LIMIT)
    reader.feed(event(chunk("before")))
    reader.feed(body)
    assert reader.progressed is moved


@pytest.mark.parametrize("together", [True, False])
def test_an_error_event_that_looks_like_the_text_before_it_is_an_error(together: bool) -> None:  # noqa: FBT001 - a case
    body = [event(chunk("a")), event(chunk("b")), event(chunk("c")), b"event: error\n" + event(chunk("d"))]
    reader = AnswerReader(limit=LIMIT)
    with pytest.raises(BackendError):
        [reader.feed(part) for part in ([b"".join(body)] if together else body)]


@given(st.lists(st.text(max_size=5), max_size=8), st.data())
def test_any_cut_of_the_bytes_gives_the_same_answer(texts: list[str], data: st.DataObject) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    body = b"".join(event(chunk(text)) for text in texts) + STOP + event(usage_chunk(total_tokens=1)) + DONE
    places = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=10)))
    reader = AnswerReader(limit=LIMIT)
    parts = [body[start:end] for start, end in zip([0, *places], [*places, len(body)], strict=True)]
    if not "".join(texts).strip():
        with pytest.raises(BackendError, match="empty_answer"):
            [reader.feed(part) for part in parts]
        return
    assert "".join([reader.feed(part) for part in parts]) == "".join(texts).replace("\0", "\ufffd")
    assert (reader.finish_reason, reader.usage, reader.done) == ("stop", {"total_tokens": 1}, True)


# The end


def test_an_answer_is_whole_with_done_or_with_a_finish_reason() -> None:
    assert read(event(chunk("a")), DONE)[1].finish_reason is None
    assert read(event(chunk("a")), STOP)[1].finish_reason == "stop"
    assert read(event(chunk("a")), b"data: [DONE]")[0] == "a"
    assert read(event(chunk("a")), STOP.strip())[1].finish_reason == "stop"


@pytest.mark.parametrize("cut", [b"", b"data: {", b"data: [DON", b": keep-alive\n\n", event(chunk("b")).strip()])
def test_an_answer_that_ends_without_either_is_broken(cut: bytes) -> None:
    error = failure(event(chunk("a")), cut)
    assert error.kind in {"away", "broken"}
    assert error.reason == "broken_stream"


def test_an_empty_body_is_broken() -> None:
    assert failure().reason == "broken_stream"
    assert failure(b"\n \r\n").reason == "broken_stream"


def test_an_error_in_an_event_that_lacks_its_blank_line_is_told() -> None:
    assert failure(event({"error": {"message": "overloaded"}}).strip()).reason == "overloaded"


def test_nothing_counts_after_done() -> None:
    assert read(event(chunk("a")) + DONE + event(chunk("b")) + b"data: {\n\n")[0] == "a"


@pytest.mark.parametrize(
    "reason", ["error", "insufficient_system_resource", "abort", "network_error", "FAILED", "cancelled", "timeout"]
)
def test_a_finish_reason_that_means_failure_is_a_failure(reason: str) -> None:
    error = failure(event(chunk("a", finish_reason=reason)))
    assert (error.kind, error.reason, error.detail) == ("broken", "aborted", f"finish reason {reason}")


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("stop", "stop"),
        ("STOP", "STOP"),
        ("eos_token", "eos_token"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("model_length", "length"),
        ("model_context_window_exceeded", "length"),
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("sensitive", "content_filter"),
        ("ERROR_TOXIC", "content_filter"),
        ("two words", "other"),
        (7, "other"),
        ({"a": 1}, "other"),
    ],
)
def test_the_finish_reasons_of_servers_have_few_words(sent: Any, told: str) -> None:  # noqa: ANN401 - JSON
    assert read(event(chunk("a", finish_reason=sent)))[1].finish_reason == told


def test_the_word_for_no_finish_reason_is_none() -> None:
    reader = AnswerReader(limit=LIMIT)
    reader.feed(event(chunk("a", finish_reason="null")))
    assert not reader.complete


# Usage


def test_usage_comes_in_its_own_chunk_or_with_the_last_one() -> None:
    counts = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    own = AnswerReader(limit=LIMIT)
    own.feed(event(chunk("a")) + STOP + event(usage_chunk(**counts)) + DONE)
    assert own.usage == counts
    last = AnswerReader(limit=LIMIT)
    last.feed(event({**chunk("a"), "usage": None}) + event({**chunk(finish_reason="stop"), "usage": counts}))
    assert last.usage == counts


def test_hidden_reasoning_is_not_lost_from_usage() -> None:
    reader = AnswerReader(limit=LIMIT)
    reader.feed(
        event(
            usage_chunk(
                completion_tokens=50,
                total_time=0.5,
                cached=True,
                prompt_tokens_details={"cached_tokens": 7, "audio_tokens": 0},
                completion_tokens_details={"reasoning_tokens": 40},
            )
        )
    )
    assert reader.usage == {"completion_tokens": 50, "cached_tokens": 7, "reasoning_tokens": 40}


def test_the_newest_usage_wins_and_an_empty_one_does_not() -> None:
    reader = AnswerReader(limit=LIMIT)
    for counts in ({"total_tokens": 1}, {"total_tokens": 2}, {"cost": 0.1}, {"prompt_tokens_details": None}):
        reader.feed(event(usage_chunk(**counts)))
    assert reader.usage == {"total_tokens": 2}


# Answers in one document


def document(**fields: object) -> bytes:
    return json.dumps({"object": "chat.completion", **fields}).encode()


def test_an_answer_that_is_not_streamed_is_read() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "length"}
    body = b" \n" + document(choices=[choice], usage={"total_tokens": 8})
    text, reader = read(*(body[at : at + 7] for at in range(0, len(body), 7)))
    assert text == "Hello"
    assert (reader.finish_reason, reader.usage, reader.complete) == ("length", {"total_tokens": 8}, True)


@pytest.mark.parametrize("message", [{"content": None}, {"content": ""}, {"content": " \n"}, {}])
def test_an_answer_that_is_not_streamed_may_not_be_empty(message: dict[str, Any]) -> None:
    error = failure(document(choices=[{"message": message}]))
    assert (error.kind, error.reason) == ("broken", "empty_answer")


@pytest.mark.parametrize(
    "body", [b"{}", document(choices=[]), b"[]", b"[1]", b'{"choices": [{"message": 1}]}', b'{"choices": {}}', b"{cut"]
)
def test_json_without_an_answer_is_a_bad_stream(body: bytes) -> None:
    error = failure(body)
    assert (error.kind, error.reason) == ("broken", "bad_stream")
    assert error.detail


def test_a_document_without_end_is_refused() -> None:
    error = failure(b'{"x": "', *([b"x" * (1 << 20)] * 9))
    assert (error.kind, error.reason) == ("impossible", "too_large")
    assert error.detail == f"a document of more than {JSON_LIMIT} bytes"


def test_a_page_instead_of_an_answer_is_told_by_its_title() -> None:
    error = failure(b"<!DOCTYPE html><html><head><title>Log in to the network</title></head><body>...</body></html>")
    assert (error.reason, error.detail) == ("bad_stream", "a page instead of an answer: Log in to the network")


# Errors


@pytest.mark.parametrize(
    "body",
    [
        event({"error": {"message": "try later", "code": "overloaded"}}),
        event({"object": "error", "message": "try later", "type": "overloaded"}),
        event({"type": "error", "error": {"type": "overloaded", "message": "try later"}}),
        b"event: error\n" + event({"error": {"message": "try later", "type": "overloaded"}}),
        event({**chunk("", finish_reason="error"), "error": {"code": "overloaded", "message": "try later"}}),
        b'{"error": {"message": "try later", "code": "overloaded"}}',
        b'[{"error": {"message": "try later", "code": "overloaded"}}]',
    ],
)
def test_an_error_object_is_an_error_wherever_it_comes(body: bytes) -> None:
    error = failure(body)
    assert error.kind in {"away", "broken"}
    assert (error.kind, error.reason, error.detail) == ("away", "overloaded", "overloaded: try later")


def test_an_error_object_in_the_middle_of_an_answer_ends_it() -> None:
    error = failure(
        event(chunk("a")), event({"error": {"type": "invalid_request_error"}}), event(chunk("b")), STOP, DONE
    )
    assert error.kind in {"impossible", "misconfigured"}
    assert error.reason == "backend_error"


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"{", id="half an object"),
        pytest.param(b"hello", id="no JSON"),
        pytest.param(b'{"choices":[{"delta":{"content":"\xff"}}]}', id="no UTF-8"),
        pytest.param(b'{"choices":[{"delta":{"content":"\xe4\xbd"}}]}', id="half a character"),
        pytest.param(b'{"choices":[{"delta":{"content":"\\u00"}}]}', id="half an escape"),
        pytest.param(b'{"choices":[{"delta":{"content":"\\ud83d \xff"}}]}', id="half a pair and no UTF-8"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'"\\u0000"' + b"[" * 100_000, id="deep, with an escape"),
        pytest.param(b"7", id="a number"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"choices": {"a": 1}}', id="choices that are no list"),
        pytest.param(b'{"choices": "abc"}', id="choices that are text"),
        pytest.param(b'{"choices": [7]}', id="a choice that is a number"),
        pytest.param(b'{"choices": [{"delta": "a"}]}', id="a delta that is text"),
        pytest.param(b'{"choices": [{"delta": {"content": 7}}]}', id="content that is a number"),
        pytest.param(b'{"choices": [{"delta": {"content": [7]}}]}', id="a part that is a number"),
    ],
)
def test_what_is_no_chat_completion_is_a_bad_stream(payload: bytes) -> None:
    error = failure(event(chunk("a")), b"data: " + payload + b"\n\n")
    assert (error.kind, error.reason) == ("broken", "bad_stream")
    assert read(event(chunk("a")), b"data: " + payload + b"\n\n", STOP)[0] == "a"


def test_an_event_without_end_is_too_large() -> None:
    error = failure(b"data: ", *([b"x" * (1 << 20)] * 5))
    assert (error.kind, error.reason) == ("impossible", "too_large")
    assert error.detail == f"an event of more than {JSON_LIMIT} bytes"


FIELDS = st.sampled_from(
    ["choices", "delta", "content", "finish_reason", "usage", "error", "message", "code", "object", "detail", "loc"]
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=3)
"""Includes single surrogates and NUL."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.just(10**400) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(FIELDS | ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_an_answer_that_can_be_sent_or_an_error_of_the_backend(value: object) -> None:
    problems = list[str]()
    plain = json.dumps(value).encode()
    for body in (as_event(plain) + STOP, plain):
        try:
            text, reader = read(body)
        except BackendError as error:
            problems.append(str(error))
            continue
        to_json([text, reader.finish_reason, reader.usage])
        assert "\0" not in text
        assert len(reader.finish_reason or "") <= 64
        assert all(0 <= count <= MAX_TOKEN_COUNT for count in (reader.usage or {}).values())
    assert all(len(problem) < 300 and problem.isprintable() for problem in problems)


# Surrogate pairs in two events

SMILE_HIGH, SMILE_LOW = (
    b'{"choices":[{"delta":{"content":"a\\ud83d"}}]}',
    b'{"choices":[{"delta":{"content":"\\ude00b"}}]}',
)


def as_event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


def test_a_character_in_two_halves_is_joined() -> None:
    together, apart = AnswerReader(limit=LIMIT), AnswerReader(limit=LIMIT)
    assert together.feed(as_event(SMILE_HIGH) + as_event(SMILE_LOW)) == "a😀b"
    assert apart.feed(as_event(SMILE_HIGH)) == "a"
    assert apart.feed(as_event(SMILE_LOW)) == "😀b"
    assert apart.feed(event(chunk("c😀"))) == "c😀"


@pytest.mark.parametrize(
    ("payloads", "text"),
    [
        ([SMILE_HIGH, SMILE_HIGH, SMILE_LOW], "a\ufffda😀b"),
        ([SMILE_LOW], "\ufffdb"),
        ([SMILE_HIGH], "a"),
    ],
)
def test_half_a_character_never_gets_out(payloads: list[bytes], text: str) -> None:
    assert read(*map(as_event, payloads), STOP)[0] == text


def test_half_a_character_in_a_document_never_gets_out() -> None:
    assert read(b'{"choices":[{"message":{"content":"a\\ud83d b"}}]}')[0] == "a\ufffd b"


# Reasoning in tags


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_reasoning_at_the_beginning_of_the_text_is_progress_and_not_text(size: int) -> None:
    content = "<think>\nhm </th </think>\n\nThe <think>answer"
    events = [event(chunk(content[begin : begin + size])) for begin in range(0, len(content), size)]
    reader = AnswerReader(limit=LIMIT)
    pieces = list[str]()
    for part in events:
        pieces.append(reader.feed(part))
        assert reader.progressed
    assert "".join([*pieces, reader.feed(STOP), reader.feed(DONE), reader.end()]) == "The <think>answer"


@pytest.mark.parametrize("end", [[STOP, DONE], [STOP], [DONE]], ids=["finish and done", "finish", "done"])
def test_a_prefix_of_a_tag_is_text_at_the_end(end: list[bytes]) -> None:
    assert read(event(chunk("<thi")), *end)[0] == "<thi"


def test_an_answer_of_reasoning_in_tags_is_empty() -> None:
    for text in ("<think>hm</think>\n", "<think>hm"):
        assert failure(event(chunk(text)), STOP, DONE).reason == "empty_answer"


def test_reasoning_in_tags_is_removed_from_a_document_too() -> None:
    message = {"role": "assistant", "content": "<think>hm</think>\nThe answer"}
    assert read(to_json({"choices": [{"message": message, "finish_reason": "stop"}]}))[0] == "The answer"


def test_without_tags_the_text_is_shown_as_it_is() -> None:
    reader = AnswerReader(limit=LIMIT, reasoning="field")
    assert reader.feed(event(chunk("<think>hm</think>"))) == "<think>hm</think>"


# Reasoning that is reported


def test_reasoning_before_the_text_is_reported_as_it_comes_and_its_end_once() -> None:
    told = list[str]()
    reader = AnswerReader(limit=LIMIT, reasoning="field", on_reasoning=told.append)
    assert reader.feed(with_delta(reasoning_content="let ") + with_delta(reasoning_content="me")) == ""
    assert told == ["let ", "me"]
    assert reader.feed(with_delta(content="\n\n") + with_delta(reasoning="!")) == "\n\n"  # blanks are not its end
    assert reader.feed(with_delta(content="yes", reasoning="?")) == "yes"
    assert told == ["let ", "me", "!", "?", ""]
    reader.feed(with_delta(content="no", reasoning="more") + with_delta(reasoning="more"))
    assert told == ["let ", "me", "!", "?", ""]


def test_without_reasoning_nothing_is_reported() -> None:
    told = list[str]()
    reader = AnswerReader(limit=LIMIT, on_reasoning=told.append)
    assert "".join(map(reader.feed, (event(chunk("a")), event(chunk("b")), STOP, DONE))) == "ab"
    assert told == []


def test_reasoning_in_tags_and_in_documents_is_reported() -> None:
    told = list[str]()
    reader = AnswerReader(limit=LIMIT, on_reasoning=told.append)
    for text in ("<thi", "nk>let ", "me</think", ">\nyes"):
        reader.feed(event(chunk(text)))
    assert ("".join(told), told[-1]) == ("let me", "")
    told.clear()
    reader = AnswerReader(limit=LIMIT, on_reasoning=told.append)
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    reader.feed(to_json({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert (reader.end(), told) == ("yes", ["hm", ""])


def test_reasoning_is_bounded_and_holds_nothing_that_text_may_not_hold() -> None:
    told = list[str]()
    reader = AnswerReader(limit=6, on_reasoning=told.append)
    reader.feed(b'data: {"choices": [{"delta": {"reasoning": "a\\ud83d\\u0000"}}]}\n\n')
    reader.feed(with_delta(reasoning="bcdef") + with_delta(reasoning="g"))
    assert reader.feed(event(chunk("yes"))) == "yes"
    assert told == ["a\ufffd\ufffd", "bcd", ""]
