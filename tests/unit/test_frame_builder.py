"""What the gateway says in each situation, in both languages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.gateway.frames import REFUSED_REASONS, RETRY_AFTER_MS, FrameBuilder
from imstream.model import Terminal
from imstream.reply_buffer import ReplyEnded, TextGrown, TextReset
from imstream.texts import Lang, Text
from imstream.wire import Code, Event, InvalidFrame, MsgType, ServerFrame


@pytest.fixture(params=["zh", "en"])
def phrases(request: pytest.FixtureRequest) -> FrameBuilder:
    """Those for user 10001, in either language."""
    return phrases_in(request.param)


def phrases_in(lang: Lang) -> FrameBuilder:
    phrases = FrameBuilder(lang, "node-7")
    phrases.user_id = 10001
    return phrases


def sentence(phrases: FrameBuilder, text: Text) -> str:
    return text.zh if phrases.lang == "zh" else text.en


def said(text: str) -> ServerFrame:
    return ServerFrame.model_validate_json(text)


def test_a_login_is_answered_with_the_user_and_the_node(phrases: FrameBuilder) -> None:
    frame = phrases.welcome()
    assert (frame.msg_type, frame.code, frame.user_id, frame.node) == (MsgType.INIT, Code.SUCCESS, 10001, "node-7")
    assert "10001" in (frame.contents or "")


def test_a_heartbeat_is_answered_with_one(phrases: FrameBuilder) -> None:
    frame = phrases.heartbeat()
    assert (frame.msg_type, frame.contents) == (MsgType.HEARTBEAT, sentence(phrases, Text.HEARTBEAT))


def test_an_accepted_message_is_told_its_place(phrases: FrameBuilder) -> None:
    frame = phrases.accepted("m", 3)
    assert (frame.event, frame.message_id, frame.position, frame.user_id) == (Event.ACCEPTED, "m", 3, 10001)
    assert "3" in (frame.contents or "")


@pytest.mark.parametrize(("by_user", "text"), [(True, Text.USER_BUSY), (False, Text.BUSY)])
def test_who_does_not_fit_is_told_whose_cap_it_is_and_when_to_try_again(
    phrases: FrameBuilder,
    by_user: bool,  # noqa: FBT001 - a parameter of the test
    text: Text,
) -> None:
    frame = phrases.busy("m", by_user=by_user)
    assert (frame.code, frame.msg_type, frame.message_id) == (Code.BUSY, MsgType.SYSTEM, "m")
    assert frame.contents == sentence(phrases, text)
    assert frame.retry_after_ms is not None


def test_refused_clients_do_not_all_come_back_at_once() -> None:
    phrases = phrases_in("en")
    waits = [phrases.busy("m").retry_after_ms or 0 for _ in range(200)]
    assert RETRY_AFTER_MS * 0.5 <= min(waits) < max(waits) <= RETRY_AFTER_MS * 1.5
    assert len(set(waits)) > 50


def test_a_bad_frame_is_answered_with_its_problem(phrases: FrameBuilder) -> None:
    frame = phrases.bad_frame(InvalidFrame("history.0.role", "must be a {role}"))
    assert (frame.code, frame.msg_type) == (Code.BAD_REQUEST, MsgType.SYSTEM)
    assert (frame.contents or "").endswith("history.0.role: must be a {role}")


def test_a_reply_that_nobody_knows_is_told_for_its_message(phrases: FrameBuilder) -> None:
    frame = phrases.expired("m")
    assert (frame.code, frame.msg_type, frame.message_id) == (Code.EXPIRED, MsgType.CHAT, "m")
    assert frame.event is None


def test_the_receipt_of_a_cancel_names_its_message(phrases: FrameBuilder) -> None:
    frame = phrases.cancelled("m")
    assert (frame.event, frame.message_id, frame.contents) == (
        Event.CANCELLED,
        "m",
        sentence(phrases, Text.CANCELLED),
    )


def test_only_what_may_be_tried_again_says_when() -> None:
    phrases = phrases_in("en")
    assert phrases.system(Code.FORBIDDEN, Text.NOT_LOGGED_IN).retry_after_ms is None
    assert phrases.system(Code.UNAVAILABLE, Text.UNAVAILABLE, retry=True).retry_after_ms is not None


# What is new in a reply


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 99), st.integers(0, 10**9))
def test_new_text_is_a_delta(text: str, attempt: int, before: int) -> None:
    frame = said(phrases_in("zh").step("m", TextGrown(attempt, text, before + len(text))))
    assert (frame.event, frame.contents, frame.attempt, frame.offset) == (
        Event.DELTA,
        text,
        attempt,
        before + len(text),
    )


def test_a_new_attempt_begins_at_offset_0(phrases: FrameBuilder) -> None:
    frame = said(phrases.step("m", TextReset(2)))
    assert (frame.event, frame.attempt, frame.offset, frame.message_id) == (Event.RESTART, 2, 0, "m")
    assert frame.contents == sentence(phrases, Text.RESTART)


def test_a_whole_answer_ends_with_its_finish_reason_usage_and_node(phrases: FrameBuilder) -> None:
    frame = said(phrases.step("m", ReplyEnded(1, 5, Terminal("done", "stop", {"total_tokens": 7}))))
    assert (frame.code, frame.event, frame.offset) == (Code.SUCCESS, Event.DONE, 5)
    assert (frame.finish_reason, frame.usage, frame.node) == ("stop", {"total_tokens": 7}, "node-7")
    assert frame.contents is None


def test_a_cancelled_answer_ends_as_such(phrases: FrameBuilder) -> None:
    frame = said(phrases.step("m", ReplyEnded(1, 5, Terminal("cancelled"))))
    assert (frame.code, frame.event, frame.contents) == (
        Code.SUCCESS,
        Event.CANCELLED,
        sentence(phrases, Text.CANCELLED),
    )


@pytest.mark.parametrize(
    ("reason", "text"),
    [*((reason, Text.REFUSED) for reason in sorted(REFUSED_REASONS)), ("http_503", Text.FAILED), (None, Text.FAILED)],
)
def test_a_failed_answer_says_whether_the_person_can_mend_it(
    phrases: FrameBuilder, reason: str | None, text: Text
) -> None:
    terminal = Terminal("failed", reason=reason, error="the key sk-123 is wrong")
    encoded = phrases.step("m", ReplyEnded(4, 0, terminal))
    frame = said(encoded)
    assert (frame.code, frame.event, frame.attempt) == (Code.AI_FAILED, Event.FAILED, 4)
    assert frame.contents == sentence(phrases, text)
    assert "sk-123" not in encoded  # what the backend says is for operators
