"""Key sets: the used keys, also after a change or while the issuer is away."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from imstream.guards.auth.jwks import (
    MAX_KEYS,
    MAX_SIZE,
    InvalidKeySet,
    JwksKeySource,
    KeysUnavailable,
    parse_key_set,
)
from imstream.guards.auth.tokens import Algorithm, InvalidToken
from imstream.urls import SecretUrl
from tests.support.tokens import PUBLIC, Issuer, as_jwk, issuer, key_of, token
from tests.support.waiting import wait_until

OLD, NEW = key_of("ES256", 1), key_of("ES256", 2)
OLD_JWK, NEW_JWK = as_jwk(OLD, "ES256", kid="old"), as_jwk(NEW, "ES256", kid="new")
OLD_TOKEN, NEW_TOKEN = token(OLD, "ES256", headers={"kid": "old"}), token(NEW, "ES256", headers={"kid": "new"})


@asynccontextmanager
async def following(one: Issuer, *, known: bool = True, **timing: float) -> AsyncIterator[JwksKeySource]:
    """The key source of an issuer after its first fetch. Not refreshed during a test without `refresh_interval`."""
    usual = {"refresh_interval": 60, "min_interval": 0.05, "max_age": 3600}
    spans = {name: timedelta(seconds=seconds) for name, seconds in {**usual, **timing}.items()}
    keys = JwksKeySource(SecretUrl(one.url), "ES256", **spans)
    async with keys.running():
        if known:
            await wait_until(lambda: is_known(keys, OLD_TOKEN), "the keys are fetched")
        yield keys


async def is_known(keys: JwksKeySource, shown: str) -> bool:
    try:
        return bool(await keys.keys_for(shown))
    except (KeysUnavailable, InvalidToken):
        return False


def usable(document: object, algorithm: Algorithm) -> list[tuple[str | None, Any]]:
    """The usable keys of a document."""
    return parse_key_set(json.dumps(document).encode(), algorithm).keys


def named(found: Any) -> list[str | None]:  # noqa: ANN401 - each algorithm has its own type of key
    return [name for name, _ in found]


# Parsing


@pytest.mark.parametrize("algorithm", PUBLIC)
def test_keys_of_other_algorithms_and_for_other_purposes_are_left_out(algorithm: Algorithm) -> None:
    everything = [
        *(as_jwk(key_of(kind), kind, kid=kind) for kind in PUBLIC),
        as_jwk(key_of(algorithm), algorithm, kid="whole", use="sig", alg=algorithm, key_ops=["verify"]),
        as_jwk(key_of(algorithm), algorithm, kid="encrypts", use="enc"),
        as_jwk(key_of(algorithm), algorithm, kid="signs", key_ops=["sign"]),
        as_jwk(key_of(algorithm), algorithm, kid="other", alg="ES512"),
        as_jwk(key_of("RS256-weak"), "RS256", kid="weak"),
        as_jwk(key_of("ES384"), "ES384", kid="another curve"),
        {"kty": "oct", "k": "c2VjcmV0IG9mIG1vcmUgdGhhbiB0aGlydHktdHdvIGJ5dGVz", "kid": "secret"},
        {"kty": "EC", "kid": "broken", "crv": "P-256", "x": 5},
        {"kid": "nothing"},
        "no key",
    ]
    assert named(usable({"keys": everything}, algorithm)) == [algorithm, "whole"]


def test_a_private_key_that_was_published_is_not_taken() -> None:
    private = {**as_jwk(OLD, "ES256"), "d": "AQ"}
    assert usable({"keys": [private]}, "ES256") == []


def test_no_more_keys_are_kept_than_can_be_tried() -> None:
    assert len(usable({"keys": [OLD_JWK] * (MAX_KEYS + 1)}, "ES256")) == MAX_KEYS


@given(st.recursive(st.none() | st.text() | st.integers(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)))
def test_any_document_is_a_key_set_or_refused(document: object) -> None:
    try:
        assert usable(document, "RS256") == []
    except InvalidKeySet:
        return


@given(st.dictionaries(st.sampled_from(["crv", "x", "y", "n", "e", "use", "alg", "key_ops"]), st.text() | st.none()))
def test_a_key_that_makes_no_sense_is_left_out(jwk: dict[str, Any]) -> None:
    for algorithm in PUBLIC:
        fitting = {"RS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}[algorithm]
        assert usable({"keys": [{**jwk, "kty": fitting}]}, algorithm) == []


# Refreshing


async def test_a_key_is_found_by_its_name() -> None:
    async with issuer(OLD_JWK, NEW_JWK) as one, following(one) as keys:
        [found] = await keys.keys_for(NEW_TOKEN)
        assert found.public_numbers() == NEW.public_key().public_numbers()
        assert len(await keys.keys_for(token(NEW, "ES256"))) == 2, "a token that names no key is tried with all"


async def test_keys_without_a_name_are_for_tokens_whose_key_is_not_there() -> None:
    nameless = as_jwk(NEW, "ES256")
    async with issuer(OLD_JWK, nameless) as one, following(one) as keys:
        [found] = await keys.keys_for(NEW_TOKEN)
        assert found.public_numbers() == NEW.public_key().public_numbers()


async def test_a_new_key_is_looked_for_as_soon_as_a_token_names_it() -> None:
    async with issuer(OLD_JWK) as one, following(one) as keys:
        one.keys = [OLD_JWK, NEW_JWK]
        await wait_until(lambda: is_known(keys, NEW_TOKEN), "the new key is known")
        assert await is_known(keys, OLD_TOKEN)


async def test_strangers_cannot_make_it_ask_more_than_seldom() -> None:
    async with issuer(OLD_JWK) as one, following(one, min_interval=30) as keys:
        for number in range(50):
            with pytest.raises(KeysUnavailable) as away:  # not InvalidToken: it may be a new key
                await keys.keys_for(token(NEW, "ES256", headers={"kid": f"made up {number}"}))
            assert timedelta(0) < away.value.retry_after <= timedelta(seconds=30)
        assert one.fetched == 1
        assert await is_known(keys, OLD_TOKEN)


async def test_many_who_ask_at_once_for_an_unknown_key_share_one_look() -> None:
    async with issuer(OLD_JWK) as one, following(one) as keys:
        one.keys = [NEW_JWK]
        await asyncio.sleep(0.06)  # longer than `min_interval`
        found = await asyncio.gather(*(keys.keys_for(NEW_TOKEN) for _ in range(20)))
        assert [len(each) for each in found] == [1] * 20
        assert one.fetched == 2


async def test_a_key_that_is_not_there_after_a_look_is_none() -> None:
    async with issuer(OLD_JWK) as one, following(one, min_interval=0) as keys:
        with pytest.raises(InvalidToken, match="unknown_key"):
            await keys.keys_for(NEW_TOKEN)
        assert one.fetched == 2


async def test_keys_that_were_withdrawn_are_dropped_at_the_next_look() -> None:
    async with issuer(OLD_JWK, NEW_JWK) as one, following(one, refresh_interval=0.02) as keys:
        one.keys = [NEW_JWK]

        async def is_dropped() -> bool:
            return not await is_known(keys, OLD_TOKEN)

        await wait_until(is_dropped, "the old key is dropped")
        assert await is_known(keys, NEW_TOKEN)


async def test_while_the_issuer_is_away_the_old_keys_are_kept() -> None:
    async with issuer(OLD_JWK) as one, following(one, refresh_interval=0.02) as keys:
        await one.go()
        await asyncio.sleep(0.1)  # fetches have failed
        assert await is_known(keys, OLD_TOKEN)
        with pytest.raises(KeysUnavailable):
            await keys.keys_for(NEW_TOKEN)
        one.keys = [NEW_JWK]
        await one.come()
        await wait_until(lambda: is_known(keys, NEW_TOKEN), "the new key is known")


async def test_before_the_first_answer_there_are_no_keys_and_then_they_come_by_themselves() -> None:
    async with issuer(OLD_JWK, away=True) as one, following(one, known=False) as keys:
        with pytest.raises(KeysUnavailable):
            await keys.keys_for(OLD_TOKEN)
        await one.come()
        await wait_until(lambda: is_known(keys, OLD_TOKEN), "the keys are fetched")


@pytest.mark.parametrize(
    ("published", "status"),
    [
        ("<html>", 200),
        ("", 200),
        ("[" * 100_000, 200),
        ('{"keys": {}}', 200),
        ('{"keys": null}', 200),
        ('[{"keys": []}]', 200),
        (" " * (MAX_SIZE + 1) + '{"keys": []}', 200),
        ('{"keys": []}', 302),
        ('{"keys": []}', 500),
    ],
)
async def test_an_answer_that_is_no_key_set_changes_nothing(published: str, status: int) -> None:
    async with issuer(OLD_JWK) as one, following(one, refresh_interval=0.02) as keys:
        one.keys, one.status = published, status
        before = one.fetched
        await wait_until(lambda: one.fetched > before + 1, "it is fetched again")
        assert await is_known(keys, OLD_TOKEN)


WRONG: dict[str, tuple[Any, ...]] = {
    "key_ops": (1, True, {"verify": 1}, "no", ["sign"]),
    "use": (1, [], {}, None),
    "alg": (1, [], {}, None),
    "kty": (1, [], {}, None, "", "RSA", "oct"),
    "x": (1, [], {}, None, "", "%", "é", "A" * 100_000),
    "d": ("AQ",),
}
POISON: list[Any] = [
    *(None, True, 1, "x", [], {}, [[]]),
    *({**NEW_JWK, field: wrong} for field, values in WRONG.items() for wrong in values),
    {"kty": "RSA", "n": "A" * 10_000, "e": "AQ"},
]
"""Broken entries of a key set."""

NO_KEY_SETS = ('{"keys": ' + "[" * 10_000, '{"keys": [' + "9" * 100_000 + "]}", "\ufeff{}", '{"keys": NaN}')


async def test_whatever_stands_in_a_key_set_the_good_key_in_it_holds_and_the_next_set_is_fetched() -> None:
    async with issuer(OLD_JWK) as one, following(one, refresh_interval=0.005) as keys:
        sets: list[list[Any] | str] = [*([poison, OLD_JWK, poison] for poison in POISON), *NO_KEY_SETS]
        for published in sets:
            one.keys = published
            until = one.fetched + 2
            await wait_until(partial(lambda until: one.fetched >= until, until), f"it is fetched: {published}")
            assert await is_known(keys, OLD_TOKEN), published
        one.keys = [NEW_JWK]
        await wait_until(lambda: is_known(keys, NEW_TOKEN), "the new key is known")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda one: st.lists(one, max_size=3))


@given(st.sampled_from([as_jwk(key_of(kind), kind) for kind in PUBLIC]), st.data())
def test_a_key_with_any_field_changed_takes_no_other_with_it(good: dict[str, Any], data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([*good, "use", "alg", "key_ops", "kid", "d", "k", "x5c"]))
    wrong = {**good, field: data.draw(JSON | st.dictionaries(st.text(), JSON, max_size=2))}
    for kind in PUBLIC:
        fine = as_jwk(key_of(kind), kind, kid="fine")
        assert "fine" in named(usable({"keys": [wrong, fine]}, kind))


async def test_thousands_of_broken_keys_make_one_line_in_the_log_however_often_they_are_read() -> None:
    broken = [{"kty": "EC", "kid": str(number), "crv": "P-256", "x": 5} for number in range(4000)]
    with capture_logs() as logs:
        async with issuer(*broken, OLD_JWK) as one, following(one, refresh_interval=0.01):
            await wait_until(lambda: one.fetched > 4, "it is fetched several times", limit=30)
    assert [(line["event"], line.get("broken")) for line in logs] == [
        ("token keys fetched", None),
        ("unusable token keys skipped", 4000),
    ]


# Revocation


async def test_an_empty_key_set_is_an_answer_and_the_keys_that_were_withdrawn_are_dropped() -> None:
    async with issuer(OLD_JWK) as one, following(one, refresh_interval=0.02, min_interval=0) as keys:
        one.keys = []

        async def is_dropped() -> bool:
            return not await is_known(keys, OLD_TOKEN)

        await wait_until(is_dropped, "the old key is dropped")
        with pytest.raises(InvalidToken, match="unknown_key"):
            await keys.keys_for(OLD_TOKEN)
        with pytest.raises(InvalidToken, match="unknown_key"):
            await keys.keys_for(token(OLD, "ES256"))
        one.keys = [NEW_JWK]
        await wait_until(lambda: is_known(keys, NEW_TOKEN), "the new key is known")


async def test_so_is_a_key_set_with_keys_of_another_kind_only() -> None:
    async with issuer(OLD_JWK) as one, following(one, refresh_interval=0.02, min_interval=0) as keys:
        one.keys = [as_jwk(key_of("RS256"), "RS256", kid="old"), {"kty": "EC", "kid": "old", "crv": "P-256", "x": 5}]

        async def is_refused() -> bool:
            try:
                return not await keys.keys_for(OLD_TOKEN)
            except InvalidToken:
                return True

        await wait_until(is_refused, "the old key is dropped")


async def test_keys_whose_issuer_has_not_confirmed_them_for_too_long_are_not_used() -> None:
    with capture_logs() as logs:
        async with issuer(OLD_JWK) as one, following(one, min_interval=0.02, max_age=2.0) as keys:
            before = one.fetched
            await wait_until(lambda: one.fetched > before + 1, "it is fetched more often than keys expire")
            one.keys = "<html>"

            async def is_away() -> bool:
                try:
                    await keys.keys_for(OLD_TOKEN)
                except KeysUnavailable:
                    return True
                return False

            await wait_until(is_away, "the keys expire")
            one.keys = [OLD_JWK]
            await wait_until(lambda: is_known(keys, OLD_TOKEN), "the keys are fetched again")
    events = [line["event"] for line in logs]
    assert events == [
        "token keys fetched",
        "token keys not fetched",
        "token keys expired, no login is possible",
        "token keys fetched",
    ]


async def test_an_answer_that_was_packed_without_being_asked_for_is_not_unpacked() -> None:
    async with issuer(OLD_JWK) as one, following(one, refresh_interval=0.02) as keys:
        one.packed, one.keys = True, [NEW_JWK]
        before = one.fetched
        with capture_logs() as logs:
            await wait_until(lambda: one.fetched > before + 1, "it is fetched again")
        assert "the response is compressed, which was not requested" in [line.get("error") for line in logs]
        assert await is_known(keys, OLD_TOKEN)


@pytest.mark.parametrize("shown", ["", "a.b.c", "令牌.x.y"])
async def test_a_token_that_cannot_be_read_asks_for_no_key(shown: str) -> None:
    async with issuer(OLD_JWK) as one, following(one) as keys:
        with pytest.raises(InvalidToken, match="malformed"):
            await keys.keys_for(shown)
        assert one.fetched == 1
