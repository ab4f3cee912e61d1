"""Access to metrics and to the details of health checks, and the responses to other clients."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text_metrics
from starlette.requests import Request
from starlette.testclient import TestClient

from imstream.errors import SettingsError
from imstream.gateway.app import is_from_here, make_app, make_metrics_app
from imstream.gateway.session_deps import SessionDeps
from imstream.metrics import Metrics
from imstream.settings import Settings

HERE = ("127.0.0.1", 50_000)


def deps(*, why: str | None = None, **settings: Any) -> SessionDeps:  # noqa: ANN401 - any setting
    """The dependencies of sessions that the application of a node uses."""
    parts: dict[str, Any] = {
        "settings": Settings.load(**settings),
        "registry": [],
        "jobs": [],
        "guards": SimpleNamespace(rejections=Counter(words=2)),
        "metrics": Metrics(),
        "not_ready": lambda: why,
    }
    return cast("SessionDeps", SimpleNamespace(**parts))


def node(peer: tuple[str, int] = HERE, *, why: str | None = None, **settings: Any) -> TestClient:  # noqa: ANN401 - same
    app = make_app(deps(why=why, **settings), stuck=lambda: why)
    return TestClient(app, client=peer, base_url="http://127.0.0.1:8080", follow_redirects=False)


def test_this_machine_reads_them_on_the_address_of_the_node() -> None:
    answer = node().get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "imstream_messages" in {family.name for family in text_metrics(answer.text)}
    assert node(("::1", 50_000), host="::1").get("/metrics").status_code == 200


def test_clients_that_accept_open_metrics_get_them() -> None:
    answer = node().get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "imstream_messages" in {family.name for family in open_metrics(answer.text)}  # type: ignore[no-untyped-call] # the library's gap


@pytest.mark.parametrize("headers", [
    {"Forwarded": "for=127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-Proto": "https"},
    {"X-Forwarded-Host": "127.0.0.1"},
    {"X-Real-IP": "127.0.0.1"},
    {"Via": "1.1 proxy"},
    {"CF-Connecting-IP": "127.0.0.1"},
    {"Connection": "upgrade"},
    {"Origin": "http://127.0.0.1:8080"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-origin"},
    {"Host": "chat.example.com"},
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_requests_of_proxies_and_pages_get_404(headers: dict[str, str], method: str) -> None:
    client = node()
    refused = client.request(method, "/metrics", headers=headers)
    unknown = client.request(method, "/nothing", headers=headers)
    assert (refused.status_code, refused.content, refused.headers) == (404, unknown.content, unknown.headers)
    assert client.get("/readyz", headers=headers).json() == {"ready": True}


@pytest.mark.parametrize(("version", "local"), [("1.0", False), ("1.1", True)])
def test_a_proxy_that_adds_no_header_is_detected_by_its_protocol(version: str, *, local: bool) -> None:
    head = {"type": "http", "http_version": version, "client": HERE, "headers": [(b"host", b"127.0.0.1:8080")]}
    assert is_from_here(Request(head)) is local


def test_a_person_may_open_them_in_a_browser() -> None:
    assert node().get("/metrics", headers={"Sec-Fetch-Site": "none"}).status_code == 200


@pytest.mark.parametrize(
    ("peer", "settings"),
    [
        (("192.0.2.1", 50_000), {}),
        (HERE, {"host": "0.0.0.0", "allow_insecure": True}),
        (HERE, {"host": "::", "allow_insecure": True}),
        (HERE, {"metrics": "off"}),
        (HERE, {"metrics": "127.0.0.1:9100"}),
    ],
)
def test_others_find_nothing(peer: tuple[str, int], settings: dict[str, Any]) -> None:
    client = node(peer, **settings)
    for path in ("/metrics", "/metrics/", "/Metrics"):
        refused, unknown = client.get(path), client.get("/nothing")
        assert (refused.status_code, refused.content, refused.headers) == (404, unknown.content, unknown.headers)


def test_strangers_learn_the_verdict_of_health_checks_and_nothing_else() -> None:
    for why, status in ((None, 200), ("draining", 503)):
        for path, verdict in (("/readyz", "ready"), ("/healthz", "alive")):
            answer = node(why=why, metrics="off").get(path)
            assert (answer.status_code, answer.json()) == (status, {verdict: why is None})


def test_operators_learn_the_details() -> None:
    known = {"ready": True, "node": "0", "sessions": 0, "running": 0, "refused": {"words": 2}}
    assert node().get("/readyz").json() == known
    listener = TestClient(make_metrics_app(deps(why="draining", metrics="off"), stuck=lambda: "it is stuck"))
    assert listener.get("/readyz").json() == {**known, "ready": False, "why": "draining"}
    assert listener.get("/healthz").json() == {"alive": False, "node": "0", "why": "it is stuck"}


def test_their_own_listener_answers_all_clients_and_serves_nothing_else() -> None:
    app = make_metrics_app(deps(), stuck=lambda: None)
    listener = TestClient(app, client=("192.0.2.1", 50_000), base_url="http://node.example.com:9100")
    assert listener.get("/metrics", headers={"X-Forwarded-For": "192.0.2.7"}).status_code == 200
    assert listener.get("/").status_code == listener.get("/ws").status_code == 404


@pytest.mark.parametrize(
    ("value", "address"),
    [
        (None, None),
        ("", None),
        ("off", None),
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("127.0.0.1:+1000", ("127.0.0.1", 9080)),
        ("[::1]:9100", ("::1", 9100)),
        ("metrics.example.com:0", ("metrics.example.com", 0)),
    ],
)
def test_the_setting_names_an_address(value: str | None, address: tuple[str, int] | None) -> None:
    assert Settings.load(metrics=value).metrics_address(8080) == address


@pytest.mark.parametrize("value", ["on", "9100", ":9100", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "::1:9100"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^IMSTREAM_METRICS=.* is not allowed: off, or a host and a port"):
        Settings.load(metrics=value)


def test_a_port_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"IMSTREAM_METRICS=127\.0\.0\.1:\+60000 is not allowed: port 68080"):
        Settings.load(metrics="127.0.0.1:+60000").metrics_address(8080)
