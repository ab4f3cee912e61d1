"""No secret is shown: all secret settings are set here, and searched for in a node's output, records and arguments."""

import asyncio
import base64
import re
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import structlog
from websockets.asyncio.client import connect

from imstream import logs
from imstream.errors import SettingsError
from imstream.keys import Keys
from imstream.settings import Settings
from tests.support.many_nodes import becomes
from tests.support.one_node import QUICK, OneNode
from tests.support.peer import Peer, peer
from tests.support.processes import PYTHON, start
from tests.support.scripted_backend import Exchange, ScriptedBackend, refuses, scripted_backend
from tests.support.servers import USER, RedisServer
from tests.support.stage import fresh_redis
from tests.support.tokens import token
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

HUSH = "hush7f3a"
"""A part of every secret."""

SECRETS = {
    "redis_url": f"redis://imstream:{HUSH}redis@127.0.0.1:1/0?password={HUSH}again",
    "ai_url": f"http://me:{HUSH}ai@127.0.0.1:9/v1?api-key={HUSH}query",
    "ai_key": f"{HUSH}ai-key",
    "auth_secret": f"{HUSH}-of-more-than-thirty-two-bytes-in-length",
    "auth_jwks_url": f"http://me:{HUSH}jwks@127.0.0.1:9/jwks",
    "page_token": f"{HUSH}-page-token",
    "moderation_url": f"http://me:{HUSH}moderation@127.0.0.1:9/v1",
    "moderation_key": f"{HUSH}moderation-key",
}

SHOWN_SECRETS = [HUSH, base64.b64encode(f"me:{HUSH}ai".encode()).decode()]


def assert_hushed(*texts: object) -> None:
    """Check that no text shows a secret, plain or encoded for HTTP."""
    for text in texts:
        for secret in SHOWN_SECRETS:
            assert secret not in str(text), text


def test_every_setting_that_may_hold_a_secret_is_looked_after_here() -> None:
    named = {name for name in Settings.model_fields if re.search(r"_(secret|key|url|token|password)$", name)}
    assert named - {"auth_public_key"} == SECRETS.keys()


def test_settings_show_no_secret_of_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings.load(**SECRETS)
    assert_hushed(repr(settings), settings, f"{settings!r:.9999}", settings.model_dump_json(include={"redis_url"}))
    assert str(settings.redis_url) == "redis://127.0.0.1:1/0?password=…"
    assert str(settings.ai_url) == "http://127.0.0.1:9/v1?api-key=…"
    for log_format in ("json", "console"):
        logs.configure(Settings.load(log_format=log_format))
        structlog.get_logger().error("all of it", settings=settings, redis=settings.redis_url, ai=settings.ai_url)
        try:
            _fail(settings, SECRETS["ai_key"])
        except RuntimeError:
            structlog.get_logger().exception("it failed")
    said = capsys.readouterr().out
    assert said.count("it failed") == 2
    assert_hushed(said)


def _fail(settings: Settings, secret: str) -> None:
    raise RuntimeError(type(settings).__name__ + type(secret).__name__)


@pytest.mark.parametrize("setting", SECRETS)
def test_a_secret_that_is_refused_is_not_repeated(setting: str) -> None:
    wrong: list[Any] = [[f"{HUSH}list"], 7, f"gopher://me:{HUSH}@host/{HUSH}"]
    refused = 0
    for value in wrong[: 2 if setting.endswith(("key", "secret", "token")) else 3]:
        try:
            Settings.load(**{setting: value if value != wrong[2] else f"gopher://me:{HUSH}@host/"})
        except SettingsError as error:
            refused += 1
            assert_hushed(error, repr(error), error.__cause__)
    assert refused


@pytest.mark.parametrize("command", ["--help", "node --help", "up --help", "streams --help", "chat --help"])
def test_help_shows_no_secret_of_the_environment(command: str, tmp_path: Path) -> None:
    env = {Settings.variable(name): value for name, value in SECRETS.items()} | {"IMSTREAM_TOKEN": f"{HUSH}token"}
    with start([PYTHON, "-m", "imstream", *command.split()], tmp_path / "log", env=env) as helped:
        assert helped.wait() == 0
    assert "--help" in helped.output()
    assert_hushed(helped.output())


def ticket() -> str:
    """The token of user 10001, the same in each call."""
    return token(SECRETS["auth_secret"], sub=str(user_id(10001)), exp=4_000_000_000)


async def echoes(exchange: Exchange) -> None:
    """A script of the backend: refuse the call and quote the request."""
    headers = exchange.request.headers
    await refuses(HTTPStatus.UNAUTHORIZED, f"no entry with {headers.get('authorization')}")(exchange)


@asynccontextmanager
async def node_with_secrets(
    folder: Path, server: RedisServer, backend: ScriptedBackend, **settings: object
) -> AsyncIterator[OneNode]:
    """A node with all secrets that logs at level debug; at the end, none was shown."""
    with server.client() as client:
        allow(client, f">{HUSH}redis")
        url = server.url.replace(USER, f"imstream:{HUSH}redis")
        ai = backend.url.replace("//", f"//me:{HUSH}ai@")
        shown = {"auth": "jwt", **({} if "auth_jwks_url" in settings else {"auth_secret": SECRETS["auth_secret"]})}
        unused = {name: SECRETS[name] for name in ("moderation_url", "moderation_key", "page_token")}
        node = OneNode(
            folder,
            client,
            url,
            ai,
            {
                **QUICK,
                "log_level": "debug",
                "max_attempts": 1,
                "retry_window": "1s",
                "moderation_fail": "open",
                "auth_max_lifetime": "36500d",
                **shown,
                **unused,
                **settings,
            },
        )
        await node.start(wait=False)
        await becomes(node, None)
        try:
            yield node
            assert_hushed(*psutil.Process(node.now.process.pid).cmdline())
        finally:
            await asyncio.to_thread(node.now.process.__exit__, None, None, None)
    assert_hushed(node.now.process.output())
    node.check_log()


