"""The authentication guard: its settings, and its verdicts at a login."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from imstream.codes import CloseCode, Code
from imstream.errors import SettingsError
from imstream.guards.authentication import TokenAuthentication
from imstream.guards.chain import GuardChain
from imstream.guards.guard import Allow, GuardDeps, LoginAttempt, Reject
from imstream.texts import Text
from imstream.user_ids import UserId
from tests.support.guard_deps import guard_deps
from tests.support.tokens import (
    PUBLIC,
    SECRET,
    USER,
    as_jwk,
    issuer,
    key_of,
    private_pem,
    public_pem,
    token,
    written,
)
from tests.support.waiting import wait_until


def create(**settings: Any) -> TokenAuthentication:  # noqa: ANN401 - any setting
    guard = TokenAuthentication.create(deps(**settings))
    assert guard is not None
    return guard


def deps(**settings: Any) -> GuardDeps:  # noqa: ANN401 - any setting
    return guard_deps(**{"auth": "jwt", **settings})


def refusal(**settings: Any) -> str:  # noqa: ANN401 - any setting
    with pytest.raises(SettingsError) as refused:
        create(**settings)
    return str(refused.value)


# Settings


def test_without_tokens_there_is_no_such_guard() -> None:
    assert TokenAuthentication.create(deps(auth="none")) is None


async def test_a_node_asks_for_tokens_when_it_is_told_to() -> None:
    guards = GuardChain.create(deps(auth_secret=SECRET))
    async with guards.running():
        assert [type(guard) for guard in guards.guards if isinstance(guard, TokenAuthentication)] == [
            TokenAuthentication
        ]
        assert isinstance(await guards.check_login(LoginAttempt(USER)), Reject)


def test_a_key_is_needed() -> None:
    told = refusal()
    assert told.startswith("IMSTREAM_AUTH=jwt is not allowed without a key: ")
    assert told.endswith("IMSTREAM_AUTH_ALGORITHM=HS256 takes IMSTREAM_AUTH_SECRET")
    assert refusal(auth_algorithm="RS256").endswith("takes IMSTREAM_AUTH_PUBLIC_KEY or IMSTREAM_AUTH_JWKS_URL")


@pytest.mark.parametrize("secret", ["short", "é" * 15 + "x"])
def test_a_short_secret_is_refused_and_not_shown(secret: str) -> None:
    told = refusal(auth_secret=secret)
    assert told == (
        f"IMSTREAM_AUTH_SECRET=(hidden) is not allowed: at least 32 bytes, and it has {len(secret.encode())}"
    )


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", "\n {}\t\n"])
async def test_a_line_end_after_a_secret_is_no_part_of_it(around: str) -> None:
    guard = create(auth_secret=around.format(SECRET))
    assert isinstance(await check(guard, token()), Allow)
    assert "it has 5" in refusal(auth_secret=around.format("short") + "\n" * 40)


@pytest.mark.parametrize("empty", ["", " ", "\n"])
async def test_an_empty_issuer_or_audience_counts_as_unset(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTH_ISSUER", "AUTH_AUDIENCE", "AUTH_PUBLIC_KEY", "AUTH_JWKS_URL"):
        monkeypatch.setenv(f"IMSTREAM_{name}", empty)
    guard = create(auth_secret=SECRET)
    assert isinstance(await check(guard, token()), Allow)
    assert isinstance(await check(guard, token(iss="https://id.example.com")), Allow)
    assert isinstance(await check(guard, token(aud="others")), Reject)


def test_the_key_set_is_fetched_over_https_or_on_this_machine_unless_http_is_allowed() -> None:
    for url in ("https://id.example.com/keys", "http://127.0.0.1:9/keys", "http://[::1]/keys", "http://localhost:8080"):
        assert create(auth_algorithm="ES256", auth_jwks_url=url)
    for url in (
        "http://id.example.com/keys",
        "http://localhost.example.com/",
        "http://127.0.0.1@example.com/",
        "http://192.168.1.1/",
    ):
        told = refusal(auth_algorithm="ES256", auth_jwks_url=url)
        assert told.startswith("IMSTREAM_AUTH_JWKS_URL=http://")
        assert "set an https URL, or IMSTREAM_AUTH_JWKS_ALLOW_HTTP=true" in told
        assert create(auth_algorithm="ES256", auth_jwks_url=url, auth_jwks_allow_http=True)
    for url in ("http://", "https://", "https:///keys", "http://[::1", "https://me:hush@"):
        told = refusal(auth_algorithm="ES256", auth_jwks_url=url, auth_jwks_allow_http=True)
        assert told.endswith("is not allowed: must be a valid URL with a host")
        assert "hush" not in told


def test_a_secret_that_is_a_public_key_is_refused() -> None:
    pem = public_pem(key_of("RS256")).decode()
    told = refusal(auth_secret=pem)
    assert told == "IMSTREAM_AUTH_SECRET=(hidden) is not allowed: it is an asymmetric key, not a secret"


def test_keys_that_contradict_each_other_or_the_algorithm_are_refused(tmp_path: Path) -> None:
    pem = written(tmp_path, public_pem(key_of("RS256")))
    url = "https://id.example.com/keys"
    told = refusal(auth_algorithm="RS256", auth_public_key=pem, auth_jwks_url=url)
    assert told.startswith("IMSTREAM_AUTH_PUBLIC_KEY and IMSTREAM_AUTH_JWKS_URL are not allowed together")
    told = refusal(auth_secret=SECRET, auth_jwks_url=url)
    assert told.startswith("IMSTREAM_AUTH_JWKS_URL is not allowed: IMSTREAM_AUTH_ALGORITHM=HS256 takes")
    told = refusal(auth_algorithm="ES256", auth_secret=SECRET, auth_jwks_url=url)
    assert told.startswith("IMSTREAM_AUTH_SECRET is not allowed: IMSTREAM_AUTH_ALGORITHM=ES256 takes")
    assert SECRET not in told


@pytest.mark.parametrize("algorithm", PUBLIC)
@pytest.mark.parametrize("kind", ["RS256", "RS256-weak", "ES256", "ES384", "EdDSA"])
def test_a_key_of_another_kind_or_too_weak_is_refused(algorithm: str, kind: str, tmp_path: Path) -> None:
    if kind == algorithm:
        return
    path = written(tmp_path, public_pem(key_of(kind)))
    told = refusal(auth_algorithm=algorithm, auth_public_key=path)
    assert told.startswith(f"IMSTREAM_AUTH_PUBLIC_KEY={path} is not allowed: {algorithm} needs an ")


def test_a_file_without_a_public_key_is_refused(tmp_path: Path) -> None:
    private = written(tmp_path, private_pem(key_of("ES256")), "private.pem")
    assert "it contains a private key; ES256 needs" in refusal(auth_algorithm="ES256", auth_public_key=private)
    empty = written(tmp_path, b"", "empty.pem")
    assert "it contains no public key in PEM format; ES256 needs" in refusal(
        auth_algorithm="ES256", auth_public_key=empty
    )
    nothing = tmp_path / "nothing.pem"
    told = refusal(auth_algorithm="ES256", auth_public_key=nothing)
    assert told == f"IMSTREAM_AUTH_PUBLIC_KEY={nothing} is not allowed: cannot be read: No such file or directory"


# Logins


async def check(guard: TokenAuthentication, shown: str | None, user_id: UserId = USER) -> Allow | Reject:
    return await guard.check_login(LoginAttempt(user_id, shown))


@pytest.mark.parametrize("kind", [*PUBLIC, "EdDSA-448"])
async def test_a_key_in_a_file_is_believed(kind: str, tmp_path: Path) -> None:
    algorithm = kind.removesuffix("-448")
    path = written(tmp_path, public_pem(key_of(kind)))
    guard = create(auth_algorithm=algorithm, auth_public_key=path)
    async with guard.running():
        assert isinstance(await check(guard, token(key_of(kind), algorithm)), Allow)
        assert isinstance(await check(guard, token(key_of(kind, 1), algorithm)), Reject)


async def test_a_pass_ends_when_the_token_is_refused_at_the_door() -> None:
    ends = int(time.time()) + 60
    passed = await check(create(auth_secret=SECRET, auth_leeway="2s"), token(exp=ends))
    assert isinstance(passed, Allow)
    assert passed.expires_at == ends + 2


@pytest.mark.parametrize(
    ("shown", "reason", "sentence"),
    [
        (None, "token_missing", "Please log in with a token"),
        ("", "token_missing", "Please log in with a token"),
        (token(exp=1), "token_expired", Text.LOGIN_EXPIRED.en),
        (token(nbf=2**33), "token_not_yet_valid", "This token is not valid yet"),
        ("a.b.c", "token_malformed", "This token is not valid"),
        ("令牌", "token_malformed", "This token is not valid"),
        (token("another secret of more than 32 bytes"), "token_signature", "This token is not valid"),
        (token(exp=1) + "x", "token_signature", "This token is not valid"),
        (token(sub="10002"), "token_other_user", "This token is not valid"),
        (token(aud="somebody else"), "token_audience", "This token is not valid"),
    ],
)
async def test_a_refusal_tells_the_log_more_than_the_bearer(shown: str | None, reason: str, sentence: str) -> None:
    refused = await check(create(auth_secret=SECRET), shown)
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.code, refused.close) == (reason, Code.UNAUTHORIZED, CloseCode.NOT_AUTHENTICATED)
    assert refused.sentence.en == sentence
    assert refused.sentence.zh != sentence


async def test_while_there_are_no_keys_nobody_is_told_that_a_token_is_wrong() -> None:
    async with issuer(away=True) as away:
        guard = create(auth_algorithm="ES256", auth_jwks_url=away.url)
        async with guard.running():
            refused = await check(guard, token(key_of("ES256"), "ES256"))
    assert isinstance(refused, Reject)
    assert (refused.code, refused.close) == (Code.UNAVAILABLE, None)
    assert refused.retry_after is not None
    assert timedelta(0) < refused.retry_after <= timedelta(seconds=5)


async def test_published_keys_are_believed() -> None:
    key = key_of("ES256")
    async with issuer(as_jwk(key, "ES256")) as at:
        guard = create(auth_algorithm="ES256", auth_jwks_url=at.url)

        async def is_accepted() -> bool:
            return isinstance(await check(guard, token(key, "ES256")), Allow)

        async with guard.running():
            await wait_until(is_accepted, "the keys were fetched")


def test_a_token_is_in_no_repr() -> None:
    shown = token()
    assert shown not in repr(LoginAttempt(USER, shown))
