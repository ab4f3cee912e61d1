"""Frames of the wire: round trips, and every text of a client is either a frame or an `InvalidFrame`."""

import json
import time
from typing import Any, TypeVar

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from imstream.clock import now_ms
from imstream.codes import CloseCode, Code, State
from imstream.frame_parser import FrameLimits, InvalidFrame, parse_frame
from imstream.strict_json import InvalidJson, parse_json
from imstream.user_ids import MAX_USER_ID, MIN_USER_ID
from imstream.wire import (
    MAX_RESUMED,
    MAX_WANTS,
    Accepted,
    Asked,
    Cancelled,
    ClientCancel,
    ClientChat,
    ClientFrame,
    ClientHeartbeat,
    ClientInit,
    Delta,
    Done,
    Expired,
    Failed,
    HeartbeatReply,
    KnownMessage,
    Problem,
    ReceivedFrame,
    Restart,
    ResumePoint,
    ServerFrame,
    Status,
    Turn,
    Welcome,
    encode_delta,
)

WIRE_FIELDS = {"msgType", "userId", "messageId", "contents", "history", "token", "resume", "wants"}
"""Every field that a client's frame may have."""

Model = TypeVar("Model", bound=BaseModel)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
USER_IDS = st.integers(MIN_USER_ID, MAX_USER_ID)
MESSAGE_IDS = st.from_regex(r"[A-Za-z0-9._:-]{1,64}", fullmatch=True)
COUNTS = st.integers(0, 2**53)


def made(model: type[Model], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Model]:
    """Frames with these fields. `st.builds` would warn about the patterns in the model."""
    return st.fixed_dictionaries(fields).map(lambda given: model(**given))


POINTS = made(ResumePoint, message_id=MESSAGE_IDS, attempt=COUNTS, offset=COUNTS)
TURNS = made(Turn, role=st.sampled_from(["user", "assistant", "system"]), content=TEXTS)

CLIENT_FRAMES: st.SearchStrategy[ClientFrame] = st.one_of(
    made(
        ClientInit,
        msg_type=st.just("INIT"),
        user_id=USER_IDS,
        token=st.none() | TEXTS,
        resume=st.lists(POINTS, max_size=MAX_RESUMED),
        wants=st.lists(TEXTS, max_size=MAX_WANTS),
    ),
    made(
        ClientChat,
        msg_type=st.just("CHAT"),
        user_id=USER_IDS,
        message_id=st.none() | MESSAGE_IDS,
        contents=TEXTS.filter(bool),
        history=st.lists(TURNS),
    ),
    made(ClientCancel, msg_type=st.just("CANCEL"), user_id=st.none() | USER_IDS, message_id=MESSAGE_IDS),
    made(ClientHeartbeat, msg_type=st.just("HEARTBEAT"), user_id=st.none() | USER_IDS),
)
COMMON: dict[str, st.SearchStrategy[Any]] = {"resp_time": st.integers(0).map(str)}
ABOUT_A_MESSAGE = {**COMMON, "contents": TEXTS, "message_id": MESSAGE_IDS}
ENDING: dict[str, st.SearchStrategy[Any]] = {
    **ABOUT_A_MESSAGE,
    "contents": st.none() | TEXTS,
    "user_id": st.none() | USER_IDS,
    "attempt": st.none() | COUNTS,
    "offset": st.none() | COUNTS,
    "finish_reason": st.none() | TEXTS,
    "usage": st.none() | st.dictionaries(TEXTS, COUNTS),
    "node": st.none() | TEXTS,
}
SERVER_FRAMES: st.SearchStrategy[ServerFrame] = st.one_of(
    made(
        Welcome,
        **COMMON,
        contents=TEXTS,
        user_id=USER_IDS,
        remaining=st.none() | COUNTS,
        heartbeat_ms=st.none() | COUNTS,
        node=st.none() | TEXTS,
        messages=st.none()
        | st.lists(made(KnownMessage, message_id=MESSAGE_IDS, state=st.sampled_from(State)), max_size=5),
    ),
    made(HeartbeatReply, **COMMON, contents=TEXTS, user_id=st.none() | USER_IDS),
    made(
        Problem,
        **COMMON,
        code=st.sampled_from(sorted(set(Code) - {Code.SUCCESS, Code.EXPIRED})),
        contents=TEXTS,
        user_id=st.none() | USER_IDS,
        message_id=st.none() | MESSAGE_IDS,
        retry_after_ms=st.none() | COUNTS,
    ),
    made(
        Accepted,
        **ABOUT_A_MESSAGE,
        user_id=USER_IDS,
        position=st.none() | COUNTS,
        remaining=st.none() | COUNTS,
        node=st.none() | TEXTS,
    ),
    made(Delta, **ABOUT_A_MESSAGE, attempt=COUNTS, offset=COUNTS),
    made(Restart, **ABOUT_A_MESSAGE, attempt=COUNTS, offset=COUNTS),
    made(Expired, **ABOUT_A_MESSAGE),
    made(Done, **ENDING),
    made(Failed, **{**ENDING, "contents": TEXTS}, code=st.sampled_from([Code.AI_FAILED, Code.FORBIDDEN])),
    made(Cancelled, **{**ENDING, "contents": TEXTS}),
    made(
        Status,
        **COMMON,
        message_id=MESSAGE_IDS,
        state=st.sampled_from([State.QUEUED, State.STARTED, State.WAITING]),
        position=st.none() | COUNTS,
        eta_ms=st.none() | COUNTS,
    ),
    made(Asked, **ABOUT_A_MESSAGE),
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
)
"""Any JSON that Python writes, including lone surrogates, NaN and Infinity."""

