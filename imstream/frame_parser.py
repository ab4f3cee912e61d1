"""Reads the frames of clients: any text is either a `ClientFrame` or an `InvalidFrame` that names the wrong field."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from imstream.strict_json import InvalidJson, InvalidNumber, parse_json
from imstream.user_ids import UserIds
from imstream.wire import MAX_RESUMED, MESSAGE_ID_PATTERN, USER_ID_FIELD, ClientChat, ClientFrame, ClientHeartbeat

_CLIENT_FRAME: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="msg_type")])
_PING = ClientHeartbeat(msg_type="HEARTBEAT")


class InvalidFrame(Exception):  # noqa: N818 - the client's fault
    """A client's frame is invalid.

    Attributes:
        field: The wire name of the invalid field; empty for the whole frame.
        message_id: The frame's `messageId`; None unless the frame could be read as an object with a valid one.
    """

    def __init__(self, field: str, problem: str, message_id: str | None = None) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem
        self.message_id = message_id


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """Maximum nesting, and maximum turns in `history`, of a client's frame. Its length is limited before."""

    depth: int = 8
    history: int = 200

    @property
    def values(self) -> int:
        """Maximum values in the JSON of a frame: a full history or `resume`, and hundreds in unknown fields."""
        return 8 * MAX_RESUMED + 3 * self.history


def parse_frame(text: str, limits: FrameLimits = FrameLimits(), user_ids: UserIds = UserIds.NUMBER) -> ClientFrame:
    """Parse one text frame of a client. Raises `InvalidFrame`."""
    if text == "PING":
        return _PING
    try:
        value = parse_json(text, max_depth=limits.depth, max_values=limits.values)
        history = value.get("history") if isinstance(value, dict) else None
        if too_long := isinstance(history, list) and len(history) > limits.history:
            history.clear()  # do not validate turns of a frame that is refused
        frame = _CLIENT_FRAME.validate_python(value, by_alias=True, by_name=False, context=user_ids)  # only wire names
    except InvalidNumber as error:
        raise _field_of_bad_number(text, user_ids) or InvalidFrame("", str(error)) from None
    except InvalidJson as error:
        raise InvalidFrame("", str(error), _message_id(error.value)) from None
    except ValidationError as error:
        raise _first_problem(error, _message_id(value)) from None
    if too_long and isinstance(frame, ClientChat):
        raise InvalidFrame("history", f"more than {limits.history} turns", frame.message_id)
    return frame


def _message_id(value: object) -> str | None:
    """The message id in a value that may be no frame; None if it has none that is valid."""
    message_id = value.get("messageId") if isinstance(value, dict) else None
    return message_id if isinstance(message_id, str) and re.fullmatch(MESSAGE_ID_PATTERN, message_id) else None


def _field_of_bad_number(text: str, user_ids: UserIds) -> InvalidFrame | None:
    """Find the known field with this number, if any. Pydantic's own parser accepts such numbers, up to a length."""
    try:
        _CLIENT_FRAME.validate_json(text, by_alias=True, by_name=False, context=user_ids)
    except ValidationError as error:
        return found if (found := _first_problem(error)).field else None
    except UnicodeEncodeError:  # an unescaped lone surrogate, which cannot come over a socket
        return None
    return None


def _first_problem(error: ValidationError, message_id: str | None = None) -> InvalidFrame:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # An invalid user id is reported before any other problem.
    first = next((problem for problem in problems if problem["loc"][1:] == (USER_ID_FIELD,)), problems[0])
    if first["type"].startswith("union_tag"):
        return InvalidFrame("msgType", "must be one of INIT, CHAT, CANCEL, HEARTBEAT", message_id)
    # The location starts with the tag of the union, which is not a field.
    return InvalidFrame(".".join(str(part) for part in first["loc"][1:]), first["msg"], message_id)
