"""`imstream token`: its tokens are accepted by nodes with the same settings."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imstream.cli.main import main
from imstream.guards.auth.tokens import InvalidToken, TokenRules
from imstream.settings import Settings
from tests.support.tokens import SECRET, USER, key_of, private_pem, public_pem, written


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove all settings of the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IMSTREAM_")]:
        monkeypatch.delenv(name)


def run(*arguments: object, **settings: str) -> Result:
    env = {f"IMSTREAM_{name.upper()}": value for name, value in settings.items()}
    return CliRunner().invoke(main, ["token", *map(str, arguments)], env=env, prog_name="imstream")


def validity(result: Result, key: object, **settings: Any) -> float:  # noqa: ANN401 - any setting
    """How long the printed token is valid for `USER`, in seconds."""
    assert result.exit_code == 0, result.output
    assert result.output.count("\n") == 1
    shown = TokenRules(Settings.load(auth_leeway=0, **settings)).verify(result.output.strip(), [key])
    assert shown.user_id == USER
    return shown.expires_at - time.time()


def test_it_signs_with_the_secret_for_an_hour() -> None:
    holds = validity(run("--user", USER, auth_secret=SECRET), SECRET.encode())
    assert 3590 < holds <= 3600


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA", "EdDSA-448"])
def test_it_signs_with_the_key_in_a_file_by_its_kind(kind: str, tmp_path: Path) -> None:
    algorithm = kind.removesuffix("-448")
    path = written(tmp_path, private_pem(key_of(kind)))
    for set_by in ({}, {"auth_algorithm": algorithm}):
        result = run("--user", USER, "--ttl", "90s", "--key", path, **set_by)
        assert 80 < validity(result, key_of(kind).public_key(), auth_algorithm=algorithm) <= 90


def test_it_says_what_the_settings_of_the_node_ask_for() -> None:
    asked = {"auth_claim": "uid", "auth_issuer": "https://id.example.com", "auth_audience": "chat"}
    validity(run("--user", USER, auth_secret=SECRET, **asked), SECRET.encode(), **asked)
    options = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    validity(run("--user", USER, *options, auth_secret=SECRET), SECRET.encode(), **asked)
    with pytest.raises(InvalidToken, match="claims"):
        validity(run("--user", USER, auth_secret=SECRET), SECRET.encode(), **asked)


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ([], {}, "set IMSTREAM_AUTH_SECRET as the node has it, or give --key FILE"),
        ([], {"auth_secret": "short"}, "IMSTREAM_AUTH_SECRET=(hidden) is not allowed: at least 32 bytes"),
        ([], {"auth_algorithm": "RS256"}, "IMSTREAM_AUTH_ALGORITHM=RS256 needs --key FILE, with the private key"),
        (["--ttl", "soon"], {"auth_secret": SECRET}, "--ttl='soon' is not allowed: a time span such as 250ms"),
        (["--ttl", "0"], {"auth_secret": SECRET}, "--ttl='0' is not allowed: more than 0, at most 3650d"),
        (
            ["--ttl", "25h"],
            {"auth_secret": SECRET},
            "--ttl=90000s is not allowed: nodes accept at most IMSTREAM_AUTH_MAX",
        ),
        (["--key", "nothing.pem"], {}, "--key=nothing.pem is not allowed: cannot be read: No such file"),
        (
            ["--key", "public.pem"],
            {},
            "--key=public.pem is not allowed: no private key in PEM format without a password",
        ),
        (["--key", "weak.pem"], {}, "--key=weak.pem is not allowed: an RSA key of at least 2048 bits"),
        (
            ["--key", "ec.pem"],
            {"auth_algorithm": "RS256"},
            "--key=ec.pem is not allowed: it is for ES256, and IMSTREAM",
        ),
    ],
)
def test_what_it_cannot_sign_with_it_says(
    arguments: list[str], settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    written(tmp_path, public_pem(key_of("ES256")), "public.pem")
    written(tmp_path, private_pem(key_of("ES256")), "ec.pem")
    written(tmp_path, private_pem(key_of("RS256-weak")), "weak.pem")
    result = run("--user", USER, *arguments, **settings)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
    assert SECRET not in result.output


@pytest.mark.parametrize("user", ["10000", "x", str(2**53)])
def test_nobody_gets_a_token_whom_no_node_takes(user: str) -> None:
    assert run("--user", user, auth_secret=SECRET).exit_code == 2
