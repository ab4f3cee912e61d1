"""Settings: their sources, and how invalid values are refused."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.errors import SettingsError
from imstream.settings import Settings
from imstream.settings_group import SettingsGroup, parse_duration

GROUPS = [Settings, DemoSettings, LocalAISettings, EmbeddedSettings]
UNITS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def refusal(group: type[SettingsGroup] = Settings, **given_settings: Any) -> str:  # noqa: ANN401 - any setting
    """The error text for these settings."""
    with pytest.raises(SettingsError) as refused:
        group.load(**given_settings)
    return str(refused.value)


# Sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("group", GROUPS)
def test_every_default_is_allowed(group: type[SettingsGroup]) -> None:
    assert group.load() == group.load(**group.load().model_dump())


def test_what_is_given_wins_over_the_environment_that_over_the_file_and_that_over_the_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.load().queue_limit == 100
    (folder / ".env").write_text("IMSTREAM_QUEUE_LIMIT=1\nSOMEBODY_ELSES=x\nIMSTREAM_NOBODYS=x\n")
    assert Settings.load().queue_limit == 1
    monkeypatch.setenv("IMSTREAM_QUEUE_LIMIT", "2")
    assert Settings.load().queue_limit == 2
    assert Settings.load(queue_limit=3).queue_limit == 3


def test_each_group_has_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMSTREAM_PORT", "1001")
    monkeypatch.setenv("IMSTREAM_DEMO_PORT", "1002")
    monkeypatch.setenv("IMSTREAM_EMBEDDED_PORT", "1003")
    assert [Settings.load().port, DemoSettings.load().port, EmbeddedSettings.load().port] == [1001, 1002, 1003]


def test_settings_do_not_change_once_they_are_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load().port = 1  # type: ignore[misc]


def test_line_ends_around_a_value_are_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AI_MODEL": "llama\n", "AI_URL": "\r\nhttp://ai/v1\r\n", "WORDS": "words.txt\n"}.items():
        monkeypatch.setenv(f"IMSTREAM_{name}", value)
    read = Settings.load(host="::1\n", system_prompt="one\ntwo\n")
    assert (read.ai_model, read.ai_url.get_secret_value()) == ("llama", "http://ai/v1")
    assert (read.words, read.host, read.system_prompt) == (Path("words.txt"), "::1", "one\ntwo")


def test_empty_values_of_optional_settings_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    optional = [name for name, field in Settings.model_fields.items() if field.default is None]
    assert {"auth_secret", "words", "tokenizer", "moderation_url"} < set(optional)
    for name in optional:
        monkeypatch.setenv(Settings.variable(name), " ")
    settings = Settings.load()
    assert [name for name in optional if getattr(settings, name) is not None] == []


# Invalid values


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("port", 70_000, "65535"),
        ("port", "http", "integer"),
        ("queue_limit", 0, "greater than or equal to 1"),
        ("redis_url", "http://127.0.0.1", "redis+sentinel://"),
        ("ai_url", "localhost:8081", "http://"),
        ("node", "a b", "pattern"),
        ("node", "{0}", "pattern"),
        ("key_prefix", "im:", "pattern"),
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("retry_wait", "soon", "a time span such as 250ms, 30s, 15m, 1h or 1d"),
        ("retry_wait", "0s", "greater than"),
        ("retry_wait", "-1s", "a time span such as"),
        ("retry_wait", -1, "greater than"),
        ("reply_ttl", "9" * 40, "a shorter time span"),
        ("reply_ttl", float("inf"), "a shorter time span"),
        ("reply_ttl", float("nan"), "NaN"),
        ("reply_ttl", None, "timedelta"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_itself_and_what_is_allowed(
    setting: str,
    value: Any,  # noqa: ANN401 - any setting
    allowed: str,
) -> None:
    told = refusal(**{setting: value})
    assert told.startswith(f"IMSTREAM_{setting.upper()}={value!r} is not allowed: ")
    assert allowed in told
    assert "Value error" not in told


def test_all_that_is_wrong_is_told_at_once() -> None:
    assert [line.partition("=")[0] for line in refusal(port=-1, node="").splitlines()] == [
        "IMSTREAM_NODE",
        "IMSTREAM_PORT",
    ]


@pytest.mark.parametrize("group", [DemoSettings, LocalAISettings, EmbeddedSettings])
def test_the_name_told_is_the_one_to_set(group: type[SettingsGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    name = group.variable("port")
    monkeypatch.setenv(name, "no")
    assert refusal(group).startswith(f"{name}='no' is not allowed: ")


def test_a_secret_is_never_shown() -> None:
    assert "s3cret" not in refusal(ai_key=["s3cret"])
    assert "s3cret" not in repr(Settings.load(ai_key="s3cret"))
    assert Settings.load(ai_key="s3cret").ai_key == SecretStr("s3cret")


# Time spans


@given(st.integers(0, 10**6), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_a_time_span_is_a_number_and_a_unit(number: int, unit: str, between: str) -> None:
    assert parse_duration(f" {number}{between}{unit} ") == timedelta(seconds=number * UNITS[unit])


@given(st.floats(0, 10**6))
def test_a_number_is_seconds(seconds: float) -> None:
    assert parse_duration(seconds) == timedelta(seconds=seconds)


@given(st.timedeltas())
def test_a_time_span_stays_what_it_is(span: timedelta) -> None:
    assert parse_duration(span) is span


@given(st.text() | st.from_regex(r"[0-9]{1,400}(\.[0-9]+)?(ms|s|m|h|d)?", fullmatch=True) | st.floats() | st.integers())
@example("9" * 400)
@example("1e3")
@example("1.s")
def test_any_value_is_a_time_span_or_refused(value: object) -> None:
    try:
        span = parse_duration(value)
    except ValueError:
        return
    assert isinstance(span, timedelta)
