"""The AsyncAPI document of the WebSocket protocol, from the models in wire.py and the words in codes.py."""

import tomllib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from imstream.codes import CloseCode, Code, Event, State, Want
from imstream.model import TERMINAL_EVENTS
from imstream.texts import Text, localize
from imstream.user_ids import MIN_USER_ID, UserIdField, UserIds
from imstream.wire import (
    SUBPROTOCOL,
    USER_ID_FIELD,
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
    Problem,
    Restart,
    ResumePoint,
    ServerFrame,
    Status,
    Thinking,
    Welcome,
)

Json = dict[str, Any]
Word = TypeVar("Word", bound=Enum)

_WORDS: dict[str, Json] = tomllib.loads(Path(__file__).with_name("protocol_words.toml").read_text("utf-8"))

CLIENT_FRAMES: tuple[type[ClientFrame], ...] = get_args(ClientFrame)

SERVER_FRAMES: tuple[type[ServerFrame], ...] = (
    Welcome,
    HeartbeatReply,
    Problem,
    Accepted,
    Delta,
    Restart,
    Done,
    Failed,
    Cancelled,
    Expired,
    Status,
    Thinking,
    Asked,
)
"""Every kind of server frame."""

PING = "Ping"

_USER = MIN_USER_ID
_TIME = "1767225600000"
_WITHOUT_MEANING = {"code", "msgType", "event", USER_ID_FIELD}
"""Fields that have tables or a schema of their own."""

_CODE_POINTS = {"attempt": 1, "offset": 2}

