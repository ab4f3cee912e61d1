"""Notes and errors about settings at start-up."""

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import imstream.node_process
from imstream.cli import settings_notes
from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.main import main
from imstream.cli.up import UpSettings
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.settings import Settings
from imstream.settings_group import SettingsGroup


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no variables."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IMSTREAM_")]:
        monkeypatch.delenv(name)
    return tmp_path


GROUPS: list[type[SettingsGroup]] = [Settings, UpSettings, EmbeddedSettings, DemoSettings, LocalAISettings]
COMMANDS = ("node", "up", "redis", "demo-ai", "local-ai", "streams", "token --user 10001", "user show 10001")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(command: str, folder: Path) -> None:
    file = folder / ".env"
    for make, why in (
        (lambda: file.write_bytes(b"IMSTREAM_PORT=8080\n# caf\xe9\n"), "it is not UTF-8"),
        (lambda: file.write_bytes("IMSTREAM_PORT=8080\n".encode("utf-16")), "it is not UTF-8"),
        (lambda: file.symlink_to("/proc/self/mem"), "Input/output error"),  # root can read all other files
    ):
        file.unlink(missing_ok=True)
        make()
        result = CliRunner().invoke(main, command.split())
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert ".env" in result.output
        assert result.output.endswith(f"cannot be read: {why}\n")


def test_a_mark_at_the_beginning_of_the_file_is_no_part_of_the_first_name(folder: Path) -> None:
    (folder / ".env").write_bytes(b"\xef\xbb\xbfIMSTREAM_PORT=1001\n")
    assert Settings.load().port == 1001
    assert settings_notes.check()[1] == []


def test_every_setting_is_known_in_any_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [group.variable(name) for group in GROUPS for name in group.model_fields]
    for name in (*names, "IMSTREAM_TOKEN", "imstream_port"):
        monkeypatch.setenv(name, "1")
    (folder / ".env").write_text("".join(f"{name}=1\n" for name in names))
    (folder / ".env").chmod(0o600)
    assert settings_notes.check()[1] == []


def test_a_name_that_is_no_setting_is_reported_with_the_nearest_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMSTREAM_QUEU_LIMIT", "hush")
    monkeypatch.setenv("imstream_embeded_port", "hush")
    (folder / ".env").write_text("IMSTREAM_DEMOPACE=hush\nSOMEBODY_ELSES=x\nIMSTREAM_ZZZZZZ=hush\nIMSTREAM_\x1b[2J=x\n")
    assert sorted(settings_notes.check()[1]) == [
        "IMSTREAM_DEMOPACE in .env is not a setting; did you mean IMSTREAM_DEMO_PACE?",
        "IMSTREAM_QUEU_LIMIT is not a setting; did you mean IMSTREAM_QUEUE_LIMIT?",
        "IMSTREAM_ZZZZZZ in .env is not a setting",
        "IMSTREAM_\\x1b[2J in .env is not a setting",
        "imstream_embeded_port is not a setting; did you mean IMSTREAM_EMBEDDED_PORT?",
    ]


def test_names_without_end_or_number_cost_little(folder: Path) -> None:
    (folder / ".env").write_text("".join(f"IMSTREAM_{number}{'X' * 200}=1\n" for number in range(2_000)))
    before = time.process_time()
    warnings = settings_notes.check()[1]
    assert time.process_time() - before < 5
    assert len(warnings) == 11
    assert warnings[-1] == "1990 more variables that begin with IMSTREAM_ are not settings"
    assert max(map(len, warnings)) < 200


@pytest.mark.parametrize(
    ("mode", "content", "expected"),
    [
        (0o600, "IMSTREAM_AI_KEY=x", None),
        (0o644, "IMSTREAM_PORT=1", None),
        (0o640, "IMSTREAM_AI_KEY=x", None),
        (0o644, "IMSTREAM_AI_KEY=", None),
        (0o644, "IMSTREAM_AI_KEY=x", "holds secrets and can be read by other users: chmod 600"),
        (0o644, "imstream_redis_url=redis://:x@host", "holds secrets and can be read by other users: chmod 600"),
        (0o644, "IMSTREAM_REDIS_URL=redis://host", None),
        (0o602, "IMSTREAM_PORT=1", "can be written by other users, who can change every setting"),
        (0o620, "IMSTREAM_PORT=1", "can be written by other users, who can change every setting"),
    ],
)
def test_a_file_that_others_can_change_or_read_secrets_in_is_a_warning(
    mode: int, content: str, expected: str | None, folder: Path
) -> None:
    file = folder / ".env"
    file.write_text(content)
    file.chmod(mode)
    warnings = settings_notes.check()[1]
    assert [warning.startswith(f"{file} {expected}") for warning in warnings] == [True] * (expected is not None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_a_warning(folder: Path) -> None:
    (folder / ".env").write_text("IMSTREAM_PORT=1\n")
    os.chown(folder / ".env", 65534, -1)
    assert settings_notes.check()[1] == [f"{folder / '.env'} belongs to another user, who can change every setting"]


def test_a_node_logs_the_file_and_the_warnings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imstream.node_process, "run", lambda _: None)
    assert "settings read" not in CliRunner().invoke(main, ["node"]).output
    (folder / ".env").write_text("IMSTREAM_NOD=1\n")
    lines = CliRunner().invoke(main, ["node", "--log-format", "json"]).output.splitlines()
    assert [line.partition('"level":')[2] for line in lines] == [
        f'"info","event":"settings read","file":"{folder}/.env"}}',
        '"warning","event":"IMSTREAM_NOD in .env is not a setting; did you mean IMSTREAM_NODE?"}',
    ]


def test_other_commands_warn_on_standard_error_and_servers_name_the_file(folder: Path) -> None:
    (folder / ".env").write_text("IMSTREAM_PORTT=1\n")
    warning = "Warning: IMSTREAM_PORTT in .env is not a setting; did you mean IMSTREAM_PORT?\n"
    result = CliRunner().invoke(main, ["token", "--user", "10001", "--ttl", "0"])
    assert (result.stdout, result.stderr.startswith(warning)) == ("", True)
    for server in ("redis", "demo-ai", "local-ai", "up"):
        result = CliRunner().invoke(main, [server, "--port", "x"])
        assert result.stderr.startswith(f"settings read from {folder}/.env\n{warning}"), result.stderr


def test_a_secrets_file_that_others_can_read_is_warned_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "key").write_text("sk-1")
    monkeypatch.setenv("IMSTREAM_AI_KEY_FILE", str(folder / "key"))
    (folder / ".env").write_text(
        "IMSTREAM_AUTH_SECRET_FILE=key\nIMSTREAM_PAGE_TOKEN_FILE=gone\nIMSTREAM_AI_KEY_FILE=\n"
    )
    (folder / "key").chmod(0o440)
    assert settings_notes.check()[1] == []
    (folder / "key").chmod(0o444)
    assert settings_notes.check()[1] == [
        f"IMSTREAM_AI_KEY_FILE: {folder}/key can be read by other users of this machine",
        "IMSTREAM_AUTH_SECRET_FILE: key can be read by other users of this machine",
    ]