HARMLESS_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**128), 2**128)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=5,
)
"""Valid values of unknown fields."""

NEARLY_FRAMES = st.fixed_dictionaries(
    {"msgType": st.sampled_from(["INIT", "CHAT", "CANCEL", "HEARTBEAT"]) | JSON},
    optional={
        "userId": USER_IDS | JSON,
        "messageId": MESSAGE_IDS | JSON,
        "contents": TEXTS | JSON,
        "token": TEXTS | JSON,
        "history": st.lists(st.fixed_dictionaries({}, optional={"role": JSON | st.just("user"), "content": JSON}))
        | JSON,
        "resume": st.lists(st.fixed_dictionaries({}, optional={"messageId": JSON, "offset": JSON, "attempt": JSON}))
        | JSON,
        "user_id": JSON,
    },
)
"""Objects with known fields, any of which may be missing or invalid."""


def refusal(text: str) -> InvalidFrame | None:
    """The error for this text, or None for a valid frame."""
    try:
        parse_frame(text)
    except InvalidFrame as error:
        return error
    return None


# Round trips


@given(CLIENT_FRAMES)
def test_every_frame_of_a_client_is_read_as_it_was_meant(frame: ClientFrame) -> None:
    assert parse_frame(frame.model_dump_json(by_alias=True)) == frame
    assert parse_frame(frame.model_dump_json(by_alias=True, exclude_none=True)) == frame
    assert parse_frame(json.dumps(frame.model_dump(by_alias=True), ensure_ascii=True)) == frame


@given(SERVER_FRAMES)
def test_every_frame_of_the_server_is_read_as_it_was_meant(frame: ServerFrame) -> None:
    text = frame.encode()
    assert type(frame).model_validate_json(text) == frame
    read = ReceivedFrame.model_validate_json(text)
    assert read.model_dump(exclude_none=True) == frame.model_dump(exclude_none=True)
    assert read.encode() == text
    assert None not in json.loads(text).values()
    assert "\n" not in text