EXAMPLES: tuple[ClientFrame | ServerFrame, ...] = (
    ClientInit(
        msg_type="INIT", user_id=_USER, resume=[ResumePoint(message_id="m-1", attempt=1, offset=2)], wants=[Want.STATUS]
    ),
    ClientChat(msg_type="CHAT", user_id=_USER, message_id="m-1", contents="Hello"),
    ClientCancel(msg_type="CANCEL", message_id="m-1"),
    ClientHeartbeat(msg_type="HEARTBEAT"),
    Welcome(
        resp_time=_TIME,
        contents=localize(Text.WELCOME, "en", user_id=_USER),
        user_id=_USER,
        heartbeat_ms=25_000,
        node="0",
    ),
    HeartbeatReply(resp_time=_TIME, contents=localize(Text.HEARTBEAT, "en"), user_id=_USER),
    Problem(
        resp_time=_TIME,
        code=Code.BUSY,
        contents=localize(Text.BUSY, "en"),
        user_id=_USER,
        message_id="m-1",
        retry_after_ms=2_000,
    ),
    Accepted(
        resp_time=_TIME,
        contents=localize(Text.ACCEPTED, "en", position=1),
        user_id=_USER,
        message_id="m-1",
        position=1,
        node="0",
    ),
    Delta(resp_time=_TIME, contents="Hi", message_id="m-1", **_CODE_POINTS),
    Restart(resp_time=_TIME, contents=localize(Text.RESTART, "en"), message_id="m-1", attempt=2, offset=0),
    Done(
        resp_time=_TIME,
        user_id=_USER,
        message_id="m-1",
        **_CODE_POINTS,
        finish_reason="stop",
        usage={"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        node="0",
    ),
    Failed(
        resp_time=_TIME,
        contents=localize(Text.FAILED, "en"),
        user_id=_USER,
        message_id="m-1",
        **_CODE_POINTS,
        node="0",
    ),
    Cancelled(
        resp_time=_TIME,
        contents=localize(Text.CANCELLED, "en"),
        user_id=_USER,
        message_id="m-1",
        **_CODE_POINTS,
        node="0",
    ),
    Expired(resp_time=_TIME, contents=localize(Text.EXPIRED, "en"), message_id="m-1"),
    Status(resp_time=_TIME, message_id="m-2", state=State.QUEUED, position=1, eta_ms=4_000),
    Thinking(resp_time=_TIME, contents="The user greets me.", message_id="m-1", attempt=1, start=0),
    Asked(resp_time=_TIME, contents="Hello", message_id="m-1"),
)
"""One frame of each kind."""


class _WireSchema(GenerateJsonSchema):
    """JSON Schema of frames as they are sent: a field without a value is absent, never null."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Json:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> Json:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - see its name
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> Json:
        made = super().model_schema(schema)
        made.pop("title")  # the name in components/schemas
        if USER_ID_FIELD in made["properties"]:
            made["properties"][USER_ID_FIELD] = _schema("UserId")
        return made

    def enum_schema(self, schema: core_schema.EnumSchema) -> Json:
        made = super().enum_schema(schema)
        return {"description": made["description"].partition("\n")[0], "type": made["type"], "enum": made["enum"]}

    def field_is_required(self, field: core_schema.ModelField, total: bool) -> bool:  # type: ignore[override]  # noqa: ARG002, FBT001
        """Whether a field is always sent; one with a default of a client frame is not."""
        schema = field["schema"]
        if schema["type"] != "default":
            return True
        return self.mode == "serialization" and schema.get("default", ...) is not None


def document() -> Json:
    """Build the document."""
    messages = {
        **{model.__name__: _message(model) for model in (*CLIENT_FRAMES, *SERVER_FRAMES)},
        PING: {
            "title": PING,
            "summary": "A heartbeat as bare text.",
            "contentType": "text/plain",
            "payload": _schema(PING),
            "examples": [{"payload": "PING"}],
        },
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "imstream",
            "version": "1",
            "description": "Chat between people and AI models. Fields, codes and events may be added: ignore others.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {"node": {"host": "localhost:8080", "protocol": "ws", "description": "A node or a load balancer."}},
        "channels": {"chat": _channel(messages)},
        "operations": _operations(),
        "components": {"schemas": _schemas(), "messages": messages},
        **_vocabulary(),
    }


def _schema(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> Json:
    _, found = models_json_schema(
        [*((model, "validation") for model in CLIENT_FRAMES), *((model, "serialization") for model in SERVER_FRAMES)],
        ref_template="#/components/schemas/{model}",
        schema_generator=_WireSchema,
    )
    schemas: Json = found["$defs"]
    for name, schema in schemas.items():
        own = _WORDS["FieldOf"].get(name, {})
        for field in schema.get("properties", {}).keys() - _WITHOUT_MEANING:
            meaning = own.get(field) or _WORDS["Field"][field]
            schema["properties"][field] = dict(sorted({**schema["properties"][field], "description": meaning}.items()))
    for model in CLIENT_FRAMES:
        schemas[model.__name__]["not"] = {"required": ["code"]}  # else a server frame could fit, with unknown fields
    user_id = {
        "description": f"the user: {UserIds.NUMBER.allowed}; with `IMSTREAM_USER_IDS=text`, {UserIds.TEXT.allowed}",
        **TypeAdapter(UserIdField).json_schema(),
    }
    return {**schemas, "UserId": user_id, PING: {"description": "A heartbeat.", "type": "string", "const": "PING"}}


def _message(model: type[ClientFrame | ServerFrame]) -> Json:
    summary = (model.__doc__ or "").partition("\n")[0]
    message = {"title": model.__name__, "summary": summary, "payload": _schema(model.__name__)}
    if "message_id" in model.model_fields:
        message["correlationId"] = {"location": "$message.payload#/messageId"}
    example = next(frame for frame in EXAMPLES if type(frame) is model)
    payload = example.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=False)
    return {**message, "examples": [{"payload": {name: value for name, value in payload.items() if value != []}}]}


def _channel(messages: Iterable[str]) -> Json:
    query = {
        USER_ID_FIELD: {"type": "string", "description": "a load balancer hashes it to choose a node"},
        "lang": {"type": "string", "description": "the language of texts, like `Accept-Language`"},
    }
    protocol = {"type": "string", "description": f"`{SUBPROTOCOL}`, and optionally the user's token as a second one"}
    return {
        "address": "/ws",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {
            "ws": {
                "method": "GET",
                "query": {"type": "object", "properties": query},
                "headers": {"type": "object", "properties": {"Sec-WebSocket-Protocol": protocol}},
                "bindingVersion": "0.1.0",
            }
        },
    }


def _operations() -> Json:
    channel = {"$ref": "#/channels/chat"}

    def messages(*models: type | str) -> list[Json]:
        names = [model if isinstance(model, str) else model.__name__ for model in models]
        return [{"$ref": f"#/channels/chat/messages/{name}"} for name in names]

    def request(summary: str, asked: Iterable[type | str], *answers: type) -> Json:
        reply = {"channel": channel, "messages": messages(*answers)}
        return {
            "action": "receive",
            "channel": channel,
            "summary": summary,
            "messages": messages(*asked),
            "reply": reply,
        }

    replies = (Welcome, HeartbeatReply, Accepted)
    return {
        "logIn": request("Log in, and resume messages.", [ClientInit], Welcome, Problem),
        "ask": request("Ask a question.", [ClientChat], Accepted, Problem),
        "cancel": request("Stop the answer to a message.", [ClientCancel], Cancelled, Problem),
        "beat": request("Show that the client is alive.", [ClientHeartbeat, PING], HeartbeatReply, Problem),
        "tell": {
            "action": "send",
            "channel": channel,
            "summary": "Send the answers to the user's messages, and problems.",
            "messages": messages(*(model for model in SERVER_FRAMES if model not in replies)),
        },
    }


def _vocabulary() -> Json:
    return {
        "x-codes": [{"code": code, **row} for code, row in words(Code)],
        "x-events": [{"event": event, **row, "terminal": event in TERMINAL_EVENTS} for event, row in words(Event)],
        "x-wants": [{"want": want, **row} for want, row in words(Want)],
        "x-states": [{"state": state, **row} for state, row in words(State)],
        "x-close-codes": [{"code": code, "reason": code.reason, **row} for code, row in words(CloseCode)],
    }


def words(kind: type[Word]) -> list[tuple[Word, dict[str, str]]]:
    """The words of a kind, each with its row of protocol_words.toml: `meaning`, `fault`, `action`."""
    rows: dict[str, dict[str, str]] = _WORDS[kind.__name__]
    if missing := rows.keys() ^ kind.__members__.keys():
        raise ValueError(f"protocol_words.toml and codes.py differ in {kind.__name__}: {', '.join(sorted(missing))}")
    return [(word, rows[word.name]) for word in kind]
