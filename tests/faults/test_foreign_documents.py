"""Foreign bytes: each parser returns a value or raises its own error, and the node survives.

Issuers, backends, clients, operators and other nodes write key sets, tokens, answers, frames, word lists, settings,
notices, leases and stored requests.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from imstream.ai import failures
from imstream.ai.answer_reader import AnswerReader
from imstream.ai.sse import EventParser, EventTooLong
from imstream.errors import BackendError, NodeTaken, SettingsError
from imstream.frame_parser import InvalidFrame, parse_frame
from imstream.guards.auth.jwks import InvalidKeySet, check_url, parse_key_set
from imstream.guards.auth.tokens import InvalidToken, TokenRules, key_id, secret_key
from imstream.guards.authentication import is_local
from imstream.guards.origin import Origin
from imstream.guards.words import word_guard
from imstream.keys import Keys
from imstream.model import ChatRequest, MalformedEntry, NewerVersion
from imstream.settings import Settings
from imstream.store.inbox import (
    AccountChanged,
    DrainRequested,
    NodeLeft,
    ReplyGrew,
    SessionReplaced,
    notice_fields,
    parse_notice,
)
from imstream.store.leases import Holder
from imstream.texts import choose_lang
from imstream.urls import RedisUrl, SecretUrl, redact_url
from imstream.user_ids import UserIds
from imstream.worker.lease_keeper import is_alive, this_process
from tests.support.guard_deps import guard_deps
from tests.support.one_node import one_node
from tests.support.peer import peer
from tests.support.servers import DemoBackend, RedisServer
from tests.support.tiers import examples
from tests.support.tokens import PUBLIC, SECRET, as_jwk, issuer, key_of, token
from tests.support.waiting import wait_until

HERE = this_process("http://127.0.0.1:8080")
NOW = datetime.now(UTC)
NODE = Keys()
RULES = TokenRules(Settings.load())
ORIGINS = [
    cast("Origin", Origin.create(guard_deps(origins=origins))) for origins in ("same", "*", "https://chat.example.com")
]


# Parsers


def read_word_list(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "words.txt"
        path.write_bytes(data)
        word_guard.read(path)


def read_lease(data: bytes) -> None:
    holder = Holder.decode(data.decode(errors="replace"))
    is_alive(holder, HERE.machine)
    told = str(NodeTaken("0", holder.address, holder.pid, holder.host))
    assert told.isprintable()
    assert len(told) < 1000


def read_stored_notice(data: bytes) -> None:
    notice = parse_notice(data.decode(errors="replace").split("\0"))
    if isinstance(notice, ReplyGrew | SessionReplaced | AccountChanged):
        Keys().reply(notice.user_id, getattr(notice, "message_id", ""))


def read_stored_request(data: bytes) -> None:
    parts = data.decode(errors="replace").split("\0")
    ChatRequest.from_fields(dict(zip(parts[::2], parts[1::2], strict=False)))


def read_answer(data: bytes) -> None:
    reader = AnswerReader(limit=1000)
    for begin in range(0, len(data), 50):
        reader.feed(data[begin : begin + 50])
    reader.end()


def read_events(data: bytes) -> None:
    parser = EventParser(limit=1000)
    parser.feed(data)
    parser.close()


def read_refusal(data: bytes) -> None:
    text = data.decode("latin-1")
    failures.from_response(500, {"retry-after": text, "retry-after-ms": text}, data, now=NOW)


def read_token(data: bytes) -> None:
    shown = RULES.check_shape(data.decode(errors="surrogateescape"))
    key_id(shown)
    RULES.verify(shown, [SECRET.encode()])


def read_headers(data: bytes) -> None:
    text = data.decode("latin-1")
    for guard in ORIGINS:
        for origin, host in ((text, "127.0.0.1"), ("http://127.0.0.1", text)):
            guard.check_handshake({"origin": origin, "host": host, "x-forwarded-proto": text})
    is_local({"host": text, "x-forwarded-for": text})
    choose_lang(text, "zh")
    for kind in UserIds:
        kind.parse(text)


def read_setting(data: bytes) -> None:
    text = data.decode(errors="surrogateescape").replace("\0", "")  # as in the environment
    redact_url(text)
    with suppress(SettingsError):
        secret_key(SecretStr(text), "IMSTREAM_AUTH_SECRET")
    with suppress(SettingsError):
        check_url(SecretUrl(text), allow_http=False)
    Settings.load(**dict.fromkeys(Settings.model_fields, text))


def read_redis_url(data: bytes) -> None:
    RedisUrl.parse(data.decode(errors="replace"))


@dataclass
class Parser:
    """A parser, the errors that it raises for invalid documents, and valid documents to mutate."""

    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = ()
    takes: list[bytes] = field(default_factory=list)


def flat(*parts: str) -> bytes:
    """The fields of a stream entry."""
    return "\0".join(parts).encode()


REQUEST = ChatRequest(10001, "m-1", "why?", (("user", "a"), ("assistant", "b")), "en", 1_764_000_000_000, "ab")
CHUNK = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}], "usage": {"prompt_tokens": 1}}
KEY_SET = json.dumps({"keys": [as_jwk(key_of(kind), kind, kid=kind, use="sig") for kind in PUBLIC]}).encode()
INIT = {"msgType": "INIT", "userId": 10001, "token": "a.b.c", "resume": [{"messageId": "m", "attempt": 1, "offset": 2}]}
CHAT = {"msgType": "CHAT", "userId": 10001, "contents": "a", "history": [{"role": "user", "content": "b"}]}

PARSERS = {
    "key set": Parser(lambda data: [parse_key_set(data, kind) for kind in PUBLIC], (InvalidKeySet,), [KEY_SET]),
    "token": Parser(read_token, (InvalidToken,), [token().encode(), token(key_of("ES256"), "ES256").encode()]),
    "client frame": Parser(
        lambda data: parse_frame(data.decode()),
        (InvalidFrame, UnicodeDecodeError),  # the WebSocket rejects the latter earlier
        [json.dumps(frame).encode() for frame in (INIT, CHAT)],
    ),
    "headers": Parser(
        read_headers, (), [b"https://chat.example.com:8443", b"en;q=0.5, zh", b"[::1]:80", b"10.0.0.1, ::1"]
    ),
    "word list": Parser(read_word_list, (SettingsError,), ["bad\n# no\n敏感词\nf.u\n".encode()]),
    "setting": Parser(
        read_setting,
        (SettingsError,),
        [b"redis+sentinel://u:p@h:1,h:2/x", b"http://u:p@h/v1", b"15m", b"Asia/Shanghai"],
    ),
    "redis url": Parser(read_redis_url, (ValueError,), [b"rediss+cluster://u:p@h:1,[::1]:2?ssl_cert_reqs=none"]),
    "notice": Parser(
        read_stored_notice,
        (),
        [
            flat(*notice_fields(notice))
            for notice in (
                ReplyGrew(10001, "m-1"),
                SessionReplaced(10001, 5),
                NodeLeft("eu-1"),
                DrainRequested(),
                DrainRequested("0a1b"),
                AccountChanged(10001),
            )
        ],
    ),
    "lease": Parser(read_lease, (), [HERE.encode().encode()]),
    "stored request": Parser(read_stored_request, (MalformedEntry, NewerVersion), [flat(*REQUEST.fields())]),
    "events": Parser(read_events, (EventTooLong,), [b"event: x\r\ndata: a\r\ndata: b\r\n\r\n: c\n\n"]),
    "answer": Parser(
        read_answer,
        (BackendError,),
        [b"data: " + json.dumps(CHUNK).encode() + b"\n\ndata: [DONE]\n\n", json.dumps(CHUNK).encode()],
    ),
    "refusal of a backend": Parser(
        read_refusal, (), [b'{"error": {"message": "no", "code": "x"}}', b"<title>No</title><p>&amp;</p>", b"12.5"]
    ),
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("9" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, document: bytes) -> bytes:
    """A document with a part replaced; in JSON possibly a value."""
    values = list(re.finditer(rb'(?<=: )("[^"]*"|[\d.]+|true|null|\[\])', document))
    in_json = draw(st.booleans())
    if in_json and values:
        begin, end = values[draw(st.integers(0, len(values) - 1))].span()
        new = json.dumps(draw(JSON)).encode()
    else:
        begin = draw(st.integers(0, len(document)))
        end = draw(st.integers(begin, min(len(document), begin + 20)))
        new = draw(st.binary(max_size=8) | st.sampled_from([b"", b"\0", b"[" * 5000, b'{"a":' * 5000, document]))
    return document[:begin] + new + document[end:]


def foreign(takes: list[bytes]) -> st.SearchStrategy[bytes]:
    """Documents that are valid, nearly valid, other JSON, or random bytes."""
    right = st.sampled_from(takes)
    nearly = right.flatmap(changed)
    return st.one_of(
        nearly, nearly.flatmap(changed), right, JSON.map(lambda value: json.dumps(value).encode()), st.binary()
    )


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@settings(max_examples=examples(1000, first=40))
def test_whatever_comes_a_parser_gives_a_value_or_its_own_refusal(name: str, data: st.DataObject) -> None:
    parser = PARSERS[name]
    document = data.draw(foreign(parser.takes))
    try:
        parser.read(document)
    except parser.refusals:
        return


@pytest.mark.parametrize("name", PARSERS)
def test_documents_that_the_parser_takes_are_used(name: str) -> None:
    parser = PARSERS[name]
    taken = 0
    for document in parser.takes:
        try:
            parser.read(document)
            taken += 1
        except parser.refusals:
            continue
    assert taken or name == "setting", "no value is valid for all settings"


# The node


async def test_a_node_survives_all_documents_of_an_issuer_and_all_foreign_values_in_redis(
    redis_server: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    key = as_jwk(key_of("ES256"), "ES256", kid="good")
    poison = [{**key, "kid": "bad", "key_ops": 1}, 7, {**key, "use": []}]
    known = {"auth": "jwt", "auth_algorithm": "ES256", "lease": "900ms", "log_format": "json"}
    shown = token(key_of("ES256"), "ES256", headers={"kid": "good"})
    async with (
        issuer(*cast("Any", poison), key) as keys,
        one_node(tmp_path, redis_server, demo.url, **known, auth_jwks_url=keys.url) as node,
    ):
        redis = node.redis
        # The directory of nodes, and the lease of another node.
        redis.zadd(NODE.nodes(), {"eu-1": float("-inf"), "eu-2": 1e300, "\x9b": 1, "x" * 9999: 1})
        redis.set(NODE.lease("eu-1"), "[" * 5000, px=2**62)
        redis.rpush(NODE.requests("eu-2"), "not a stream")
        looks = int(redis.info("commandstats")["cmdstat_zrange"]["calls"])
        # The inbox: invalid entries, then a notice.
        inbox = NODE.inbox("0")
        for entry in (
            {"event": "grew"},
            {"event": "grew", "user": "1e9", "message_id": "m"},
            {"event": "begun", "user": "9" * 5000, "message_id": "m"},
            {"event": "begun", "user": "10001", "message_id": "}{" * 1000},
            {"event": "replaced", "user": "10001", "login": "-inf"},
            {b"\xff": b"\xff"},
            {"": ""},
        ):
            redis.xadd(inbox, cast("Any", entry))
        async with peer(node.now.ws(10001), user=10001, token=shown) as someone:
            redis.hset(NODE.account(10001), "banned", "1")
            redis.xadd(inbox, {"event": "account", "user": "10001"})
            assert await someone.closed() == 4503, "the notice after them is read"
        redis.delete(NODE.account(10001))
        await wait_until(
            lambda: int(redis.info("commandstats")["cmdstat_zrange"]["calls"]) > looks + 2,
            "the adopter has scanned",
        )
        # An inbox of another type, and then none.
        redis.delete(inbox)
        redis.rpush(inbox, "not a stream")
        await wait_until(lambda: "inbox cannot be read" in node.now.process.output(), "it is logged")
        redis.delete(inbox)
        # Tokens with unknown keys on one socket: few log lines, each with the peer.
        before = len(node.now.process.output())
        async with peer(node.now.ws(10002)) as stranger:
            for number in range(60):
                made_up = token(key_of("ES256"), "ES256", headers={"kid": f"made up {number}"}, sub="10002")
                await stranger.send_frame("INIT", userId=10002, token=made_up)
                assert (await stranger.frame())["code"] in {"UNAVAILABLE", "UNAUTHORIZED"}
                if stranger.frames[-1]["code"] == "UNAUTHORIZED":
                    break
        lines = [
            json.loads(line) for line in node.now.process.output()[before:].splitlines() if line[:1] + line[-1:] == "{}"
        ]
        refusals = [line for line in lines if line["event"] == "login refused"]
        assert 0 < len(refusals) < 40
        assert all(line["peer"] == "127.0.0.1" for line in refusals)
        async with peer(node.now.ws(10001), user=10001, token=shown) as someone:
            assert (await someone.chat(10001, "still there? [[demo first=0 pace=0 length=3]]", "m-1"))[
                "event"
            ] == "accepted"
            assert (await someone.end_of("m-1")).terminal is not None
        said = node.now.process.output()
        assert said.count("unusable token keys skipped") == 1
        assert said.count("cannot be looked at") == 1
        assert "background task failed" not in said
        redis.delete(NODE.nodes(), NODE.lease("eu-1"), NODE.requests("eu-2"), inbox)
        await node.terminated()
