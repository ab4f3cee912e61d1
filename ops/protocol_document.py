"""Generates asyncapi.json and the tables of ops/docs/protocol.md.

The sources are the models in wire.py, the words in codes.py and their meanings in protocol_words.toml. Run it with
`.venv/bin/python -m ops.protocol_document`.
"""

import json
from pathlib import Path

from imstream.codes import CloseCode, Code, Event, State, Want
from imstream.wire import USER_ID_FIELD
from ops.asyncapi import CLIENT_FRAMES, SERVER_FRAMES, Json, document, words
from ops.generated import replace, table

ASYNCAPI = Path(__file__).parents[1] / "imstream" / "gateway" / "static" / "asyncapi.json"
PROTOCOL = Path(__file__).parent / "docs" / "protocol.md"

_KIND = ("code", "msgType", "event")
_EVERYWHERE = ("code", "respTime", "msgType", "event")
"""Fields that the tables do not list for each frame."""


def asyncapi_text() -> str:
    """The text of asyncapi.json."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def protocol_text(current: str) -> str:
    """The text of protocol.md, with the tables between its markers replaced."""
    schemas = document()["components"]["schemas"]
    for schema in schemas.values():
        if USER_ID_FIELD in (fields := schema.get("properties", {})):
            fields[USER_ID_FIELD] = schemas["UserId"]
    client = {model.__name__: schemas[model.__name__] for model in CLIENT_FRAMES}
    server = {model.__name__: schemas[model.__name__] for model in SERVER_FRAMES}
    tables = {
        "client frames": _frames(client),
        "client fields": _fields(client),
        "server frames": _frames(server),
        "server fields": _fields(server),
        "events": table(("`event`", "meaning", "client"), ((f"`{it}`", *row.values()) for it, row in words(Event))),
        "wants": table(("want", "frames"), ((f"`{it}`", *row.values()) for it, row in words(Want))),
        "states": table(("`state`", "meaning"), ((f"`{it}`", *row.values()) for it, row in words(State))),
        "codes": table(
            ("`code`", "meaning", "caused by", "client"), ((f"`{it}`", *row.values()) for it, row in words(Code))
        ),
        "close codes": table(
            ("code", "reason", "meaning", "caused by", "client"),
            ((str(it.value), it.reason, *row.values()) for it, row in words(CloseCode)),
        ),
    }
    return replace(current, tables)


def _frames(schemas: dict[str, Json]) -> str:
    return table(("frame", "schema", "meaning", "fields"), (_frame(name, schema) for name, schema in schemas.items()))


def _frame(name: str, schema: Json) -> tuple[str, ...]:
    fields = schema["properties"]
    fixed = {field: fields[field]["const"] for field in _KIND if "const" in fields.get(field, {})}
    kind = f"`{fixed['msgType']}`"
    if "event" in fixed:
        kind += f" `{fixed['event']}`"
    elif fixed.get("code", "SUCCESS") != "SUCCESS":
        kind += f" with code `{fixed['code']}`"
    names = [field for field in fields if field not in _EVERYWHERE]
    required = [f"`{field}`" for field in names if field in schema["required"]]
    optional = [f"`{field}`" for field in names if field not in schema["required"]]
    groups = (", ".join(required), "optional " + ", ".join(optional) if optional else "")
    listed = "; ".join(group for group in groups if group)
    return kind, f"`{name}`", schema["description"], listed


def _fields(schemas: dict[str, Json]) -> str:
    """One row for each field; if frames describe it differently, with the text of each."""
    found: dict[str, dict[str, list[str]]] = {}
    types: dict[str, str] = {}
    for frame, schema in schemas.items():
        for name, field in schema["properties"].items():
            types[name] = _type(field)
            if meaning := field.get("description"):
                found.setdefault(name, {}).setdefault(meaning, []).append(frame)
    return table(("field", "type", "meaning"), ((f"`{name}`", types[name], _meaning(found[name])) for name in found))


def _type(field: Json) -> str:
    if field.get("type") == "array":
        items = field["items"]
        return f"array of `{items['$ref'].rpartition('/')[2]}`" if "$ref" in items else f"array of {items['type']}"
    return str(field.get("type", "integer or string"))


def _meaning(meanings: dict[str, list[str]]) -> str:
    if len(meanings) == 1:
        return next(iter(meanings))
    return "; ".join(
        f"{meaning} ({', '.join(frames)})" if len(frames) == 1 else meaning for meaning, frames in meanings.items()
    )


if __name__ == "__main__":
    ASYNCAPI.write_text(asyncapi_text(), "utf-8")
    PROTOCOL.write_text(protocol_text(PROTOCOL.read_text("utf-8")), "utf-8")