def allow(client: redis.Redis, *rules: str) -> None:
    """Change the permissions or the password of the node's Redis user."""
    client.execute_command("ACL", "SETUSER", "imstream", *rules)  # type: ignore[no-untyped-call] # redis-py's gap


async def ask(someone: Peer, message_id: str) -> dict[str, Any]:
    """Send a message and wait for a refusal or the end of its answer."""
    answer = await someone.chat(user_id(10001), "why?", message_id)
    if answer["msgType"] == "CHAT":
        await someone.end_of(message_id)
    return someone.frames[-1]


@pytest.mark.parametrize("settings", [{}, {"ai_key": SECRETS["ai_key"]}], ids=["credentials", "key"])
async def test_a_node_shows_no_secret_whatever_goes_wrong(settings: dict[str, object], tmp_path: Path) -> None:
    async with scripted_backend(always=echoes) as backend:
        with fresh_redis(tmp_path) as server:
            async with node_with_secrets(tmp_path, server, backend, **settings) as node:
                async with peer(node.now.ws(user_id(10001)), user=user_id(10001), token=ticket()) as someone:
                    assert (await ask(someone, "refused-by-the-ai"))["event"] == "failed"
                    await wait_until(lambda: len(node.dead()) == 1, "the request is a dead letter")
                    allow(node.redis, "-xadd")
                    assert (await ask(someone, "refused-by-redis"))["code"] == "UNAVAILABLE"
                    allow(node.redis, "+xadd")
                    for key in node.redis.scan_iter(Keys().reply(user_id(10001), "*")):
                        assert_hushed(node.redis.xrange(key))
                    [letter] = node.dead()
                    assert "401" in letter["reason"] + letter["error"]
                    assert_hushed(letter, node.redis.get(Keys().lease("0")))
                    # The old password is invalid, and every connection has to authenticate again.
                    allow(node.redis, f"<{HUSH}redis")
                    node.redis.client_kill_filter(user="imstream")
                    await becomes(node, "redis denies access, see the log")
                    server.kill()
                    await becomes(node, "redis does not answer")
                    for path in ("/readyz", "/healthz", "/"):
                        assert_hushed(await asyncio.to_thread(body, f"{node.now.http}{path}"))
                    assert_hushed(*someone.frames)
                assert "redis denies access" in node.now.process.output()


async def test_neither_a_token_nor_what_somebody_says_is_in_the_log_of_a_node(tmp_path: Path) -> None:
    async with scripted_backend(always=echoes) as backend:
        with fresh_redis(tmp_path) as server:
            async with node_with_secrets(tmp_path, server, backend) as node:
                url = f"{node.now.ws(user_id(10001))}&token={HUSH}token"
                headers = {"Authorization": f"Bearer {HUSH}bearer", "Cookie": f"session={HUSH}cookie"}
                protocols: Any = ["imstream.v1.json", f"{HUSH}subprotocol"]
                async with connect(url, subprotocols=protocols, additional_headers=headers, proxy=None) as connection:
                    someone = Peer(connection)
                    await someone.send_frame("INIT", userId=user_id(10001), token=ticket())
                    assert (await someone.frame())["msgType"] == "INIT"
                    await someone.chat(user_id(10001), f"what {HUSH} says", "m")
                    assert_hushed(connection.response)
                async with connect(url, proxy=None) as connection:
                    someone = Peer(connection)
                    await someone.send_frame("INIT", userId=user_id(10001), token=f"{HUSH}init")
                    assert (await someone.frame())["code"] == "UNAUTHORIZED"
                assert ticket() not in node.now.process.output()


async def test_an_address_of_keys_is_shown_without_its_password(tmp_path: Path) -> None:
    async with scripted_backend(always=echoes) as backend:
        with fresh_redis(tmp_path) as server:
            published = {"auth_algorithm": "ES256", "auth_jwks_url": SECRETS["auth_jwks_url"]}
            async with node_with_secrets(tmp_path, server, backend, **published) as node:
                await wait_until(lambda: "token keys not fetched" in node.now.process.output(), "the failure is logged")


def body(url: str) -> str:
    """The body of the response to a GET, with any status."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - a URL of this test
            return str(answer.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return str(refused.read())


def test_a_node_that_does_not_start_shows_no_secret(tmp_path: Path) -> None:
    wrong = {
        "redis_url": f"redis://imstream:{HUSH}redis@:1",
        "ai_url": f"ftp://me:{HUSH}ai@a",
        "port": "x",
    }
    env = {Settings.variable(name): value for name, value in {**SECRETS, **wrong}.items()}
    with start([PYTHON, "-m", "imstream", "node"], tmp_path / "log", env=env) as node:
        assert node.wait() == 2
    assert node.output().count("is not allowed") == 3
    assert_hushed(node.output())