@given(CLIENT_FRAMES, st.dictionaries(TEXTS.filter(lambda name: name not in WIRE_FIELDS), HARMLESS_JSON))
def test_fields_that_nobody_knows_are_ignored(frame: ClientFrame, more: dict[str, object]) -> None:
    text = json.dumps(frame.model_dump(by_alias=True) | more)
    assert parse_frame(text, FrameLimits(depth=20)) == frame


@pytest.mark.parametrize("name", ["user_id", "msg_type"])
def test_the_names_that_fields_have_in_python_are_not_those_of_the_wire(name: str) -> None:
    right = {"msgType": "INIT", "userId": 10001}
    wire_name = {"user_id": "userId", "msg_type": "msgType"}[name]
    error = refusal(json.dumps({name: right.pop(wire_name), **right}))
    assert error is not None
    assert error.field == wire_name


def test_a_bare_ping_is_a_heartbeat() -> None:
    assert parse_frame("PING") == ClientHeartbeat(msg_type="HEARTBEAT")
    assert refusal("ping") is not None


# Deltas are encoded without a model


@given(MESSAGE_IDS, st.integers(1, 2**53), COUNTS, TEXTS)
@example("m", 1, 3, 'a"b\\c/d\x00\x1f\x7f\u2028\ufeff\ufffe你好😀</script>')
def test_a_delta_is_what_the_model_would_have_written(message_id: str, attempt: int, offset: int, text: str) -> None:
    frame = Delta(contents=text, message_id=message_id, attempt=attempt, offset=offset)
    written = encode_delta(message_id, attempt=attempt, offset=offset, text=text)
    resp_time = json.loads(written)["respTime"]
    assert written == frame.model_copy(update={"resp_time": resp_time}).encode()


@given(TEXTS, st.characters(categories=["Cs"]), TEXTS)
def test_text_that_is_no_unicode_is_refused_by_both_alike(before: str, surrogate: str, after: str) -> None:
    text = before + surrogate + after
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encode_delta("m", attempt=1, offset=1, text=text)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        Delta(contents=text, message_id="m", attempt=1, offset=1).encode()


# Any text is a frame or an InvalidFrame that names the field


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")) | JSON.map(json.dumps))
@example("")
@example("\ufeff{}")
@example("[" * 100_000)
@example('{"a":' * 100_000)
@example('{"msgType":"INIT","userId":1' + "0" * 5_000 + "}")
def test_what_is_no_object_with_a_type_is_refused(text: str) -> None:
    assume(text != "PING")
    error = refusal(text)
    assert error is not None
    assert error.field in {"", "msgType"}
    assert error.problem


@given(st.builds(json.dumps, NEARLY_FRAMES, ensure_ascii=st.booleans()))
@example('{"msgType": "INIT", "userId": NaN}')
@example('{"msgType": "INIT", "userId": -Infinity}')
@example('{"msgType": "INIT", "userId": 1e400}')
@example('{"msgType": "INIT", "user_id": 1}')
@example('{"msgType": "CHAT", "userId": 10001, "contents": "\\ud800"}')
def test_an_object_is_a_frame_or_is_told_which_field_is_wrong(text: str) -> None:
    error = refusal(text)
    if error is not None:
        assert error.field.partition(".")[0] in WIRE_FIELDS | {""}
        assert error.field or any(word in error.problem for word in ("JSON", "nicode", "NUL", "number", "nested"))
        assert str(error) == (f"{error.field}: {error.problem}" if error.field else error.problem)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{}", "msgType"),
        ('{"msgType": "SYSTEM", "userId": 10001}', "msgType"),
        ('{"msgType": "init", "userId": 10001}', "msgType"),
        ('{"msgType": ["INIT"], "userId": 10001}', "msgType"),
        ('{"msgType": "INIT"}', "userId"),
        ('{"msgType": "INIT", "userId": 10000}', "userId"),
        ('{"msgType": "INIT", "userId": 9007199254740992}', "userId"),
        ('{"msgType": "INIT", "userId": 10001.5}', "userId"),
        ('{"msgType": "INIT", "userId": true}', "userId"),
        ('{"msgType": "INIT", "userId": null}', "userId"),
        ('{"msgType": "INIT", "userId": 10001, "resume": {}}', "resume"),
        (
            '{"msgType": "INIT", "userId": 10001, "resume": [{"messageId": "a"}, {"messageId": "你"}]}',
            "resume.1.messageId",
        ),
        ('{"msgType": "INIT", "userId": 10001, "resume": [{"messageId": "a", "offset": -1}]}', "resume.0.offset"),
        ('{"msgType": "CHAT", "userId": 10001}', "contents"),
        ('{"msgType": "CHAT", "userId": 10001, "contents": ""}', "contents"),
        ('{"msgType": "CHAT", "userId": 10001, "contents": 7}', "contents"),
        ('{"msgType": "CHAT", "userId": 10001, "contents": "a", "messageId": ""}', "messageId"),
        ('{"msgType": "CHAT", "userId": 10001, "contents": "a", "messageId": "a\\n"}', "messageId"),
        ('{"msgType": "CHAT", "userId": 10001, "contents": "a", "history": [{"role": "tool"}]}', "history.0.role"),
        ('{"msgType": "CANCEL", "userId": 10001}', "messageId"),
    ],
)
def test_the_wrong_field_is_named_as_it_stands_on_the_wire(text: str, field: str) -> None:
    error = refusal(text)
    assert error is not None
    assert error.field == field


