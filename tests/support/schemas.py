"""Which JSON Schema of asyncapi.json a frame fits. On the wire, each fits exactly one."""

import json
from importlib import resources
from typing import Any

from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

DOCUMENT: dict[str, Any] = json.loads((resources.files("imstream.gateway") / "static/asyncapi.json").read_text("utf-8"))

_URN = "urn:imstream"
_REGISTRY: Registry[Any] = Registry().with_resource(_URN, Resource.from_contents(DOCUMENT, DRAFT7))
_VALIDATORS = {
    name: Draft7Validator({"$ref": f"{_URN}#/components/schemas/{name}"}, registry=_REGISTRY)
    for name in DOCUMENT["components"]["messages"]
}
_CONSTANTS = frozenset({"code", "msgType", "event", "state"})
_checked: set[object] = set()


def fitting(frame: object) -> list[str]:
    """The names of the frames whose schema accepts this one."""
    return [name for name, validator in _VALIDATORS.items() if validator.is_valid(frame)]


def check_frame(frame: dict[str, Any]) -> None:
    """Check that a frame fits exactly one schema.

    It is skipped if another one had the same constants, fields and types: a check takes milliseconds.
    """
    shape = tuple((name, value if name in _CONSTANTS else type(value)) for name, value in frame.items())
    if shape not in _checked:
        assert len(names := fitting(frame)) == 1, f"{frame} fits {names or 'no schema'}"
        _checked.add(shape)
