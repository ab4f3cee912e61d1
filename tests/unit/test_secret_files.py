"""Secrets from files: `IMSTREAM_…_FILE` names a file that holds the value of `IMSTREAM_…`."""

import os
import re
from pathlib import Path

import pytest

from imstream.cli.up import make_plan
from imstream.errors import SettingsError
from imstream.settings import Settings
from imstream.settings_group import is_secret
from imstream.urls import SecretUrl
from ops.settings_table import DOCUMENT, GROUPS
from tests.journeys.test_secrets import SECRETS

VALUES = {**SECRETS, "ai_headers": '{"X-Key": "a"}', "ai_body": '{"user": "a"}', "ai_proxy": "http://me:pw@10.0.0.1:1"}
"""A value for each setting that may hold a secret."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no variables."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IMSTREAM_")]:
        monkeypatch.delenv(name)
    return tmp_path


def refusal() -> str:
    """The error text of the settings as they are."""
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    return str(refused.value)


def test_every_setting_that_may_hold_a_secret_has_a_file() -> None:
    assert set(Settings.file_variables().values()) == {Settings.variable(name) for name in VALUES}
    named = {name for name in Settings.model_fields if re.search(r"_(secret|key|url|token|password)$", name)}
    assert named - {"auth_public_key"} <= VALUES.keys()
    assert not Settings.file_variables().keys() & {Settings.variable(name) for name in Settings.model_fields}


@pytest.mark.parametrize("setting", VALUES)
def test_a_value_is_read_from_its_file(setting: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = Settings.variable(setting)
    (folder / "secret").write_text(f"\ufeff {VALUES[setting]}\r\n")
    monkeypatch.setenv(f"{variable}_FILE", str(folder / "secret"))
    wanted = Settings.load(**{setting: VALUES[setting]})
    assert Settings.load() == wanted
    assert setting in Settings.load().model_fields_set
    monkeypatch.delenv(f"{variable}_FILE")
    assert Settings.load() != wanted
    (folder / ".env").write_text(f"{variable}_FILE=secret\n")
    assert Settings.load() == wanted


@pytest.mark.parametrize("setting", VALUES)
def test_a_file_that_cannot_be_used_is_refused_and_nothing_is_shown(
    setting: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = Settings.variable(setting)
    (folder / "empty").write_text("\n")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    problems = {
        "hush7f3a": "its file cannot be read: No such file or directory",  # the secret itself, by mistake
        str(folder): "its file cannot be read: Is a directory",
        "binary": "its file cannot be read: not UTF-8",
        "empty": "its file is empty",
    }
    for file, problem in problems.items():
        monkeypatch.setenv(f"{variable}_FILE", file)
        assert refusal() == f"{variable}_FILE: {problem}"
    (folder / "wrong").write_text("gopher://me:hush7f3a@host/")
    monkeypatch.setenv(f"{variable}_FILE", "wrong")
    if setting not in {"ai_key", "auth_secret", "page_token", "moderation_key"}:
        assert variable in refusal()
        assert "hush7f3a" not in refusal()


def test_a_value_and_its_file_at_the_same_place_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "key").write_text("of the file")
    monkeypatch.setenv("IMSTREAM_AI_KEY_FILE", "key")
    monkeypatch.setenv("IMSTREAM_AI_KEY", "of the variable")
    assert refusal() == "IMSTREAM_AI_KEY and IMSTREAM_AI_KEY_FILE are both set: remove one of them"
    monkeypatch.setenv("IMSTREAM_AI_KEY", "")
    assert (key := Settings.load().ai_key) is not None
    assert key.get_secret_value() == "of the file"
    monkeypatch.setenv("IMSTREAM_AI_KEY_FILE", "")
    assert Settings.load().ai_key is None


def test_the_environment_overrides_a_file_that_is_named_in_dotenv(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "url").write_text("redis://of-the-file:1/0")
    (folder / ".env").write_text("IMSTREAM_REDIS_URL_FILE=url\n")
    assert str(Settings.load().redis_url) == "redis://of-the-file:1/0"
    monkeypatch.setenv("IMSTREAM_REDIS_URL", "redis://of-the-variable:1/0")
    assert str(Settings.load().redis_url) == "redis://of-the-variable:1/0"
    assert str(Settings.load(redis_url="redis://of-the-option:1/0").redis_url) == "redis://of-the-option:1/0"


def test_the_nodes_of_up_read_the_files_too_except_where_it_sets_the_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ai_key", "page_token", "redis_url"):
        (folder / name).write_text(VALUES[name])
        monkeypatch.setenv(f"IMSTREAM_{name.upper()}_FILE", name)
    [nodes, *_] = make_plan({"port": "18080", "ai_url": "http://127.0.0.1:1/v1"}).stages()[0]
    environment = nodes[0].environment
    assert environment["IMSTREAM_AI_KEY_FILE"] == "ai_key"
    assert environment["IMSTREAM_REDIS_URL"] == VALUES["redis_url"]
    assert not {"IMSTREAM_REDIS_URL_FILE", "IMSTREAM_PAGE_TOKEN_FILE"} & environment.keys()


def test_the_table_of_settings_marks_each_setting_that_may_hold_a_secret_and_no_other() -> None:
    fields = {group.variable(name): field for group in GROUPS.values() for name, field in group.model_fields.items()}
    may_hold = {
        name for name, field in fields.items() if is_secret(field) or SecretUrl.__name__ in str(field.annotation)
    }
    named = {name for name in fields if re.search(r"_(SECRET|KEY|TOKEN|PASSWORD)$", name)} - {
        "IMSTREAM_AUTH_PUBLIC_KEY"
    }
    assert named <= may_hold
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert {name for name, default in rows if "**F**" in default} == may_hold
    assert {variable for group in GROUPS.values() for variable in group.file_variables().values()} == may_hold
