"""A node in its own process, observed from outside: readiness, log, tasks, connections and memory."""

import asyncio
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from imstream.user_ids import UserId
from tests.support.processes import Running, http_status
from tests.support.servers import start_node
from tests.support.users import query
from tests.support.waiting import wait_until

_PROGRAM = str(Path(__file__).with_name("observed_node.py"))


@dataclass
class ObservedNode:
    """A running node."""

    port: int
    process: Running

    @property
    def _system(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def ws(self, user_id: UserId) -> str:
        """Its WebSocket URL for a user."""
        return f"ws://127.0.0.1:{self.port}/ws?{query(user_id)}"

    async def status(self, path: str = "/readyz") -> int | None:
        """The status of a GET; None without an answer."""
        return await asyncio.to_thread(http_status, f"http://127.0.0.1:{self.port}{path}")

    async def becomes(self, status: int, limit: float) -> None:
        """Wait until `/readyz` answers with this status."""

        async def has_become() -> bool:
            return await self.status() == status

        await wait_until(has_become, f"/readyz answers {status}", limit=limit)

    def logged(self, level: str) -> list[str]:
        """The events logged at a level."""
        return [line["event"] for line in self._lines() if line.get("level") == level]

    def memory(self) -> int:
        """Resident memory in bytes."""
        return int(self._system.memory_info().rss)

    def open_files(self) -> int:
        """Number of file descriptors, including sockets."""
        return int(self._system.num_fds())

    def connections_to(self, port: int) -> int:
        """Number of its connections to a port of 127.0.0.1."""
        return sum(bool(one.raddr) and one.raddr.port == port for one in self._system.net_connections("tcp"))

    def clients(self) -> int:
        """Number of client sockets."""
        return sum(bool(one.raddr) and one.laddr.port == self.port for one in self._system.net_connections("tcp"))

    async def tasks(self) -> int:
        """Number of asyncio tasks."""
        known = len(self._told_tasks())
        self.process.signal(signal.SIGUSR1)
        await wait_until(lambda: len(self._told_tasks()) > known, "the node tells its tasks")
        return int(self._told_tasks()[-1]["count"])

    def _told_tasks(self) -> list[dict[str, Any]]:
        return [line for line in self._lines() if line["event"] == "tasks"]

    def _lines(self) -> list[dict[str, Any]]:
        """Its complete output lines so far."""
        printed = self.process.output().splitlines()
        return [json.loads(line) for line in printed if line.startswith("{") and line.endswith("}")]


async def start_observed_node(
    folder: Path, *, redis_url: str, ai_url: str, settings: Mapping[str, object], wait: bool = True
) -> ObservedNode:
    """Start a node and wait until it is ready, without blocking the event loop, which may run a proxy to Redis."""
    node = await asyncio.to_thread(
        start_node, folder, redis_url=redis_url, ai_url=ai_url, settings=settings, command=(_PROGRAM,), wait=wait
    )
    return ObservedNode(node.port, node.process)