def test_a_wrong_user_id_is_named_before_all_else_that_is_wrong() -> None:
    error = refusal('{"msgType": "CHAT", "messageId": "", "contents": "", "history": 1, "userId": 7}')
    assert error is not None
    assert error.field == "userId"


def test_one_login_resumes_up_to_its_limit() -> None:
    def login(resumed: int) -> str:
        return json.dumps({"msgType": "INIT", "userId": 10001, "resume": [{"messageId": "m"}] * resumed})

    assert refusal(login(MAX_RESUMED)) is None
    error = refusal(login(MAX_RESUMED + 1))
    assert error is not None
    assert error.field == "resume"


# Limits


def _chat(**fields: object) -> str:
    return json.dumps({"msgType": "CHAT", "userId": 10001, "contents": "a"} | fields)


def _nested(depth: int, kind: str) -> str:
    begin, end = ("[", "]") if kind == "lists" else ('{"x":', "}")
    return '{"msgType":"HEARTBEAT","more":' + begin * (depth - 1) + "0" + end * (depth - 1) + "}"


@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_a_frame_nests_up_to_its_limit(kind: str) -> None:
    for limit in (4, 8):
        assert parse_frame(_nested(limit, kind), FrameLimits(depth=limit)).msg_type == "HEARTBEAT"
        for depth in (limit + 1, 150, 900, 5_000, 60_000):
            with pytest.raises(InvalidFrame, match=f"nested deeper than {limit} levels"):
                parse_frame(_nested(depth, kind), FrameLimits(depth=limit))


def _values(value: Any) -> int:  # noqa: ANN401 - whatever JSON holds
    """Count items and containers: the commas and opening brackets of the JSON."""
    if not isinstance(value, dict | list):
        return 0
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(0, len(inner) - 1) + sum(map(_values, inner))


