"""Which tokens are valid, for every algorithm."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imstream.guards.auth.tokens import MAX_TOKEN, Algorithm, Claims, InvalidToken, TokenRules, key_id
from imstream.settings import Settings
from tests.support.tokens import PUBLIC, SECRET, USER, key_of, public_pem, token

NOW = 1_800_000_000.0
ALL: tuple[Algorithm, ...] = ("HS256", *PUBLIC)


def rules(algorithm: Algorithm = "HS256", **settings: Any) -> TokenRules:  # noqa: ANN401 - any setting
    return TokenRules(Settings.load(auth_algorithm=algorithm, **settings), clock=lambda: NOW)


def signing(algorithm: Algorithm) -> Any:  # noqa: ANN401 - each algorithm has its own type of key
    return SECRET if algorithm == "HS256" else key_of(algorithm)


def checking(algorithm: Algorithm) -> Any:  # noqa: ANN401 - same
    return SECRET.encode() if algorithm == "HS256" else key_of(algorithm).public_key()


def read(shown: str, algorithm: Algorithm = "HS256", **settings: Any) -> Claims | str:  # noqa: ANN401 - same
    """The verified claims, or the reason of the rejection."""
    one = rules(algorithm, **settings)
    try:
        return one.verify(one.check_shape(shown), [checking(algorithm)])
    except InvalidToken as error:
        return error.reason


def signed(algorithm: Algorithm = "HS256", **claims: Any) -> str:  # noqa: ANN401 - right and wrong ones
    return token(signing(algorithm), algorithm, **{"exp": NOW + 60, **claims})


def encoded(value: object) -> str:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ALL)
def test_a_token_shows_its_user_until_it_ends_and_the_leeway_is_over(algorithm: Algorithm) -> None:
    assert read(signed(algorithm), algorithm) == Claims(USER, NOW + 60 + 5)


@pytest.mark.parametrize("algorithm", ALL)
@given(data=st.data())
def test_a_token_with_any_character_changed_is_not_believed(algorithm: Algorithm, data: st.DataObject) -> None:
    good = signed(algorithm)
    place = data.draw(st.integers(0, len(good) - 1))
    other = data.draw(st.characters(codec="ascii"))
    assume(other != good[place])
    assert isinstance(read(good[:place] + other + good[place + 1 :], algorithm), str)


@pytest.mark.parametrize("algorithm", ALL)
@given(cut=st.integers(0, 200))
def test_a_token_that_was_cut_is_not_believed(algorithm: Algorithm, cut: int) -> None:
    assert isinstance(read(signed(algorithm)[: -1 - cut], algorithm), str)


@pytest.mark.parametrize("algorithm", PUBLIC)
def test_a_key_of_somebody_else_is_of_no_use(algorithm: Algorithm) -> None:
    forged = token(key_of(algorithm, 1), algorithm, exp=NOW + 60)
    assert read(forged, algorithm) == "signature"


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("other", [*ALL, "none", "None", "HS512", "PS256", "", None, 1, ["HS256"], {"a": 1}])
def test_only_the_one_algorithm_is_taken_whatever_a_token_says_of_itself(
    algorithm: Algorithm,
    other: Any,  # noqa: ANN401 - what a header may hold
) -> None:
    if other == algorithm:
        return
    _, claims, signature = signed(algorithm).split(".")
    for sealed in (signature, ""):
        assert read(f"{encoded({'typ': 'JWT', 'alg': other})}.{claims}.{sealed}", algorithm) == "algorithm"


@pytest.mark.parametrize("algorithm", PUBLIC)
def test_a_token_sealed_with_the_public_key_as_its_secret_is_not_believed(algorithm: Algorithm) -> None:
    said = f"{encoded({'typ': 'JWT', 'alg': 'HS256'})}.{encoded({'sub': str(USER), 'exp': NOW + 60})}"
    forged = f"{said}.{encoded(hmac.digest(public_pem(key_of(algorithm)), said.encode(), hashlib.sha256))}"
    assert jwt.get_unverified_header(forged)["alg"] == "HS256"  # the header is valid
    assert read(forged, algorithm) == "algorithm"


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": NOW - 6}, "expired"),
        ({"exp": float("nan")}, "claims"),
        ({"exp": float("inf")}, "claims"),
        ({"exp": NOW + 60, "nbf": float("nan")}, "claims"),
        ({"exp": NOW - 5}, "expired"),
        ({"exp": None}, "claims"),
        ({"exp": "1900000000"}, "claims"),
        ({"exp": True}, "claims"),
        ({"exp": 10**400}, "claims"),
        ({"nbf": NOW + 6}, "not_yet_valid"),
        ({"nbf": "now"}, "claims"),
        ({"sub": None}, "claims"),
        ({"aud": "chat"}, "audience"),
        ({"aud": ["chat"]}, "audience"),
    ],
)
def test_what_is_wrong_with_the_claims_has_a_name_for_the_log(claims: dict[str, Any], reason: str) -> None:
    assert read(signed(**claims)) == reason


def test_clocks_may_differ_by_the_leeway() -> None:
    assert read(signed(exp=NOW - 4)) == Claims(USER, NOW + 1)
    assert read(signed(nbf=NOW + 5)) == Claims(USER, NOW + 65)
    assert read(signed(exp=NOW), auth_leeway=0) == "expired"
    assert read(signed(exp=NOW - 50), auth_leeway="1m") == Claims(USER, NOW + 10)


@pytest.mark.parametrize("audience", ["chat", ["mail", "chat"]])
def test_a_token_must_be_for_this_service_and_from_its_issuer_when_these_are_set(audience: object) -> None:
    wanted: dict[str, Any] = {"auth_audience": "chat", "auth_issuer": "https://id.example.com"}
    assert read(signed(aud=audience, iss="https://id.example.com"), **wanted) == Claims(USER, NOW + 65)
    assert read(signed(aud=audience), **wanted) == "claims"
    assert read(signed(aud=audience, iss="https://id.example.com/"), **wanted) == "issuer"
    assert read(signed(aud=audience, iss=["https://id.example.com"]), **wanted) == "issuer"
    assert read(signed(iss="https://id.example.com"), **wanted) == "claims"
    assert read(signed(aud=["mail"], iss="https://id.example.com"), **wanted) == "audience"


def test_the_user_may_stand_in_another_claim_as_a_number_or_as_its_digits() -> None:
    assert read(signed(sub=USER)) == Claims(USER, NOW + 65)
    assert read(signed(sub="somebody", uid=10002), auth_claim="uid") == Claims(10002, NOW + 65)
    assert read(signed(sub=7, uid="10002", jti=7), auth_claim="uid") == Claims(10002, NOW + 65)
    assert read(signed(), auth_claim="uid") == "claims"


@pytest.mark.parametrize("algorithm", ALL)
def test_a_token_that_holds_for_too_long_is_not_believed(algorithm: Algorithm) -> None:
    day = 24 * 3600
    assert read(signed(algorithm, exp=NOW + day), algorithm) == Claims(USER, NOW + day + 5)
    assert read(signed(algorithm, exp=NOW + day + 6), algorithm) == "lifetime"
    assert read(signed(algorithm, exp=4_000_000_000), algorithm) == "lifetime"
    assert read(signed(algorithm, exp=1e300), algorithm) == "lifetime"


def test_the_lifetime_is_limited_from_the_issue_and_not_from_now() -> None:
    day = 24 * 3600
    assert read(signed(exp=NOW + 60, iat=NOW + 60 - day)) == Claims(USER, NOW + 65)
    assert read(signed(exp=NOW + 60, iat=NOW + 54 - day)) == "lifetime"
    assert read(signed(exp=NOW + 60, iat=0)) == "lifetime"
    assert read(signed(exp=NOW + 2 * day, iat=NOW + 2 * day - 60)) == "lifetime", "issued in the future"
    assert read(signed(exp=NOW + 3600, iat=NOW - 60), auth_max_lifetime="1h") == "lifetime"
    assert read(signed(exp=NOW + 300 * day), auth_max_lifetime="365d") == Claims(USER, NOW + 300 * day + 5)
    for wrong in ("now", float("nan"), True, [1], 10**400):
        assert read(signed(iat=wrong)) == "claims"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(JSON)
@example("010001")
@example(" 10001")
@example("10001.0")
@example(10001.0)
@example("１０００１")
@example(True)  # noqa: FBT003 - a claim
@example(10000)
@example(2**53)
@example([10001])
def test_a_claim_that_is_no_user_id_is_nobody(claim: Any) -> None:  # noqa: ANN401 - any JSON
    told = read(signed(sub=claim))
    number = isinstance(claim, int) and not isinstance(claim, bool) and 10000 < claim < 2**53
    digits = isinstance(claim, str) and claim.isascii() and claim.isdigit() and 10000 < int(claim) < 2**53
    if number or (digits and str(int(claim)) == claim):
        assert told == Claims(int(claim), NOW + 65)
    else:
        assert told == "claims"


@given(JSON, JSON)
def test_times_that_are_none_are_refused(exp: object, nbf: object) -> None:
    told = read(signed(exp=exp, nbf=nbf))
    assert told in {"claims", "expired", "not_yet_valid", "lifetime"} or isinstance(told, Claims)
    if isinstance(told, Claims):
        assert isinstance(exp, int | float)
        assert NOW - 5 < exp <= NOW + 24 * 3600 + 5


@given(st.text() | st.binary().map(encoded) | st.tuples(JSON, JSON).map(lambda two: ".".join(map(encoded, two)) + "."))
@example("")
@example(".." * 3)
@example("x" * (MAX_TOKEN + 1))
@example(f"{encoded({'alg': 'HS256', 'kid': 5})}..")
@example(f"{encoded({'alg': 'HS256', 'crit': ['b64'], 'b64': False})}..")
@example(f"{encoded({'alg': 'HS256'})}.{encoded(b'[' * 5000)}.")
@example(f"{encoded(b'[' * 5000)}.{encoded(b'[' * 50)}.")
@example("\ud800.a.b")
def test_anything_else_is_refused_and_breaks_nothing(shown: str) -> None:
    assert isinstance(read(shown), str)
    try:
        key_id(shown if shown.isascii() else "")
    except InvalidToken:
        return


@given(JSON)
def test_claims_that_are_no_object_are_refused(claims: object) -> None:
    said = f"{encoded({'alg': 'HS256'})}.{encoded(claims)}"
    sealed = f"{said}.{encoded(hmac.digest(SECRET.encode(), said.encode(), hashlib.sha256))}"
    assert read(sealed) in {"malformed", "claims"} | ({"audience"} if isinstance(claims, dict) else set())


def test_of_several_keys_each_is_tried() -> None:
    keys = [key_of("ES256", number).public_key() for number in range(3)]
    one = rules("ES256")
    for number in range(3):
        shown = token(key_of("ES256", number), "ES256", exp=NOW + 60)
        assert one.verify(shown, keys) == Claims(USER, NOW + 65)
    with pytest.raises(InvalidToken, match="signature"):
        one.verify(token(key_of("ES256", 3), "ES256", exp=NOW + 60), keys)
    with pytest.raises(InvalidToken, match="unknown_key"):
        one.verify(signed("ES256"), [])


def test_by_default_the_time_is_now() -> None:
    one = TokenRules(Settings.load())
    assert one.verify(token(), [SECRET.encode()]).expires_at > time.time()
