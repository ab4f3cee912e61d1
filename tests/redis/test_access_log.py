"""The users of ops/redis-users.acl: denied commands of the user of nodes, and the report of a missing permission."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from imstream.errors import StoreDenied, StoreFull
from imstream.redis import health
from imstream.redis.client import BlockingReader, RedisClient
from imstream.redis.errors import AccessLog, error_from_reply
from imstream.settings import Settings
from imstream.store.requests import RequestStream
from tests.redis.conftest import chat_request
from tests.support.processes import free_port, start, wait_for
from tests.support.servers import ADMIN, OPS, USER, RedisServer, users

TIMEOUT = timedelta(seconds=10)
USER_LINES = [line for line in users().splitlines() if line.startswith("user ")]


def set_users(client: redis.Redis, *lines: str) -> None:
    """Change users as `ACL SETUSER` does, at once."""
    for line in lines:
        client.execute_command("ACL", "SETUSER", *line.split()[1:])  # type: ignore[no-untyped-call] # redis-py's gap


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, RedisServer]]:
    made: dict[str, RedisServer] = {}
    yield made
    for server in made.values():
        server.stop()


@pytest.fixture
def server(
    started: dict[str, RedisServer], redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> RedisServer:
    """A server for this module only: the shared servers must have denied nothing."""
    binary = redis_server.binary
    if binary not in started:
        started[binary] = RedisServer(binary, free_port(), tmp_path_factory.mktemp("denying"))
        started[binary].start()
    return started[binary]


# The files


def test_nobody_can_log_in_before_there_is_a_password() -> None:
    for name in ("redis-users.acl", "sentinel-users.acl"):
        lines = [line.split() for line in (OPS / name).read_text("utf-8").splitlines() if line.startswith("user ")]
        assert len(lines) > 2
        for line in lines:
            assert line[2] == "reset"
            assert [word for word in line if word.startswith(("#", ">", "nopass"))] == (
                [] if line[1] == "default" else ["#" + 64 * "0"]
            )


@pytest.mark.parametrize("way", ["aclfile", "at once"])
def test_the_users_are_taken_as_an_aclfile_and_at_once(redis_server: RedisServer, way: str, tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "users.acl"
    command = [redis_server.binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    file.write_text("\n".join(USER_LINES), "utf-8")
    with start([*command, *(["--aclfile", str(file)] if way == "aclfile" else [])], tmp_path / "log") as process:
        if way == "at once":
            with redis.Redis(port=port) as client:
                wait_for(lambda: _answers(client), process, "redis")
                set_users(client, *USER_LINES)
        with redis.Redis(port=port, decode_responses=True, **ADMIN) as client:
            wait_for(lambda: _answers(client), process, "redis")
            assert set(client.acl_users()) == {"admin", "default", "imstream", "replica", "sentinel", "viewer"}
            with redis_server.client() as other:
                assert _permissions(client) == _permissions(other)
        with redis.Redis(port=port) as nobody, pytest.raises(redis.AuthenticationError):
            nobody.ping()


def _permissions(client: redis.Redis) -> dict[str, object]:
    """The permissions of the user of nodes, sorted: redis-py lists commands in any order."""
    user: dict[str, object] = client.acl_getuser("imstream")  # type: ignore[assignment] # typed for both kinds of client
    return {name: sorted(value) if isinstance(value, list) else value for name, value in user.items()}


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


# Commands denied to a node


@pytest.mark.parametrize(
    "command",
    [
        *(("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("RANDOMKEY",), ("DBSIZE",), ("SWAPDB", 0, 1)),
        *(("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "REWRITE"), ("SHUTDOWN",), ("SAVE",)),
        *(("MONITOR",), ("SLOWLOG", "GET"), ("REPLICAOF", "NO", "ONE"), ("FAILOVER",)),
        *(("ACL", "LIST"), ("ACL", "SETUSER", "imstream", "+@all"), ("ACL", "WHOAMI")),
        *(("CLIENT", "LIST"), ("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "PAUSE", 1)),
        *(("SCRIPT", "FLUSH"), ("SCRIPT", "KILL"), ("MODULE", "LIST"), ("CLUSTER", "RESET")),
        *(("PUBLISH", "im:a", "b"), ("SUBSCRIBE", "im:a"), ("XTRIM", "other", "MAXLEN", 0), ("RENAME", "im:a", "im:b")),
        *(("XGROUP", "DESTROY", "im:a", "workers"), ("XINFO", "STREAM", "im:a"), ("DUMP", "im:a")),
        *(("GET", "other"), ("XADD", "im", "*", "a", "b"), ("DEL", "im:a", "other"), ("SET", "imx:a", 1)),
        ("EVAL", "return redis.call('GET', KEYS[1])", 1, "other"),
        ("EVAL", "return redis.call('GET', 'other')", 0),
        ("EVAL", "return redis.call('FLUSHALL')", 0),
    ],
    ids=lambda command: " ".join(map(str, command)),
)
async def test_the_user_of_a_node_may_not(server: RedisServer, command: tuple[str | int, ...]) -> None:
    async with RedisClient(server.url, connections=1, timeout=TIMEOUT) as redis_client:
        with pytest.raises(StoreDenied, match=r"grant the user the permissions in ops/redis-users\.acl"):
            await redis_client.execute(*command)


# Reports of missing permissions


def logins(url: str) -> dict[str, str]:
    """URLs with a login that is denied."""
    return {
        "wrong password": url.replace(USER, "imstream:wrong"),
        "unknown user": url.replace(USER, "nobody:imstream-secret"),
        "password alone": url.replace(USER, ":imstream-secret"),
        "no login": url.replace(f"{USER}@", ""),
    }


@pytest.mark.parametrize("which", logins(""))
async def test_a_denied_login_is_told_from_an_absence(server: RedisServer, which: str) -> None:
    url = logins(server.url)[which]
    reader = BlockingReader(url, block=TIMEOUT, timeout=TIMEOUT)
    async with RedisClient(url, connections=1, timeout=TIMEOUT) as redis_client:
        for ask in (redis_client.execute, reader.execute):
            with pytest.raises(StoreDenied, match="check the user and the password in IMSTREAM_REDIS_URL"):
                await ask("XLEN", "im:a")
    await reader.aclose()


@pytest.mark.parametrize("rules", ["-evalsha", "-eval", "-xadd", "-hincrby", "-hget", "resetkeys ~other:*"])
async def test_a_permission_that_is_lacking_is_said_also_when_a_script_lacks_it(
    server: RedisServer, rules: str
) -> None:
    reader = BlockingReader(server.url, block=TIMEOUT, timeout=TIMEOUT)
    with server.client() as client:
        client.script_flush()
        set_users(client, f"user imstream {rules}")
        try:
            async with RedisClient(server.url, connections=1, timeout=TIMEOUT) as redis_client:
                requests = RequestStream(redis_client, reader, Settings.load())
                with pytest.raises(StoreDenied, match="ACL LOG shows denied commands"):
                    await requests.admit(chat_request())
        finally:
            set_users(client, *USER_LINES)
            client.flushall()
    await reader.aclose()


async def test_without_the_permission_to_look_at_its_settings_a_node_says_so_and_goes_on(server: RedisServer) -> None:
    with server.client() as client:
        set_users(client, "user imstream -info")
        try:
            async with RedisClient(server.url, connections=1, timeout=TIMEOUT) as redis_client:
                [warning] = await health.warnings(redis_client)
        finally:
            set_users(client, *USER_LINES)
    assert "cannot read the settings of Redis: " in warning
    assert "'info'" in warning


# Reports of an exhausted Redis


async def test_commands_that_are_refused_because_the_memory_is_full_are_reported(server: RedisServer) -> None:
    lacks = list[str]()
    reader = BlockingReader(server.url, block=TIMEOUT, timeout=TIMEOUT)
    with server.client() as client:
        access_log = AccessLog(lacks.append)
        async with RedisClient(server.url, connections=1, timeout=TIMEOUT, access_log=access_log) as redis_client:
            requests = RequestStream(redis_client, reader, Settings.load())
            await requests.admit(chat_request())
            assert lacks == []
            client.config_set("maxmemory", 1)
            try:
                with pytest.raises(StoreFull):
                    await requests.admit(chat_request())
            finally:
                client.config_set("maxmemory", 0)
                client.flushall()
    assert set(lacks) == {"memory"}
    await reader.aclose()


def test_a_full_disk_is_reported() -> None:
    lacks = list[str]()
    refusal = redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device")
    AccessLog(lacks.append).report(error_from_reply(refusal))
    assert lacks == ["disk"]
