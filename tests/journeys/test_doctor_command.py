"""`imstream doctor`: problems that keep a node from serving, and their remedies."""

import json
import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from imstream.keys import Keys
from imstream.store.scripts import LUA
from tests.support.documents import redis_cli
from tests.support.one_node import OneNode
from tests.support.processes import free_port, wait_for
from tests.support.redis_sets import Topology, sentinel_set
from tests.support.servers import OPS, DemoBackend, RedisServer
from tests.support.stage import fresh_redis


def run(*options: str, **environment: object) -> Result:
    """Run the command."""
    env = {f"IMSTREAM_{name.upper()}": str(value) for name, value in environment.items()}
    return CliRunner().invoke(main, ["doctor", *options], env=env)


def findings(*options: str, **environment: object) -> dict[str, list[tuple[str, str]]]:
    """Its findings, by check: state and text."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in json.loads(run("--json", *options, **environment).stdout)["findings"]:
        found.setdefault(one["check"], []).append((one["state"], one["text"]))
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .env of another test or developer is read."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_redis(tmp_path: Path) -> Any:  # noqa: ANN401 - a generator
    with fresh_redis(tmp_path) as server:
        yield server


def test_a_node_that_can_serve_passes_with_every_topology_of_redis(empty_redis: Topology, demo: DemoBackend) -> None:
    port = free_port()
    result = run("--call", redis_url=empty_redis.url, ai_url=demo.url, port=port)
    assert result.exit_code == 0, result.output
    rows = [re.split(r"  +", line, maxsplit=2) for line in result.output.splitlines()]
    assert rows[0] == ["check", "state", "result"]
    states = {check: state for check, state, _ in rows}
    assert states["redis"] == states["redis commands"] == states["backend"] == states["port"] == "ok"
    assert f"port {port} is free" in result.output
    assert "answers" in result.output
    with empty_redis.client() as client:
        assert not client.exists(Keys().probe("0"))


def test_redis_cli_shows_the_same_facts_of_redis_as_doctor(demo: DemoBackend, own_redis: RedisServer) -> None:
    told = redis_cli("Before a start", own_redis, {})
    [(_, text)] = findings(redis_url=own_redis.url, ai_url=demo.url, port=free_port())["redis"]
    assert re.findall(r"valkey_version:(\S+)", told["INFO server"])[0] in text


def test_settings_that_are_wrong_or_unknown_are_named(demo: DemoBackend, own_redis: RedisServer) -> None:
    wrong = run(port="many")
    assert wrong.exit_code == 1
    assert "IMSTREAM_PORT='many' is not allowed" in wrong.output
    given = {"redis_url": own_redis.url, "ai_url": demo.url, "port": free_port()}
    [(state, text)] = findings(**given, queue_limitt=5)["settings"]
    assert (state, "did you mean IMSTREAM_QUEUE_LIMIT?" in text) == ("warning", True)


def test_a_redis_that_is_away_or_denies_access_is_an_error(demo: DemoBackend, own_redis: RedisServer) -> None:
    away = run(redis_url=f"redis://127.0.0.1:{free_port()}/0", ai_url=demo.url, port=free_port())
    assert away.exit_code == 1
    assert "does not answer" in away.output
    wrong = own_redis.url.replace("imstream-secret", "wrong")
    [(state, text)] = findings(redis_url=wrong, ai_url=demo.url, port=free_port())["redis"]
    assert (state, "denies access" in text, "wrong" in text) == ("error", True, False)


def test_commands_that_redis_denies_or_does_not_carry_out_are_named(demo: DemoBackend, own_redis: RedisServer) -> None:
    given = {"redis_url": own_redis.url, "ai_url": demo.url, "port": free_port()}
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "imstream", "-xclaim", "-zadd")
        denied = findings(**given)["redis commands"]
        assert [(state, text.partition(":")[0]) for state, text in denied] == [("error", "XCLAIM"), ("error", "ZADD")]
        assert run(**given).exit_code == 1
        client.execute_command("ACL", "SETUSER", "imstream", "+xclaim", "+zadd")
        client.config_set("min-replicas-to-write", 1)
        [(_, text)] = findings(**given)["redis commands"]
        assert text.startswith("XADD, ")
        assert ": NOREPLICAS " in text
        client.config_set("min-replicas-to-write", 0)
        client.config_set("maxmemory", 1)
        [(_, text)] = findings(**given)["redis commands"]
        assert text.startswith("XADD: ")
        assert "maxmemory" in text
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert [state for state, _ in findings(**given)["redis settings"]] == ["warning"]


def test_every_command_that_nodes_may_use_is_tried() -> None:
    [user] = re.findall(r"^user imstream .*$", (OPS / "redis-users.acl").read_text("utf-8"), re.MULTILINE)
    allowed = {command.partition("|")[0] for command in re.findall(r"\+([a-z|]+)", user)}
    tried = {command.lower() for command in re.findall(r"try\('(\w+)'", LUA["check_rights"].text)}
    by_connecting = {"eval", "evalsha", "select", "client", "cluster", "asking"}
    assert allowed == tried | by_connecting


def test_backends_that_do_not_answer_are_errors_if_none_is_left(
    demo: DemoBackend, own_redis: RedisServer, tmp_path: Path
) -> None:
    given = {"redis_url": own_redis.url, "port": free_port()}
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    [(state, text)] = findings(**given, ai_url=nowhere)["backend"]
    assert (state, nowhere in text, "connect_failed" in text) == ("error", True, True)
    file = tmp_path / "backends.toml"
    names = {"one": demo.url, "two": nowhere}
    file.write_text(
        "".join(f'[[backend]]\nname = "{name}"\nurl = "{url}"\nmodel = "demo"\n' for name, url in names.items())
    )
    both = findings(**given, ai_backends=file)["backend"]
    assert [state for state, _ in both] == ["ok", "warning"]
    assert run(redis_url=own_redis.url, port=free_port(), ai_backends=file).exit_code == 0


def test_a_port_is_free_ours_or_that_of_another_program(
    demo: DemoBackend, own_redis: RedisServer, tmp_path: Path
) -> None:
    given = {"redis_url": own_redis.url, "ai_url": demo.url}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        [(state, text)] = findings(**given, port=taken.getsockname()[1])["port"]
        assert (state, "used by another program" in text) == ("error", True)
    with own_redis.client() as client:
        node = OneNode(tmp_path, client, own_redis.url, demo.url, {})
        node.start_now()
        with node.now.process:
            [(state, text)] = findings(**given, port=node.port)["port"]
            assert (state, text.endswith(f"is used by node 0 (process {node.now.process.pid})")) == ("ok", True)
            other = findings(**given, port=node.port, node="1", metrics="127.0.0.1:+1")
            assert [state for state, _ in other["metrics"]] == ["ok"]
            [(state, text)] = other["port"]
            assert (state, "is used by node 0" in text) == ("error", True)


def test_a_running_node_is_recognised_while_redis_does_not_have_its_lease(
    demo: DemoBackend, own_redis: RedisServer, tmp_path: Path
) -> None:
    given = {"redis_url": own_redis.url, "ai_url": demo.url}
    with own_redis.client() as client:
        node = OneNode(tmp_path, client, own_redis.url, demo.url, {"lease": "1s"})
        node.start_now()
        with node.now.process:
            client.config_set("min-replicas-to-write", 1)  # the lease cannot be renewed
            wait_for(lambda: not client.exists(Keys().lease("0")), node.now.process, "the end of the lease")
            assert findings(**given, port=node.port)["port"] == [
                ("ok", f"127.0.0.1 port {node.port} is used by node 0")
            ]
            [(state, text)] = findings(**given, port=node.port, node="1")["port"]
            assert (state, text.endswith("is used by node 0: choose another IMSTREAM_PORT")) == ("error", True)
            own_redis.kill()
            assert findings(**given, port=node.port)["port"][0][0] == "ok"


def test_a_node_that_shows_no_details_at_its_port_is_a_node(
    demo: DemoBackend, own_redis: RedisServer, tmp_path: Path
) -> None:
    with own_redis.client() as client:
        node = OneNode(tmp_path, client, own_redis.url, demo.url, {"metrics": "off"})
        node.start_now()
        with node.now.process:
            nowhere = f"redis://127.0.0.1:{free_port()}/0"
            [(state, text)] = findings(redis_url=nowhere, ai_url=demo.url, port=node.port)["port"]
            assert (state, text.endswith("is used by a node that does not show its id there")) == ("warning", True)


def test_too_few_open_files_a_wrong_clock_and_a_slow_redis_are_warnings(
    demo: DemoBackend, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"redis_url": own_redis.url, "ai_url": demo.url, "port": free_port()}
    monkeypatch.setattr("imstream.cli.doctor.time.time", lambda: 0.0)
    monkeypatch.setattr("imstream.cli.doctor.MAX_ROUND_TRIP", timedelta())
    found = findings(**given, node_sockets=1_000_000_000)
    assert [state for state, _ in found["redis speed"]] == ["warning"]
    [(state, text)] = found["open files"]
    assert (state, "lower IMSTREAM_NODE_SOCKETS" in text) == ("warning", True)
    assert [state for state, _ in found["clock"]] == ["warning"]


@pytest.mark.long  # tests/redis/test_health.py has the warning in the first tier
def test_a_master_with_one_replica_is_warned_about(demo: DemoBackend, tmp_path: Path) -> None:
    with sentinel_set(tmp_path) as sentinels, sentinels.client() as client:
        client.config_set("min-replicas-to-write", 1)
        found = findings(redis_url=sentinels.url, ai_url=demo.url, port=free_port())
        [(state, text)] = found["redis settings"]
        assert (state, "NOREPLICAS" in text) == ("warning", True)
        assert [state for state, _ in found["redis commands"]] == ["ok"]
