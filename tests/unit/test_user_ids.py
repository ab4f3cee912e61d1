"""User ids: numbers, and text."""

from hypothesis import example, given
from hypothesis import strategies as st

from imstream.user_ids import MAX_USER_ID, MIN_USER_ID, UserIds

NUMBER, TEXT = UserIds.NUMBER, UserIds.TEXT


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
