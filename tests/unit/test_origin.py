"""The origin guard: which pages may open sockets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.codes import CloseCode, Code
from imstream.errors import SettingsError
from imstream.guards.guard import Allow, LoginAttempt
from imstream.guards.origin import Origin, parse_origins
from tests.support.guard_deps import guard_deps

PAGE_TOKEN = "printed by imstream up"  # noqa: S105 - of these tests


def guard(origins: str, **settings: str) -> Origin | None:
    return Origin.create(guard_deps(origins=origins, **settings))


def is_accepted(
    origin: str | None,
    host: str = "chat.example.com",
    *,
    origins: str = "same",
    auth: str = "none",
    page_token: str = "",
    **headers: str,
) -> bool:
    asked = {"host": host, **headers, **({} if origin is None else {"origin": origin})}
    checks = guard(origins, auth=auth, **({"page_token": page_token} if page_token else {}))
    return checks is None or checks.check_handshake(asked) is None


def test_who_is_no_browser_is_not_concerned() -> None:
    assert is_accepted(None)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://chat.example.com", "chat.example.com"),
        ("https://chat.example.com", "chat.example.com:443"),
        ("http://chat.example.com", "chat.example.com:80"),
        ("http://chat.example.com:8080", "chat.example.com:8080"),
        ("https://chat.example.com", "Chat.Example.com"),
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://[::1]:8080", "[::1]:8080"),
    ],
)
def test_a_page_of_the_same_host_may_come(origin: str, host: str) -> None:
    assert is_accepted(origin, host)
    assert not is_accepted(origin, host, origins="https://other.example.com")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example.com", "chat.example.com"),
        ("https://chat.example.com.evil.com", "chat.example.com"),
        ("https://chat.example.com", "chat.example.com:8443"),
        ("https://chat.example.com:8443", "chat.example.com"),
        ("http://127.0.0.1:8081", "127.0.0.1:8080"),
        ("http://localhost:8080", "127.0.0.1:8080"),
        ("null", "chat.example.com"),
        ("null", ""),
        ("", "chat.example.com"),
        ("", ""),
        ("https://", ""),
        ("chat.example.com", "chat.example.com"),
        ("//chat.example.com", "chat.example.com"),
        ("file://chat.example.com", "chat.example.com"),
        ("https://chat.example.com/path", "chat.example.com"),
        ("https://evil@chat.example.com", "chat.example.com"),
        ("https://chat.example.com https://evil.example.com", "chat.example.com"),
        ("https://chat.example.com:port", "chat.example.com"),
        ("https://[::1", "[::1"),
    ],
)
def test_any_other_page_may_not(origin: str, host: str) -> None:
    assert not is_accepted(origin, host)


def test_where_tls_ends_before_the_node_a_page_without_it_is_another_one() -> None:
    forwarded = {"x-forwarded-proto": "https"}
    assert is_accepted("https://chat.example.com", **forwarded)
    assert not is_accepted("http://chat.example.com", **forwarded)
    # A balancer behind the one that terminates TLS does not have the scheme.
    assert is_accepted("https://chat.example.com", **{"x-forwarded-proto": "http"})
    # Of several balancers, the outermost is first.
    assert not is_accepted("http://chat.example.com", **{"x-forwarded-proto": "https, http"})


def test_the_page_from_disk_may_come_where_it_is_named() -> None:
    needed = [{"page_token": PAGE_TOKEN}, {"auth": "jwt"}]
    for settings in needed:
        assert is_accepted("null", origins="same,null", **settings)
        assert not is_accepted("https://evil.example.com", origins="same,null", **settings)


def test_where_clients_are_not_authenticated_the_page_from_disk_needs_a_token() -> None:
    with pytest.raises(SettingsError) as refused:
        guard("same,null")
    assert str(refused.value).startswith("IMSTREAM_ORIGINS='same,null' is not allowed with IMSTREAM_AUTH=none, ")
    assert "IMSTREAM_PAGE_TOKEN" in str(refused.value)
    with pytest.raises(SettingsError, match=r"^IMSTREAM_ORIGINS"):
        guard("same,null", page_token="")
    for token in ("too short", f"{' ' * 20}short"):
        with pytest.raises(
            SettingsError, match=r"IMSTREAM_PAGE_TOKEN=\(hidden\) is not allowed: at least 16 characters"
        ):
            guard("same,null", page_token=token)


@pytest.mark.parametrize("origins", ["same,null", "null", "*"])
async def test_of_pages_of_the_origin_null_only_those_with_the_token_are_logged_in(origins: str) -> None:
    checks = guard(origins, page_token=f"{PAGE_TOKEN}\n")
    assert checks is not None

    async def logs_in(token: str | None, origin: str | None = "null") -> bool:
        verdict = await checks.check_login(LoginAttempt(10001, token, origin))
        assert isinstance(verdict, Allow) or (verdict.code, verdict.close) == (
            Code.UNAUTHORIZED,
            CloseCode.NOT_AUTHENTICATED,
        )
        return isinstance(verdict, Allow)

    assert await logs_in(PAGE_TOKEN)
    for token in (None, "", " ", PAGE_TOKEN[:-1], f"{PAGE_TOKEN} ", PAGE_TOKEN.upper(), "\ud800", "x" * 60_000):
        assert not await logs_in(token)
    assert await logs_in(None, "http://chat.example.com")
    assert await logs_in(None, None)


def test_named_origins_may_come_and_no_others() -> None:
    origins = "https://a.example.com:443, HTTP://B.example.com:8080 ,tauri://localhost"
    for origin in ("https://a.example.com", "http://b.example.com:8080", "tauri://localhost"):
        assert is_accepted(origin, origins=origins)
    for origin in ("http://a.example.com", "https://b.example.com:8080", "https://chat.example.com", "null"):
        assert not is_accepted(origin, origins=origins)


def test_all_may_come_where_that_is_said() -> None:
    assert guard("*", auth="jwt") is None
    for origin in ("https://evil.example.com", "http://chat.example.com", "tauri://localhost"):
        assert is_accepted(origin, origins="*")
    assert not is_accepted("null", origins="*"), "it identifies no page, and no page token is set"
    assert is_accepted("null", origins="*", page_token=PAGE_TOKEN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "same,",
        "*,same",
        "example.com",
        "https://",
        "https://a.com/",
        "https://a.com:port",
        "https://u@a.com",
        "any",
    ],
)
def test_what_is_no_origin_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        guard(text)
    assert str(refused.value).startswith(f"IMSTREAM_ORIGINS={text!r} is not allowed: a list with commas of same, ")


@given(st.text(), st.text())
def test_no_header_breaks_it(origin: str, host: str) -> None:
    is_accepted(origin, host)


@given(st.text() | st.from_regex(r"[a-z]+://[a-z.]*(:[0-9]*)?", fullmatch=True))
def test_any_setting_is_read_or_refused(text: str) -> None:
    try:
        assert parse_origins(text)
    except SettingsError:
        return
