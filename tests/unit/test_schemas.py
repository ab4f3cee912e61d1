"""The JSON Schemas of asyncapi.json: a frame fits its own, and no other."""

import json

import pytest
from hypothesis import given

from imstream.frame_parser import InvalidFrame, parse_frame
from imstream.user_ids import UserIds
from imstream.wire import ClientFrame, ServerFrame, encode_delta
from ops.asyncapi import CLIENT_FRAMES, EXAMPLES, SERVER_FRAMES
from tests.support.schemas import DOCUMENT, check_frame, fitting
from tests.unit.test_wire import CLIENT_FRAMES as ANY_CLIENT_FRAME
from tests.unit.test_wire import NEARLY_FRAMES
from tests.unit.test_wire import SERVER_FRAMES as ANY_SERVER_FRAME


def wire(frame: ClientFrame | ServerFrame) -> object:
    return json.loads(frame.model_dump_json(by_alias=True, exclude_none=True))


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: type(frame).__name__)
def test_an_example_fits_the_schema_of_its_kind_and_no_other(frame: ClientFrame | ServerFrame) -> None:
    assert fitting(wire(frame)) == [type(frame).__name__]


def test_there_is_a_schema_and_an_example_for_each_kind_of_frame() -> None:
    kinds = {model.__name__ for model in (*CLIENT_FRAMES, *SERVER_FRAMES)}
    assert {type(frame).__name__ for frame in EXAMPLES} == kinds
    assert set(DOCUMENT["components"]["messages"]) == {*kinds, "Ping"}
    for message in DOCUMENT["components"]["messages"].values():
        assert message["payload"]["$ref"].removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"]


@given(ANY_SERVER_FRAME)
def test_every_frame_of_the_server_fits_one_schema(frame: ServerFrame) -> None:
    assert fitting(wire(frame)) == [type(frame).__name__]


@given(ANY_CLIENT_FRAME)
def test_every_frame_of_a_client_fits_one_schema(frame: ClientFrame) -> None:
    assert fitting(wire(frame)) == [type(frame).__name__]


@given(NEARLY_FRAMES)
def test_a_node_accepts_frames_that_fit_the_schema_of_a_client(value: dict[str, object]) -> None:
    user_ids = UserIds.TEXT if isinstance(value.get("userId"), str) else UserIds.NUMBER
    for name in fitting(value):
        try:
            assert type(parse_frame(json.dumps(value), user_ids=user_ids)).__name__ == name
        except InvalidFrame as error:
            if error.field:  # else a limit of the JSON itself, such as NaN or its depth
                raise


def test_a_delta_fits_its_schema_and_ping_too() -> None:
    assert fitting(json.loads(encode_delta("m", attempt=1, offset=2, text="hi"))) == ["Delta"]
    assert fitting("PING") == ["Ping"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"code": "BUSY"}, "Delta"),
        ({"event": "unknown"}, "Done"),
        ({"respTime": 1}, "Accepted"),
        ({"offset": "2"}, "Delta"),
        ({"code": "SUCCESS"}, "Problem"),
        ({"code": "OF_A_LATER_RELEASE"}, "Problem"),
        ({"userId": 1}, "Welcome"),
        ({"position": None}, "Accepted"),
    ],
)
def test_a_frame_with_another_value_fits_no_schema(change: dict[str, object], kind: str) -> None:
    [frame] = [frame for frame in EXAMPLES if type(frame).__name__ == kind]
    changed = {**json.loads(frame.model_dump_json(by_alias=True, exclude_none=True)), **change}
    assert fitting(changed) == []


def test_unknown_fields_are_allowed() -> None:
    for frame in EXAMPLES:
        assert fitting({**json.loads(frame.model_dump_json(by_alias=True, exclude_none=True)), "x": 1})


def test_the_clients_of_the_tests_refuse_a_frame_that_fits_no_schema_also_after_one_that_fits() -> None:
    frame = wire(EXAMPLES[-1])
    assert isinstance(frame, dict)
    for _ in range(2):
        check_frame(frame)
    for change in ({"event": "unknown"}, {"messageId": 1}, {"code": "BUSY"}):
        with pytest.raises(AssertionError, match="fits no schema"):
            check_frame({**frame, **change})
