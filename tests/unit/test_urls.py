"""Redis URLs: parsing, refusal, and how they are shown."""

from pathlib import Path

import pytest

from imstream.cli import up
from imstream.errors import SettingsError
from imstream.settings import Settings
from imstream.urls import RedisUrl, redact_url
from tests.support.processes import free_port

READ = {
    "redis://host": ("server", (("host", 6379),), "", "redis://host:6379/0"),
    "redis://127.0.0.1:6390/2": ("server", (("127.0.0.1", 6390),), "", "redis://127.0.0.1:6390/2"),
    "rediss://me:h%40sh@[::1]:1/?ssl_cert_reqs=none": (
        *("server", (("::1", 1),), ""),
        "rediss://me:h%40sh@[::1]:1/0?ssl_cert_reqs=none",
    ),
    "redis+sentinel://:hush@a,b:1/the-master": (
        *("sentinel", (("a", 26379), ("b", 1)), "the-master"),
        "redis://:hush@a:26379/0",
    ),
    "rediss+sentinel://[::1]:5,[::2]/m/3": ("sentinel", (("::1", 5), ("::2", 26379)), "m", "rediss://[::1]:5/3"),
    "redis+cluster://me:hush@a:1,b:2,c:3": (
        *("cluster", (("a", 1), ("b", 2), ("c", 3)), ""),
        "redis://me:hush@a:1/0",
    ),
    "rediss+cluster://a:1/": ("cluster", (("a", 1),), "", "rediss://a:1/0"),
}


@pytest.mark.parametrize("url", READ)
def test_an_address_says_what_stands_where(url: str) -> None:
    read = RedisUrl.parse(url)
    assert (read.topology, read.servers, read.service, read.server_url(*read.servers[0])) == READ[url]


def test_the_sentinels_may_ask_for_a_login_of_their_own() -> None:
    read = RedisUrl.parse("redis+sentinel://me:hush@a/m?sentinel_username=you&sentinel_password=p%26w&client_name=x")
    assert read.sentinel_login == {"username": "you", "password": "p&w"}
    assert read.server_url("b", 1) == "redis://me:hush@b:1/0?client_name=x"


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "host",
            "http://host",
            "redis:/host",
            "redis://",
            "redis://host:0",
            "redis://host:65536",
            "redis://host:x",
        ),
        *("redis://host/db", "redis://a,b", "unix:///tmp/redis", "redis+sentinel://a:1"),
        *("redis+sentinel://a:1/", "redis+sentinel://a:1/m/x", "redis+sentinel://a:1,/m", "redis+sentinel:///m"),
        *("redis+cluster://a:1/2", "redis+cluster://a:1,,b:2", "redis+cluster://", "redis+other://a:1"),
    ],
)
def test_a_wrong_address_is_refused_at_the_start_with_its_name_and_what_is_allowed(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.load(redis_url=url)
    said = str(refused.value)
    assert said.startswith("IMSTREAM_REDIS_URL='")
    for scheme in ("redis://", "redis+sentinel://", "redis+cluster://"):
        assert scheme in said.partition("is not allowed: ")[2]


def test_the_password_may_be_in_a_file_that_need_not_be_there_yet() -> None:
    read = RedisUrl.parse("redis://me@host/1?password_file=.imstream/a%20b&client_name=x")
    assert read.password_file == Path(".imstream/a b")
    assert read.server_url("host", 1) == "redis://me@host:1/1?client_name=x"
    assert RedisUrl.parse("redis://me@host").password_file is None
    for both in ("redis://me:hush@host?password_file=f", "redis://host?password=hush&password_file=f"):
        with pytest.raises(SettingsError, match="a password or password_file, not both") as refused:
            Settings.load(redis_url=both)
        assert "hush" not in str(refused.value)


def test_an_option_that_would_undo_ours_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"behind \? only username, .*; not retry_on_timeout, socket_timeout"):
        Settings.load(redis_url="redis://host/0?socket_timeout=1&retry_on_timeout=yes")
    with pytest.raises(SettingsError, match="not sentinel_password"):
        Settings.load(redis_url="redis+cluster://host?sentinel_password=x")


@pytest.mark.parametrize("url", ["redis+other://me:hush@host", "redis://me:hu/sh@host", "http://h?password=hush&x=y"])
def test_an_address_that_is_refused_is_shown_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.load(redis_url=url)
    assert "hush" not in str(refused.value)
    assert "hu/sh" not in str(refused.value)


SHOWN = {
    "redis://me:hush@host:6379/0": "redis://host:6379/0",
    "redis+sentinel://me:hush@a:1,b:2/m/0": "redis+sentinel://a:1,b:2/m/0",
    "redis+sentinel://a:1/m?sentinel_password=hush&client_name=x": "redis+sentinel://a:1/m?sentinel_password=…&client_name=x",
    "redis+cluster://:p@ss@[::1]:1,[::2]:2": "redis+cluster://[::1]:1,[::2]:2",
    "http://127.0.0.1:8081/v1": "http://127.0.0.1:8081/v1",
    "https://me:hush@a/v1?api-key=hush&api-version=7": "https://a/v1?api-key=…&api-version=7",
    "rediss://a:1/0?ssl_keyfile=/k.pem": "rediss://a:1/0?ssl_keyfile=/k.pem",
}


@pytest.mark.parametrize("url", SHOWN)
def test_addresses_are_shown_without_their_password(url: str) -> None:
    assert redact_url(url) == SHOWN[url]


@pytest.mark.parametrize(
    ("url", "shown"),
    {
        "redis://me:hush@host:6379/2": "redis-cli -u redis://host:6379/2 XINFO",
        "redis+cluster://me:hush@a:1,b:2": "redis-cli -c -u redis://a:1/0 XINFO",
        "redis+sentinel://a:1/m": None,
    }.items(),
)
def test_up_tells_how_redis_cli_finds_the_stream(url: str, shown: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMSTREAM_REDIS_URL", url)
    said = "\n".join(up.summary(up.make_plan({"port": str(free_port()), "ai_url": "http://ai/v1"})))
    assert "hush" not in said
    assert (f"{shown} STREAM" in said) if shown else ("  redis-cli" not in said)
