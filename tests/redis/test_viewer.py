"""The user `viewer` of ops/redis-users.acl: every documented command that reads works, and nothing can be changed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.keys import GROUP, Keys
from imstream.store.leases import Holder
from tests.conftest import SERVERS
from tests.support.processes import free_port
from tests.support.servers import ADMIN, USER, RedisServer, missing, users

VIEWER: dict[str, Any] = {"username": "viewer", "password": "viewer-secret"}
OPERATING = (Path(__file__).parents[2] / "ops" / "docs" / "operating.md").read_text("utf-8")
READING = ("ZRANGE", "GET", "PTTL", "HGETALL", "XLEN", "XRANGE", "XREVRANGE", "XPENDING", "INFO", "TIME", "SMEMBERS")


@pytest.fixture(scope="module", params=["valkey", "redis-6.2"])  # the newest, and the first with its kind of rules
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with a node, a request, a dead letter, a reply and an account. Not shared: it denies commands."""
    binary = SERVERS[request.param]()
    if binary is None:
        missing(request.param)
        return
    server = RedisServer(binary, free_port(), tmp_path_factory.mktemp("viewed"))
    server.start()
    keys, fields = Keys(), {"user": "10001", "message_id": "m-1", "contents": "why?"}
    with server.client() as client:
        client.zadd(keys.nodes(), {"0": 1_795_600_000_000})
        client.set(keys.lease("0"), Holder("i", "host", "machine", 1, "127.0.0.1:8080").encode())
        client.xgroup_create(keys.requests("0"), GROUP, mkstream=True)
        client.xadd(keys.requests("0"), {**fields, "at": "1795600000000"}, "1795600000000-0")
        client.xreadgroup(GROUP, "0", {keys.requests("0"): ">"})
        client.xadd(keys.dead("0"), {**fields, "reason": "http_400"}, "1795600000000-0")
        client.xadd(keys.reply(10001, "m-1"), {"event": "queued"})
        client.hset(keys.account(10001), mapping={"banned": "1", "reason": "spam"})
        client.hset(keys.account(10002), mapping={"locked_until": "1", "reason": "flood"})  # it is over
        client.hset(keys.status("0"), "instance", "i")
        client.zadd(keys.messages(10001), {"m-1": 1_795_600_000_000})
    yield server
    server.stop()


@pytest.fixture
def url(server: RedisServer) -> str:
    return server.url.replace(USER, "viewer:viewer-secret")


def as_viewer(server: RedisServer) -> redis.Redis:
    return redis.Redis(port=server.port, decode_responses=True, **VIEWER)


def content(server: RedisServer) -> dict[str, bytes | None]:
    """All keys with their values."""
    with redis.Redis(port=server.port, **ADMIN) as raw:
        return {str(key): raw.dump(key) for key in sorted(raw.scan_iter())}


@pytest.mark.parametrize(
    "command",
    [
        *(
            "nodes",
            "nodes --json",
            "streams --node 0",
            "top --count 1",
            "backends",
            "explain 10001 m-1",
            "explain 10001",
            "dead list",
            "dead list --all",
        ),
        *(
            "dead show",
            "user show 10001",
            "user show 10002",
            "user quota 10001",
            "dead purge --dry-run",
            "dead retry --dry-run",
        ),
    ],
)
def test_a_command_that_reads_works(url: str, command: str) -> None:
    result = CliRunner().invoke(main, [*command.split(), "--redis", url])
    assert result.exit_code == 0, result.output


def test_the_reading_commands_of_the_documents_work(server: RedisServer) -> None:
    lines = re.findall(rf"^(?:redis-cli )?((?:{'|'.join(READING)})\b .*)$", OPERATING, re.MULTILINE)
    commands = [line.replace("'", "").split() for line in lines] + [["TIME"]]
    assert {command[0] for command in commands} == set(READING)
    with as_viewer(server) as client:
        client.response_callbacks.clear()  # not needed, and wrong for some results
        for command in [*commands, ["PING"], ["TYPE", Keys().nodes()], ["SCAN", "0", "MATCH", "im:{node:*}:dead"]]:
            client.execute_command(*command)


@pytest.mark.parametrize(
    "command",
    ["user ban 10001", "user unban 10001", "user lock 10001", "user quota 10001 --reset", "dead purge", "pause --all"],
)
def test_a_command_that_changes_something_is_denied(server: RedisServer, url: str, command: str) -> None:
    before = content(server)
    result = CliRunner().invoke(main, [*command.split(), "--redis", url])
    assert result.exit_code == 1, result.output
    assert "denies access" in result.output
    assert content(server) == before


def test_no_command_that_writes_administrates_or_publishes_is_allowed(server: RedisServer) -> None:
    with server.client() as admin:
        [line] = [line for line in users().splitlines() if line.startswith("user viewer ")]
        allowed = {word.removeprefix("+") for word in line.split() if word.startswith("+")}
        kinds = ("write", "admin", "pubsub", "transaction", "dangerous", "blocking")
        refused = {str(name) for kind in kinds for name in admin.acl_cat(kind)}
        scripting = {str(name).partition("|")[0] for name in admin.acl_cat("scripting")}
    assert {"xlen", "hgetall"} < allowed
    assert not allowed & scripting
    assert allowed & refused <= {"info", "client|setname", "cluster|slots"}


@pytest.mark.parametrize(
    "command",
    [
        *("SET im:a 1", "DEL im:nodes", "ZADD im:nodes 1 1", "XADD im:a * a b", "EXPIRE im:nodes 1", "FLUSHALL"),
        *("XGROUP DESTROY im:{node:0}:requests workers", "XACK im:{node:0}:requests workers 1795600000000-0"),
        *("XREADGROUP GROUP workers 0 STREAMS im:{node:0}:requests 0", "RENAME im:nodes im:b", "KEYS *", "MULTI"),
        *("CONFIG SET maxmemory 1", "ACL WHOAMI", "CLIENT KILL TYPE normal", "PUBLISH im:a b", "SCRIPT FLUSH"),
        *("GET other", "EVAL return\xa0redis.call('SET',KEYS[1],1) 1 im:a", "EVAL return\xa0redis.call('FLUSHALL') 0"),
        *("EVAL return\xa01 0", "EVALSHA 0123456789012345678901234567890123456789 0", "SCRIPT LOAD return\xa01"),
    ],
)
def test_writes_and_foreign_keys_are_denied(server: RedisServer, command: str) -> None:
    before = content(server)
    words = [word.replace("\xa0", " ") for word in command.split(" ")]
    denied = r"(?i)no permissions|can't run this command|can't access"
    with as_viewer(server) as client, pytest.raises(redis.ResponseError, match=denied):
        client.execute_command(*words)
    assert content(server) == before
