"""The command line: help, options, and errors about wrong ones."""

import errno
import os
import re
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click import Context
from click.testing import CliRunner, Result

import imstream.cli.chat_terminal
import imstream.node_process
from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.main import main
from imstream.cli.up import UpSettings
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.settings import Settings
from imstream.settings_group import SettingsGroup
from imstream.urls import redact_url
from tests.support.processes import PYTHON, free_port, http_status, start, wait_for


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, arguments, env=env, prog_name="imstream")


def words(text: str) -> str:
    """Text without the line breaks of help."""
    return " ".join(text.split())


@pytest.fixture
def node_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """The settings that `run` was called with; no node runs."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IMSTREAM_")]:
        monkeypatch.delenv(name)
    runs: list[Settings] = []
    monkeypatch.setattr(imstream.node_process, "run", runs.append)
    return runs


def test_the_version_is_that_of_the_distribution() -> None:
    assert run("--version").output == f"imstream, version {version('imstream-server')}\n"


def test_help_draws_the_flow_and_says_what_to_start_first() -> None:
    out = run("--help").output
    assert "client --ws--> node --> its Redis Stream --> worker --http--> AI backend\n" in out
    assert 'Start with "imstream up"' in words(out)


def test_help_lists_each_command_once_under_its_purpose() -> None:
    sections = [one.splitlines() for one in run("--help").output.partition("\nRun it:\n")[2].split("\n\n")]
    listed = [line.split()[0] for lines in sections for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(main.list_commands(Context(main)))
    assert listed[:2] == ["up", "node"]
    assert [lines[0] for lines in sections[1:]] == ["Talk to it:", "Watch it:", "Operate it:", "Write a client:"]


@pytest.mark.parametrize(
    ("command", "group"),
    [
        ("up", UpSettings),
        ("node", Settings),
        ("demo-ai", DemoSettings),
        ("local-ai", LocalAISettings),
        ("redis", EmbeddedSettings),
    ],
)
def test_every_setting_is_an_option_with_its_variable_and_its_text(command: str, group: type[SettingsGroup]) -> None:
    out = words(run(command, "--help").output)
    for name, field in group.model_fields.items():
        if "Secret" in str(field.annotation):
            continue
        assert f"--{name.replace('_', '-')}" in out
        assert f"{field.description} [{group.variable(name)}" in out


def test_help_shows_defaults_as_they_are_typed() -> None:
    out = words(run("node", "--help").output)
    for default in ("PORT; default 8080]", "FLUSH_INTERVAL; default 100ms]", "REPLY_TTL; default 15m]"):
        assert f"[IMSTREAM_{default}" in out
    assert "QUEUED_TTL; default 1d]" in out
    assert "TIMEOUT; default 2s]" in out
    assert "auto|json|console" in out


def test_a_secret_has_no_option() -> None:
    result = run("node", "--ai-key", "hush")
    assert result.exit_code == 2
    assert "No such option" in result.output
    assert "IMSTREAM_AI_KEY" in words(run("node", "--help").output)


def test_options_win_over_the_environment_and_that_over_the_file(node_runs: list[Settings], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("IMSTREAM_PORT=1001\nIMSTREAM_NODE=file\nIMSTREAM_USER_LIMIT=9\n")
    env = {"IMSTREAM_PORT": "1002", "IMSTREAM_NODE": "environment"}
    assert run("node", "--port", "1003", "--reply-ttl", "90s", env=env).exit_code == 0
    [settings] = node_runs
    assert (settings.port, settings.node, settings.user_limit) == (1003, "environment", 9)
    assert settings.reply_ttl.total_seconds() == 90


def test_a_switch_may_be_given_without_a_value(node_runs: list[Settings]) -> None:
    for words_given, value in ((("--allow-insecure",), True), (("--allow-insecure", "false"), False), ((), False)):
        assert run("node", *words_given, "--auth", "jwt").exit_code == 0
        assert node_runs.pop().allow_insecure is value


def test_redis_and_ai_have_short_names(node_runs: list[Settings]) -> None:
    assert run("node", "--redis", "redis://r:1/0", "--ai", "http://a/v1").exit_code == 0
    assert (str(node_runs[0].redis_url), str(node_runs[0].ai_url)) == ("redis://r:1/0", "http://a/v1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("node", "--port", "many"), "IMSTREAM_PORT='many' is not allowed: Input should be a valid integer"),
        (("node", "--reply-ttl", "soon"), "IMSTREAM_REPLY_TTL='soon' is not allowed: a time span such as 250ms"),
        (("node", "--log-level", "loud"), "IMSTREAM_LOG_LEVEL='loud' is not allowed: Input should be 'debug', 'info'"),
        (("demo-ai", "--fail-rate", "2"), "IMSTREAM_DEMO_FAIL_RATE='2' is not allowed: Input should be less than"),
        (("redis", "--port", "0"), "IMSTREAM_EMBEDDED_PORT='0' is not allowed: Input should be greater than"),
        (("up", "--demo-pace", "x"), "IMSTREAM_DEMO_PACE='x' is not allowed"),
        (("up", "--embedded-port", "x"), "IMSTREAM_EMBEDDED_PORT='x' is not allowed"),
        (("up", "--port", "0"), "IMSTREAM_PORT=0 is not allowed"),
        (("up", "--nodes", "0"), "IMSTREAM_UP_NODES='0' is not allowed: Input should be greater than"),
        (("up", "--nodes", "2", "--port", "65535"), "IMSTREAM_PORT=65535 is not allowed: 2 nodes need as many ports"),
        (("balancer", "10.0.0.1"), "'10.0.0.1' is not an address such as 10.0.0.1:8080"),
        (("streams", "--redis", "http://x"), "IMSTREAM_REDIS_URL='http://x' is not allowed"),
        (("node", "--quota-timezone", "Mars"), "IMSTREAM_QUOTA_TIMEZONE='Mars' is not allowed: a time zone such as"),
        (("chat", "--user", "many"), "'many' is not a user id: a number from 10001 to"),
        (("token", "--user", "10000"), "'10000' is not a user id: a number from 10001 to"),
        (("user", "show", "10000"), "'10000' is not a user id: a number from 10001 to"),
        (("user", "lock", "10001", "--for", "soon"), "--for='soon' is not allowed: a time span such as 250ms"),
        (("user", "lock", "10001", "--for", "0"), "--for='0' is not allowed: more than 0, at most 3650d"),
    ],
)
def test_a_wrong_value_is_refused_with_setting_value_and_what_is_allowed(
    arguments: tuple[str, ...], said: str, node_runs: list[Settings]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in words(result.output)
    assert not node_runs


def test_a_wrong_value_in_the_environment_is_refused_the_same_way(node_runs: list[Settings]) -> None:
    result = run("node", env={"IMSTREAM_QUEUE_LIMIT": "0"})
    assert result.exit_code == 2
    assert "IMSTREAM_QUEUE_LIMIT='0' is not allowed: Input should be greater than or equal to 1" in result.output
    assert not node_runs


def test_up_says_which_port_is_taken_and_by_which_setting_it_is_changed(node_runs: list[Settings]) -> None:
    del node_runs
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option, setting in (("--port", "IMSTREAM_PORT"), ("--demo-port", "IMSTREAM_DEMO_PORT")):
            free = {one: free_port() for one in ("--embedded-port", "--demo-port", "--port")}
            result = run("up", *(str(word) for pair in (free | {option: port}).items() for word in pair))
            assert result.exit_code == 2
            assert f"{setting}={port} cannot be used on 127.0.0.1 (Address already in use): is" in result.output
            assert f"choose another port with {setting}" in result.output


def test_a_node_says_in_one_line_that_it_cannot_listen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [PYTHON, "-m", "imstream", "node", "--port", str(port)]
        node = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert node.returncode == 2
    assert f"IMSTREAM_PORT={port}" in node.stderr
    assert "Traceback" not in node.stderr


def test_the_demo_backend_says_where_it_serves_and_ends_with_0_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    command = [PYTHON, "-m", "imstream", "demo-ai", "--port", str(port)]
    with start(command, tmp_path / "log") as demo:
        wait_for(lambda: http_status(f"http://127.0.0.1:{port}/v1/models") == 200, demo, "demo-ai")
        taken = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert taken.returncode == 2
        assert f"IMSTREAM_DEMO_PORT={port}: cannot listen: {os.strerror(errno.EADDRINUSE)}" in taken.stderr
        assert demo.terminate() == 0
    assert demo.output() == f"ready: demo AI backend at http://127.0.0.1:{port}/v1 (canned answers, no model)\n"


def test_a_command_about_a_user_says_in_one_line_that_there_is_no_redis() -> None:
    port = free_port()
    for command in ("show", "lock", "unlock", "ban", "unban", "quota"):
        result = run("user", command, "10001", "--redis", f"redis://me:hush@127.0.0.1:{port}/0")
        assert result.exit_code == 1
        assert re.fullmatch(rf"Error: no Redis at redis://127\.0\.0\.1:{port}/0: .*\n", result.output)


def test_help_of_the_demo_backend_lists_the_markers_line_by_line() -> None:
    assert "\n      [[demo fail=2]]                 503 for two calls, then the answer\n" in run("demo-ai", "-h").output


def test_chat_passes_on_who_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, ...]] = []

    def record(*arguments: object, question: str | None) -> int:
        runs.append((*arguments, question))
        return 3

    monkeypatch.setattr(imstream.cli.chat_terminal, "run", record)
    env = {"LC_ALL": "en_GB.UTF-8", "IMSTREAM_TOKEN": "hush"}
    assert run("chat", "--user", "10002", env=env).exit_code == 3
    assert run("chat", "--url", "ws://h/ws", "--lang", "zh", env=env).exit_code == 3
    other = {"LC_ALL": "zh_CN.UTF-8", "IMSTREAM_TOKEN": "", "TRACEPARENT": "00-trace-span-01"}
    assert run("chat", env=other).exit_code == 3
    here = {"LC_ALL": "C", "IMSTREAM_HOST": "0.0.0.0", "IMSTREAM_PORT": "1234"}
    assert run("chat", "what", "is it?", env=here).exit_code == 3
    assert run("chat", env=here | {"IMSTREAM_URL": "wss://h/ws"}).exit_code == 3
    assert runs == [
        ("ws://127.0.0.1:8080/ws", 10002, "hush", "en", None, None),
        ("ws://h/ws", 10001, "hush", "zh", None, None),
        ("ws://127.0.0.1:8080/ws", 10001, None, "zh", "00-trace-span-01", None),
        ("ws://127.0.0.1:1234/ws", 10001, None, "en", None, "what is it?"),
        ("wss://h/ws", 10001, None, "en", None, None),
    ]


@pytest.mark.parametrize(
    ("env", "lang"),
    [
        ({"LC_ALL": "zh_TW.UTF-8", "LC_MESSAGES": "en_GB.UTF-8", "LANG": "en_GB.UTF-8"}, "zh"),
        ({"LC_MESSAGES": "zh_CN.UTF-8@pinyin", "LANG": "en_GB.UTF-8"}, "zh"),
        ({"LANG": "zh_CN"}, "zh"),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "POSIX"}, "en"),
        ({"LANG": "de_AT.UTF-8"}, "en"),
        ({}, "en"),
    ],
)
def test_commands_use_the_language_of_the_locale(
    env: dict[str, str], lang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(imstream.cli.chat_terminal, "run", lambda *arguments, **_: {"zh": 3, "en": 4}[arguments[3]])
    assert run("chat", env=env).exit_code == {"zh": 3, "en": 4}[lang]


def test_a_child_whose_parent_has_gone_ends_at_once(tmp_path: Path) -> None:
    with start([PYTHON, "-m", "imstream", "--parent", "1", "demo-ai", "--port", "0"], tmp_path / "log") as child:
        assert child.wait() == 1
    assert "ready" not in child.output()


def test_a_child_is_killed_when_its_parent_is(tmp_path: Path) -> None:
    parent = (
        "import os, subprocess, sys\n"
        "child = [sys.executable, '-m', 'imstream', '--parent', str(os.getpid()), 'demo-ai', '--port', sys.argv[1]]\n"
        "subprocess.run(child)\n"
    )
    port = free_port()
    models = f"http://127.0.0.1:{port}/v1/models"
    with start([PYTHON, "-c", parent, str(port)], tmp_path / "log") as started:
        wait_for(lambda: http_status(models) == 200, started, "demo-ai")
        started.kill()
    with start([PYTHON, "-c", "import time; time.sleep(60)"], tmp_path / "clock") as clock:
        wait_for(lambda: http_status(models) is None, clock, "the end of the child")


def test_addresses_are_shown_without_their_password() -> None:
    assert redact_url("redis://me:hush@host:6379/0") == "redis://host:6379/0"
    assert redact_url("http://127.0.0.1:8081/v1") == "http://127.0.0.1:8081/v1"
