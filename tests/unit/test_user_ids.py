"""User ids: numbers, and text."""

import json
import re
import string
from urllib.parse import quote, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imstream.errors import SettingsError
from imstream.frame_parser import InvalidFrame, parse_frame
from imstream.model import ChatRequest
from imstream.settings import Settings
from imstream.store.inbox import AccountChanged, Notice, ReplyGrew, SessionReplaced, notice_fields, parse_notice
from imstream.tracing import new_traceparent
from imstream.user_ids import MAX_USER_ID, MIN_USER_ID, USER_ID_PATTERN, UserIds

NUMBER, TEXT = UserIds.NUMBER, UserIds.TEXT
TEXTS = st.from_regex(USER_ID_PATTERN, fullmatch=True)
ALLOWED = string.ascii_letters + string.digits + "._+@|:/=-"


@given(st.integers(MIN_USER_ID, MAX_USER_ID))
def test_a_user_id_in_the_address_is_a_number_in_range(user_id: int) -> None:
    assert NUMBER.parse(str(user_id)) == user_id
    assert NUMBER.parse(f"{user_id:016}") == user_id


@given(st.integers(max_value=MIN_USER_ID - 1) | st.integers(MAX_USER_ID + 1))
@example(0)
@example(10_000)
@example(10**5000)
def test_a_number_out_of_range_is_no_user_id(number: int) -> None:
    assert NUMBER.parse(hex(number) if number > 10**4000 else str(number)) is None


@given(st.none() | st.text())
@example(" 10001")
@example("10_001")
@example("+10001")
@example("10001.0")
@example("１０００１")
@example("١٠٠٠١")
@example("9" * 10_000)
def test_a_user_id_in_the_address_is_digits_and_nothing_else(text: str | None) -> None:
    user_id = NUMBER.parse(text)
    if user_id is not None:
        assert text is not None
        assert text.lstrip("0") == str(user_id)
        assert isinstance(user_id, int)
        assert MIN_USER_ID <= user_id <= MAX_USER_ID


# Text


@pytest.mark.parametrize(
    "text",
    [
        "0b9c2f1e-6a57-4a5e-9f0e-6f2f3f1f6f3a",
        "ada.love-lace+im@example.com",
        "auth0|5f7c8ec7c33c6c004bbafe82",
        "f:8c1f:ada",
        "https://accounts.example.com/u/7=",
        "-_7",
        "7",
        "x" * 128,
    ],
)
def test_ids_of_identity_providers_are_taken_as_they_are(text: str) -> None:
    assert TEXT.parse(text) == text


@pytest.mark.parametrize(
    "text", [None, "", "x" * 129, "abc\n", "\nabc", "a b", "a\0", "a\x1b[31m", "café", "cafe\u0301", "七"]
)
def test_other_texts_are_no_ids(text: str | None) -> None:
    assert TEXT.parse(text) is None


def test_no_character_may_break_a_key_a_pattern_a_url_a_log_line_or_quotes() -> None:
    taken = [char for char in map(chr, range(0x10000)) if TEXT.parse(f"a{char}b") is not None]
    assert sorted(taken) == sorted(ALLOWED)
    assert set(ALLOWED).isdisjoint("{}*?[]\\^%&#\"'`$!;<>() ")
    assert all(char.isprintable() for char in ALLOWED)


@given(TEXTS)
def test_the_characters_are_those_that_every_client_escapes_alike(user: str) -> None:
    # JavaScript's URLSearchParams leaves * - . _ and Python's urlencode leaves _ . - ~ as they are. A load balancer
    # hashes the characters of the URL.
    assert urlencode({"userId": user}) == "userId=" + quote(user, safe="*-._") == "userId=" + quote(user, safe="_.-~")


@given(TEXTS | st.integers(0, MAX_USER_ID))
@example(7)
@example(10001)
@example("010001")
def test_a_frame_with_text_or_the_digits_of_a_number_has_a_text(user: str | int) -> None:
    frame = parse_frame(json.dumps({"msgType": "INIT", "userId": user}), user_ids=TEXT)
    assert frame.user_id == str(user)


@pytest.mark.parametrize("user", ["null", '""', "-1", "1.0", "true", "[]", str(2**53), "1e999", "1" * 400, '"a b"'])
def test_any_other_id_in_a_frame_is_refused_before_everything_else(user: str) -> None:
    text = f'{{"msgType": "CHAT", "messageId": "", "contents": "", "userId": {user}}}'
    with pytest.raises(InvalidFrame) as refused:
        parse_frame(text, user_ids=TEXT)
    assert refused.value.field == "userId"


# Redis


@given(TEXTS)
def test_a_stored_text_id_stays_a_text(user: str) -> None:
    request = ChatRequest(user, "m", "hello", (), "en", 1, new_traceparent())
    fields = request.fields()
    assert ChatRequest.from_fields(dict(zip(fields[::2], fields[1::2], strict=True)), user_ids=TEXT) == request
    notices: list[Notice] = [ReplyGrew(user, "m"), ReplyGrew(user, "m", begun=True), AccountChanged(user)]
    for notice in (*notices, SessionReplaced(user, 7)):
        assert parse_notice(notice_fields(notice), TEXT) == notice


@given(TEXTS.filter(lambda text: not re.fullmatch("[0-9]+", text)))
def test_a_node_with_numbers_ignores_entries_with_a_text_id(user: str) -> None:
    assert parse_notice(notice_fields(AccountChanged(user)), NUMBER) is None


# The setting


def test_the_setting_names_the_allowed_ids() -> None:
    assert Settings.load().user_ids is NUMBER
    assert Settings.load(user_ids="text").user_ids is TEXT
    with pytest.raises(SettingsError, match=r"IMSTREAM_USER_IDS='names' is not allowed: .*'number' or 'text'"):
        Settings.load(user_ids="names")


@pytest.mark.parametrize("kind", UserIds)
def test_the_longest_id_is_an_id(kind: UserIds) -> None:
    assert kind.parse(kind.longest) is not None
    assert kind.parse(kind.longest + "0") is None