@settings(max_examples=50)
@given(st.recursive(TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=10))
@example({'"': ['\\"', '\\\\"[', "[{,", '\\"', {"a\\": {}, ",": []}]})
@example([[]] * 500)
@example([",[{" * 500])
@example(['"'] * 500)
@example(["\\"] * 500)
def test_a_text_has_as_many_values_as_its_limit_whatever_its_strings_hold(value: object) -> None:
    text, count = json.dumps(value), _values(value)
    assert parse_json(text, max_depth=1_000, max_values=count) == value
    if count:
        with pytest.raises(InvalidJson, match="more than"):
            parse_json(text, max_depth=1_000, max_values=count - 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"msgType": "CHAT", "userId": 10001, "messageId": "m.1", "contents": ""}',
        '{"msgType": "CHAT", "userId": 10000, "messageId": "m.1", "contents": "a"}',
        '{"msgType": "CANCEL", "userId": "me", "messageId": "m.1"}',
        '{"msgType": "SHOUT", "messageId": "m.1"}',
        '{"messageId": "m.1"}',
        _chat(messageId="m.1", history=[{"role": "user", "content": "x"}] * 201),
        _chat(messageId="m.1", more=[[[[[[[[[]]]]]]]]]),
        _chat(messageId="m.1", contents="\0"),
        _chat(messageId="m.1", contents="\ud800"),
    ],
)
def test_an_invalid_frame_keeps_the_id_of_its_message(text: str) -> None:
    error = refusal(text)
    assert error is not None
    assert error.message_id == "m.1"


@pytest.mark.parametrize("message_id", ["", "a b", "a\n", "x" * 65, "你", 7, None, ["m"], {"m": "m"}])
def test_an_id_that_is_not_valid_is_not_kept(message_id: object) -> None:
    error = refusal(json.dumps({"msgType": "CHAT", "messageId": message_id}))
    assert error is not None
    assert error.message_id is None


@pytest.mark.parametrize(
    "text", ["", "hello", "[]", '["messageId"]', '{"messageId": "m.1"', '{"messageId": "m", "a": NaN}']
)
def test_a_text_that_is_no_object_has_no_id(text: str) -> None:
    error = refusal(text)
    assert error is not None
    assert error.message_id is None


def test_a_full_history_fits_with_unknown_fields_and_more_is_refused() -> None:
    turn = {"role": "user", "content": "x", "id": 1, "at": 2}
    assert parse_frame(_chat(history=[turn] * 200)).msg_type == "CHAT"
    too_much: list[list[Any]] = [[{}] * 21_000, [turn] * 1_000, [1] * 30_000]
    for wrong in too_much:
        with pytest.raises(InvalidFrame, match="more than 1112 values"):
            parse_frame(_chat(history=wrong))
    with pytest.raises(InvalidFrame, match="history: more than 200 turns"):
        parse_frame(_chat(history=[{}] * 500))  # before the turns are validated
    with pytest.raises(InvalidFrame, match="userId"):
        parse_frame(_chat(history=[{}] * 500, userId=7))


def test_brackets_in_a_text_are_no_nesting() -> None:
    chat = parse_frame(
        _chat(contents="[[[[[[[{{{{{{{{", history=[{"role": "user", "content": "[{"}] * 20), FrameLimits(depth=3)
    )
    assert chat.msg_type == "CHAT"


