"""Commands of operators show text that users, backends and others wrote into Redis: no terminal obeys it."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from click import Context
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from imstream.cli import control
from imstream.cli.main import main
from imstream.keys import GROUP, Keys
from imstream.store.leases import Holder
from tests.support.servers import RedisServer
from tests.support.stage import fresh_redis
from tests.support.tiers import examples

KEYS = Keys()
USER = 10001
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), 0x2066, 0x2067)]
FORGED = "FORGED"

HOSTILE = st.lists(
    st.sampled_from([*CONTROLS, "\x1b[2J", "\x1b]0;title\x07", f"\n{FORGED}", f"\r\n{FORGED}", "a", '"', "\\", "你"]),
    min_size=1,
    max_size=60,
).map("".join)

VERBS = {
    "nodes": ["", "--json", "--wait-settled --timeout 1ms", "--wait-settled --timeout 1ms --json"],
    "streams": ["--node 0", "--node 1"],
    "top": ["--count 1", "--count 1 --json"],
    "backends": ["", "--json"],
    "explain": [f"{USER}", f"{USER} --json", f"{USER} m-1", f"{USER} m-1 --json", f"{USER} m-2", f"{USER} m-3 --json"],
    "dead": [
        *("list --all", "list --all --json", "show", "show --json", "retry --dry-run", "retry --dry-run --json"),
        *("purge --dry-run", "purge --dry-run --json", "purge --json"),
    ],
    "user": [f"show {USER}", f"quota {USER}", f"lock {USER} --for 1h", f"ban {USER}", f"unban {USER}"],
    "pause": ["--all", "--node 1 --json"],
    "resume": ["--node 1 --json", "--all"],
    "drain": ["--node ghost"],
    "doctor": ["", "--json"],
}
"""Commands that show text of others, each with its options."""

OTHERS = {"up", "node", "redis", "balancer", "demo-ai", "local-ai", "chat", "token", "conform"}
"""Commands that show none of Redis."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with fresh_redis(tmp_path_factory.mktemp("printed")) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def _at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No node confirms a pause, and no .env is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "_CONFIRM", timedelta())
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


def fill(server: RedisServer, text: str) -> None:
    """Write the text wherever Redis has text."""
    now = int(time.time() * 1000)
    fields: dict[str, Any] = {"user": text, "message_id": text, "contents": text, "reason": text, "error": text}
    fields |= {"attempts": text, text: text}
    lease = Holder(text, text, text, 1, text).encode()
    event = {"by": text, "backend": text, "reason": text, "error": text, text: text, "until": text}
    with server.client() as client:
        client.flushall()
        client.zadd(KEYS.nodes(), {"0": now, "1": now, text: now})
        client.set(KEYS.lease("0"), lease)
        status = dict.fromkeys(("version", "not_ready", "metrics", "paused", text), text)
        client.hset(KEYS.status("0"), mapping={**status, "instance": Holder.decode(lease).instance})
        backend = json.dumps(
            {"state": "away", **dict.fromkeys(("lastError", "reason", "model", "url"), text), "failedAt": now}
        )
        for node in ("0", text):
            client.hset(KEYS.backends(node), text, backend)
        for node in ("0", "1"):
            client.set(KEYS.adopter(node), text)
            client.xgroup_create(KEYS.requests(node), GROUP, mkstream=True)
            for _ in range(2):
                client.xadd(KEYS.requests(node), fields)
            client.xreadgroup(GROUP, text, {KEYS.requests(node): ">"}, count=1)
            client.xadd(KEYS.dead(node), fields)
        client.xadd(KEYS.dead("1"), fields | {"user": str(USER), "message_id": "m-3"})
        client.xadd(KEYS.reply(USER, "m-1"), event | {"event": "opened", "request": "0/1-1"})
        client.xadd(KEYS.reply(USER, "m-1"), event | {"event": text})
        client.xadd(KEYS.reply(USER, "m-1"), event | {"event": "waiting"})
        client.xadd(KEYS.requests("0"), fields | {"user": str(USER), "message_id": "m-2"})
        client.xadd(KEYS.reply(USER, "m-3"), event | {"event": "failed"})
        client.zadd(KEYS.messages(USER), {"m-1": now, "m-3": now, text: now})
        client.hset(KEYS.account(USER), mapping={"banned": "1", "reason": text, "by": text})
        client.sadd(KEYS.route(USER), text, "0")
        client.zadd(KEYS.quota(USER, time.strftime("%Y-%m-%d", time.gmtime())), {text: now, "m-1": now})
        client.hset(KEYS.paused(), mapping={"0": json.dumps({"reason": text, "by": text}), "*": text})


def run(server: RedisServer, *command: str) -> Result:
    more = ["--ai", "http://127.0.0.1:9/v1", "--port", "0"] if command[0] == "doctor" else []
    result = CliRunner().invoke(main, [*command, "--redis", server.url, *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exc_info)
    return result


def test_every_command_that_shows_text_of_others_is_examined_here() -> None:
    assert {*main.list_commands(Context(main))} == VERBS.keys() | OTHERS


@settings(max_examples=examples(12, first=2))
@given(text=HOSTILE)
def test_no_command_prints_control_characters_or_forged_lines(server: RedisServer, text: str) -> None:
    for verb, variants in VERBS.items():
        fill(server, text)
        for options in variants:
            result = run(server, verb, *options.split())
            for output in (result.stdout, result.stderr):
                assert not {*CONTROLS[:0x0A], *CONTROLS[0x0B:]} & {*output}, (verb, options, output)
                assert not any(line.startswith(FORGED) for line in output.splitlines()), (verb, options)
            if "--json" in options and result.stdout:
                assert parsed(result.stdout), (verb, options)


def parsed(output: str) -> list[Any]:
    """The JSON documents of an output."""
    decoder, found, rest = json.JSONDecoder(), list[Any](), output.strip()
    while rest:
        one, end = decoder.raw_decode(rest)
        found.append(one)
        rest = rest[end:].strip()
    return found


def test_json_has_the_text_as_it_is(server: RedisServer) -> None:
    text = "".join(CONTROLS)
    fill(server, text)
    [letters] = parsed(run(server, "dead", "show", "--json").stdout)
    assert {letter["error"] for letter in letters} == {text}
