"""A strict backend with a dialect of its own, behind a node: the settings reach it, and no message fails."""

import json
from pathlib import Path

import pytest

from tests.support.one_node import one_node
from tests.support.scripted_backend import Exchange, refuses, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.users import user_id

USER = user_id(10001)
KEY = "key-that-no-log-may-show"


async def strict(exchange: Exchange) -> None:
    """Insist on a key, a parameter and alternating roles; refuse `stream_options`; think in tags."""
    body = exchange.request.json
    turns = [(message["role"], message["content"]) for message in body["messages"]]
    if exchange.request.headers.get("api-key") != KEY:
        await refuses(401, json.dumps({"error": {"message": f"wrong key {KEY}"}}))(exchange)
    elif "stream_options" in body or body.get("enable_thinking") is not False:
        await refuses(400, '{"error": {"message": "Param Incorrect"}}')(exchange)
    elif [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"] or ("", "") in turns:
        await refuses(400, '{"error": {"message": "roles must alternate"}}')(exchange)
    else:
        await streams("<thi", "nk>hm</think>\n", "\nfine")(exchange)


async def test_a_strict_backend_answers_every_conversation(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_THE_BACKEND", KEY)
    options = {
        "ai_headers": '{"api-key": "env:KEY_OF_THE_BACKEND"}',
        "ai_body": '{"enable_thinking": false}',
        "ai_system": "user",
        "system_prompt": "Be brief.",
    }
    histories: list[list[tuple[str, str]]] = [
        [],
        [("user", "a question that was never answered")],
        [("assistant", "a greeting")],
        [("user", "hi"), ("assistant", ""), ("user", "hello?"), ("assistant", "<think>who?</think>hello")],
    ]
    async with (
        scripted_backend(always=strict) as backend,
        one_node(tmp_path, redis_server, backend.url, **options) as node,
    ):
        async with node.peer(USER) as someone:
            for number, turns in enumerate(histories):
                history = [{"role": role, "content": content} for role, content in turns]
                await someone.chat(USER, "and now?", f"m{number}", history=history)
                told = await someone.end_of(f"m{number}")
                assert (told.events[-1], told.text, told.attempt) == ("done", "fine", 1), turns
        assert len(backend.requests) == 1 + len(histories)  # one was repeated without `stream_options`
        assert "who?" not in backend.requests[-1].body.decode()
        log = node.now.process.output()
        assert log.count("backend refuses stream_options") == 1
        assert KEY not in log
        await node.settled()
