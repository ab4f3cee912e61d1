"""The frame for each situation, in both languages."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.failures import REQUEST_REASONS
from imstream.codes import Code, Event, MsgType
from imstream.frame_parser import InvalidFrame
from imstream.gateway.cursor import ReplyEnded, TextGrown, TextReset
from imstream.gateway.frames import RETRY_AFTER_MS, FrameBuilder
from imstream.model import Refusal, Terminal
from imstream.texts import Lang, Text
from imstream.wire import ReceivedFrame


@pytest.fixture(params=["zh", "en"])
def frames(request: pytest.FixtureRequest) -> FrameBuilder:
    """A builder for user 10001, in either language."""
    return frames_in(request.param)


def frames_in(lang: Lang) -> FrameBuilder:
    frames = FrameBuilder(lang, "node-7")
    frames.user_id = 10001
    return frames


def sentence(frames: FrameBuilder, text: Text) -> str:
    return text.zh if frames.lang == "zh" else text.en


def said(text: str) -> ReceivedFrame:
    return ReceivedFrame.model_validate_json(text)


def test_a_login_is_answered_with_the_user_and_the_node(frames: FrameBuilder) -> None:
    frame = frames.welcome()
    assert (frame.msg_type, frame.code, frame.user_id, frame.node) == (MsgType.INIT, Code.SUCCESS, 10001, "node-7")
    assert "10001" in (frame.contents or "")


def test_a_heartbeat_is_answered_with_one(frames: FrameBuilder) -> None:
    frame = frames.heartbeat()
    assert (frame.msg_type, frame.contents) == (MsgType.HEARTBEAT, sentence(frames, Text.HEARTBEAT))


@pytest.mark.parametrize(("recorded", "told"), [("FORBIDDEN", Code.FORBIDDEN), ("OF_A_NEWER_RELEASE", Code.AI_FAILED)])
def test_a_refusal_with_a_code_of_a_newer_release_is_sent_as_a_failure(
    frames: FrameBuilder, recorded: str, told: Code
) -> None:
    terminal = Terminal("failed", reason="a_guard", refusal=Refusal(recorded, "No."))
    frame = said(frames.reply_step("m", ReplyEnded(1, 0, terminal)))
    assert (frame.code, frame.contents) == (told, "No.")


def test_an_accepted_message_is_told_its_place(frames: FrameBuilder) -> None:
    frame = frames.accepted("m", 3)
    assert (frame.event, frame.message_id, frame.position, frame.user_id) == (Event.ACCEPTED, "m", 3, 10001)
    assert "3" in (frame.contents or "")


@pytest.mark.parametrize(("by_user", "text"), [(True, Text.USER_BUSY), (False, Text.BUSY)])
def test_who_does_not_fit_is_told_whose_cap_it_is_and_when_to_try_again(
    frames: FrameBuilder,
    by_user: bool,  # noqa: FBT001 - a parameter of the test
    text: Text,
) -> None:
    frame = frames.busy("m", by_user=by_user)
    assert (frame.code, frame.msg_type, frame.message_id) == (Code.BUSY, MsgType.SYSTEM, "m")
    assert frame.contents == sentence(frames, text)
    assert frame.retry_after_ms is not None


def test_refused_clients_do_not_all_come_back_at_once() -> None:
    frames = frames_in("en")
    waits = [frames.busy("m").retry_after_ms or 0 for _ in range(200)]
    assert RETRY_AFTER_MS * 0.5 <= min(waits) < max(waits) <= RETRY_AFTER_MS * 1.5
    assert len(set(waits)) > 50


def test_a_bad_frame_is_answered_with_its_problem(frames: FrameBuilder) -> None:
    frame = frames.bad_frame(InvalidFrame("history.0.role", "must be a {role}"))
    assert (frame.code, frame.msg_type) == (Code.BAD_REQUEST, MsgType.SYSTEM)
    assert (frame.contents or "").endswith("history.0.role: must be a {role}")


def test_a_reply_that_nobody_knows_is_told_for_its_message(frames: FrameBuilder) -> None:
    frame = frames.expired("m")
    assert (frame.code, frame.msg_type, frame.message_id) == (Code.EXPIRED, MsgType.CHAT, "m")
    assert "event" not in json.loads(frame.encode())


def test_the_receipt_of_a_cancel_names_its_message(frames: FrameBuilder) -> None:
    frame = frames.cancelled("m")
    assert (frame.event, frame.message_id, frame.contents) == (
        Event.CANCELLED,
        "m",
        sentence(frames, Text.CANCELLED),
    )


def test_only_what_may_be_tried_again_says_when() -> None:
    frames = frames_in("en")
    assert frames.system(Code.FORBIDDEN, Text.NOT_LOGGED_IN).retry_after_ms is None
    assert frames.system(Code.UNAVAILABLE, Text.UNAVAILABLE, retry=True).retry_after_ms is not None


# Steps of a reply


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 99), st.integers(0, 10**9))
def test_new_text_is_a_delta(text: str, attempt: int, before: int) -> None:
    frame = said(frames_in("zh").reply_step("m", TextGrown(attempt, text, before + len(text))))
    assert (frame.event, frame.contents, frame.attempt, frame.offset) == (
        Event.DELTA,
        text,
        attempt,
        before + len(text),
    )


def test_a_new_attempt_begins_at_offset_0(frames: FrameBuilder) -> None:
    frame = said(frames.reply_step("m", TextReset(2)))
    assert (frame.event, frame.attempt, frame.offset, frame.message_id) == (Event.RESTART, 2, 0, "m")
    assert frame.contents == sentence(frames, Text.RESTART)


def test_a_whole_answer_ends_with_its_finish_reason_usage_and_node(frames: FrameBuilder) -> None:
    frame = said(frames.reply_step("m", ReplyEnded(1, 5, Terminal("done", "stop", {"total_tokens": 7}))))
    assert (frame.code, frame.event, frame.offset) == (Code.SUCCESS, Event.DONE, 5)
    assert (frame.finish_reason, frame.usage, frame.node) == ("stop", {"total_tokens": 7}, "node-7")
    assert frame.contents is None


def test_a_cancelled_answer_ends_as_such(frames: FrameBuilder) -> None:
    frame = said(frames.reply_step("m", ReplyEnded(1, 5, Terminal("cancelled"))))
    assert (frame.code, frame.event, frame.contents) == (
        Code.SUCCESS,
        Event.CANCELLED,
        sentence(frames, Text.CANCELLED),
    )


@pytest.mark.parametrize(
    ("reason", "kind", "text"),
    [
        *((reason, "impossible", Text.REFUSED) for reason in sorted(REQUEST_REASONS)),
        ("http_503", "away", Text.AI_AWAY),
        ("http_404", "misconfigured", Text.AI_AWAY),
        ("broken_stream", "broken", Text.FAILED),
        (None, None, Text.FAILED),
    ],
)
def test_a_failed_answer_says_whether_the_person_can_mend_it(
    frames: FrameBuilder, reason: str | None, kind: str | None, text: Text
) -> None:
    terminal = Terminal("failed", reason=reason, error="the key sk-123 is wrong", kind=kind)
    encoded = frames.reply_step("m", ReplyEnded(4, 0, terminal))
    frame = said(encoded)
    code = Code.FORBIDDEN if reason == "content_filter" else Code.AI_FAILED
    assert (frame.code, frame.event, frame.attempt) == (code, Event.FAILED, 4)
    assert frame.contents == sentence(frames, text)
    assert "sk-123" not in encoded  # errors of the backend are for operators