def test_a_message_has_as_many_turns_as_its_limit() -> None:
    turns = [{"role": "user", "content": "x"}] * 4
    assert parse_frame(_chat(history=turns), FrameLimits(history=4)).msg_type == "CHAT"
    assert parse_frame(_chat(), FrameLimits(history=0)).msg_type == "CHAT"
    with pytest.raises(InvalidFrame, match="history: more than 3 turns"):
        parse_frame(_chat(history=turns), FrameLimits(history=3))


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ('{"msgType":"HEARTBEAT","msgType":"CHAT","userId":10001}', "", "'msgType' occurs more than once"),
        ('{"msgType":"INIT","userId":10001,"userId":10002}', "", "'userId' occurs more than once"),
        ('{"msgType":"INIT","userId":10001,"user\\u0049d":5}', "", "'userId' occurs more than once"),
        ('{"msgType":"HEARTBEAT","x":{"a":1,"b":2,"a":1}}', "", "'a' occurs more than once"),
        ('{"msgType":"HEARTBEAT","\\ud83d":1,"\\ud83d":2}', "", "occurs more than once"),
        ('{"msgType":"HEARTBEAT","x":[' + "9" * 30_000 + "]}", "", "more than 64 digits"),
        ('{"msgType":"HEARTBEAT","x":0.' + "3" * 30_000 + "}", "", "more than 64 digits"),
        ('{"msgType":"HEARTBEAT","x":1e999}', "", "1e999 is too large"),
        ('{"msgType":"HEARTBEAT","x":NaN}', "", "NaN is no number"),
        ('{"msgType":"HEARTBEAT","x":[-Infinity]}', "", "-Infinity is no number"),
        ('{"msgType":"INIT","userId":' + "9" * 400 + "}", "userId", "less than or equal"),
        ('{"msgType":"INIT","userId":1e999}', "userId", "finite"),
        ('{"msgType":"INIT","userId":10001,"resume":[{"messageId":"m","offset":1e18}]}', "resume.0.offset", "less"),
        ('{"msgType":"HEARTBEAT","x":"a\\u0000"}', "", "NUL"),
        ('{"msgType":"HEARTBEAT","\\u0000":1}', "", "NUL"),
        ('{"msgType":"CHAT","userId":10001,"contents":"a\\u0000b"}', "", "NUL"),
        ('{"msgType":"CHAT","userId":10001,"contents":"a\0b"}', "", "Invalid control character"),
        ('{"msgType":"HEARTBEAT","x":["\\udc00"]}', "", "half of a surrogate pair"),
        ('{"msgType":"HEARTBEAT","\\uD800":1}', "", "half of a surrogate pair"),
        ('{"msgType":"CHAT","userId":10001,"contents":"\\ude00\\ud83d"}', "", "half of a surrogate pair"),
        ('{"msgType":"CHAT","userId":10001,"contents":"\ud800"}', "contents", "unicode"),
    ],
)
def test_what_only_an_attacker_sends_is_refused_and_named(text: str, field: str, problem: str) -> None:
    error = refusal(text)
    assert error is not None
    assert (error.field, problem in error.problem) == (field, True), error.problem
    assert len(str(error)) < 200


def test_what_looks_like_it_is_taken() -> None:
    for contents in ("\\u0000", "\\\\u0000 \\ud800", "😀 \x7f \u202e"):
        chat = parse_frame(_chat(contents=contents))
        assert isinstance(chat, ClientChat)
        assert chat.contents == contents


@pytest.mark.parametrize(
    ("name", "value"),
    [("code", "LATER"), ("event", "later"), ("state", "later"), ("messages", [{"messageId": "m", "state": "later"}])],
)
def test_words_of_a_newer_server_are_read_as_text(name: str, value: object) -> None:
    frame = ReceivedFrame.model_validate({"msgType": "CHAT", name: value, "unknown": 1})
    assert json.loads(frame.encode())[name] == value


# Stable numbers


@pytest.mark.parametrize("code", CloseCode)
def test_the_reason_of_a_close_is_ascii_and_fits_in_its_frame(code: CloseCode) -> None:
    assert code.reason.isascii()
    assert 0 < len(code.reason) <= 123  # RFC 6455, sections 5.5 and 5.5.1


def test_close_codes_tell_by_their_range_whether_to_reconnect() -> None:
    reconnect = {CloseCode.DRAINING, CloseCode.NODE_FULL, CloseCode.NO_HEARTBEAT, CloseCode.READER_TOO_SLOW}
    never = {
        CloseCode.NOT_AUTHENTICATED,
        CloseCode.BAD_USER_ID,
        CloseCode.REPLACED,
        CloseCode.LOCKED,
        CloseCode.TOO_MANY_SOCKETS,
    }
    assert all(code in {1012, 1013} or 4000 <= code < 4500 for code in reconnect)
    assert all(4500 <= code < 5000 for code in never)
    rest = {code for code in CloseCode if code <= CloseCode.INTERNAL_ERROR}
    assert set(CloseCode) == reconnect | never | rest


def test_the_time_of_a_frame_is_milliseconds_since_1970() -> None:
    before = time.time_ns() // 1_000_000
    assert before <= now_ms() <= int(HeartbeatReply(contents="").resp_time)
