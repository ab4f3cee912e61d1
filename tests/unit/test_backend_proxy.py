"""Calls through an HTTP proxy, which is used only with the option."""

from base64 import b64encode

import pytest

from imstream.ai.backend import OpenAIBackend
from imstream.ai.backend_options import BackendOptions
from imstream.errors import BackendError, SettingsError
from imstream.settings import Settings
from tests.support.asking import PROMPT
from tests.support.scripted_backend import ScriptedBackend, refuses, scripted_backend, streams

LOGIN = "me:pass-of-the-proxy"


async def ask(proxy: str, url: str = "http://ai.internal/v1") -> None:
    async with OpenAIBackend(Settings.load(ai_url=url, ai_proxy=proxy, ai_key="sk-1")) as client:
        await client.answer(PROMPT, on_text=lambda _: None)


def address(proxy: ScriptedBackend, login: str = "") -> str:
    return f"http://{login}127.0.0.1:{proxy.port}"


async def test_a_call_goes_through_the_proxy() -> None:
    async with scripted_backend(streams("Hi")) as proxy:
        await ask(address(proxy, f"{LOGIN}@"))
        request = proxy.requests[0]
    assert request.target == "http://ai.internal/v1/chat/completions"
    assert request.headers["host"] == "ai.internal"
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["proxy-authorization"] == "Basic " + b64encode(LOGIN.encode()).decode()


async def test_a_call_by_https_asks_the_proxy_for_a_tunnel_without_showing_it_the_key() -> None:
    async with scripted_backend(refuses(403)) as proxy:
        with pytest.raises(BackendError, match=r"^proxy_failed: the proxy answers with status 403"):
            await ask(address(proxy), "https://ai.internal/v1")
        request = proxy.requests[0]
    assert (request.method, request.target) == ("CONNECT", "ai.internal:443")
    assert "authorization" not in request.headers


@pytest.mark.parametrize("url", ["http://ai.internal/v1", "https://ai.internal/v1"])
async def test_a_proxy_that_requires_a_password_is_misconfigured_and_its_password_is_not_shown(url: str) -> None:
    async with scripted_backend(refuses(407, LOGIN)) as proxy:
        with pytest.raises(BackendError) as failed:
            await ask(address(proxy, f"{LOGIN}@"), url)
    assert failed.value.kind == "misconfigured"
    assert "pass-of-the-proxy" not in str(failed.value)


async def test_a_proxy_that_is_away_is_a_failed_connection() -> None:
    async with scripted_backend() as gone:
        proxy = address(gone, f"{LOGIN}@")
    with pytest.raises(BackendError, match=r"^connect_failed") as failed:
        await ask(proxy)
    assert failed.value.kind == "away"
    assert "pass-of-the-proxy" not in str(failed.value)


async def test_the_proxy_of_the_environment_is_used_with_the_option_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with scripted_backend(streams("Hi")) as proxy, scripted_backend(streams("Hi")) as direct:
        await ask("env", direct.url)
        monkeypatch.setenv("http_proxy", address(proxy))
        await ask("env")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        await ask("env", direct.url)
        assert (len(proxy.requests), len(direct.requests)) == (1, 2)


@pytest.mark.parametrize("proxy", ["socks5://me:pass-of-the-proxy@proxy", "http://me:pass-of-the-proxy@", "proxy:3128"])
def test_a_proxy_that_cannot_be_used_is_refused_at_the_start(proxy: str) -> None:
    with pytest.raises(SettingsError, match=r"^IMSTREAM_AI_PROXY=.* is not allowed: ") as refused:
        OpenAIBackend(Settings.load(ai_proxy=proxy))
    assert "pass-of-the-proxy" not in str(refused.value)


def test_a_proxy_of_the_environment_that_cannot_be_used_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"socks5://{LOGIN}@127.0.0.1")
    with pytest.raises(SettingsError, match=r"'env' is not allowed: the proxy that the environment names") as refused:
        OpenAIBackend(Settings.load(ai_url="http://ai.internal/v1", ai_proxy="env"))
    assert "pass-of-the-proxy" not in str(refused.value)


def test_the_representation_of_options_shows_no_password() -> None:
    assert "pass-of-the-proxy" not in repr(BackendOptions.model_validate({"proxy": f"http://{LOGIN}@proxy"}))
