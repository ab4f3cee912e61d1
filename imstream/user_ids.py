"""User ids. `IMSTREAM_USER_IDS` decides which kind all nodes of a deployment accept.

Numbers are those of the service that imstream replaces. Text is for the ids of identity providers: UUIDs, e-mail
addresses, `auth0|5f7c8ec7c33c6c004bbafe82`. Its characters need no escaping in a Redis key with a hash tag, in a
pattern of keys, in a log line or within quotes of a shell. ASCII has one spelling of each id, Unicode several.
"""

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

from pydantic import GetPydanticSchema, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema

MIN_USER_ID = 10001
MAX_USER_ID = 2**53 - 1  # the largest integer that JavaScript's JSON keeps exact (RFC 8259, section 6)

MAX_USER_ID_LENGTH = 128
_CHARACTERS = "A-Za-z0-9._+@|:/=-"
USER_ID_PATTERN = rf"^[{_CHARACTERS}]{{1,{MAX_USER_ID_LENGTH}}}$"
"""The ids of the kind `text`, as a regular expression that is also valid in JSON Schema."""

_TEXT = re.compile(USER_ID_PATTERN)

UserId = int | str  # a user id: an integer if the kind is `number`, a string if it is `text`


class UserIds(StrEnum):
    """The kind of the user ids of a deployment."""

    NUMBER = "number"
    TEXT = "text"

    @property
    def allowed(self) -> str:
        """Describe the ids of this kind, for errors."""
        if self is UserIds.TEXT:
            return f"1 to {MAX_USER_ID_LENGTH} of A-Z a-z 0-9 . _ + @ | : / = -"
        return f"a number from {MIN_USER_ID} to {MAX_USER_ID}"

    @property
    def longest(self) -> str:
        """An id of the maximum length, which a tokenizer splits into as many tokens as any."""
        return "|0" * (MAX_USER_ID_LENGTH // 2) if self is UserIds.TEXT else str(MAX_USER_ID)

    def parse(self, text: str | None) -> UserId | None:
        """Parse an id in a URL, a stored entry or a command line. None if it is missing or not of this kind."""
        if text is None:
            return None
        if self is UserIds.TEXT:
            return text if _TEXT.fullmatch(text) else None
        if not (text.isascii() and text.isdecimal()) or len(text) > len(str(MAX_USER_ID)):
            return None
        return number if MIN_USER_ID <= (number := int(text)) <= MAX_USER_ID else None


def kind_of(user_id: UserId) -> UserIds:
    """The kind to which an id belongs."""
    return UserIds.TEXT if isinstance(user_id, str) else UserIds.NUMBER


def _validate(value: Any, number: Callable[[Any], int], info: core_schema.ValidationInfo) -> UserId:  # noqa: ANN401 - any JSON
    """Validate by the kind that is the context of the validation, or without context, by the type of the id."""
    kind = info.context or kind_of(value)
    if kind is UserIds.NUMBER:
        return number(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_USER_ID:
        value = str(value)
    if not isinstance(value, str) or (user_id := UserIds.TEXT.parse(value)) is None:
        raise PydanticCustomError("user_id", "must be {allowed}", {"allowed": UserIds.TEXT.allowed})
    return user_id


_NUMBER_SCHEMA = core_schema.int_schema(ge=MIN_USER_ID, le=MAX_USER_ID)
_NUMBER_JSON_SCHEMA = {"type": "integer", "minimum": MIN_USER_ID, "maximum": MAX_USER_ID}

UserIdField = Annotated[
    UserId,
    GetPydanticSchema(
        lambda _source, _handler: core_schema.with_info_wrap_validator_function(
            _validate, _NUMBER_SCHEMA, serialization=core_schema.simple_ser_schema("any")
        )
    ),
    WithJsonSchema({"anyOf": [_NUMBER_JSON_SCHEMA, {"type": "string", "pattern": USER_ID_PATTERN}]}),
]
"""The type of a user id in a frame; see frame_parser.py. An integer is a text id, too: its digits. So clients of a
deployment with numbers need not change with the setting."""
