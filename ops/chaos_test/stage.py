"""The processes of a run: Redis, the AI backend, nodes and a load balancer."""

import asyncio
import hashlib
import random
import re
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from imstream.cli import embedded_redis
from imstream.cli.balancer import Program, find_program
from ops.chaos_test.parts import Part, answers_http, free_ports
from ops.chaos_test.schedule import LEASE

RETIRE_AFTER = 12.0
"""Seconds after which a dead node is retired; longer than any outage."""

USERS = Path(__file__).parents[1] / "redis-users.acl"

_UNLIMITED = 100_000

_NODE_SETTINGS = {
    "lease": f"{LEASE}s",
    "retire_after": f"{RETIRE_AFTER}s",
    "redis_timeout": "1s",
    "sweep_interval": "1s",
    "drain_grace": "2s",
    "queue_limit": 200,
    "user_limit": 8,
    "chats_per_minute": 0,
    # No request may be given up because of the backends' faults.
    "ai_breaker_pause": "500ms",
    "retry_wait_max": "3s",
    "retry_window": "1d",
    "max_attempts": _UNLIMITED,
    "max_deliveries": _UNLIMITED,
    # Replies must not expire before the end.
    "reply_ttl": "6h",
    "log_format": "json",
}

# The faults of backends must be detected during the run.
_BACKEND = """[[backend]]
name = "{name}"
url = "http://127.0.0.1:{port}/v1"
model = "demo"
priority = {priority}
continue = "{how}"
connect_timeout = "2s"
first_token_timeout = "4s"
load_timeout = "4s"
idle_timeout = "4s"
"""

_AI_SETTINGS = {
    "first": "50ms",
    "fail_rate": 0.05,
    "busy_rate": 0.03,
    "hang_rate": 0.01,
    "break_rate": 0.05,
    "retry_after": "1s",
    "continues": True,
}


def installed_balancers() -> list[str]:
    """The load balancers that are installed."""
    return [program for program in get_args(Program) if find_program(program)]


def users(password: str) -> str:
    """The users of `ops/redis-users.acl`, all with the same password: nodes have only the permissions they need."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    return re.sub(r"(?<=#)0{64}", digest, USERS.read_text("utf-8"))


class Stage:
    """All processes. A context manager: after entering they are ready, on exit they are killed.

    Attributes:
        password: Password of all users of Redis.
        nodes: The nodes that are restarted.
        ai, second_ai: The backend that faults hit, which is preferred, and the one that is called when it is away.
        leaver: One more node, which is killed early and not restarted.
        balancer: The load balancer; None if clients choose a node themselves.
    """

    def __init__(self, folder: Path, *, nodes: int, seed: int, balancer: str | None) -> None:
        redis_port, ai_port, second_port, balancer_port, *node_ports = free_ports(5 + nodes)
        self.redis_port = redis_port
        self.password = secrets.token_hex()
        config = (folder / "users.conf").resolve()
        config.write_text(users(self.password), "utf-8")
        self._random = random.Random(f"{seed} stage")  # noqa: S311 - no secrets
        self.redis = Part(
            "redis",
            ["redis"],
            redis_port,
            folder,
            embedded_redis.answers,
            _environment("IMSTREAM_EMBEDDED_", {"port": redis_port, "data": folder / "redis-data", "config": config}),
        )
        self.ai, self.second_ai = (
            Part(
                name,
                ["demo-ai"],
                port,
                folder,
                partial(answers_http, path="/v1/models"),
                _environment("IMSTREAM_DEMO_", {**_AI_SETTINGS, "port": port, "seed": f"{seed}{number}"}),
            )
            for number, (name, port) in enumerate({"ai": ai_port, "second-ai": second_port}.items())
        )
        for how in ("none", "assistant"):
            tables = (
                _BACKEND.format(name=part.name, port=part.port, priority=priority, how=how)
                for priority, part in enumerate([self.ai, self.second_ai])
            )
            (folder / f"backends-{how}.toml").write_text("".join(tables), "utf-8")
        *self.nodes, self.leaver = (self._node(folder, str(number), port) for number, port in enumerate(node_ports))
        self.balancer = None
        if balancer is not None:
            command = ["balancer", "--program", balancer, "--folder", str(folder / balancer)]
            command += ["--listen", f"127.0.0.1:{balancer_port}", *(f"127.0.0.1:{port}" for port in node_ports)]
            self.balancer = Part(balancer, command, balancer_port, folder, partial(answers_http, path="/readyz"))

    def _node(self, folder: Path, name: str, port: int) -> Part:
        how = "assistant" if int(name) % 2 else "none"  # half of them repeat broken answers
        settings = {
            **_NODE_SETTINGS,
            "node": name,
            "port": port,
            "redis_url": f"redis://imstream:{self.password}@127.0.0.1:{self.redis_port}/0",
            "ai_backends": (folder / f"backends-{how}.toml").resolve(),
        }
        return Part(
            f"node {name}",
            ["node"],
            port,
            folder,
            partial(answers_http, path="/readyz"),
            _environment("IMSTREAM_", settings),
        )

    @property
    def parts(self) -> Iterator[Part]:
        """The parts that are kept running, in the order in which they start."""
        yield from (self.redis, self.ai, self.second_ai, *self.nodes)
        if self.balancer is not None:
            yield self.balancer

    async def __aenter__(self) -> Self:
        try:
            await self.leaver.start()
            await self.restore()
            await self.leaver.wait_until_ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def restore(self) -> None:
        """Restore all parts, and wait until they are ready."""
        for part in self.parts:
            part.thaw()
            await part.start()
        for part in self.parts:
            await part.wait_until_ready()

    def port_for_client(self) -> int:
        """The port for the next connection: of the load balancer, or of a random node."""
        if self.balancer is not None:
            return self.balancer.port
        return self._random.choice([*self.nodes, self.leaver]).port  # its death is unknown to clients

    async def _end(self) -> None:
        """Kill everything."""
        await asyncio.gather(*(part.kill() for part in (*self.parts, self.leaver)))


def _environment(prefix: str, settings: dict[str, object]) -> dict[str, str]:
    return {f"{prefix}{name.upper()}": str(value) for name, value in settings.items()}
