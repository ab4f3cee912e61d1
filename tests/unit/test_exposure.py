"""A node without authentication accepts local clients only."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from imstream.errors import SettingsError
from imstream.guards.authentication import Exposure
from tests.support.guard_deps import guard_deps
from tests.support.tokens import SECRET


def guard(**settings: Any) -> Exposure | None:  # noqa: ANN401 - any setting
    return Exposure.create(guard_deps(**settings))


def is_accepted(one: Exposure | None, **headers: str) -> bool:
    return (
        one is None or one.check_handshake({name.replace("_", "-"): value for name, value in headers.items()}) is None
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_it_listens_to_its_own_machine(host: str) -> None:
    assert guard(host=host) is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "chat.example.com", "localhost.example.com"])
def test_it_does_not_listen_beyond_unless_it_is_told_to(host: str) -> None:
    with pytest.raises(SettingsError) as refused:
        guard(host=host)
    assert str(refused.value).startswith(
        f"IMSTREAM_HOST={host} is not allowed with IMSTREAM_AUTH=none, because any client"
    )
    assert "IMSTREAM_ALLOW_INSECURE=true" in str(refused.value)
    assert guard(host=host, allow_insecure=True) is not None
    assert guard(host=host, auth="jwt", auth_secret=SECRET) is None


def test_a_key_without_tokens_is_refused_because_somebody_thinks_they_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"^IMSTREAM_AUTH=none is not allowed with IMSTREAM_AUTH_SECRET: set IMST"):
        guard(auth_secret=SECRET)


@pytest.mark.parametrize("headers", [
    {},
    {"host": "127.0.0.1:8080"},
    {"host": "localhost"},
    {"host": "[::1]:8080"},
    {"host": "127.0.0.1:8000", "x_forwarded_for": "127.0.0.1"},
])  # fmt: skip
def test_who_comes_from_here_may_come(headers: dict[str, str]) -> None:
    assert is_accepted(guard(), **headers)


@pytest.mark.parametrize("headers", [
    {"host": "127.0.0.1:8000", "x_forwarded_for": "10.0.0.7"},
    {"host": "127.0.0.1:8000", "x_forwarded_for": "127.0.0.1, 10.0.0.7"},
    {"host": "127.0.0.1:8000", "x_forwarded_for": ""},
    {"host": "127.0.0.1:8000", "x_real_ip": "10.0.0.7"},
    {"host": "127.0.0.1:8000", "forwarded": "for=10.0.0.7"},
    {"host": "10.0.0.5:8000"},
    {"host": "evil.example.com:8080"},
    {"host": "127.0.0.1.evil.example.com"},
    {"host": "[::1"},
    {"host": ""},
])  # fmt: skip
def test_who_comes_through_a_balancer_from_elsewhere_or_by_another_name_may_not(headers: dict[str, str]) -> None:
    assert not is_accepted(guard(), **headers)
    assert is_accepted(guard(allow_insecure=True), **headers)
    assert is_accepted(guard(auth="jwt", auth_secret=SECRET), **headers)


@given(st.text(), st.text())
def test_no_header_breaks_it(host: str, forwarded: str) -> None:
    is_accepted(guard(), host=host, x_forwarded_for=forwarded)


@pytest.mark.parametrize(("insecure", "level"), [(False, "warning"), (True, "error")])
async def test_it_says_at_the_start_that_nobody_is_asked(insecure: bool, level: str) -> None:  # noqa: FBT001 - a parameter
    one = guard(allow_insecure=insecure)
    assert one is not None
    with capture_logs() as logged:
        async with one.running():
            pass
    [line] = logged
    assert line["log_level"] == level
    assert "users are not authenticated" in line["event"]
